"""Encode and decode one tensor with any codec."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from birkhoff.codec import lattice, paper, planes, rate, rest
from birkhoff.codec.container import (
    FORMAT_VERSION,
    MAX_EXPANSION,
    Claims,
    CodedTensor,
    DifferenceParams,
    LatticeParams,
    PaperParams,
    Params,
)
from birkhoff.codec.dtypes import CODED_DTYPES, TORCH_TO_SAFETENSORS, dtype_from_code, dtype_name
from birkhoff.codec.errors import BaseError, FormatError, TargetError, TensorError
from birkhoff.codec.metrics import Fidelity, fidelity, in_parts, survey, to_host
from birkhoff.codec.native.survey import Survey
from birkhoff.codec.pairs import matrix_shape, pairs_per_row
from birkhoff.codec.profiles import FALLBACKS, FINEST_DB, TARGET_DB_RANGE, Decision, unfit

LEAST_PATH = 1 << 12
"""Size in weights from which trellis paths are searched. On fewer, the start of a run costs what it gains."""

ESCAPE_BITS = 40
"""Approximate bits of an escape."""

MOST_ESCAPED = 1 / 40
"""Largest share of a path's pairs that may be escapes in memory, because a path's coordinates reach only half as far as
single nodes'. At rest they cost no more. Above 39 dB there are more, and HyperLinear adds each one separately."""


_TOGETHER = 1 << 22
"""Weights of tensors whose byte planes are unpacked together: few enough that the planes take little memory."""

_LOOK = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A stored tensor, the reason if it is lossless, and its error as measured by the encoder (None if lossless)."""

    tensor: CodedTensor
    reason: str
    fidelity: Fidelity | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unpacked:
    """A tensor with coordinates, whose streams are not packed yet. `target_db` is stored with it if given."""

    name: str
    tensor: Tensor
    code: lattice.LatticeTensor
    error: Fidelity
    path: int
    target_db: float | None = None

    def packed(self, streams: Sequence[bytes | memoryview], escapes: int) -> Encoded:
        """Return the stored tensor."""
        params = LatticeParams(path=self.path, columns=self.code.columns, step=self.code.step, escapes=escapes)
        coded = stored(self.name, self.tensor, "lattice", *streams, params=params, error=self.error)
        encoded = Encoded(tensor=coded, reason="", fidelity=self.error)
        return encoded if self.target_db is None else with_target(encoded, self.target_db)


def encode_tensor(name: str, tensor: Tensor, decision: Decision) -> Encoded:
    """Code one tensor (any shape, any stored dtype, CPU or GPU) by its decision.

    `output.encode` codes tensors with a nominal target, `difference.encode` those with a base.

    Raises:
        TensorError: The tensor holds NaN or Inf, or has a dtype that cannot be stored.
        TargetError: The target is out of range.
    """
    return encode_tensors([(name, tensor, decision)])[0]


def encode_tensors(items: Iterable[tuple[str, Tensor, Decision]]) -> list[Encoded]:
    """Code several tensors as `encode_tensor` does. Streams are packed together, so lossy ones must be on one type
    of device."""
    found = [_encode(*item) for item in items]
    unpacked = [one for one in found if isinstance(one, _Unpacked)]
    packed = iter(planes.pack_all([(one.code, one.path) for one in unpacked]))
    return [one.packed(*next(packed)) if isinstance(one, _Unpacked) else one for one in found]


def _encode(name: str, tensor: Tensor, decision: Decision) -> "Encoded | _Unpacked":
    seen = survey(tensor) if decision.codec == "lattice" and in_parts(tensor) else None
    if seen is None or not math.isfinite(seen.energy):
        check_storable(name, tensor)
        seen = None
    if decision.action == "lossless":
        store = _encode_raw if decision.codec == "raw" else _encode_lossless
        return Encoded(tensor=store(name, tensor), reason=decision.reason, fidelity=None)
    if decision.codec == "paper":
        return _encode_paper(name, tensor)
    if decision.target_db is None:
        return _encode_match(name, tensor, path=decision.path, seen=seen)
    encoded = _encode_lattice(name, tensor, decision.target_db, path=decision.path, seen=seen)
    return _with_target(encoded, decision.target_db) if decision.states_target else encoded


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise TensorError if a tensor holds NaN or Inf, or has a dtype that cannot be stored."""
    if tensor.dtype not in TORCH_TO_SAFETENSORS:
        raise TensorError(f"tensor {name!r}: dtype {tensor.dtype} cannot be stored")
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
        raise TensorError(f"tensor {name!r} holds NaN or Inf: repair or retrain the checkpoint before compressing it")


