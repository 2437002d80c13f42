"""Encode a tensor that has a base: as a difference to it, or on its own, whichever is smaller."""

from dataclasses import dataclass, replace

from torch import Tensor

from birkhoff.codec import planes, rate
from birkhoff.codec.container import MAX_EXPANSION, CodedTensor, DifferenceParams, LatticeParams, fits
from birkhoff.codec.difference import by_output
from birkhoff.codec.difference.find import Difference, find
from birkhoff.codec.output import encode as output
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import TARGET_DB_RANGE, Decision
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
"""Approximate bytes by which a difference's entry in the packed index exceeds another entry."""

_CLEARLY = 0.8
"""A difference below this share of the direct form's estimated bytes is taken without encoding the direct form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A possible base: a stored tensor, and the SHA-256 of the container that holds it."""

    container: str
    tensor: CodedTensor


def encode(name: str, tensor: Tensor, decision: Decision, base: Base | None, hessian: Hessian | None = None) -> Encoded:
    """Code a tensor by its decision, but as a difference if that takes fewer bytes.

    Otherwise the result is that of `encode_tensor`, or of `output.encode` under a nominal target. A difference meets
    the target once it is decoded with its base; under a nominal target it has the same error of the outputs as the
    direct form. A base is ignored if its name, shape or codec differs, or if it is a difference itself.

    Args:
        name: The name of the tensor and of its base.
        tensor: Of any shape and stored dtype, on the CPU or a GPU.
        decision: For any codec. Only `lattice` uses the base.
        base: The base, or None.
        hessian: The Hessian for error feedback under a nominal target, on the tensor's device.

    Raises: As `encode_tensor`.
    """
    check_storable(name, tensor)
    found = _found(name, tensor, decision, base, hessian)
    if found is None or base is None:
        return _direct(name, tensor, decision, hessian)
    encoded = _encoded(name, tensor, found, base)
    if decision.states_target or decision.target_db is None:
        encoded = with_target(encoded, _target_of(tensor, decision))
    size = encoded.tensor.nbytes + ENTRY_BYTES
    if tensor.numel() > MAX_EXPANSION * encoded.tensor.nbytes:  # readers refuse that
        return _direct(name, tensor, decision, hessian)
    if 8 * size < _CLEARLY * found.direct_bits * tensor.numel():
        return encoded
    direct = _direct(name, tensor, decision, hessian)
    return encoded if size < direct.tensor.nbytes else direct


def _direct(name: str, tensor: Tensor, decision: Decision, hessian: Hessian | None) -> Encoded:
    """Code the tensor without a base."""
    if not decision.nominal:
        return encode_tensor(name, tensor, decision)
    assert decision.target_db is not None  # a nominal target has a value
    return output.encode(name, tensor, decision.target_db, hessian, path=decision.path)


def _target_of(tensor: Tensor, decision: Decision) -> float:
    return published_target(tensor) if decision.target_db is None else decision.target_db


def is_for(base: CodedTensor, name: str, tensor: Tensor, decision: Decision) -> bool:
    """Return whether a stored tensor can be the base of another, by name, shape and decision."""
    shape = tuple(tensor.shape)
    return decision.codec == "lattice" and base.name == name and fits(base, shape, matrix_shape(shape)[1])


def _found(
    name: str, tensor: Tensor, decision: Decision, base: Base | None, hessian: Hessian | None
) -> Difference | None:
    """Find the difference of a tensor. Return None without a usable base, or if it cannot save anything."""
    if base is None or not is_for(base.tensor, name, tensor, decision):
        return None
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    if fallback(matrix) is not None:
        return None
    target_db, held = _target_of(tensor, decision), lattice_of(base.tensor).to(matrix.device)
    if not decision.nominal:
        if target_db > TARGET_DB_RANGE[1]:  # fixed point, which has no difference
            return None
        path = decision.path and matrix.numel() >= LEAST_PATH
        try:
            return find(matrix, held, target_db, path=path, base_path=path_of(base.tensor))
        except rate.RangeError:
            return None
    if output.is_fixed(target_db):
        return None
    try:
        found = by_output.find(matrix, held, target_db, hessian, path=decision.path, base_path=path_of(base.tensor))
    except rate.RangeError:
        return None
    worse = found is None or not output.is_no_worse(tensor, found.sum, target_db, hessian, path=decision.path)
    return None if worse else found


def path_of(coded: CodedTensor) -> int:
    """Return the kind of the paths that a tensor's coordinates are on, 0 for none."""
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
