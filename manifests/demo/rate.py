"""What the demo model would take when compressed: an estimate for training to watch, free of any codec.

A matrix quantised uniformly with step h and entropy-coded takes about H(round(w / h)) bits a weight; h is chosen for a
signal-to-quantisation-noise ratio of 30 dB, `10 log10(sum w^2 / sum (w - h round(w / h))^2)`. One-dimensional tensors
stay float32, of which byte-plane coding leaves about 27 bits.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TARGET_DB = 30.0
_BITS_LOSSLESS = 27.0
_BYTES_OF_METADATA = 100.0  # per tensor: its name, shape and parameters in the artifact


def estimated_bytes(tensors: Mapping[str, Tensor], *, target_db: float = TARGET_DB) -> float:
    """Bytes that the float32 `tensors` would take compressed, matrices at `target_db`."""
    bits = sum(
        t.numel() * (entropy(t, target_db=target_db) if t.ndim > 1 else _BITS_LOSSLESS) for t in tensors.values()
    )
    return bits / 8 + _BYTES_OF_METADATA * len(tensors)


def estimated_ratio(tensors: Mapping[str, Tensor], *, target_db: float = TARGET_DB) -> float:
    """Float32 bytes of `tensors` over the bytes they would take compressed."""
    return sum(4 * t.numel() for t in tensors.values()) / estimated_bytes(tensors, target_db=target_db)


def entropy(tensor: Tensor, *, target_db: float = TARGET_DB) -> float:
    """Empirical entropy in bits a weight of a float tensor quantised uniformly at `target_db`; 0 if it is all zero."""
    weights = tensor.detach().flatten().double()
    power = float(weights.square().mean())
    if power == 0.0:
        return 0.0
    step = _step(weights, noise=power * 10 ** (-target_db / 10))
    _, counts = torch.round(weights / step).unique(return_counts=True)
    share = counts / weights.numel()
    return float(-(share * share.log2()).sum())


def _step(weights: Tensor, *, noise: float) -> float:
    """The step whose mean square error is `noise`, by bisection around sqrt(12 noise), right for fine steps."""
    fine = math.sqrt(12 * noise)
    low, high = fine / 4, fine * 4
    for _ in range(30):
        step = (low + high) / 2
        error = float((weights - torch.round(weights / step) * step).square().mean())
        low, high = (step, high) if error < noise else (low, step)
    return low