def decode_tensor(coded: CodedTensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the dense tensor on `device`, in its original dtype and shape, in its own memory.

    Raises:
        FormatError: The streams do not match the entry.
        BaseError: The tensor is a difference whose base is missing.
    """
    return decode_with_code(coded, device)[0]


def decode_with_code(coded: CodedTensor, device: torch.device | str) -> tuple[Tensor, lattice.LatticeTensor | None]:
    """Return `decode_tensor`'s result and, for a tensor on the lattice, its coordinates, on `device`; else None.

    The CPU reads the streams step by step, as FORMAT.md describes. Raises as `decode_tensor`.
    """
    try:
        if isinstance(coded.params, LatticeParams):
            dtype, code = float_dtype(coded), lattice_of(coded).to(device)
            return code.decode(dtype).view(coded.shape), code
        return _DECODERS[coded.codec](coded).to(device), None
    except KeyError:
        raise FormatError(
            f"tensor {coded.name!r}: unknown codec {coded.codec!r}; known: {', '.join(['lattice', *_DECODERS])}"
        ) from None
    except BaseError:
        raise  # it names the tensor already
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None


def decode_plain(coded: Iterable[CodedTensor]) -> list[Tensor]:
    """Return `decode_tensor` of tensors without coordinates, on the CPU.

    Byte planes of many tensors are unpacked together, because a call for each takes longer than its work.

    Raises:
        FormatError: As `decode_tensor`.
    """
    every = list(coded)
    together = [one for one in every if one.codec == "planes" and one.version == FORMAT_VERSION]
    parts = iter([tensor for group in _groups(together) for tensor in _decode_planes_all(group)])
    chosen = set(map(id, together))
    return [next(parts) if id(one) in chosen else decode_tensor(one) for one in every]


def _groups(coded: Iterable[CodedTensor]) -> Iterator[list[CodedTensor]]:
    """Cut a list into groups of about `_TOGETHER` weights."""
    group: list[CodedTensor] = []
    weights = 0
    for one in coded:
        group.append(one)
        weights += one.weights
        if weights >= _TOGETHER:
            yield group
            group, weights = [], 0
    yield group


def _decode_planes_all(coded: Sequence[CodedTensor]) -> list[Tensor]:
    try:
        dtypes = [dtype_from_code(one.dtype) for one in coded]
        widths = [dtype.itemsize for dtype in dtypes]
        sizes = [one.weights * width for one, width in zip(coded, widths, strict=True)]
        found = rest.unpack_elements_all([one.parts for one in coded], sizes, widths)
    except FormatError:
        for one in coded:  # which of them is it?
            decode_tensor(one)
        raise
    return [
        torch.from_numpy(elements.reshape(-1)).view(dtype).view(one.shape)
        for elements, dtype, one in zip(found, dtypes, coded, strict=True)
    ]


def _finite(tensor: Tensor) -> bool:
    # min and max propagate NaN and need no mask of the tensor's size.
    if not tensor.numel():
        return True
    return all(map(math.isfinite, to_host(*torch.aminmax(tensor))))


def _bytes_of(tensor: Tensor) -> bytes:
    """Return the elements in row-major order, little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _from_bytes(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"{len(data)} bytes stored for shape {list(shape)} of {dtype_name(dtype)}")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)


def stored(
    name: str,
    tensor: Tensor,
    codec: str,
    *parts: bytes | memoryview,
    params: Params = None,
    error: Fidelity | None = None,
) -> CodedTensor:
    """Return a coded tensor with the encoder's measurements, if `error` is given."""
    claims = Claims()
    if error is not None:
        claims = Claims(sqnr_db=error.sqnr_db, max_abs=error.max_abs, mean_abs=error.mean_abs).rounded()
    return CodedTensor(
        name=name,
        codec=codec,
        dtype=TORCH_TO_SAFETENSORS[tensor.dtype],
        shape=tuple(tensor.shape),
        params=params,
        claims=claims,
        parts=parts,
    )


