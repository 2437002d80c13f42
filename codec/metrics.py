"""Measure how far a decoded tensor is from its source: relative, with units, the same everywhere.

An error is judged against the energy of the *bulk* of the weights. Few outliers can carry most of the energy of a
tensor, and an error that is small beside them can be all of what the others hold. The rule, for every tensor:

    While the weights above 16 times the root mean square (fewer than one in 256, whatever they are) carry more than
    half of the energy, they are left out of it, and the root mean square is taken anew, over as many weights as before.
    Zeros alone are not a bulk.

The error of the outliers still counts. Where the rule leaves nothing out, all but the largest 256th part of the weights
hold at least half of the energy, and so lie within 3 dB of the SQNR of the whole.

On a CPU, weights of float32 and shorter types are subtracted and squared in float32 and summed in float64: number k of
a tensor into partial sum k mod 16, these as exactly as float64 holds their sum. So a step that is found by an error
does not depend on the machine's vectors, on threads, or on how a tensor was cut.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec.native.library import native, pointer

_CHUNK = 1 << 20
"""Elements looked at together: bounds the float32 copies of a large tensor."""

OUTLIER_RMS = 16.0
"""Outliers are greater than so many times the root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Error of a decoded tensor against its source.

    `energy` is sum w^2 of the bulk and `error` is sum (w - w')^2, in the weights' unit squared; `max_abs` and
    `mean_abs` are the greatest and mean |w - w'|, in the weights' unit.
    """

    energy: float
    error: float
    max_abs: float
    mean_abs: float

    @property
    def sqnr_db(self) -> float:
        """10*log10(energy / error) in dB; infinite if nothing was lost."""
        return sqnr_db(self.energy, self.error)


def sqnr_db(energy: float, error: float) -> float:
    """10*log10(energy / error), infinite for no error, -infinite for an error without end or against no energy."""
    if error == 0:
        return math.inf
    return 10 * math.log10(energy / error) if energy > 0 and error < math.inf else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """What is left of a tensor's weights without outliers: `energy` is their sum w^2, none is above `limit`."""

    energy: float
    limit: float


def bulk(weight: Tensor, energy: float, greatest: float | None = None, *, exact: bool = False) -> Bulk:
    """Return the bulk of real weights of any shape; `limit` is infinite if there are no outliers.

    `energy` is the sum w^2 of all of them, which every caller has taken already, and `greatest` the greatest |w|, if it
    is known; `exact` as in `compare`.
    """
    found = Bulk(energy=energy, limit=math.inf)
    if not 0 < energy < math.inf:
        return found
    if greatest is None:
        greatest = max(map(abs, to_host(*torch.aminmax(weight))))
    while True:
        limit = OUTLIER_RMS * math.sqrt(found.energy / weight.numel())
        inner = _energy(weight, limit, exact=exact) if greatest > limit else found.energy
        if not 0 < 2 * inner < found.energy:
            return found
        found, greatest = Bulk(energy=inner, limit=limit), limit


def _energy(weight: Tensor, limit: float, *, exact: bool) -> float:
    """Sum of squares of the weights up to a limit."""
    if in_parts(weight):
        return survey(weight, limit).energy
    sums = torch.float64 if exact else None
    flat, energies, energy = weight.reshape(-1), [], 0.0
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(_wide(weight))
        if max(map(abs, to_host(*torch.aminmax(w)))) > limit:  # most chunks have no outlier
            w = w.masked_fill(w.abs() > limit, 0)
        energies.append(w.square().sum(dtype=sums))
    for part in to_host(*energies):  # not by `sum`: Python 3.12 rounds it otherwise than earlier ones
        energy += part
    return energy


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fidelity(source: Tensor, decoded: Tensor, *, exact: bool = False) -> Fidelity:
    """Compare two real tensors of one shape, in float32 (float64 for float64), sums gathered chunk by chunk.

    `exact` as in `compare`.
    """
    if in_parts(source) and in_parts(decoded):
        seen = survey(source)
        found, greatest = _compared(source, decoded, seen.energy), max(-seen.low, seen.high)
        return replace(found, energy=bulk(source, found.energy, greatest).energy)
    found = compare(source, decoded, exact=exact)
    return replace(found, energy=bulk(source, found.energy, exact=exact).energy)


def compare(source: Tensor, decoded: Tensor, *, exact: bool = False) -> Fidelity:
    """`fidelity` with the energy of all weights, outliers too: what can be summed over the parts of a tensor.

    `exact` takes sums in float64, as they are on a CPU: then every device finds the same but for some 1e-15 of it,
    whatever the order in which it adds.
    """
    if in_parts(source) and in_parts(decoded):
        return _compared(source, decoded, survey(source).energy)
    energy = error = absolute = greatest = 0.0
    found: list[Tensor] = []
    wide, sums = _wide(source), torch.float64 if exact else None
    flat, other = source.reshape(-1), decoded.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(wide)
        d = other[start : start + _CHUNK].to(wide).sub(w).abs_()
        found += w.square().sum(dtype=sums), d.sum(dtype=sums), d.max().to(sums or wide), d.square_().sum(dtype=sums)
    numbers = iter(to_host(*found))
    for energy_, absolute_, greatest_, error_ in zip(numbers, numbers, numbers, numbers, strict=True):
        energy, absolute, error = energy + energy_, absolute + absolute_, error + error_
        greatest = max(greatest, greatest_)
    return Fidelity(energy=energy, error=error, max_abs=greatest, mean_abs=absolute / max(1, flat.numel()))


def _compared(source: Tensor, decoded: Tensor, energy: float) -> Fidelity:
    errors = Errors()
    errors.add(source, decoded)
    return errors.fidelity(energy)


def in_parts(weight: Tensor) -> bool:
    """Whether sums over these weights are taken in `PARTS`: on a CPU, of float32 and shorter types."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


PARTS = 16
"""Partial sums of a tensor on a CPU: number k belongs to k mod PARTS."""

_ERRORS = np.dtype([("error", "f8", PARTS), ("absolute", "f8", PARTS), ("most", "f4", PARTS)], align=True)
_RANGE = np.dtype(
    [("energy", "f8", PARTS), ("least", "f4", PARTS), ("most", "f4", PARTS), ("broken", "i4")], align=True
)
"""As `native.c` has them."""

Array = npt.NDArray[np.float32]


class Errors:
    """Errors of decoded weights, gathered part by part in their order; for what is `in_parts`."""

    def __init__(self) -> None:
        self.sums: npt.NDArray[np.void] = np.zeros(1, dtype=_ERRORS)
        self.count: int = 0

    def add(self, source: Tensor, decoded: Tensor) -> None:
        """Take the next weights, both of one shape."""
        flat, other = source.reshape(-1), decoded.reshape(-1)
        library = native()
        for start in range(0, flat.numel(), _CHUNK):
            w, d = (t[start : start + _CHUNK].to(torch.float32).contiguous() for t in (flat, other))
            if library is None:
                self._add(w.numpy(), d.numpy())
            else:
                library.birkhoff_compare(w.data_ptr(), d.data_ptr(), w.numel(), self.count, pointer(self.sums))
            self.count += w.numel()

    def _add(self, source: Array, decoded: Array) -> None:
        with np.errstate(all="ignore"):
            difference = decoded - source
            self.sums["error"] = _added(self.sums["error"][0], difference * difference, self.count)
        size = np.abs(difference)
        self.sums["absolute"] = _added(self.sums["absolute"][0], size, self.count)
        self.sums["most"][0, 0] = np.fmax(self.sums["most"][0, 0], np.fmax.reduce(size))

    def fidelity(self, energy: float) -> Fidelity:
        """What was gathered, against an energy."""
        (sums,) = self.sums
        return Fidelity(
            energy=energy,
            error=math.fsum(sums["error"]),
            max_abs=float(sums["most"].max()),
            mean_abs=math.fsum(sums["absolute"]) / max(1, self.count),
        )


class Survey(NamedTuple):
    """The least and the greatest of some weights, the sum of their squares, and whether all are whole numbers.

    The energy tells whether one is NaN or infinite: then it is so too, and the others mean nothing.
    """

    low: float
    high: float
    energy: float
    whole: bool


def survey(weight: Tensor, limit: float = math.inf) -> Survey:
    """Look once through weights that are `in_parts`; the squares of those above `limit` are left out."""
    found = np.zeros(1, dtype=_RANGE)
    found["least"], found["most"] = math.inf, -math.inf
    flat, library = weight.detach().reshape(-1), native()
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(torch.float32).contiguous()
        if library is None:
            _look(w.numpy(), start, np.float32(limit), found)
        else:
            library.birkhoff_survey(w.data_ptr(), w.numel(), start, limit, pointer(found))
    (sums,) = found
    return Survey(float(sums["least"].min()), float(sums["most"].max()), math.fsum(sums["energy"]), not sums["broken"])


def _look(weight: Array, first: int, limit: np.float32, found: npt.NDArray[np.void]) -> None:
    with np.errstate(all="ignore"):
        squares = np.where(np.abs(weight) > limit, np.float32(0), weight * weight)
        whole = (np.abs(weight) < np.float32(1 << 31)) & (weight == np.trunc(weight))
    found["energy"] = _added(found["energy"][0], squares, first)
    found["least"][0, 0] = np.fmin(found["least"][0, 0], np.fmin.reduce(weight))
    found["most"][0, 0] = np.fmax(found["most"][0, 0], np.fmax.reduce(weight))
    found["broken"] |= not whole.all()


def _added(sums: npt.NDArray[np.float64], numbers: Array, first: int) -> npt.NDArray[np.float64]:
    """Partial sums [16] with the numbers of a tensor from `first` on added to them, one after the other."""
    ahead = first % PARTS
    rows = np.zeros((1 + -(-(ahead + len(numbers)) // PARTS), PARTS))
    rows[0] = sums
    rows[1:].reshape(-1)[ahead : ahead + len(numbers)] = numbers
    result: npt.NDArray[np.float64] = np.add.accumulate(rows, axis=0)[-1]
    return result


def to_host(*scalars: Tensor) -> list[float]:
    """Return the values of scalars of one device and dtype, in one copy: a GPU is waited for once, not for each."""
    if not scalars or scalars[0].device.type == "cpu":
        return list(map(float, scalars))
    values: list[float] = torch.stack(scalars).tolist()
    return values
