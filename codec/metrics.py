"""Measure the error of a decoded tensor against its source, the same way on every device.

An error is measured against the energy of the *bulk* of the weights. A few outliers can carry most of a tensor's
energy, and an error that is small beside them can destroy all other weights. The rule, for every tensor:

    While the weights above 16 times the root mean square (always fewer than one in 256) carry more than half of the
    energy, leave them out, and compute the root mean square again, over the original number of weights. Stop if only
    zeros would remain.

The error of the outliers still counts. If the rule leaves nothing out, all but the largest 256th part of the weights
hold at least half of the energy, so their SQNR is within 3 dB of the SQNR of all weights.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements processed together. Bounds the float32 copies of a large tensor."""

OUTLIER_RMS = 16.0
"""Outliers are larger than this multiple of the root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Error of a decoded tensor against its source.

    `energy` is sum w^2 over the bulk and `error` is sum (w - w')^2 over all weights, in squared units of the weights.
    `max_abs` and `mean_abs` are the greatest and the mean |w - w'|.
    """

    energy: float
    error: float
    max_abs: float
    mean_abs: float

    @property
    def sqnr_db(self) -> float:
        """10*log10(energy / error) in dB, infinite without error."""
        return sqnr_db(self.energy, self.error)


def sqnr_db(energy: float, error: float) -> float:
    """Return 10*log10(energy / error): infinite without error, -infinite for an infinite error or for no energy."""
    if error == 0:
        return math.inf
    return 10 * math.log10(energy / error) if energy > 0 and error < math.inf else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """A tensor's weights without outliers: `energy` is their sum w^2, and none is above `limit`."""

    energy: float
    limit: float


def bulk(weight: Tensor, energy: float) -> Bulk:
    """Return the bulk of real weights of any shape. `limit` is infinite if there are no outliers.

    `energy` is sum w^2 of all weights.
    """
    found = Bulk(energy=energy, limit=math.inf)
    if not 0 < energy < math.inf:
        return found
    greatest = max(map(abs, to_host(*torch.aminmax(weight))))
    while True:
        limit = OUTLIER_RMS * math.sqrt(found.energy / weight.numel())
        inner = _energy(weight, limit) if greatest > limit else found.energy
        if not 0 < 2 * inner < found.energy:
            return found
        found, greatest = Bulk(energy=inner, limit=limit), limit


def _energy(weight: Tensor, limit: float) -> float:
    """Return the sum of squares of the weights up to a limit."""
    flat, energies, energy = weight.reshape(-1), [], 0.0
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(_wide(weight))
        if max(map(abs, to_host(*torch.aminmax(w)))) > limit:  # most chunks have no outlier
            w = w.masked_fill(w.abs() > limit, 0)
        energies.append(w.square().sum())
    for part in to_host(*energies):  # not `sum`, which rounds differently since Python 3.12
        energy += part
    return energy


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fidelity(source: Tensor, decoded: Tensor) -> Fidelity:
    """Compare two real tensors of one shape, in float32 (float64 for float64), summed chunk by chunk."""
    found = compare(source, decoded)
    return replace(found, energy=bulk(source, found.energy).energy)


def compare(source: Tensor, decoded: Tensor) -> Fidelity:
    """As `fidelity`, but with the energy of all weights, which can be summed over the parts of a tensor."""
    energy = error = absolute = greatest = 0.0
    found: list[Tensor] = []
    wide = _wide(source)
    flat, other = source.reshape(-1), decoded.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(wide)
        d = other[start : start + _CHUNK].to(wide).sub(w).abs_()
        found += w.square().sum(), d.sum(), d.max(), d.square_().sum()
    numbers = iter(to_host(*found))
    for energy_, absolute_, greatest_, error_ in zip(numbers, numbers, numbers, numbers, strict=True):
        energy, absolute, error = energy + energy_, absolute + absolute_, error + error_
        greatest = max(greatest, greatest_)
    return Fidelity(energy=energy, error=error, max_abs=greatest, mean_abs=absolute / max(1, flat.numel()))


def to_host(*scalars: Tensor) -> list[float]:
    """Return the values of scalars of one device and dtype, in one copy, so that a GPU is synchronized only once."""
    if not scalars or scalars[0].device.type == "cpu":
        return list(map(float, scalars))
    values: list[float] = torch.stack(scalars).tolist()
    return values
