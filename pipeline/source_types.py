"""Descriptors of a checkpoint: what a planner and a worker must know about a tensor without holding it.

A descriptor is a few hundred bytes, picklable, and enough to read its tensor from any process that sees the
file. All byte counts are plain integers, all offsets count from the start of the named file.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from birkhoff.pipeline.errors import SourceError

CheckpointFormat = Literal["torch-zip", "torch-legacy", "safetensors"]

# Dense and real: what a weight can be. Complex, quantized and packed 4-bit types are refused by name.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        torch.float8_e8m0fnu,
    )
}

# PyTorch's own kernels stop at 64 dimensions.
_MAX_DIMS = 64
# An expanded view of 4 bytes can claim terabytes; no real checkpoint expands one tensor beyond this.
_MAX_EXPANDED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies in a file, and how to read it from there."""

    name: str
    """State-dict key after unnesting, such as `image_encoder.blocks.0.attn.qkv.weight`."""
    dtype: str
    """Name of the torch dtype without `torch.`, a key of `DTYPES`."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements. Contiguous in nearly every file, but `.pth` files can hold views."""
    offset: int
    """Bytes from the start of `path` to element 0."""
    nbytes: int
    """Bytes from element 0 to the end of the last element: what has to be read."""
    path: str
    """Absolute path of the file that holds the bytes."""
    crc32: int | None = None
    """Checksum of the `nbytes` bytes, where the file has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint of which only the headers were read."""

    path: Path
    """What was opened: the file, or the index of a sharded checkpoint. Absolute."""
    files: tuple[Path, ...]
    """Source files whose bytes make up the checkpoint: `path`, and the shards of an index."""
    nbytes: int
    """Size of all source files together."""
    format: CheckpointFormat
    tensors: tuple[StoredTensor, ...]
    """In the order of the file; tied weights are listed under each of their names."""
    nesting: tuple[str, ...] = ()
    """Keys that lead to the state dict: `("model",)` where it sits under `checkpoint["model"]`."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(key, type) of the entries that are no weights, such as `("epoch", "int")`."""

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Groups of two or more names that cover the very same bytes: tied weights."""
        groups: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.nbytes:
                groups[tensor.path, tensor.offset, tensor.nbytes].append(tensor.name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of `shape` in elements, as torch gives them (an empty dimension counts as 1)."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


def extent_bytes(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes from element 0 to the end of the last element of a strided tensor; 0 for an empty one."""
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)))


def check_tensor(path: Path, name: str, dtype: str, shape: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse a tensor that no checkpoint of weights holds.

    Raises:
        SourceError: a name that is no text, an unknown dtype, too many dimensions, or a view that expands to
            an absurd size.
    """
    label = f"{path}: tensor {shown(name)}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SourceError(f"{label} has a name that is no valid text; the file is forged")
    if dtype not in DTYPES:
        raise SourceError(f"{label} is {dtype}, expected a dense real dtype; convert it and save again")
    if len(shape) > _MAX_DIMS:
        raise SourceError(f"{label} has {len(shape)} dimensions, at most {_MAX_DIMS} exist; the file is forged")
    itemsize = DTYPES[dtype].itemsize
    full = itemsize * math.prod(shape)
    if full > max(extent_bytes(shape, stride, itemsize), _MAX_EXPANDED_BYTES):
        raise SourceError(
            f"{label} expands few stored bytes to {full}, at most {_MAX_EXPANDED_BYTES} are allowed;"
            " save a contiguous copy of it"
        )


def shown(value: object, limit: int = 80) -> str:
    """`repr` of something read from a file: one line and short, whatever the file says."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException) -> str:
    """Type and first telling line of a library's error, for use inside a one-line message."""
    # torch puts a page of advice on trusting the file before what went wrong.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
