"""One tensor to its stored form and back, whatever the codec: the place where codecs are told apart."""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from birkhoff.codec import lattice, paper, planes, rate, rest
from birkhoff.codec.container import CodedTensor
from birkhoff.codec.dtypes import CODED_DTYPES, TORCH_TO_SAFETENSORS, dtype_from_code, dtype_name
from birkhoff.codec.errors import FormatError, TargetError, TensorError
from birkhoff.codec.metrics import Fidelity, fidelity, to_host
from birkhoff.codec.pairs import matrix_shape, pairs_per_row
from birkhoff.codec.profiles import TARGET_DB_RANGE, Profile

LEAST_PATH = 1 << 12
"""Weights from which a path is searched: the start of a run costs what it gains on fewer."""

ESCAPE_BITS = 40
"""About what an escape takes."""

PATH_GAIN_BITS = 0.17
"""What a path saves a weight. Its steps are half as long and its box half as wide: above 37 dB, escapes eat that."""


FALLBACKS = {
    "constant": "all its weights are equal",
    "range": "its weights leave float32's range when squared",
    "target": "no step meets its target",
    "published": f"the published codec leaves it raw: its mean error would exceed {paper.ERROR_LIMIT}",
}
"""Why a tensor that its header sends to coding is lossless all the same, by the `reason` stored with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A stored tensor, what was done to it and why, and its error as the encoder measured it (None if lossless)."""

    tensor: CodedTensor
    reason: str
    fidelity: Fidelity | None


def encode_tensor(name: str, tensor: Tensor, profile: Profile) -> Encoded:
    """Code one tensor (any shape, any stored dtype, CPU or GPU) as `profile` says.

    Raises:
        TensorError: the tensor holds NaN or Inf, or has a dtype that cannot be stored.
        TargetError: the profile's target is out of range.
    """
    if tensor.dtype not in TORCH_TO_SAFETENSORS:
        raise TensorError(f"tensor {name!r}: dtype {tensor.dtype} cannot be stored")
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
        raise TensorError(f"tensor {name!r} holds NaN or Inf: repair or retrain the checkpoint before compressing it")
    profile = profile.of_tensor(tuple(tensor.shape))
    action, reason = profile.action(tuple(tensor.shape), dtype_name(tensor.dtype))
    if action == "lossless":
        store = _encode_raw if profile.codec == "paper" else _encode_lossless
        return Encoded(tensor=store(name, tensor), reason=reason, fidelity=None)
    if profile.codec == "paper":
        return _encode_paper(name, tensor)
    if profile.target_db is None:
        return _encode_match(name, tensor, path=profile.path)
    encoded = _encode_lattice(name, tensor, profile.target_db, path=profile.path)
    return _with_target(encoded, profile.target_db) if profile.single else encoded


def decode_tensor(coded: CodedTensor, device: torch.device | str = "cpu") -> Tensor:
    """The dense tensor on `device`, original dtype and shape, in memory of its own.

    Raises:
        FormatError: the streams are not what the entry declares.
    """
    return decode_with_code(coded, device, device)[0]


def decode_with_code(
    coded: CodedTensor, device: torch.device | str, streams_on: torch.device | str = "cpu"
) -> tuple[Tensor, lattice.LatticeTensor | None]:
    """`decode_tensor`, and the coordinates that a `lattice` tensor was decoded from, on `device` too; else None.

    The streams are read on another device only if asked for: on the CPU that is as FORMAT.md writes it down, step by
    step. Raises as `decode_tensor`.
    """
    try:
        if coded.codec == "lattice":
            dtype, code = _float_dtype(coded), lattice_of(coded, streams_on).to(device)
            return code.decode(dtype).view(coded.shape), code
        return _DECODERS[coded.codec](coded).to(device), None
    except KeyError:
        raise FormatError(
            f"tensor {coded.name!r}: unknown codec {coded.codec!r}; known: {', '.join(['lattice', *_DECODERS])}"
        ) from None
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None


def _finite(tensor: Tensor) -> bool:
    # min and max propagate NaN, and need no mask of the tensor's size.
    if not tensor.numel():
        return True
    return all(map(math.isfinite, to_host(*torch.aminmax(tensor))))


