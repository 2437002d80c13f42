"""Search the highest target whose whole version fits a budget: pure decisions, no I/O.

The workers estimate every tensor's bytes over the whole grid of targets (`codec.budget`), in one look at the weights.
The highest target that should fit is encoded, and every byte of that version counted. From there the estimated curve,
scaled to the measured size, is accurate to a few hundredths of a dB: the first or second pass is usually the last one.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from birkhoff.codec.budget import Floats, Grid, highest
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.registry.documents import ShardRecord

PASSES = 4
"""Times a model is encoded at most once a target that fits was found; every pass but the first is a correction."""

MISSES = 8
"""Passes without a fit before giving up: from the second on each goes down twice as far as the one before."""

_HINT_DB = 0.3
"""So near the estimated target, that of the version before is tried first: its shards are there."""

DOUBT = 0.1
"""An estimated size may be too large by this share: the lowest target is tried before a budget is refused for less."""

DOUBT_OF_DIFFERENCES = 0.5
"""That of a model with a base: how far weights are from it, a sample tells only roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A pass: its step of the grid, every byte of its version, its shards by index, how many of them were there."""

    step: int
    bytes: int
    records: Mapping[int, ShardRecord]
    reused: int = 0


@dataclass(slots=True, kw_only=True)
class Search:
    """What is known of one model's sizes.

    `estimated` are the bytes of a whole version at every step of the grid, `limit` the most it may have, `hint` a step
    that is worth a try because its shards may be there.
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
        """A search over the sum of the shards' estimated bytes at the knots; `beside` is what comes to the shards."""
        estimated = grid.fill(np.sum(knots, axis=0)) + beside
        hint = None if hint_db is None else max(lowest, grid.step(hint_db))
        return cls(grid=grid, limit=limit, estimated=estimated, hint=hint, lowest=lowest, doubt=doubt)

    @property
    def passes(self) -> int:
        """Passes that have ended."""
        return len(self._measured)

    def next(self) -> int | None:
        """Return the step to encode now; None if the search has ended, with or without a `best`."""
        over = [step for step, size in self._measured.items() if size > self.limit]
        if (len(self._measured) >= PASSES and self.best is not None) or len(over) >= MISSES or self.lowest in over:
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
        """A pass has ended."""
        self._measured[trial.step] = trial.bytes
        if trial.bytes <= self.limit and (self.best is None or trial.step > self.best.step):
            self.best = trial

    def least(self) -> tuple[int, bool]:
        """Return (bytes at the lowest target, whether they were counted and not estimated)."""
        found = self._measured.get(self.lowest)
        return (round(float(self._calibrated()[self.lowest])), False) if found is None else (found, True)

    def _calibrated(self) -> Floats:
        """Return the estimated sizes, scaled to the passes that came nearest to the limit.

        By how much an estimate is wrong drifts with the target: two passes tell how, as far again as they lie apart.
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
    """The lowest step of a plan's grid at which every tensor that follows its profile gets `floor_db`, or the last.

    What an override says of a tensor is the user's word, and may be less. Nominal targets have no floor.
    """
    grid = Grid.of(plan.profile)

    def holds(step: int) -> bool:
        follow = (item.decision for item in plan.at(grid.target(step)).tensors if item.decision.override is None)
        promised = (made for made in follow if made.action == "coded" and not made.nominal)
        return all((made.target_db or 0.0) >= floor_db for made in promised)

    return bisect_left(range(grid.steps(grid.high - grid.low)), True, key=holds)
