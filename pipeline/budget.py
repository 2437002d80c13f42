"""The search for the highest target whose whole version fits a budget: pure decisions, no I/O.

The workers foretell every tensor's bytes over the whole grid of targets (`codec.budget`), in one look at the weights.
The highest target that should fit is encoded, and every byte of that version counted. From there the foretold curve,
scaled to what came out, is right to a few hundredths of a dB: mostly the first or second pass is the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from birkhoff.codec.budget import Floats, Grid, highest
from birkhoff.pipeline.artifact import ShardRecord

PASSES = 4
"""Times a model is encoded at most once a target that fits was found; every pass but the first is a correction."""

MISSES = 8
"""Passes without a fit before giving up: from the second on each goes down twice as far as the one before."""

_HINT_DB = 0.3
"""So near the foretold target, that of the version before is tried first: its shards are there."""

_DOUBT = 0.1
"""A foretold size may be too large by this share: the lowest target is tried before a budget is refused for less."""


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

    `foretold` are the bytes of a whole version at every step of the grid, `limit` the most it may have, `hint` a step
    that is worth a try because its shards may be there.
    """

    grid: Grid
    limit: int
    foretold: Floats
    hint: int | None = None
    best: Trial | None = None
    """The highest trial that fits."""
    _measured: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, grid: Grid, limit: int, knots: Sequence[Floats], beside: int, *, hint_db: float | None) -> "Search":
        """A search over the sum of the shards' foretold bytes at the knots, `beside` being what comes to the shards."""
        foretold = grid.fill(np.sum(knots, axis=0)) + beside
        return cls(grid=grid, limit=limit, foretold=foretold, hint=None if hint_db is None else grid.step(hint_db))

    @property
    def passes(self) -> int:
        """Passes that have ended."""
        return len(self._measured)

    def next(self) -> int | None:
        """The step to encode now; None where the search has ended, with or without a `best`."""
        over = [step for step, size in self._measured.items() if size > self.limit]
        if (len(self._measured) >= PASSES and self.best is not None) or len(over) >= MISSES or 0 in over:
            return None
        sizes = self._calibrated()
        guess = highest(sizes, self.limit)
        if guess is None:
            hopeless = not self._measured and sizes[0] * (1 - _DOUBT) > self.limit
            guess = None if hopeless else 0
        elif not self._measured and self.hint is not None and abs(self.hint - guess) <= self.grid.steps(_HINT_DB):
            guess = self.hint
        if guess is None:
            return None
        if len(over) > 1 and self.best is None:
            guess -= 2 ** (len(over) - 2)
        guess = max(0, min([guess, *(step - 1 for step in over)]))
        return None if self.best is not None and guess <= self.best.step else guess

    def note(self, trial: Trial) -> None:
        """A pass has ended."""
        self._measured[trial.step] = trial.bytes
        if trial.bytes <= self.limit and (self.best is None or trial.step > self.best.step):
            self.best = trial

    def least(self) -> tuple[int, bool]:
        """(bytes at the lowest target, whether they were counted and not foretold)."""
        found = self._measured.get(0)
        return (round(float(self._calibrated()[0])), False) if found is None else (found, True)

    def _calibrated(self) -> Floats:
        """The foretold sizes, scaled to the pass that came nearest to the limit."""
        if not self._measured:
            return self.foretold
        step, size = min(self._measured.items(), key=lambda item: abs(item[1] - self.limit))
        scaled: Floats = self.foretold * (size / self.foretold[step])
        return scaled
