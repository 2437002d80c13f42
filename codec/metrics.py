"""Measure how far a decoded tensor is from its source, as a ratio or with units, the same on every machine.

The reference for an error is the energy of the *bulk* of the weights. A few outliers can carry most of a tensor's
energy, and an error that is small next to them can exceed all other weights. One rule holds for every tensor:

    While the weights above 16 times the root mean square (always fewer than one in 256) carry more than half of the
    energy, leave them out of it, and compute the root mean square again, over the same number of weights. Stop before
    only zeros remain.

The error of the outliers still counts. If the rule leaves nothing out, at least half of the energy belongs to all but
the largest 256th of the weights, so their SQNR is within 3 dB of the whole tensor's.

On a CPU, weights of float32 and shorter types are subtracted and squared in float32 and summed in float64. Weight k of
a tensor goes into partial sum k mod 16, and the partial sums are added as exactly as float64 allows. So a step that
depends on an error does not depend on the machine's vectors, on threads, or on how the tensor was divided.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.survey import PARTS, Array, Bulk, Survey, Surveying, added
from birkhoff.codec.native.survey import bulk as bulk_of

_CHUNK = 1 << 20
"""Elements processed together, which bounds the float32 copies of a large tensor."""


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
        """Return 10*log10(energy / error) in dB; infinite for no error."""
        return sqnr_db(self.energy, self.error)


def sqnr_db(energy: float, error: float) -> float:
    """Return 10*log10(energy / error): infinite for no error, -infinite for an infinite error or no energy."""
    if error == 0:
        return math.inf
    return 10 * math.log10(energy / error) if energy > 0 and error < math.inf else -math.inf


def bulk(weight: Tensor, energy: float, greatest: float | None = None, *, exact: bool = False) -> Bulk:
    """Return the bulk of real weights of any shape. `limit` is infinite if there are no outliers.

    `energy` is sum w^2 of all weights, which every caller has already computed. `greatest` is the greatest |w|, if
    known. `exact` is as in `compare`.
    """
    if not 0 < energy < math.inf:
        return Bulk(energy=energy, limit=math.inf)
    greatest = greatest_of(weight) if greatest is None else greatest
    return bulk_of(weight.numel(), energy, greatest, lambda limit: _energy(weight, limit, exact=exact))


def _energy(weight: Tensor, limit: float, *, exact: bool) -> float:
    """Return the sum of squares of the weights up to a limit."""
    if in_parts(weight):
        return survey(weight, limit).energy
    sums = torch.float64 if exact else None
    flat, energies, energy = weight.reshape(-1), [], 0.0
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(_wide(weight))
        if max(map(abs, to_host(*torch.aminmax(w)))) > limit:  # most chunks have no outliers
            w = w.masked_fill(w.abs() > limit, 0)
        energies.append(w.square().sum(dtype=sums))
    for part in to_host(*energies):  # not by `sum`, which rounds otherwise since Python 3.12
        energy += part
    return energy


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fidelity(source: Tensor, decoded: Tensor, *, exact: bool = False) -> Fidelity:
    """Compare two real tensors of one shape, in float32 (float64 for float64), chunk by chunk.

    `exact` is as in `compare`.
    """
    if in_parts(source) and in_parts(decoded):
        seen = survey(source)
        found = _compared(source, decoded, seen.energy)
        return replace(found, energy=bulk(source, found.energy, seen.greatest).energy)
    found = compare(source, decoded, exact=exact)
    return replace(found, energy=bulk(source, found.energy, exact=exact).energy)


def compare(source: Tensor, decoded: Tensor, *, exact: bool = False) -> Fidelity:
    """Compare like `fidelity`, but with the energy of all weights including outliers, which adds up over parts.

    `exact` computes sums in float64, as on a CPU. Then all devices agree to about 1e-15, in whatever order they add.
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
    """Return whether sums over these weights use `PARTS`: on a CPU, for float32 and shorter types."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


_ERRORS = np.dtype([("error", "f8", PARTS), ("absolute", "f8", PARTS), ("most", "f4", PARTS)], align=True)
"""The same layout as in `native.c`."""


class Errors:
    """Errors of decoded weights, added part by part in order, for tensors that are `in_parts`."""

    def __init__(self) -> None:
        self.sums: npt.NDArray[np.void] = np.zeros(1, dtype=_ERRORS)
        self.count: int = 0

    def add(self, source: Tensor, decoded: Tensor) -> None:
        """Add the next weights. Both tensors have one shape."""
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
            self.sums["error"] = added(self.sums["error"][0], difference * difference, self.count)
        size = np.abs(difference)
        self.sums["absolute"] = added(self.sums["absolute"][0], size, self.count)
        self.sums["most"][0, 0] = np.fmax(self.sums["most"][0, 0], np.fmax.reduce(size))

    def fidelity(self, energy: float) -> Fidelity:
        """Return the errors added so far, relative to an energy."""
        (sums,) = self.sums
        return Fidelity(
            energy=energy,
            error=math.fsum(sums["error"]),
            max_abs=float(sums["most"].max()),
            mean_abs=math.fsum(sums["absolute"]) / max(1, self.count),
        )


def survey(weight: Tensor, limit: float = math.inf) -> Survey:
    """Survey weights that are `in_parts`, in one pass. The sum leaves out squares of those above `limit`."""
    found = Surveying(limit)
    for part in weight.detach().reshape(-1).split(_CHUNK):
        found.add(part.to(torch.float32).contiguous().numpy())
    return found.survey()


def greatest_of(weight: Tensor) -> float:
    """Return the greatest |w| of finite weights."""
    return survey(weight).greatest if in_parts(weight) else max(map(abs, to_host(*torch.aminmax(weight))))


def to_host(*scalars: Tensor) -> list[float]:
    """Copy scalars of one device and dtype to the host. A single copy waits for a GPU only once."""
    if not scalars or scalars[0].device.type == "cpu":
        return list(map(float, scalars))
    values: list[float] = torch.stack(scalars).tolist()
    return values
