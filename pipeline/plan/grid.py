"""The targets that a budget chooses from. Imports no torch: a run needs them before its tasks start."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from birkhoff.codec.profiles import Profile

Floats = npt.NDArray[np.float64]

GRID_DB = 0.05
"""Distance in dB between the targets that a budget chooses from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The targets that a budget can choose from: every `GRID_DB` from `low` to `high`, which are whole numbers of dB.

    Sizes are estimated at the whole dB, the `knots` [T], and interpolated linearly between them.
    """

    low: float
    high: float

    @classmethod
    def of(cls, profile: Profile) -> "Grid":
        """Return the grid of a profile's targets."""
        low, high = profile.target_range
        return cls(low=low, high=high)

    @property
    def knots(self) -> tuple[float, ...]:
        """Targets in dB at which `codec.budget.sizes` are estimated."""
        return tuple(np.arange(self.low, self.high + 1).tolist())

    def target(self, step: int) -> float:
        """Return the target in dB of a step of the grid. Step 0 is the lowest."""
        return round(self.low + step * GRID_DB, 2)

    def step(self, target_db: float) -> int:
        """Return the step nearest to a target in dB."""
        return round((min(max(self.low, target_db), self.high) - self.low) / GRID_DB)

    def steps(self, db: float) -> int:
        """Return the number of steps in a range of dB."""
        return round(db / GRID_DB)

    def fill(self, at_knots: Floats) -> Floats:
        """Return the sizes at every step from those at the knots, [T]. They never decrease."""
        steps = self.steps(self.high - self.low) + 1
        found: Floats = np.interp([self.target(step) for step in range(steps)], self.knots, at_knots)
        return np.maximum.accumulate(found)


def highest(sizes: Floats, limit: float) -> int | None:
    """Return the step with the most bytes within `limit`, the lowest of equals; None if none fits. `sizes` must not
    decrease."""
    if sizes[0] > limit:
        return None
    last = int(np.searchsorted(sizes, limit, side="right")) - 1
    return int(np.searchsorted(sizes, sizes[last]))