def _bytes_of(tensor: Tensor) -> bytes:
    """Little-endian elements in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _from_bytes(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"{len(data)} bytes stored for shape {list(shape)} of {dtype_name(dtype)}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)


def _stored(name: str, tensor: Tensor, codec: str, parts: tuple[bytes, ...], **params: str) -> CodedTensor:
    dtype = TORCH_TO_SAFETENSORS[tensor.dtype]
    return CodedTensor(name=name, codec=codec, dtype=dtype, shape=tuple(tensor.shape), params=params, parts=parts)


def _encode_raw(name: str, tensor: Tensor) -> CodedTensor:
    return _stored(name, tensor, "raw", (_bytes_of(tensor),))


def _encode_lossless(name: str, tensor: Tensor) -> CodedTensor:
    """Byte planes where they are smaller; else the elements as they are."""
    packed = rest.pack_bytes(_bytes_of(tensor), tensor.dtype.itemsize)
    if len(packed) < tensor.nbytes:
        return _stored(name, tensor, "planes", (packed,))
    return _encode_raw(name, tensor)


def _decode_raw(coded: CodedTensor) -> Tensor:
    (data,) = _parts(coded, 1)
    return _from_bytes(data, dtype_from_code(coded.dtype), coded.shape)


def _decode_planes(coded: CodedTensor) -> Tensor:
    dtype = dtype_from_code(coded.dtype)
    (frame,) = _parts(coded, 1)
    return _from_bytes(rest.unpack_bytes(frame, coded.weights * dtype.itemsize, dtype.itemsize), dtype, coded.shape)


def fallback(matrix: Tensor) -> str | None:
    """Why the weights of a matrix that should be coded cannot be: a key of `FALLBACKS`; None where they can."""
    low, high = to_host(*torch.aminmax(matrix))
    if low == high:
        return "constant"
    return None if 2.0**-60 < max(-low, high) < 2.0**60 else "range"


def _fall_back(name: str, tensor: Tensor, reason: str, *, raw: bool = False) -> Encoded:
    """A tensor kept lossless although its header asked for coding; the reason goes with it."""
    coded = (_encode_raw if raw else _encode_lossless)(name, tensor)
    coded = replace(coded, params={**coded.params, "reason": reason})
    return Encoded(tensor=coded, reason=FALLBACKS[reason], fidelity=None)


def _encode_lattice(name: str, tensor: Tensor, target_db: float, *, path: bool) -> Encoded:
    rate.check_target(target_db)
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    reason = fallback(matrix)
    if reason is not None:
        return _fall_back(name, tensor, reason)
    try:
        return _encode_code(name, tensor, matrix, target_db, path=path)
    except TargetError:
        return _fall_back(name, tensor, "target")


def _encode_code(name: str, tensor: Tensor, matrix: Tensor, target_db: float, *, path: bool) -> Encoded:
    path = path and matrix.numel() >= LEAST_PATH
    try:
        encoded = _encode_matrix(name, tensor, matrix, target_db, path=path)
    except TargetError:
        if not path:
            raise
        return _encode_matrix(name, tensor, matrix, target_db, path=False)
    if path and int(encoded.tensor.params["escapes"]) * ESCAPE_BITS > PATH_GAIN_BITS * matrix.numel():
        single = _encode_matrix(name, tensor, matrix, target_db, path=False)
        encoded = min(encoded, single, key=lambda choice: choice.tensor.nbytes)
    return encoded


def _encode_matrix(name: str, tensor: Tensor, matrix: Tensor, target_db: float, *, path: bool) -> Encoded:
    code, error = rate.encode(matrix, target_db, path=path)
    coded = _stored(
        name,
        tensor,
        "lattice",
        planes.pack(code, path=path),
        path=str(int(path)),
        columns=str(code.columns),
        step=_hex(code.step),
        escapes=str(len(code.escapes)),
        **_claims(error),
    )
    return Encoded(tensor=coded, reason="", fidelity=error)


def _encode_match(name: str, tensor: Tensor, *, path: bool) -> Encoded:
    """Code a tensor at the error that the published codec makes on it, within what the lattice can serve.

    What that codec leaves raw, because its absolute error does not suit it, gets the finest target there is.
    """
    published = paper.published_error(tensor, per_row=tensor.dim() == 2)
    lowest, highest = TARGET_DB_RANGE
    target_db = highest if published is None else min(max(lowest, published), highest)
    encoded = _encode_lattice(name, tensor, target_db, path=path)
    return _with_target(encoded, target_db)


def _with_target(encoded: Encoded, target_db: float) -> Encoded:
    """The target goes with a coded tensor of which no recipe tells it; rounded down, lest it claim too much."""
    if encoded.fidelity is None:
        return encoded
    params = {**encoded.tensor.params, "target_db": f"{math.floor(target_db * 1000) / 1000:.3f}"}
    return replace(encoded, tensor=replace(encoded.tensor, params=params))


def _claims(error: Fidelity) -> dict[str, str]:
    """What the encoder measured, stored with the tensor so that metrics travel with the artifact."""
    return {
        "sqnr_db": f"{error.sqnr_db:.3f}",
        "max_abs": f"{error.max_abs:.4g}",
        "mean_abs": f"{error.mean_abs:.4g}",
    }


def lattice_of(coded: CodedTensor, device: torch.device | str = "cpu") -> lattice.LatticeTensor:
    """The coordinates of a `lattice` tensor, without decoding them to weights: what HyperLinear is built from.

    Raises:
        FormatError: the streams are not what the entry declares.
    """
    columns, escapes = _number(coded.params, "columns"), _number(coded.params, "escapes")
    rows = coded.weights // columns if columns else 0
    if rows * columns != coded.weights or not rows:
        raise FormatError(f"{coded.weights} weights are not whole rows of {columns}")
    (step,) = _floats(coded.params, "step", 1)
    if step <= 0:
        raise FormatError(f"parameter step is {step}, not a positive number")
    shape = rows, pairs_per_row(columns)
    if escapes > shape[0] * shape[1]:
        raise FormatError(f"{escapes} escapes declared among {shape[0] * shape[1]} pairs")
    path = _flag(coded.params, "path")
    i, j, escaped = planes.unpack(coded.parts, shape, escapes, path=path, device=device)
    return lattice.LatticeTensor(i=i, j=j, escapes=escaped, step=step, columns=columns)


def is_matrix(coded: CodedTensor) -> bool:
    """Whether a stored tensor is a coded matrix [N, K] in rows of K: what HyperLinear can be built from."""
    return coded.codec == "lattice" and len(coded.shape) == 2 and coded.params.get("columns") == str(coded.shape[1])


def _encode_paper(name: str, tensor: Tensor) -> Encoded:
    code = paper.encode(tensor, per_row=tensor.dim() == 2)
    if code is None:
        return _fall_back(name, tensor, "published", raw=True)
    error = fidelity(tensor, paper.decode(code).to(tensor.dtype))
    coded = _stored(
        name,
        tensor,
        "paper",
        (code.packed(),),
        per_row=str(int(code.per_row)),
        U=str(code.U),
        K=str(code.K),
        bits=str(code.bits),
        centre=_hex(*code.centre.tolist()),
        far=_hex(*code.far.tolist()),
        **_claims(error),
    )
    return Encoded(tensor=coded, reason="", fidelity=error)


def _decode_paper(coded: CodedTensor) -> Tensor:
    dtype = _float_dtype(coded)
    (data,) = _parts(coded, 1)
    if not coded.weights:
        raise FormatError("codec paper takes no tensor without weights")
    code = paper.PaperCode.from_packed(
        bytes(data),
        U=_number(coded.params, "U"),
        K=_number(coded.params, "K"),
        bits=_number(coded.params, "bits"),
        centre=torch.tensor(_floats(coded.params, "centre", 2)),
        far=torch.tensor(_floats(coded.params, "far", 2)),
        shape=coded.shape,
        per_row=_flag(coded.params, "per_row"),
    )
    return paper.decode(code).to(dtype)


def _parts(coded: CodedTensor, count: int) -> tuple[bytes | memoryview, ...]:
    if len(coded.parts) != count:
        raise FormatError(f"{len(coded.parts)} streams stored, codec {coded.codec} has {count}")
    return coded.parts


def _float_dtype(coded: CodedTensor) -> torch.dtype:
    dtype = dtype_from_code(coded.dtype)
    if dtype not in CODED_DTYPES:
        raise FormatError(f"codec {coded.codec} holds no {dtype_name(dtype)}")
    return dtype


def _number(params: Mapping[str, str], key: str) -> int:
    text = params.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise FormatError(f"parameter {key} is {text!r}, not a number")
    return int(text)


def _flag(params: Mapping[str, str], key: str) -> bool:
    text = params.get(key, "")
    if text not in ("0", "1"):
        raise FormatError(f"parameter {key} is {text!r}, not 0 or 1")
    return text == "1"


def _hex(*values: float) -> str:
    return struct.pack(f">{len(values)}f", *values).hex()


def _floats(params: Mapping[str, str], key: str, count: int) -> list[float]:
    try:
        values = struct.unpack(f">{count}f", bytes.fromhex(params.get(key, "")))
    except (ValueError, struct.error):
        raise FormatError(f"parameter {key} is {params.get(key)!r}, not {count} float32 in hex") from None
    if not all(map(math.isfinite, values)):
        raise FormatError(f"parameter {key} is {values}, not finite")
    return list(values)


_DECODERS: dict[str, Callable[[CodedTensor], Tensor]] = {
    "raw": _decode_raw,
    "planes": _decode_planes,
    "paper": _decode_paper,
}
