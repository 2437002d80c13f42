"""Encode a matrix on its own device: `codec.lattice.quantise` and `codec.rate.encode`, with the error measured in
passing.

Reference: `birkhoff.codec.lattice.quantise`.

Shapes: R = rows, K = columns, P = pairs per row, E = escapes.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from birkhoff.codec import lattice, rate
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import Fidelity, bulk, fidelity
from birkhoff.codec.native.survey import OUTLIER_RMS
from birkhoff.codec.profiles import TARGET_DB_RANGE
from birkhoff.codec.rate import TOLERANCE_DB
from birkhoff.codec.trajectory import LOW, Escapes
from birkhoff.kernels.decode.op import TRITON_DTYPES
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.runtime.device import HAS_TRITON

if HAS_TRITON:
    from birkhoff.kernels.encode import triton as encode_triton
    from birkhoff.kernels.encode.triton import Pass

_MARGIN_DB = 0.02
"""Excess in dB that the search aims for, so that the first pass nearly always meets the target."""

_TRIES = 12


def quantise(weight_RK: Tensor, step: float) -> tuple[LatticeTensor, Fidelity]:
    """Return what `lattice.quantise` does, and the error of the result decoded to the weights' dtype, in one pass.

    Indices and escapes are equal to the codec's. The sums in the `Fidelity` may differ by rounding.
    """
    if not _triton_takes(weight_RK):
        code = lattice.quantise(weight_RK, step)
        return code, fidelity(weight_RK, code.decode(weight_RK.dtype))
    return _run(weight_RK.contiguous(), torch.tensor(step, dtype=torch.float32, device=weight_RK.device))


def encode(weight_RK: Tensor, target_db: float) -> tuple[LatticeTensor, Fidelity]:
    """Code a matrix with the largest step that meets `target_db` (SQNR in dB), as `rate.encode`; return it with its
    error.

    One pass sums the energy, a sample gives the step, one pass encodes and measures. Another pass is needed only if the
    sample was misleading. The step may differ from the codec's in its last digits.

    Raises:
        TargetError: The target is out of range, the weights have no finite energy, no step meets the target, or decoded
            weights leave their dtype's range (RangeError).
    """
    low, high = TARGET_DB_RANGE
    if not _triton_takes(weight_RK) or not low <= target_db <= high:
        return rate.encode(weight_RK, target_db)
    weight_RK = weight_RK.contiguous()
    first = start(weight_RK, target_db)
    return finish(weight_RK, first, _scalars(first), target_db)


def encode_all(weights: Sequence[Tensor], target_db: float) -> list[tuple[LatticeTensor, Fidelity]]:
    """Encode several matrices on one GPU, which is synchronized once. Raises as `encode`."""
    low, high = TARGET_DB_RANGE
    if not all(map(_triton_takes, weights)) or not low <= target_db <= high:
        return [encode(weight, target_db) for weight in weights]
    weights = [weight.contiguous() for weight in weights]
    if not weights:
        return []
    passes = encode_triton.encode_passes(weights, target_db + _MARGIN_DB)
    scalars: list[list[float]] = encode_triton.gather(passes).tolist()
    return [finish(*one, target_db) for one in zip(weights, passes, scalars, strict=True)]


def start(weight_RK: Tensor, target_db: float) -> "Pass":
    """Queue the search and the first pass on the GPU. `finish` waits for them."""
    return encode_triton.encode_pass(weight_RK, encode_triton.search(weight_RK, target_db + _MARGIN_DB))


def finish(weight_RK: Tensor, first: "Pass", scalars: list[float], target_db: float) -> tuple[LatticeTensor, Fidelity]:
    """Check that the pass of `start` meets the target. If not, repeat it with another step."""
    code, found = _collect(weight_RK, first, scalars)
    if not 0 < found.energy < math.inf:
        raise TargetError(
            f"the weights' energy is {found.energy:g}: no relative error can be met; store the tensor lossless"
        )
    best: tuple[LatticeTensor, Fidelity] | None = None
    below, above = 0.0, math.inf  # the largest step that met the target, the smallest that missed it
    for _ in range(_TRIES):
        if best is None:
            rate.check_error(found.error)
        excess = found.sqnr_db - target_db
        if excess >= 0 and (best is None or found.error > best[1].error):
            best = code, found
        if 0 <= excess <= TOLERANCE_DB or excess == -math.inf:
            break
        below, above = (code.step, above) if excess > 0 else (below, code.step)
        step = code.step * 10 ** ((min(excess, 20) - _MARGIN_DB) / 20)
        code, found = quantise(weight_RK, step if below < step < above else (below + above) / 2)
    if best is None:
        raise TargetError(f"no step meets {target_db:g} dB after {_TRIES} tries; store the tensor lossless instead")
    return best


def _triton_takes(weight_RK: Tensor) -> bool:
    return weight_RK.dtype in TRITON_DTYPES and weight_RK.numel() > 0 and triton_serves(weight_RK.device)


def _run(weight_RK: Tensor, step: Tensor) -> tuple[LatticeTensor, Fidelity]:
    coded = encode_triton.encode_pass(weight_RK, step)
    return _collect(weight_RK, coded, _scalars(coded))


def _collect(weight_RK: Tensor, coded: "Pass", scalars: list[float]) -> tuple[LatticeTensor, Fidelity]:
    """What a pass made, from its scalars; the escapes are listed if there are any."""
    escapes = _no_escapes(weight_RK.device)
    energy, error, absolute, greatest, outside, step = scalars
    if outside:
        pair, i, j = encode_triton.take_escapes(weight_RK, coded)
        escapes = Escapes(pair=pair, i=i, j=j)
        energy, error, absolute, greatest, _, step = _scalars(coded)
    code = LatticeTensor(i=coded.i, j=coded.j, escapes=escapes, step=step, columns=weight_RK.shape[1])
    mean = absolute / weight_RK.numel()
    if outside or step * (1 - LOW) > OUTLIER_RMS * math.sqrt(energy / weight_RK.numel()):
        energy = bulk(weight_RK, energy).energy  # otherwise no weight can be an outlier
    return code, Fidelity(energy=energy, error=error, max_abs=greatest, mean_abs=mean)


@cache
def _no_escapes(device: torch.device) -> Escapes:
    return Escapes.none(device)


def _scalars(coded: "Pass") -> list[float]:
    values: list[float] = encode_triton.gather([coded]).tolist()[0]
    return values