def _encode_raw(name: str, tensor: Tensor) -> CodedTensor:
    return stored(name, tensor, "raw", _bytes_of(tensor))


def _encode_lossless(name: str, tensor: Tensor) -> CodedTensor:
    """Store byte planes if they are smaller, else the elements unchanged."""
    data = _bytes_of(tensor)
    packed = rest.pack_elements(data, tensor.dtype.itemsize) if data else ()
    # Readers refuse too many weights per byte, see `container.MAX_EXPANSION`.
    if packed and tensor.numel() <= MAX_EXPANSION * (size := sum(map(len, packed))) and size < len(data):
        return stored(name, tensor, "planes", *packed)
    return _encode_raw(name, tensor)


def _decode_raw(coded: CodedTensor) -> Tensor:
    (data,) = _parts(coded, 1)
    return _from_bytes(data, dtype_from_code(coded.dtype), coded.shape)


def _decode_planes(coded: CodedTensor) -> Tensor:
    dtype = dtype_from_code(coded.dtype)
    size = coded.weights * dtype.itemsize
    if coded.version == 1:
        data = rest.unpack_elements_1(_parts(coded, 1)[0], size, dtype.itemsize)
    else:
        data = rest.unpack_elements(coded.parts, size, dtype.itemsize)
    return _from_bytes(data, dtype, coded.shape)


def fallback(matrix: Tensor, seen: Survey | None = None) -> str | None:
    """Return why the weights of a matrix that should be coded cannot be: a key of `FALLBACKS`. Return None if they can.

    `seen` is the survey of finite weights, if there was one.
    """
    low, high = to_host(*torch.aminmax(matrix)) if seen is None else (seen.low, seen.high)
    return unfit(low, high, lambda: _whole(matrix) if seen is None else seen.whole)


def _whole(matrix: Tensor) -> bool:
    """Return whether all weights are whole numbers. The first weights of most layers already decide."""
    flat = matrix.reshape(-1)
    return all(torch.equal(part, part.round()) for part in (flat[:_LOOK], flat))


def fall_back(name: str, tensor: Tensor, reason: str, *, raw: bool = False) -> Encoded:
    """Store a codable tensor lossless, with the reason: a key of `FALLBACKS`."""
    coded = (_encode_raw if raw else _encode_lossless)(name, tensor)
    coded = replace(coded, claims=Claims(reason=reason))
    return Encoded(tensor=coded, reason=FALLBACKS[reason], fidelity=None)


def _encode_lattice(
    name: str, tensor: Tensor, target_db: float, *, path: bool, seen: Survey | None
) -> Encoded | _Unpacked:
    fixed = TARGET_DB_RANGE[1] < target_db <= FINEST_DB
    if not fixed:
        rate.check_target(target_db)
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    reason = fallback(matrix, seen)
    if reason is not None:
        return fall_back(name, tensor, reason)
    try:
        if fixed:
            return _encode_fixed(name, tensor, matrix, target_db, seen)
        return _encode_code(name, tensor, matrix, target_db, path=path, seen=seen)
    except rate.RangeError:
        return fall_back(name, tensor, "range")
    except TargetError:
        return fall_back(name, tensor, "target")


def _encode_fixed(name: str, tensor: Tensor, matrix: Tensor, target_db: float, seen: Survey | None) -> Encoded:
    """Code a tensor in fixed point, unless it comes back exactly or takes more bytes than it does lossless. Raises
    TargetError."""
    code, error = rate.encode_fixed(matrix, target_db, seen)
    coded = encoded_code(name, tensor, code, error, path=0)
    exact = fall_back(name, tensor, "target")
    return exact if not error.error or exact.tensor.nbytes <= coded.tensor.nbytes else coded


