"""Validate a shard's final bytes: decode and compare every tensor, and run every matrix through HyperLinear.

Validation does not trust the encoder. The container is parsed again, and its claims must match the measurements. The
CPU's decoder reads every stream, whatever device encoded it and compares the weights, so GPU kernels do not check
themselves.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from birkhoff.codec.container import CodedTensor, DifferenceParams, LatticeParams, bases_of, parse, with_bases
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import fidelity, sqnr_db, to_host
from birkhoff.codec.output.encode import is_no_worse, stored_step
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.profiles import FALLBACKS, Decision
from birkhoff.codec.tensor import decode_with_code, is_matrix
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline import logs
from birkhoff.pipeline.errors import ValidationError
from birkhoff.pipeline.registry.documents import FLOOR_DB
from birkhoff.pipeline.shard.hessians import HessianOf
from birkhoff.pipeline.shard.task import PROBE_LIMIT

PROBE_ROWS = 16
"""Random inputs of a HyperLinear probe."""

_CLAIM_SLACK_DB = 0.01
"""The encoder's claim is rounded to 0.001 dB, and sums may be taken in another order."""


_TARGET_SLACK_DB = 0.0011
"""A stored target is rounded down to 0.001 dB."""


_STEP_SLACK = 1e-6
"""Sums of squares may be taken in another order, and the step is a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardChecks:
    """The measurements of a validation, in the order of the container."""

    sqnr_db: tuple[float, ...]
    probe_db: tuple[float, ...]
    probe_error: float
    fallbacks: dict[str, str]
    """Tensors kept lossless because of their values, with the reason, a key of `FALLBACKS`."""
    bases: tuple[str, ...] = ()
    """SHA-256 of the containers that tensors are differences to."""


def validate_shard(
    blob: bytes,
    sources: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    device: torch.device,
    hessian_of: HessianOf = lambda _: None,
    tensors_of: Callable[[str], Mapping[str, CodedTensor]] = lambda _: {},
) -> ShardChecks:
    """Check a container against its source tensors (by name, in order) and their decisions.

    `hessian_of` returns the Hessians on `device` that were used for error feedback. `tensors_of` returns the tensors of
    the containers that serve as bases.

    Raises:
        ValidationError: A tensor is missing, has another shape or dtype, misses its target, has become all zeros, or is
            lossy instead of lossless or the other way round; HyperLinear does not compute its product; or, with a
            nominal target, it has another step, or a greater output error than plain rounding.
        FormatError: The container cannot be parsed.
    """
    coded_tensors = with_bases(parse(blob), tensors_of)
    if [coded.name for coded in coded_tensors] != list(sources):
        raise ValidationError("the container's tensors are not the shard's tensors: report this as a bug")
    sqnrs: list[float] = []
    probes: list[tuple[float, float]] = []
    fallbacks: dict[str, str] = {}
    for coded in coded_tensors:
        source = sources[coded.name]
        logs.step("validate", source.nbytes, coded.name)
        decoded, code = decode_with_code(coded, "cpu" if coded.lossless else device)
        _check_form(coded.name, source, decoded)
        target = promise(coded, decisions[coded.name])
        if coded.lossless:
            _check_equal(coded.name, source, decoded)
            fallbacks |= {} if coded.claims.reason is None else {coded.name: coded.claims.reason}
            continue
        source = source.to(device)
        sqnrs.append(_check_coded(coded, source, decoded, target))
        if decisions[coded.name].nominal:
            check_step(coded, source, decisions[coded.name])
            assert code is not None  # `check_step` refuses other codecs
            _check_output(coded.name, code, source, decisions[coded.name], hessian_of(coded.name))
        if code is not None and is_matrix(coded):
            probes.append(probe(coded.name, code, source, decoded))
    return ShardChecks(
        sqnr_db=tuple(round(max(value, FLOOR_DB), 2) for value in sqnrs),
        probe_db=tuple(round(max(db, FLOOR_DB), 2) for db, _ in probes),
        probe_error=float(f"{max((error for _, error in probes), default=0.0):.2g}"),
        fallbacks=fallbacks,
        bases=bases_of(coded_tensors),
    )


def _check_form(name: str, source: Tensor, decoded: Tensor) -> None:
    if (decoded.shape, decoded.dtype) != (source.shape, source.dtype):
        raise ValidationError(
            f"tensor {name!r} came back as {list(decoded.shape)} {decoded.dtype}, "
            f"expected {list(source.shape)} {source.dtype}"
        )


def promise(coded: CodedTensor, decision: Decision, *, reasons: bool = True) -> float | None:
    """Return the SQNR in dB that a stored tensor must reach; None if it is lossless, coded by `paper`, or has a nominal
    target.

    `reasons` says whether a tensor that is lossless against its decision must carry the reason.

    Raises:
        ValidationError: It is lossy instead of lossless or the other way round, or claims another target.
    """
    lossless, reason = coded.lossless, coded.claims.reason
    fell = decision.action == "coded" and lossless and (reason in FALLBACKS or not reasons)
    if lossless != (decision.action == "lossless" or fell) or (reason is not None and not fell):
        raise ValidationError(
            f"tensor {coded.name!r} should be {decision.action}, it is stored as {coded.codec}"
            + (f" for the reason {reason!r}" if reason else "")
            + "; compress again, and report this as a bug if it happens again"
        )
    if lossless or decision.codec == "paper" or decision.nominal:
        return None
    claim, target = claimed(coded, "target_db") if decision.states_target else None, decision.target_db
    if target is None:  # the target is the published codec's error, which the tensor claims
        return claim
    if claim is not None and abs(claim - target) > _TARGET_SLACK_DB:
        raise ValidationError(f"tensor {coded.name!r} claims {claim} dB as its target, it has {target} dB")
    return target


def claimed(coded: CodedTensor, key: Literal["sqnr_db", "target_db"]) -> float:
    """Return a claimed number in dB; the SQNR is -inf for a source of only zeros. Raises ValidationError if there is
    none."""
    value = coded.claims.sqnr_db if key == "sqnr_db" else coded.claims.target_db
    if value is None or not (math.isfinite(value) or (key == "sqnr_db" and value == -math.inf)):
        raise ValidationError(f"tensor {coded.name!r} claims {value} as {key}, expected a number in dB")
    return value


def _check_equal(name: str, source: Tensor, decoded: Tensor) -> None:
    # Compared as bytes, because -0.0 and NaN payloads count.
    same = torch.equal(source.contiguous().view(torch.uint8), decoded.view(torch.uint8)) if source.dim() else True
    if not same or (not source.dim() and source.item() != decoded.item()):
        raise ValidationError(f"tensor {name!r} was stored lossless but came back different: report this as a bug")


def _check_coded(coded: CodedTensor, source: Tensor, decoded: Tensor, target: float | None) -> float:
    """Check a lossy tensor, and return its SQNR in dB."""
    found = fidelity(source, decoded)
    if not math.isfinite(found.error) or not any(to_host(*torch.aminmax(decoded))):
        raise ValidationError(f"tensor {coded.name!r} came back with NaN, Inf or only zeros")
    if target is not None and found.sqnr_db < target:
        raise ValidationError(f"tensor {coded.name!r} came back at {found.sqnr_db:.2f} dB, its target is {target:g} dB")
    claim = claimed(coded, "sqnr_db")
    if claim != found.sqnr_db and not abs(claim - found.sqnr_db) <= _CLAIM_SLACK_DB:  # -inf equals only itself
        raise ValidationError(f"tensor {coded.name!r} claims {claim} dB but came back at {found.sqnr_db:.3f} dB")
    return found.sqnr_db


def check_step(coded: CodedTensor, source: Tensor, decision: Decision) -> None:
    """Hold the step of a tensor with a nominal target against its source; of a difference, the longest stride.

    Raises ValidationError.
    """
    assert decision.target_db is not None  # a nominal target is one
    if not isinstance(coded.params, LatticeParams):
        raise ValidationError(f"tensor {coded.name!r} is stored as {coded.codec}; it should be on the lattice")
    wanted = stored_step(source, decision.target_db, path=coded.params.path, columns=coded.params.columns)
    if isinstance(coded.params, DifferenceParams):
        stride = coded.params.stride * coded.params.step
        if stride > (1 + _STEP_SLACK) * wanted:
            raise ValidationError(
                f"tensor {coded.name!r} is rounded in strides of {stride:g}, {decision.target_db:g} dB allow "
                f"{wanted:g}; compress again, and report this as a bug if it is so again"
            )
        return
    if abs(coded.params.step - wanted) > _STEP_SLACK * wanted:
        raise ValidationError(
            f"tensor {coded.name!r} is stored with the step {coded.params.step:g}, {decision.target_db:g} dB mean "
            f"{wanted:g}; compress again, and report this as a bug if it happens again"
        )


def _check_output(name: str, code: LatticeTensor, source: Tensor, decision: Decision, hessian: Hessian | None) -> None:
    assert decision.target_db is not None  # a nominal target is one
    if not is_no_worse(source, code, decision.target_db, hessian, path=decision.path):
        raise ValidationError(
            f"tensor {name!r} came back with a greater output error than plain rounding gives: report this as a "
            "bug, or name another `allocation` in the manifest"
        )


def probe(name: str, code: LatticeTensor, source: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Run HyperLinear on random float32 inputs, on the device of the code, its source and its decoded weight [N, K].

    Returns:
        SQNR in dB of the outputs against the source weight, and the norm of their error against the weight decoded to
        float32 (the weight's own dtype may round further), relative to the norm of the outputs.

    Raises:
        ValidationError: That error exceeds `PROBE_LIMIT`.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    inputs = torch.randn(
        PROBE_ROWS, source.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    ).to(source.device)
    with torch.inference_mode():
        output = HyperLinear.from_lattice(code)(inputs)
        exact = linear(inputs, decoded if decoded.dtype == torch.float32 else code.decode(torch.float32))
        wanted = linear(inputs, source.to(torch.float32))
    error, energy, lost = to_host(
        (output - exact).norm() / exact.norm(), wanted.square().sum(), (output - wanted).square().sum()
    )
    if not error <= PROBE_LIMIT:
        raise ValidationError(
            f"tensor {name!r}: HyperLinear differs by {error:.2g} from F.linear with the decoded weight; "
            f"at most {PROBE_LIMIT:g} is allowed"
        )
    return sqnr_db(energy, lost), error
