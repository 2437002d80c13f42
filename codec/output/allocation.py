"""Allocate bits where the outputs are sensitive: give each tensor a target of its own.

Quantised with step h, a tensor moves the outputs by S h^2 / 12 per weight. S is its mean sensitivity (see `statistics`)
times the share of the error that feedback leaves (see `encode.left`). For a given number of bits, the sum over all
tensors is least if S h^2 is the same for all: a tensor gets 10 log10(S rms^2) dB more than one whose S rms^2 is 1. We
use four fifths of that, step ~ rms^(1/5) S^(-2/5), because the linear model breaks down once tensors that hardly move
the outputs lose all their weights. Among 0.65, 0.75, 0.85 and 1 the middle two give the best masks of LiteMedSAM, about
equally good.

Small tensors may need far more than 48 dB, where other allocations end: depthwise convolutions of LiteMedSAM need up to
63. If they stopped at 48, their errors would exceed everything that feedback leaves of the others' errors.

A target is nominal. It determines the step h = sqrt(12) rms 10^(-target/20) of single nodes in a fine lattice. The SQNR
of a tensor's weights is not a goal, because feedback trades their error for that of the outputs.

Worked example: a matrix of rms 0.1 with S = 100 has S rms^2 = 1 and gain 0, one of rms 0.1 with S = 10 has gain
8 * log10(0.1) = -8 dB. With equally many weights their mean gain is -4, and for a target of 30 dB they get 34 and
26 dB. The first has the step rms * sqrt(12) * 10^(-34/20) = 0.1 * 3.4641 * 0.019953 = 0.0069118.

Shapes: T = targets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from torch import Tensor

from birkhoff.codec import budget
from birkhoff.codec.metrics import bulk
from birkhoff.codec.output.targets import targets_db
from birkhoff.codec.profiles import Decision

POWER = 0.8
"""Share of the gain that is used."""

_LEAST = 1e-9
"""Sensitivities below this share of the median count as zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """The statistics that determine a tensor's share: its number of weights, the root mean square of their bulk, their
    mean sensitivity (0 if no output depends on them, or if none was measured), and the share of the outputs' error that
    feedback leaves."""

    weights: int
    rms: float
    sensitivity: float
    left: float = 1.0


def root_mean_square(weight: Tensor) -> float:
    """Return the root mean square of the bulk of real weights (see `metrics`), of any shape and dtype, in their
    unit."""
    energy = sum(float(part.to(weight.dtype).double().square().sum()) for part in weight.reshape(-1).split(1 << 20))
    return math.sqrt(bulk(weight, energy).energy / max(1, weight.numel()))


def gains_db(tensors: Mapping[str, Felt]) -> dict[str, float]:
    """Return each tensor's gain over the mean of all weights, by name, in dB, rounded to 0.01 dB.

    A tensor that no output depends on gets the gain that the median sensitivity gives its root mean square. Weights
    that are all zero get 0.
    """
    felt = [item.sensitivity * item.left for item in tensors.values() if item.sensitivity > 0]
    usual = median(felt) if felt else 1.0

    def gain(item: Felt) -> float:
        found = item.sensitivity * item.left
        found = found if found > _LEAST * usual else usual
        return 10 * POWER * math.log10(found * item.rms**2) if item.rms > 0 else 0.0

    gains = {name: gain(item) for name, item in tensors.items()}
    mean = sum(item.weights * gains[name] for name, item in tensors.items()) / max(1, _weights(tensors.values()))
    return {name: round(value - mean, 2) for name, value in gains.items()}


def _weights(tensors: Iterable[Felt]) -> int:
    return sum(item.weights for item in tensors)


def step(rms: float, target_db: float) -> float:
    """Return the step of single nodes at a nominal target, in the unit of the weights."""
    return math.sqrt(12) * rms * 10 ** (-target_db / 20)


def sizes(
    tensors: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    gains: Mapping[str, float],
    targets: Sequence[float],
) -> budget.Floats:
    """Estimate the bytes of a whole model at each mean target in dB, including the entries in the header: [T].

    `pipeline.plan.grid.highest` solves budgets with the result. The estimate is `budget.sizes` of each tensor at its
    own target. Feedback spreads the weights slightly, which the estimate ignores, so the real size is up to a few
    percent larger.

    Args:
        tensors: On the CPU.
        decisions: By the same names. Lossless ones follow no target.
        gains: Of the coded tensors.
    """
    total: budget.Floats = np.zeros(len(targets))
    for name, tensor in tensors.items():
        gain = gains.get(name, 0.0)
        own = [targets_db({name: gain}, target)[name] for target in targets]
        total += budget.sizes(name, tensor, decisions[name], own)
    return total