def _encode_code(
    name: str, tensor: Tensor, matrix: Tensor, target_db: float, *, path: bool, seen: Survey | None
) -> _Unpacked:
    if path and matrix.numel() >= LEAST_PATH:
        try:
            code, error = rate.encode(matrix, target_db, path=1, seen=seen)
        except TargetError:
            pass
        else:
            if len(code.escapes) <= MOST_ESCAPED * code.i.numel():
                return _Unpacked(name=name, tensor=tensor, code=code, error=error, path=1)
    code, error = rate.encode(matrix, target_db, seen=seen)
    return _Unpacked(name=name, tensor=tensor, code=code, error=error, path=0)


def encoded_code(
    name: str,
    tensor: Tensor,
    code: lattice.LatticeTensor,
    error: Fidelity,
    *,
    path: int,
    packed: planes.Packed | None = None,
) -> Encoded:
    """Return a tensor coded by the given coordinates. `path` says that these are on trellis paths, 1 for paths
    through the rows, 2 for paths down the columns. `packed` are their streams, if they are known."""
    found = _Unpacked(name=name, tensor=tensor, code=code, error=error, path=path)
    return found.packed(*(packed or planes.pack(code, path=path)))


def _encode_match(name: str, tensor: Tensor, *, path: bool, seen: Survey | None) -> Encoded | _Unpacked:
    target_db = published_target(tensor)
    return _with_target(_encode_lattice(name, tensor, target_db, path=path, seen=seen), target_db)


def published_target(tensor: Tensor) -> float:
    """Return the SQNR in dB that the published codec reaches on a tensor, clamped to the range of the lattice.

    A tensor that the published codec leaves raw, because of its absolute error, gets the highest target.
    """
    published = paper.published_error(tensor, per_row=tensor.dim() == 2)
    lowest, highest = TARGET_DB_RANGE
    return highest if published is None else min(max(lowest, published), highest)


def with_target(encoded: Encoded, target_db: float) -> Encoded:
    """Store the target with a coded tensor whose recipe does not contain it, rounded down so that it claims no more."""
    if encoded.fidelity is None:
        return encoded
    claims = replace(encoded.tensor.claims, target_db=math.floor(target_db * 1000) / 1000)
    return replace(encoded, tensor=replace(encoded.tensor, claims=claims))


def _with_target(encoded: Encoded | _Unpacked, target_db: float) -> Encoded | _Unpacked:
    """Store the target with a coded tensor whose recipe does not contain it."""
    if isinstance(encoded, _Unpacked):
        return replace(encoded, target_db=target_db)
    return with_target(encoded, target_db)


def lattice_of(coded: CodedTensor) -> lattice.LatticeTensor:
    """Return the coordinates of a tensor on the lattice, which HyperLinear is built from, without decoding weights.

    The coordinates of a difference are the sum of its base's and its own.

    Runs on the CPU, and is the reference for the faster GPU version, `birkhoff.kernels.entropy.op.lattices_of`.

    Raises:
        FormatError: The streams do not match the entry.
        BaseError: The tensor is a difference whose base is missing.
    """
    own = own_lattice(coded)
    params = coded.params
    if not isinstance(params, DifferenceParams):
        return own
    return lattice.combine(lattice_of(base_of(coded)), own, times=params.times, stride=params.stride, step=params.step)


def base_of(coded: CodedTensor) -> CodedTensor:
    """Return the base of a difference. Raises BaseError if it is missing."""
    if coded.base is None:
        assert isinstance(coded.params, DifferenceParams)
        raise BaseError(
            f"tensor {coded.name!r} is a difference to the one in container {coded.params.base}, which was not read: "
            "read both with `container.with_bases`"
        )
    return coded.base


def own_lattice(coded: CodedTensor) -> lattice.LatticeTensor:
    """Return the coordinates in a tensor's own streams. Those of a difference are added to its base's.

    Raises FormatError.
    """
    params, shape = lattice_shape(coded)
    unpack = planes.unpack_1 if coded.version == 1 else planes.unpack
    i, j, escaped = unpack(coded.parts, shape, params.escapes, path=params.path)
    return lattice.LatticeTensor(i=i, j=j, escapes=escaped, step=params.step, columns=params.columns)


