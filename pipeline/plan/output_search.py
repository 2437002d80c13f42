"""Search the lowest target in dB whose version agrees with the original well enough: pure, no I/O.

Each probe is a version that is encoded and proven. It tells how many dB are missing or to spare: for an SQNR of outputs
the difference, for agreement 20 log10 of the ratio of disagreements (on LiteMedSAM 6 dB halve it). So the second probe
is near. The bracket closes by the secant method, and by bisection if two probes in turn fell on the same side.

The search always starts at the same target, whatever was published before, so that equal inputs give equal versions.
"""

import math
from dataclasses import dataclass, field

from birkhoff.pipeline.plan.grid import Grid

RESOLUTION_DB = 0.25
"""Distance between targets that are tried, dB: about 0.8 % of a version's bytes."""

START_DB = 30.0

PROBES = 9
"""Most versions to prove. After that the lowest one that meets the goal is taken."""

_FARTHEST_DB = 20.0
"""Largest step from one probe to the next, dB."""

_LEAST_DISAGREEMENT = 1e-4
"""Replaces a disagreement of zero, whose logarithm is infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The goal: mean agreement of masks, or SQNR of outputs in dB. One is set."""

    agreement: float | None = None
    output_db: float | None = None

    def lacking_db(self, agreement: float | None, output_db: float | None) -> float:
        """Return how many dB more the tensors would need, by the figures of a proof; 0 or less if the goal is met.

        `agreement` None means no agreement at all, `output_db` None no error at all.
        """
        if self.agreement is None:
            assert self.output_db is not None
            return -math.inf if output_db is None else self.output_db - output_db
        if agreement is None:
            return math.inf
        if agreement >= self.agreement:
            return min(0.0, self._ratio_db(agreement))
        return max(RESOLUTION_DB, self._ratio_db(agreement))

    def _ratio_db(self, agreement: float) -> float:
        wanted, found = (max(_LEAST_DISAGREEMENT, 1 - value) for value in (self.agreement or 0.0, agreement))
        return 20 * math.log10(found / wanted)


@dataclass(slots=True, kw_only=True)
class OutputSearch:
    """The search for one model's target. `lowest` is the lowest step of the grid that may be tried."""

    grid: Grid
    lowest: int = 0
    best: int | None = None
    """The lowest step that meets the goal."""
    _lacking: dict[int, float] = field(default_factory=dict)

    @property
    def probes(self) -> int:
        """Number of versions that were proven."""
        return len(self._lacking)

    def note(self, step: int, lacking_db: float) -> None:
        """Record a probe."""
        self._lacking[step] = lacking_db
        if lacking_db <= 0 and (self.best is None or step < self.best):
            self.best = step

    def next(self) -> int | None:
        """Return the step to prove now; None if the search has ended, with or without a `best`."""
        if not self._lacking:
            return self._near(self.grid.step(START_DB))
        if self.probes >= PROBES:
            return None
        below = [step for step, lacking in self._lacking.items() if lacking > 0]
        low = max((step for step in below if self.best is None or step < self.best), default=None)
        every = self.grid.steps(RESOLUTION_DB)
        if self.best is None:
            assert low is not None  # there was a probe
            return self._beyond(low, max(every, self._move(low) + every))
        if low is None:
            return self._beyond(self.best, min(-every, self._move(self.best) - every))
        if self.best - low <= every:
            return None
        return min(max(self._near(self._between(low, self.best)), low + every), self.best - every)

    def _between(self, low: int, high: int) -> int:
        lacking, spare = self._lacking[low], -self._lacking[high]
        *_, before, last = (value > 0 for value in self._lacking.values())
        if before == last or not math.isfinite(lacking + spare):
            return (low + high) // 2
        return low + round((high - low) * lacking / (lacking + spare))

    def _move(self, step: int) -> int:
        """Return the estimated number of steps from a probe to the goal."""
        lacking = self._lacking[step]
        return self.grid.steps(min(_FARTHEST_DB, max(-_FARTHEST_DB, lacking)))

    def _beyond(self, step: int, move: int) -> int | None:
        """Return a step beyond all that were tried; None at the grid's end."""
        found = self._near(step + move)
        return None if found in self._lacking else found

    def _near(self, step: int) -> int:
        """Return the nearest step that may be tried: a multiple of the resolution, or an end."""
        every = self.grid.steps(RESOLUTION_DB)
        last = self.grid.steps(self.grid.high - self.grid.low)
        return min(max(self.lowest, round(step / every) * every), last)
