"""How far a decoded tensor is from its source: relative, with units, the same everywhere."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements looked at together: bounds the float32 copies of a large tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Error of a decoded tensor against its source.

    `energy` is sum w^2 and `error` is sum (w - w')^2, in the weights' unit squared; `max_abs` and `mean_abs` are the
    greatest and mean |w - w'|, in the weights' unit.
    """

    energy: float
    error: float
    max_abs: float
    mean_abs: float

    @property
    def sqnr_db(self) -> float:
        """10*log10(sum w^2 / sum (w - w')^2) in dB; infinite where nothing was lost."""
        return sqnr_db(self.energy, self.error)


def sqnr_db(energy: float, error: float) -> float:
    """10*log10(energy / error), infinite for no error."""
    if error == 0:
        return math.inf
    return 10 * math.log10(energy / error) if energy > 0 else -math.inf


def fidelity(source: Tensor, decoded: Tensor) -> Fidelity:
    """Compare two real tensors of one shape, in float32 (float64 for float64), sums gathered chunk by chunk."""
    energy = error = absolute = greatest = 0.0
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    flat, other = source.reshape(-1), decoded.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        w = flat[start : start + _CHUNK].to(wide)
        d = other[start : start + _CHUNK].to(wide).sub(w).abs_()
        energy += float(w.square().sum())
        absolute += float(d.sum())
        greatest = max(greatest, float(d.max()))
        error += float(d.square_().sum())
    return Fidelity(energy=energy, error=error, max_abs=greatest, mean_abs=absolute / max(1, flat.numel()))
