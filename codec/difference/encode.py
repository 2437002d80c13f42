"""One tensor to its stored form with a base: as a difference to it, or for itself, whichever is smaller."""

from dataclasses import dataclass, replace

from torch import Tensor

from birkhoff.codec import planes, rate
from birkhoff.codec.container import MAX_EXPANSION, CodedTensor, DifferenceParams, LatticeParams, fits
from birkhoff.codec.difference.find import Difference, find
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import (
    LEAST_PATH,
    Encoded,
    check_storable,
    encode_tensor,
    fallback,
    lattice_of,
    published_target,
    stored,
    with_target,
)

_ENTRY_BYTES = 40
"""About what an entry of a difference takes more in the packed index."""

_CLEARLY = 0.8
"""Share of the direct form's estimated bytes below which that is not even made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a tensor may be a difference to: a stored tensor, and the sha256 of the container that holds it."""

    container: str
    tensor: CodedTensor


def encode(name: str, tensor: Tensor, decision: Decision, base: Base | None) -> Encoded:
    """Code one tensor as was decided of it, as `encode_tensor` does, but as a difference where that takes fewer bytes.

    Its target is the same then, and met by what is decoded with the base. A base of another name, shape or codec is no
    help, nor is one that is a difference itself. A target that is nominal has no difference.

    Args:
        name: of the tensor, and of its base.
        tensor: of any shape and stored dtype, on the CPU or a GPU.
        decision: of codec `lattice`, or any other.
        base: the base; None for none.

    Raises: as `encode_tensor`.
    """
    check_storable(name, tensor)
    columns = matrix_shape(tuple(tensor.shape))[1]
    lattice = decision.codec == "lattice" and not decision.nominal
    if base is None or not lattice or base.tensor.name != name or not fits(base.tensor, tuple(tensor.shape), columns):
        return encode_tensor(name, tensor, decision)
    matrix = tensor.detach().reshape(-1, columns)
    if fallback(matrix) is not None:
        return encode_tensor(name, tensor, decision)
    target_db = published_target(tensor) if decision.target_db is None else decision.target_db
    path = decision.path and matrix.numel() >= LEAST_PATH
    try:
        held = lattice_of(base.tensor).to(matrix.device)
        found = find(matrix, held, target_db, path=path, base_path=_path_of(base.tensor))
    except rate.RangeError:
        found = None
    if found is None:
        return encode_tensor(name, tensor, decision)
    encoded = _encoded(name, tensor, found, base)
    if decision.states_target or decision.target_db is None:
        encoded = with_target(encoded, target_db)
    size = encoded.tensor.nbytes + _ENTRY_BYTES
    if tensor.numel() > MAX_EXPANSION * encoded.tensor.nbytes:  # few bytes may stand for so many weights
        return encode_tensor(name, tensor, decision)
    if 8 * size < _CLEARLY * found.direct_bits * tensor.numel():
        return encoded
    direct = encode_tensor(name, tensor, decision)
    return encoded if size < direct.tensor.nbytes else direct


def _path_of(coded: CodedTensor) -> int:
    return coded.params.path if isinstance(coded.params, LatticeParams) else 0


def _encoded(name: str, tensor: Tensor, found: Difference, base: Base) -> Encoded:
    streams, escapes = planes.pack(found.code, path=found.plan.path)
    params = DifferenceParams(
        path=found.plan.path,
        columns=found.code.columns,
        step=found.sum.step,
        escapes=escapes,
        base=base.container,
        times=found.plan.times,
        stride=found.plan.stride,
    )
    coded = stored(name, tensor, "difference", *streams, params=params, error=found.error)
    return Encoded(tensor=replace(coded, base=base.tensor), reason="", fidelity=found.error)
