"""Survey weights on a CPU: their range, sum of squares and bulk, natively or in numpy, without torch.

`metrics` says what the bulk is, and why sums are taken in parts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from birkhoff.codec.native.library import native, pointer

OUTLIER_RMS = 16.0
"""Weights above this multiple of the root mean square are outliers."""

PARTS = 16
"""Number of partial sums of a tensor on a CPU. Weight k belongs to sum k mod PARTS."""

_RANGE = np.dtype(
    [("energy", "f8", PARTS), ("least", "f4", PARTS), ("most", "f4", PARTS), ("broken", "i4")], align=True
)
"""The same layout as in `native.c`."""

Array = npt.NDArray[np.float32]


class Survey(NamedTuple):
    """The least and the greatest weight, the sum of squares, and whether all weights are whole numbers.

    If a weight is NaN or infinite, so is the energy, and the other fields mean nothing.
    """

    low: float
    high: float
    energy: float
    whole: bool

    @property
    def greatest(self) -> float:
        """The greatest |w|."""
        return max(-self.low, self.high)


class Surveying:
    """A survey of weights that are added part by part, in order. The sum leaves out squares of those above `limit`."""

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._count = 0
        self._found: npt.NDArray[np.void] = np.zeros(1, dtype=_RANGE)
        self._found["least"], self._found["most"] = math.inf, -math.inf

    def add(self, weights: Array) -> None:
        """Add the next weights, float32 [n], contiguous."""
        library = native()
        if not len(weights):
            return
        if library is None:
            _look(weights, self._count, np.float32(self._limit), self._found)
        else:
            library.birkhoff_survey(pointer(weights), len(weights), self._count, self._limit, pointer(self._found))
        self._count += len(weights)

    def survey(self) -> Survey:
        """Return the survey of what was added."""
        (sums,) = self._found
        whole = not sums["broken"]
        return Survey(float(sums["least"].min()), float(sums["most"].max()), math.fsum(sums["energy"]), whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """A tensor's weights without outliers: `energy` is their sum w^2, and none exceeds `limit`."""

    energy: float
    limit: float


def bulk(count: int, energy: float, greatest: float, within: Callable[[float], float]) -> Bulk:
    """Return the bulk of so many weights. `limit` is infinite if there are no outliers.

    `energy` is sum w^2 of all weights, positive and finite, `greatest` the greatest |w|. `within` returns the sum of
    squares up to a limit.
    """
    found = Bulk(energy=energy, limit=math.inf)
    while True:
        limit = OUTLIER_RMS * math.sqrt(found.energy / count)
        inner = within(limit) if greatest > limit else found.energy
        if not 0 < 2 * inner < found.energy:
            return found
        found, greatest = Bulk(energy=inner, limit=limit), limit


def _look(weight: Array, first: int, limit: np.float32, found: npt.NDArray[np.void]) -> None:
    with np.errstate(all="ignore"):
        squares = np.where(np.abs(weight) > limit, np.float32(0), weight * weight)
        whole = (np.abs(weight) < np.float32(1 << 31)) & (weight == np.trunc(weight))
    found["energy"] = added(found["energy"][0], squares, first)
    found["least"][0, 0] = np.fmin(found["least"][0, 0], np.fmin.reduce(weight))
    found["most"][0, 0] = np.fmax(found["most"][0, 0], np.fmax.reduce(weight))
    found["broken"] |= not whole.all()


def added(sums: npt.NDArray[np.float64], numbers: Array, first: int) -> npt.NDArray[np.float64]:
    """Return the partial sums [16] after adding a tensor's numbers from `first` on, one after the other."""
    ahead = first % PARTS
    rows = np.zeros((1 + -(-(ahead + len(numbers)) // PARTS), PARTS))
    rows[0] = sums
    rows[1:].reshape(-1)[ahead : ahead + len(numbers)] = numbers
    result: npt.NDArray[np.float64] = np.add.accumulate(rows, axis=0)[-1]
    return result
