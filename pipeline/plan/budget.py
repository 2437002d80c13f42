"""Search the highest target at which a whole version fits a budget: pure decisions, no I/O.

Workers estimate every tensor's bytes over the whole grid of targets (`codec.budget`), reading the weights once. The
highest target that should fit is encoded, and every byte of that version counted. From there the estimated curve,
scaled to the measured size, is accurate to a few hundredths of a dB, so the first or second pass is usually the last.
The search ends with a version that fills the budget to `ENOUGH`, or above which no target fits.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from birkhoff.pipeline.plan.grid import Floats, Grid, highest
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.registry.documents import ShardRecord

PASSES = 4
"""Most encodings of a model once a fitting target was found; each pass after the first is a correction."""

ENOUGH = 0.9975
"""Share of the budget with which a fitting version ends the search. What is left is worth less than 0.1 dB, and with
error feedback another encoding takes SAM-H more than ten seconds of a GPU."""

MISSES = 8
"""Passes without a fit before giving up. From the second on, each steps down twice as far as the one before."""

_HINT_DB = 0.3
"""If the previous version's target is this near the estimate, try it first: its shards exist."""

DOUBT = 0.1
"""An estimated size may be too large by this share: the lowest target is tried before a budget is refused for less."""

DOUBT_OF_DIFFERENCES = 0.5
"""That of a model with a base: how far weights are from it, a sample tells only roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A pass: its step of the grid, all bytes of its version, its shards by index, and how many of these existed."""

    step: int
    bytes: int
    records: Mapping[int, ShardRecord]
    reused: int = 0


@dataclass(slots=True, kw_only=True)
class Search:
    """The search for one model's target.

    `estimated` has the bytes of a whole version at every step of the grid, `limit` is the most it may take, and `hint`
    is a step worth trying first because its shards may exist.
    """

    grid: Grid
    limit: int
    estimated: Floats
    hint: int | None = None
    lowest: int = 0
    """The lowest step that may be tried."""
    doubt: float = DOUBT
    best: Trial | None = None
    """The highest trial that fits."""
    _measured: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        grid: Grid,
        limit: int,
        knots: Sequence[Floats],
        beside: int,
        *,
        hint_db: float | None,
        lowest: int = 0,
        doubt: float = DOUBT,
    ) -> "Search":
        """Return a search over the sum of the shards' estimated bytes at the knots, plus `beside` bytes of other
        parts."""
        estimated = grid.fill(np.sum(knots, axis=0)) + beside
        hint = None if hint_db is None else max(lowest, grid.step(hint_db))
        return cls(grid=grid, limit=limit, estimated=estimated, hint=hint, lowest=lowest, doubt=doubt)

    @property
    def passes(self) -> int:
        """Number of passes that have ended."""
        return len(self._measured)

    def next(self) -> int | None:
        """Return the step to encode now; None if the search has ended, with or without a `best`."""
        over = [step for step, size in self._measured.items() if size > self.limit]
        fits = self.best
        if fits is not None and (len(self._measured) >= PASSES or fits.bytes >= ENOUGH * self.limit):
            return None
        if len(over) >= MISSES or self.lowest in over:
            return None
        sizes = self._calibrated()
        guess = self._highest(sizes)
        if guess is None or guess < self.lowest:
            hopeless = not self._measured and sizes[self.lowest] * (1 - self.doubt) > self.limit
            guess = None if hopeless else self.lowest
        elif not self._measured and self.hint is not None and abs(self.hint - guess) <= self.grid.steps(_HINT_DB):
            guess = self.hint
        if guess is None:
            return None
        if len(over) > 1 and self.best is None:
            guess -= 2 ** (len(over) - 2)
        guess = max(self.lowest, min([guess, *(step - 1 for step in over)]))
        return None if self.best is not None and guess <= self.best.step else guess

    def _highest(self, sizes: Floats) -> int | None:
        """The highest step that fits. Differences cost the same down from where the base's own error is allowed."""
        guess = highest(sizes, self.limit)
        last = int(np.searchsorted(sizes, self.limit, side="right")) - 1
        return last if guess is not None and self.doubt > DOUBT and last < len(sizes) - 1 else guess

    def note(self, trial: Trial) -> None:
        """Record a pass."""
        self._measured[trial.step] = trial.bytes
        if trial.bytes <= self.limit and (self.best is None or trial.step > self.best.step):
            self.best = trial

    def least(self) -> tuple[int, bool]:
        """Return (bytes at the lowest target, whether they were counted instead of estimated)."""
        found = self._measured.get(self.lowest)
        return (round(float(self._calibrated()[self.lowest])), False) if found is None else (found, True)

    def _calibrated(self) -> Floats:
        """Return the estimated sizes, scaled to the passes nearest to the limit.

        The error of an estimate drifts with the target. Two passes give the drift, which is extrapolated by at most
        their distance.
        """
        if not self._measured:
            return self.estimated
        nearest = sorted(self._measured.items(), key=lambda item: abs(item[1] - self.limit))
        step, size = nearest[0]
        ratio = size / self.estimated[step]
        if len(nearest) == 1:
            alike: Floats = self.estimated * ratio
            return alike
        other, other_size = nearest[1]
        drift = (other_size / self.estimated[other] - ratio) / (other - step)
        away = np.arange(len(self.estimated)) - step
        scaled: Floats = self.estimated * (ratio + drift * np.clip(away, -abs(other - step), abs(other - step)))
        return scaled


def lowest_step(plan: ModelPlan, floor_db: float) -> int:
    """Return the lowest step of a plan's grid at which every tensor that follows its profile gets `floor_db`, or the
    last.

    Overrides are explicit and may go below the floor. Nominal targets have none.
    """
    grid = Grid.of(plan.profile)

    def holds(step: int) -> bool:
        follow = (item.decision for item in plan.at(grid.target(step)).tensors if item.decision.override is None)
        promised = (made for made in follow if made.action == "coded" and not made.nominal)
        return all((made.target_db or 0.0) >= floor_db for made in promised)

    return bisect_left(range(grid.steps(grid.high - grid.low)), True, key=holds)
