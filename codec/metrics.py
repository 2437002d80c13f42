"""Measure how far a decoded tensor is from its source: relative, with units, the same everywhere.

An error is judged against the energy of the *bulk* of the weights. Few outliers can carry most of the energy of a
tensor, and an error that is small beside them can be all of what the others hold. The rule, for every tensor:

    While the weights above 16 times the root mean square (fewer than one in 256, whatever they are) carry more than
    half of the energy, they are left out of it, and the root mean square is taken anew, over as many weights as before.
    Zeros alone are not a bulk.

The error of the outliers still counts. Where the rule leaves nothing out, all but the largest 256th part of the weights
hold at least half of the energy, and so lie within 3 dB of the SQNR of the whole.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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


def bulk(weight: Tensor, energy: float) -> Bulk:
    """Return the bulk of real weights of any shape; `limit` is infinite if there are no outliers.

    `energy` is the sum w^2 of all of them, which every caller has taken already.
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
    """Sum of squares of the weights up to a limit."""
    flat, energies, energy = weight.reshape(-1), [], 0.0
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(_wide(weight))
        if max(map(abs, to_host(*torch.aminmax(w)))) > limit:  # most chunks have no outlier
            w = w.masked_fill(w.abs() > limit, 0)
        energies.append(w.square().sum())
    for part in to_host(*energies):  # not by `sum`: Python 3.12 rounds it otherwise than earlier ones
        energy += part
    return energy


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fidelity(source: Tensor, decoded: Tensor) -> Fidelity:
    """Compare two real tensors of one shape, in float32 (float64 for float64), sums gathered chunk by chunk."""
    found = compare(source, decoded)
    return replace(found, energy=bulk(source, found.energy).energy)


def compare(source: Tensor, decoded: Tensor) -> Fidelity:
    """`fidelity` with the energy of all weights, outliers too: what can be summed over the parts of a tensor."""
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
    """Return the values of scalars of one device and dtype, in one copy: a GPU is waited for once, not for each."""
    if not scalars or scalars[0].device.type == "cpu":
        return list(map(float, scalars))
    values: list[float] = torch.stack(scalars).tolist()
    return values
