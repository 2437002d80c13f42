"""Fixed-rate quantisers and plain compression, as other toolkits define them: how many bytes, and what comes back.

A baseline codes one float tensor as parts whose bytes are counted as they lie there: packed codes, scales, zero points.
Grouped ones run along the rows of the tensor as a matrix [first dimension, rest]; a row's last group may be padded, and
its padding counts.

Shapes: R = rows, K = columns, G = groups, S = weights of a group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor
from torch.nn import functional

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of NormalFloat4: T. Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E."""

Part = Tensor | bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A quantiser: `encode` gives the parts of a float32 tensor, `decode` the tensor of parts and a shape."""

    name: str
    about: str
    encode: Callable[[Tensor], tuple[Part, ...]]
    decode: Callable[[tuple[Part, ...], tuple[int, ...]], Tensor]
    lossless: bool = False


def size(parts: tuple[Part, ...]) -> int:
    """Bytes of the parts."""
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)


def pack(codes: Tensor, bits: int) -> bytes:
    """Codes (uint8 below 2**bits, any shape) side by side, eight to `bits` bytes, the last eight filled with zeros."""
    flat = codes.reshape(-1).numpy()
    eights = np.zeros(-(-flat.size // 8) * 8, dtype=np.uint64)
    eights[: flat.size] = flat
    words = np.bitwise_or.reduce(eights.reshape(-1, 8) << (np.arange(8, dtype=np.uint64) * np.uint64(bits)), axis=1)
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()


def unpack(data: bytes, bits: int, count: int) -> Tensor:
    """The `count` codes of `pack`, uint8."""
    stored: npt.NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8).reshape(-1, bits)
    words = np.zeros((len(stored), 8), dtype=np.uint8)
    words[:, :bits] = stored
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes = (words.view("<u8") >> shifts) & np.uint64((1 << bits) - 1)
    return torch.from_numpy(codes.astype(np.uint8).reshape(-1)[:count])


def per_channel() -> Baseline:
    """int8, symmetric, one float32 scale for each row: absmax / 127."""

    def encode(weight: Tensor) -> tuple[Part, ...]:
        rows = weight.reshape(weight.shape[0], -1)
        scale = rows.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
        return (rows / scale).round_().to(torch.int8), scale

    def decode(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
        codes, scale = parts
        assert isinstance(codes, Tensor)
        return (codes * scale).view(shape)

    return Baseline(name="int8, channel", about="symmetric absmax, fp32 scale per row", encode=encode, decode=decode)


def per_group(bits: int, group: int = 128) -> Baseline:
    """Whole numbers of `bits`, asymmetric min-max per group: float16 scale, uint8 zero point."""
    top = (1 << bits) - 1

    def encode(weight: Tensor) -> tuple[Part, ...]:
        groups = _groups(weight, group)
        low, high = groups.amin(1, keepdim=True).clamp_(max=0), groups.amax(1, keepdim=True).clamp_(min=0)
        scale = ((high - low) / top).clamp_(min=6e-8).to(torch.float16)
        zero = (-low / scale).round_().clamp_(0, top)
        codes = (groups / scale).add_(zero).round_().clamp_(0, top).to(torch.uint8)
        return pack(codes, bits), scale, zero.to(torch.uint8)

    def decode(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
        data, scale, zero = parts
        assert isinstance(data, bytes)
        assert isinstance(scale, Tensor)
        codes = unpack(data, bits, scale.shape[0] * group).view(-1, group)
        return _ungroup((codes.to(torch.float32) - zero) * scale.to(torch.float32), shape)

    return Baseline(
        name=f"int{bits}, {group}",
        about=f"asymmetric min-max per {group}, fp16 scale and uint8 zero point",
        encode=encode,
        decode=decode,
    )


def nf4(*, double: bool) -> Baseline:
    """NormalFloat4 in blocks of 64; absmax in float32, or (`double`) in 8 bits per 256 blocks around their mean."""
    levels = torch.tensor(NF4)
    edges = (levels[1:] + levels[:-1]) / 2

    def encode(weight: Tensor) -> tuple[Part, ...]:
        groups = _groups(weight, 64)
        statistics = _absmax_parts(groups.abs().amax(1), double=double)
        absmax = _absmax(statistics, len(groups))[:, None]
        codes = torch.bucketize(groups / absmax.clamp(min=1e-30), edges).to(torch.uint8)
        return pack(codes, 4), *statistics

    def decode(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
        data, *statistics = parts
        assert isinstance(data, bytes)
        count = len(data) * 2 // 64
        codes = unpack(data, 4, count * 64).to(torch.int64)
        return _ungroup(levels[codes].view(-1, 64) * _absmax(tuple(statistics), count)[:, None], shape)

    kind = "8-bit absmax (linear, fp32 scale and mean per 256)" if double else "fp32 absmax"
    return Baseline(
        name="NF4, double" if double else "NF4", about=f"blocks of 64, {kind}", encode=encode, decode=decode
    )


def _absmax_parts(absmax: Tensor, *, double: bool) -> tuple[Part, ...]:
    if not double:
        return (absmax,)
    blocks = functional.pad(absmax, (0, -len(absmax) % 256), value=float(absmax.mean())).view(-1, 256)
    mean = blocks.mean(1, keepdim=True)
    scale = (blocks - mean).abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
    codes = ((blocks - mean) / scale).round_().to(torch.int8).reshape(-1)[: len(absmax)].clone()
    return codes, scale, mean


def _absmax(parts: tuple[Part, ...], count: int) -> Tensor:
    values, *rest = (part for part in parts if isinstance(part, Tensor))
    if not rest:
        return values
    scale, mean = rest
    padded = functional.pad(values, (0, -count % 256)).view(-1, 256)
    return (padded * scale + mean).reshape(-1)[:count]


def zstd(dtype: torch.dtype) -> Baseline:
    """zstd level 3 over the elements in `dtype`, as they lie."""

    def encode(weight: Tensor) -> tuple[Part, ...]:
        return (zstandard.ZstdCompressor(level=3).compress(weight.to(dtype).numpy().tobytes()),)

    def decode(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
        data = bytearray(zstandard.ZstdDecompressor().decompress(parts[0]))
        return torch.frombuffer(data, dtype=dtype).view(shape).to(torch.float32)

    name = {torch.float16: "zstd on fp16", torch.float32: "zstd on fp32"}[dtype]
    return Baseline(name=name, about="level 3", encode=encode, decode=decode, lossless=True)


def hqq(bits: int, group: int = 64) -> Baseline | None:
    """Half-quadratic quantisation by its own package, on the CPU; None where that is not installed."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return None

    def encode(weight: Tensor) -> tuple[Part, ...]:
        if weight.numel() % group or (bits == 4 and weight.numel() // group % 2):  # it packs two groups side by side
            return (weight,)
        options = {"nbits": bits, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        codes, meta = Quantizer.quantize(weight.reshape(weight.shape[0], -1), **options)
        return codes, meta["scale"].to(torch.float16), meta["zero"].to(torch.float16)

    def decode(parts: tuple[Part, ...], shape: tuple[int, ...]) -> Tensor:
        if len(parts) == 1:
            assert isinstance(parts[0], Tensor)
            return parts[0]
        codes, scale, zero = parts
        assert isinstance(scale, Tensor)
        assert isinstance(zero, Tensor)
        packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32"}[bits]
        plain = Quantizer.unpack[packing](codes, dtype=torch.float32)[: scale.shape[0]]
        return ((plain - zero.float()) * scale.float()).reshape(shape)

    return Baseline(
        name=f"hqq {bits} bit, {group}",
        about=f"groups of {group}, fp16 scale and zero; tensors not whole (4 bit: pairs of) groups stay fp32",
        encode=encode,
        decode=decode,
    )


def all_baselines() -> list[Baseline]:
    """Every baseline that runs in this process."""
    fixed = [per_channel(), *(per_group(bits) for bits in (6, 5, 4)), nf4(double=False), nf4(double=True)]
    theirs = [baseline for baseline in (hqq(8), hqq(4)) if baseline is not None]
    return [*fixed, *theirs, zstd(torch.float16), zstd(torch.float32)]


def _groups(weight: Tensor, group: int) -> Tensor:
    """[G, S]: rows cut into groups, zeros behind a row's last."""
    rows = weight.reshape(weight.shape[0], -1)
    return functional.pad(rows, (0, -rows.shape[1] % group)).reshape(-1, group)


def _ungroup(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = math.prod(shape[1:])
    return groups.view(shape[0], -1)[:, :columns].reshape(shape)