def lattice_shape(coded: CodedTensor) -> tuple[LatticeParams, tuple[int, int]]:
    """Return the tensor's parameters, and the shape (R, P) of its planes. Raises FormatError if they disagree."""
    params = coded.params
    if not isinstance(params, LatticeParams):
        raise FormatError(f"codec {coded.codec} holds no coordinates")
    rows = coded.weights // params.columns if params.columns else 0
    if rows * params.columns != coded.weights or not rows:
        raise FormatError(f"{coded.weights} weights are not whole rows of {params.columns}")
    shape = rows, pairs_per_row(params.columns)
    if params.escapes > shape[0] * shape[1]:
        raise FormatError(f"{params.escapes} escapes declared among {shape[0] * shape[1]} pairs")
    return params, shape


def recode(coded: CodedTensor) -> CodedTensor:
    """Return a stored tensor in the present version of the format, with the same coordinates or bits and the same
    claims.

    Raises:
        FormatError: The streams do not match the entry.
    """
    if coded.version == FORMAT_VERSION:
        return coded
    params = coded.params
    if coded.codec == "planes":
        return replace(_encode_lossless(coded.name, decode_tensor(coded)), claims=coded.claims)
    if isinstance(params, LatticeParams):
        code = lattice_of(coded)
        for path in dict.fromkeys((params.path, 0)):  # escapes may break a writer's path
            streams, escapes = planes.pack(code, path=path)
            found = replace(
                coded, parts=streams, params=replace(params, path=path, escapes=escapes), version=FORMAT_VERSION
            )
            if lattice_of(found).equals(code):
                return found
        raise FormatError(f"tensor {coded.name!r}: its coordinates cannot be written in version {FORMAT_VERSION}")
    return replace(coded, version=FORMAT_VERSION)


def is_matrix(coded: CodedTensor) -> bool:
    """Return whether a stored tensor is a coded matrix [N, K] in rows of K, from which HyperLinear can be built."""
    params = coded.params
    # One column is fixed point, or no matrix.
    return isinstance(params, LatticeParams) and len(coded.shape) == 2 and 1 < params.columns == coded.shape[1]


def _encode_paper(name: str, tensor: Tensor) -> Encoded:
    code = paper.encode(tensor, per_row=tensor.dim() == 2)
    if code is None:
        return fall_back(name, tensor, "published", raw=True)
    error = fidelity(tensor, paper.decode(code).to(tensor.dtype))
    (x, y), (far_x, far_y) = code.centre.tolist(), code.far.tolist()
    params = PaperParams(per_row=code.per_row, U=code.U, K=code.K, bits=code.bits, centre=(x, y), far=(far_x, far_y))
    coded = stored(name, tensor, "paper", code.packed(), params=params, error=error)
    return Encoded(tensor=coded, reason="", fidelity=error)


def _decode_paper(coded: CodedTensor) -> Tensor:
    dtype, params = float_dtype(coded), coded.params
    (data,) = _parts(coded, 1)
    if not isinstance(params, PaperParams):
        raise FormatError(f"codec {coded.codec} holds no pairs of the published code")
    if not coded.weights:
        raise FormatError("codec paper takes no tensor without weights")
    code = paper.PaperCode.from_packed(
        bytes(data),
        U=params.U,
        K=params.K,
        bits=params.bits,
        centre=torch.tensor(params.centre, dtype=torch.float32),
        far=torch.tensor(params.far, dtype=torch.float32),
        shape=coded.shape,
        per_row=params.per_row,
    )
    return paper.decode(code).to(dtype)


def _parts(coded: CodedTensor, count: int) -> tuple[bytes | memoryview, ...]:
    if len(coded.parts) != count:
        raise FormatError(f"{len(coded.parts)} streams stored, codec {coded.codec} has {count}")
    return coded.parts


def float_dtype(coded: CodedTensor) -> torch.dtype:
    """Return the dtype of a tensor of codec `lattice` or `paper`. Raises FormatError for dtypes that these do not
    store."""
    dtype = dtype_from_code(coded.dtype)
    if dtype not in CODED_DTYPES:
        raise FormatError(f"codec {coded.codec} holds no {dtype_name(dtype)}")
    return dtype


_DECODERS: dict[str, Callable[[CodedTensor], Tensor]] = {
    "raw": _decode_raw,
    "planes": _decode_planes,
    "paper": _decode_paper,
}
