"""Bits where the output feels them: a target for each tensor, from what the model's outputs feel of its weights.

Quantised with step h, a tensor moves the outputs by S h^2 / 12 a weight, S being its mean sensitivity (see
`statistics`) times the share that feedback leaves of the error (see `feedback.left`). The least sum of these for so
many bits has one S h^2 for all: 10 log10(S rms^2) dB more for a tensor than for one whose S rms^2 is 1. Four fifths of
that are taken, step ~ rms^(1/5) S^(-2/5): the linear model breaks down where tensors that hardly move the outputs would
lose all their weights. Of 0.65, 0.75, 0.85 and 1 the middle ones are the best on LiteMedSAM's masks, and alike.

Tensors of few weights may want far more than the 48 dB at which other allocations end: depthwise convolutions of
LiteMedSAM up to 63. Cut at 48, their errors would be more than all that feedback leaves of the others'.

A target is nominal: it says the step, h = sqrt(12) rms 10^(-target/20), which single nodes take where it is fine. What
a tensor's weights then come to is not the aim (feedback trades their error for the output's).

Worked example: a matrix of rms 0.1 with S = 100 has S rms^2 = 1 and gain 0, one of rms 0.1 with S = 10 has gain
8 * log10(0.1) = -8 dB. With equally many weights their mean gain is -4, and for a target of 30 dB they get 34 and
26 dB; the first has rms * sqrt(12) * 10^(-34/20) = 0.1 * 3.4641 * 0.019953 = 0.0069118 as its step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from torch import Tensor

from birkhoff.codec import budget
from birkhoff.codec.metrics import bulk
from birkhoff.codec.output.targets import FIXED_POINT_DB, targets_db
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import fallback

POWER = 0.8
"""Share of the gain that is taken."""

_BIT_DB = 20 * math.log10(2)
"""What a bit more brings."""

_LEAST = 1e-9
"""Sensitivities below this share of the median count as none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What decides a tensor's share: how many weights it has, the root mean square of their bulk, their mean
    sensitivity (0 where no output feels them, or nobody asked), and the share of the outputs' error that feedback
    leaves."""

    weights: int
    rms: float
    sensitivity: float
    left: float = 1.0


def root_mean_square(weight: Tensor) -> float:
    """Of the bulk of real weights of any shape and dtype (see `metrics`), in their unit."""
    energy = sum(float(part.to(weight.dtype).double().square().sum()) for part in weight.reshape(-1).split(1 << 20))
    return math.sqrt(bulk(weight, energy).energy / max(1, weight.numel()))


def gains_db(tensors: Mapping[str, Felt]) -> dict[str, float]:
    """What each tensor gets above the mean of all weights, dB, by name, rounded to 0.01 dB.

    A tensor that no output feels gets what the median one would with its root mean square; weights of zeros get 0.
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
    """The step of single nodes at a nominal target, in the weights' unit."""
    return math.sqrt(12) * rms * 10 ** (-target_db / 20)


def sizes(
    tensors: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    gains: Mapping[str, float],
    targets: Sequence[float],
) -> budget.Floats:
    """Estimated bytes of a whole model at each of some mean targets in dB, the entries in the header included: [T].

    What a budget is solved with, by `budget.highest`: the estimate is `budget.sizes` of each tensor at its own target.
    Feedback spreads weights a little, which the estimate does not know: what comes out is up to a few percent larger.

    Args:
        tensors: on the CPU. decisions: of the same names; those that are lossless follow no target.
        gains: of the coded ones.
    """
    total: budget.Floats = np.zeros(len(targets))
    for name, tensor in tensors.items():
        gain = gains.get(name, 0.0)
        own = [targets_db({name: gain}, target)[name] for target in targets]
        total += tensor_sizes(name, tensor, decisions[name], own)
    return total


def tensor_sizes(name: str, tensor: Tensor, decision: Decision, targets: Sequence[float]) -> budget.Floats:
    """Estimated bytes of one tensor at each of some nominal targets of its own in dB: [T]; else as `sizes`."""
    coarse = np.minimum(targets, FIXED_POINT_DB)
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    follows = decision.action == "coded" and fallback(matrix) is None
    finer = np.array(targets) - coarse if follows else np.zeros(len(targets))
    return budget.sizes(name, tensor, decision, coarse.tolist()) + finer * tensor.numel() / (8 * _BIT_DB)
