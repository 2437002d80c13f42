"""Rate control: the largest step whose error still meets a target in dB.

The step h is found from the error itself, never from an assumed distribution: E(h) = sum (w - w')^2 is measured on a
sample of blocks, and log h moved along E ~ h^2 until the SQNR meets the target; then the whole matrix is coded once,
and again only if the sample misled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor, quantise, quantise_path, tiles
from birkhoff.codec.metrics import Fidelity, fidelity, sqnr_db
from birkhoff.codec.pairs import HALF

TARGET_DB_RANGE = (6.0, 48.0)
"""Targets the trajectory can serve: below, tensors die; above, most pairs would be escapes."""

TOLERANCE_DB = 0.3
"""A coded tensor lies at most this far above its target."""

_CLOSE_DB = 0.06
"""Good enough not to try again: 0.01 bits a weight."""

_MARGIN_DB = 0.02
"""The search aims this far above the target, so that the first whole pass nearly always meets it."""

_TRIES = 12
_PATIENCE = 3
"""Whole passes after which anything within the tolerance will do."""

_SAMPLE = 1 << 18
"""Weights sampled for the step search; tensors up to four times as large are searched whole."""

_PATH_STEP = 0.5646
"""Step of a path over the step of single nodes at equal error: 10^(1.055/20) / 2, for the trellis's 1.055 dB."""

Quantise = Callable[[Tensor, float], LatticeTensor]


def encode(weight_RK: Tensor, target_db: float, *, path: bool = False) -> tuple[LatticeTensor, Fidelity]:
    """Code a matrix at the least fidelity that meets `target_db` (SQNR in dB, in `TARGET_DB_RANGE`).

    Args:
        weight_RK: real and finite, any float dtype and device.
        target_db: least SQNR.
        path: search paths of the trellis instead of single nodes.

    Returns:
        The coded matrix and its measured error. The SQNR lies within 0.3 dB above the target wherever the weights
        allow it; a matrix of few distinct values can jump over that window and then lies above it.

    Raises:
        TargetError: the target is out of range, the weights have no finite energy, or no step meets the target.
    """
    low, high = TARGET_DB_RANGE
    if not low <= target_db <= high:
        raise TargetError(f"target {target_db:g} dB is outside {low:g}..{high:g} dB; store the tensor lossless instead")
    goal = _Goal(energy=_energy(weight_RK), target_db=target_db)
    if not 0 < goal.energy < math.inf:
        raise TargetError(f"the weights' energy is {goal.energy:g}: no relative error exists; store them lossless")
    step = math.sqrt(12 * goal.energy / weight_RK.numel()) * 10 ** (-target_db / 20)
    step = _search(weight_RK, goal, quantise, step, tries=6)
    if path:
        step = _search(weight_RK, goal, quantise_path, step * _PATH_STEP, tries=1)
    return _settle(weight_RK, goal, quantise_path if path else quantise, _round(step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    energy: float
    target_db: float

    def excess(self, error: float) -> float:
        """dB above the target at a summed squared error, limited so that one step of the search stays sane."""
        return min(sqnr_db(self.energy, error) - self.target_db, 20.0)


def _search(weight_RK: Tensor, goal: _Goal, code: Quantise, step: float, *, tries: int) -> float:
    """A step that lies `_MARGIN_DB` above the goal on a sample, or what `tries` corrections made of it."""
    sample = _sample(weight_RK)
    if tries == 1 and sample is weight_RK:
        return step  # the first whole pass measures the same
    # Quantisation error spreads evenly over a tensor even where its energy does not: scale the error, not the energy.
    scale = weight_RK.numel() / sample.numel()
    for _ in range(tries):
        error = fidelity(sample, code(sample, step).decode(sample.dtype)).error * scale
        excess = goal.excess(error) - _MARGIN_DB
        step *= 10 ** (excess / 20)
        if abs(excess) < 0.01:
            break
    return step


def _settle(weight_RK: Tensor, goal: _Goal, code: Quantise, step: float) -> tuple[LatticeTensor, Fidelity]:
    """Code the whole matrix, and again with a better step while that pays."""
    best: tuple[LatticeTensor, Fidelity] | None = None
    below, above = 0.0, math.inf  # greatest step known to meet the target, least known to miss it
    for attempt in range(_TRIES):
        coded = code(weight_RK, step)
        found = fidelity(weight_RK, coded.decode(weight_RK.dtype))
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


def _round(step: float) -> float:
    """The step as the float32 that is stored."""
    return float(torch.tensor(step, dtype=torch.float32))


def _energy(weight_RK: Tensor) -> float:
    rows, columns = weight_RK.shape
    parts = tiles(rows, columns, weight_RK.device)
    return sum(float(weight_RK[row, column].to(torch.float32).square().sum()) for row, column, _ in parts)


def _sample(weight_RK: Tensor) -> Tensor:
    """A matrix [S, 64] of blocks spread evenly over the weights, or all of them where they are few."""
    flat = weight_RK.reshape(-1)
    blocks = flat.numel() // (2 * HALF)
    wanted = _SAMPLE // (2 * HALF)
    if blocks <= 4 * wanted:
        return weight_RK
    return flat[: blocks * 2 * HALF].view(blocks, 2 * HALF)[:: blocks // wanted].contiguous()
