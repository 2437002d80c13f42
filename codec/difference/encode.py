"""One tensor to its stored form with a base: as a difference to it, or for itself, whichever is smaller."""

from dataclasses import dataclass, replace

from torch import Tensor

from birkhoff.codec import planes, rate
from birkhoff.codec.container import MAX_EXPANSION, CodedTensor, DifferenceParams, LatticeParams, fits
from birkhoff.codec.difference import by_output
from birkhoff.codec.difference.find import Difference, find
from birkhoff.codec.output import encode as output
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

ENTRY_BYTES = 40
"""About what an entry of a difference takes more in the packed index."""

_CLEARLY = 0.8
"""Share of the direct form's estimated bytes below which that is not even made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a tensor may be a difference to: a stored tensor, and the sha256 of the container that holds it."""

    container: str
    tensor: CodedTensor


def encode(
    name: str, tensor: Tensor, decision: Decision, base: Base | None, hessian_KK: Tensor | None = None
) -> Encoded:
    """Code one tensor as was decided of it, but as a difference where that takes fewer bytes.

    Without, it is what `encode_tensor` makes of it, or `output.encode` under a nominal target. A target that is none is
    met by what is decoded with the base; under a nominal one the outputs' error is as there. A base of another name,
    shape or codec is no help, nor is one that is a difference itself.

    Args:
        name: of the tensor, and of its base.
        tensor: of any shape and stored dtype, on the CPU or a GPU.
        decision: of codec `lattice`, or any other.
        base: the base; None for none.
        hessian_KK: under a nominal target, what errors are fed back through; on the tensor's device.

    Raises: as `encode_tensor`.
    """
    check_storable(name, tensor)
    found = _found(name, tensor, decision, base, hessian_KK)
    if found is None or base is None:
        return _direct(name, tensor, decision, hessian_KK)
    encoded = _encoded(name, tensor, found, base)
    if decision.states_target or decision.target_db is None:
        encoded = with_target(encoded, _target_of(tensor, decision))
    size = encoded.tensor.nbytes + ENTRY_BYTES
    if tensor.numel() > MAX_EXPANSION * encoded.tensor.nbytes:  # few bytes may stand for so many weights
        return _direct(name, tensor, decision, hessian_KK)
    if 8 * size < _CLEARLY * found.direct_bits * tensor.numel():
        return encoded
    direct = _direct(name, tensor, decision, hessian_KK)
    return encoded if size < direct.tensor.nbytes else direct


def _direct(name: str, tensor: Tensor, decision: Decision, hessian_KK: Tensor | None) -> Encoded:
    """The tensor for itself."""
    if not decision.nominal:
        return encode_tensor(name, tensor, decision)
    assert decision.target_db is not None  # a nominal target is one
    return output.encode(name, tensor, decision.target_db, hessian_KK, path=decision.path)


def _target_of(tensor: Tensor, decision: Decision) -> float:
    return published_target(tensor) if decision.target_db is None else decision.target_db


def is_for(base: CodedTensor, name: str, tensor: Tensor, decision: Decision) -> bool:
    """Whether a stored tensor can be the base of one, by name, shape and what was decided."""
    shape = tuple(tensor.shape)
    return decision.codec == "lattice" and base.name == name and fits(base, shape, matrix_shape(shape)[1])


def _found(
    name: str, tensor: Tensor, decision: Decision, base: Base | None, hessian_KK: Tensor | None
) -> Difference | None:
    """The difference of a tensor; None where there is none, or nothing that it could save."""
    if base is None or not is_for(base.tensor, name, tensor, decision):
        return None
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    if fallback(matrix) is not None:
        return None
    target_db, held = _target_of(tensor, decision), lattice_of(base.tensor).to(matrix.device)
    if not decision.nominal:
        path = decision.path and matrix.numel() >= LEAST_PATH
        try:
            return find(matrix, held, target_db, path=path, base_path=path_of(base.tensor))
        except rate.RangeError:
            return None
    if output.is_fixed(target_db):
        return None
    try:
        found = by_output.find(matrix, held, target_db, hessian_KK, path=decision.path, base_path=path_of(base.tensor))
    except rate.RangeError:
        return None
    worse = found is None or not output.is_no_worse(tensor, found.sum, target_db, hessian_KK, path=decision.path)
    return None if worse else found


def path_of(coded: CodedTensor) -> int:
    """The kind of the paths that a tensor's coordinates lie on; 0 for none."""
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
