"""Rate control: find the largest step whose error still meets a target in dB.

The step h follows from measured errors, not from an assumed distribution. E(h) = sum (w - w')^2 is measured on a sample
of blocks, and log h is moved along E ~ h^2 until the SQNR meets the target. Then the whole matrix is coded once, or
again if the sample was misleading.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor, fixed_point, quantise, quantise_path, tiles
from birkhoff.codec.metrics import Errors, Fidelity, bulk, compare, in_parts, sqnr_db, survey, to_host
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.survey import Survey
from birkhoff.codec.pairs import HALF, pairs_per_row
from birkhoff.codec.profiles import TARGET_DB_RANGE
from birkhoff.codec.trajectory import FARTHEST, reciprocal

TOLERANCE_DB = 0.3
"""A coded tensor is at most this far above its target."""

_CLOSE_DB = 0.06
"""Excess at which coding again does not pay: 0.01 bits per weight."""

_MARGIN_DB = 0.02
"""Excess that the search aims for, so that the first whole pass nearly always meets the target."""

_SEARCHES = 6
_TRIES = 12
_PATIENCE = 3
"""Number of whole passes after which any result within the tolerance is accepted."""

_SAMPLE = 1 << 17
"""Weights sampled for the step search. The sample gives the error to 0.02 dB. Smaller tensors are searched whole."""

_NEAR_DB = 0.1
"""A smaller correction is applied without measuring it, since E ~ h^2 holds along it."""

_CHUNK = 1 << 20
"""Weights decoded together to measure their error."""

_CHUNK_GPU = 1 << 26

Quantise = Callable[[Tensor, float], LatticeTensor]


def encode(
    weight_RK: Tensor, target_db: float, *, path: int = 0, seen: Survey | None = None
) -> tuple[LatticeTensor, Fidelity]:
    """Code a matrix at the least fidelity that meets `target_db` (SQNR in dB, in `TARGET_DB_RANGE`).

    Args:
        weight_RK: Real and finite, any float dtype and device.
        target_db: Least SQNR, relative to the bulk of the weights (see `metrics`).
        path: Search trellis paths instead of single nodes: 1 through the rows, 2 down the columns.
        seen: The survey of the weights, if there was one.

    Returns:
        The coded matrix and its measured error. The SQNR is at most 0.3 dB above the target, unless the matrix has so
        few distinct values that no step hits this window.

    Raises:
        TargetError: The target is out of range, the weights have no finite energy, or no step meets the target.
    """
    check_target(target_db)
    if seen is None and in_parts(weight_RK):
        seen = survey(weight_RK)
    greatest = None if seen is None else seen.greatest
    goal = _goal_of(weight_RK, target_db, seen)
    step = _search(weight_RK, goal, greatest)
    if path:
        step *= path_step(weight_RK.shape[0] * pairs_per_row(weight_RK.shape[1]))
    code: Quantise = partial(quantise_path, path=path, greatest=greatest) if path else quantise
    return _settle(weight_RK, goal, code, _round(step))


def encode_fixed(weight_RK: Tensor, target_db: float, seen: Survey | None = None) -> tuple[LatticeTensor, Fidelity]:
    """Code a matrix as 16-bit fixed point that meets `target_db`, which may be above `TARGET_DB_RANGE`.

    Args, results and errors are as in `encode`.
    """
    goal = _goal_of(weight_RK, target_db, seen)
    return _settle(weight_RK.reshape(-1, 1), goal, fixed_point, _round(_first_step(weight_RK, goal)))


class RangeError(TargetError):
    """Decoded weights would leave the range of their dtype, because the weights are near its end."""


def check_error(error: float) -> None:
    """Raise RangeError if the error is not finite."""
    if not error < math.inf:
        raise RangeError("decoded weights would exceed the range of their type: store the tensor lossless")


def check_target(target_db: float) -> None:
    """Raise TargetError if the target is outside `TARGET_DB_RANGE`."""
    low, high = TARGET_DB_RANGE
    if not low <= target_db <= high:
        raise TargetError(f"target {target_db:g} dB is outside {low:g}..{high:g} dB; store the tensor lossless instead")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    """A target in dB against the energy of the weights' bulk. `outliers` says whether some weights are not in the
    bulk."""

    energy: float
    target_db: float
    outliers: bool

    def excess(self, error: float) -> float:
        """Return dB above the target for a summed squared error, clamped to keep each step of the search moderate.

        Raises RangeError if a weight was rounded out of its dtype's range: float16 ends at 65504.
        """
        check_error(error)
        return min(sqnr_db(self.energy, error) - self.target_db, 20.0)


def _goal_of(weight_RK: Tensor, target_db: float, seen: Survey | None) -> _Goal:
    """Return the goal for a matrix, with the survey of its weights if there was one. Raises TargetError if they have no
    finite energy."""
    energy, greatest = (_energy(weight_RK), None) if seen is None else (seen.energy, seen.greatest)
    weights = bulk(weight_RK, energy, greatest)
    if not 0 < weights.energy < math.inf:
        raise TargetError(f"the weights' energy is {weights.energy:g}: no relative error exists; store them lossless")
    return _Goal(energy=weights.energy, target_db=target_db, outliers=weights.limit < math.inf)


def _first_step(weight_RK: Tensor, goal: _Goal) -> float:
    """Return the step whose errors, spread evenly between nodes, are `_MARGIN_DB` above the goal."""
    return math.sqrt(12 * goal.energy / weight_RK.numel()) * 10 ** (-(goal.target_db + _MARGIN_DB) / 20)


def _search(weight_RK: Tensor, goal: _Goal, greatest: float | None) -> float:
    """Return a step of single nodes that is `_MARGIN_DB` above the goal on a sample, or the last correction."""
    step = _first_step(weight_RK, goal)
    sample = _sample(weight_RK)
    # Quantisation errors spread evenly over a tensor even if its energy does not, so the error is scaled, not the
    # energy.
    scale = weight_RK.numel() / sample.numel()
    for _ in range(_SEARCHES):
        error = error_of_nodes(sample, step, greatest) * scale
        excess = goal.excess(error) - _MARGIN_DB
        step *= 10 ** (excess / 20)
        if abs(excess) < _NEAR_DB:
            break
    return step


def error_of_nodes(weight_RK: Tensor, step: float, greatest: float | None = None) -> float:
    """Return sum (w - w')^2 of a matrix and its nearest nodes, without storing these. No |w| exceeds `greatest`."""
    library = native() if greatest is not None and abs(greatest * reciprocal(step)) <= FARTHEST else None
    if library is None or not _is_native(weight_RK):
        return compare(weight_RK, quantise(weight_RK, step).decode(weight_RK.dtype)).error
    errors = Errors()
    steps = reciprocal(step), step
    library.birkhoff_node_errors(weight_RK.data_ptr(), *weight_RK.shape, *steps, pointer(errors.sums))
    return errors.fidelity(0.0).error


def _is_native(weight_RK: Tensor) -> bool:
    """Return whether the native library takes weights of this layout."""
    return weight_RK.device.type == "cpu" and weight_RK.dtype == torch.float32 and weight_RK.is_contiguous()


def path_step(symbols: int) -> float:
    """Return the step of a path through rows, relative to the step of single nodes with equal error."""
    return step_of_run(trellis.steps(symbols))


def step_of_run(steps: int) -> float:
    """Return the same for runs of `steps`. The gain was measured for 64 to 256."""
    return 0.5 * 10 ** ((1.085 - 7.3 / steps) / 20)


def _settle(weight_RK: Tensor, goal: _Goal, code: Quantise, step: float) -> tuple[LatticeTensor, Fidelity]:
    """Code the whole matrix, and again with a better step as long as that pays."""
    best: tuple[LatticeTensor, Fidelity] | None = None
    below, above = 0.0, math.inf  # the largest step that met the target, the smallest that missed it
    for attempt in range(_TRIES):
        coded = code(weight_RK, step)
        found = _fidelity(weight_RK, coded, goal)
        if best is not None and not found.error < math.inf:
            break  # the previous result is good
        excess = goal.excess(found.error)
        if excess >= 0 and (best is None or found.error > best[1].error):
            best = coded, found
        if 0 <= excess <= _CLOSE_DB or (attempt >= _PATIENCE and 0 <= excess <= TOLERANCE_DB):
            break
        below, above = (step, above) if excess > 0 else (below, step)
        step = _round(step * 10 ** ((excess - _MARGIN_DB) / 20))
        if not below < step < above:
            step = _round((below + above) / 2)
    if best is None:
        raise TargetError(
            f"no step meets {goal.target_db:g} dB after {_TRIES} tries; store the tensor lossless instead"
        )
    return best


def _fidelity(weight_RK: Tensor, coded: LatticeTensor, goal: _Goal) -> Fidelity:
    """Return the error of a coded matrix, without ever holding all of it decoded."""
    if in_parts(weight_RK):
        return errors(weight_RK, coded).fidelity(goal.energy)
    rows, columns = weight_RK.shape
    height = max(1, (_CHUNK if weight_RK.device.type == "cpu" else _CHUNK_GPU) // columns)
    parts = [
        compare(weight_RK[top : top + height], coded.rows(top, top + height).decode(weight_RK.dtype))
        for top in range(0, rows, height)
    ]
    return Fidelity(
        energy=goal.energy if goal.outliers else sum(part.energy for part in parts),
        error=sum(part.error for part in parts),
        max_abs=max(part.max_abs for part in parts),
        mean_abs=sum(part.mean_abs * weight_RK[k * height : (k + 1) * height].numel() for k, part in enumerate(parts))
        / weight_RK.numel(),
    )


def errors(weight_RK: Tensor, coded: LatticeTensor) -> Errors:
    """Return the errors of a coded matrix whose weights are `in_parts`, without ever holding all of it decoded."""
    found, library = Errors(), native()
    rows, columns = weight_RK.shape
    if library is not None and _is_native(weight_RK):
        planes = coded.i.data_ptr(), coded.j.data_ptr()
        escapes = coded.escapes
        places = (t.data_ptr() for t in (escapes.pair, escapes.i, escapes.j))
        library.birkhoff_coded_errors(
            weight_RK.data_ptr(), rows, columns, *planes, coded.step, len(escapes), *places, pointer(found.sums)
        )
        found.count = weight_RK.numel()
        return found
    height = max(1, _CHUNK // columns)
    for top in range(0, rows, height):
        found.add(weight_RK[top : top + height], coded.rows(top, top + height).decode(weight_RK.dtype))
    return found


def _round(step: float) -> float:
    """Round a step to the float32 that is stored."""
    return float(torch.tensor(step, dtype=torch.float32))


def _energy(weight_RK: Tensor) -> float:
    if in_parts(weight_RK):
        return survey(weight_RK).energy
    rows, columns = weight_RK.shape
    parts = tiles(rows, columns, weight_RK.device)
    return sum(to_host(*(weight_RK[row, column].to(torch.float32).square().sum() for row, column, _ in parts)))


def _sample(weight_RK: Tensor) -> Tensor:
    """Return a matrix [S, 64] of blocks spread evenly over the weights, or all weights if there are few."""
    flat = weight_RK.reshape(-1)
    blocks = flat.numel() // (2 * HALF)
    wanted = _SAMPLE // (2 * HALF)
    if blocks <= 2 * wanted:
        return weight_RK
    return flat[: blocks * 2 * HALF].view(blocks, 2 * HALF)[:: blocks // wanted].contiguous()
