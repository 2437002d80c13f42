"""Estimate the bytes of a tensor with a base at every target, for budgets and for `plan`.

Each size is the smaller of the difference's and the direct form's, because `encode` takes the smaller. `codec.budget`
estimates the direct form. A sample gives the difference at some targets (see `find`), and sizes between these are
interpolated linearly.

Shapes: T = targets.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from birkhoff.codec import budget
from birkhoff.codec.container import CodedTensor
from birkhoff.codec.difference.encode import ENTRY_BYTES, is_for, path_of
from birkhoff.codec.difference.find import estimates
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import TARGET_DB_RANGE, Decision
from birkhoff.codec.tensor import LEAST_PATH, fallback, lattice_of

_EVERY_DB = 2.0
"""Distance in dB between the targets at which differences are estimated."""


def sizes(
    name: str, tensor: Tensor, decision: Decision, targets_db: Sequence[float], base: CodedTensor | None = None
) -> budget.Floats:
    """Estimate the bytes of a tensor at each target in dB, including its entry in the header: [T].

    Args:
        tensor: Of any shape and stored dtype, on the CPU.
        decision: For codec `lattice`, or lossless. Its own target is ignored.
        base: The possible base, or None.

    Raises:
        TensorError: As `encode_tensor`.
        FormatError: The base's streams do not match its entry.
    """
    direct = budget.sizes(name, tensor, decision, targets_db)
    if base is None or not is_for(base, name, tensor, decision):
        return direct
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    if fallback(matrix) is not None:
        return direct
    low, high = TARGET_DB_RANGE
    wanted = np.clip(targets_db, low, high)
    tried = np.arange(wanted.min(), wanted.max() + _EVERY_DB, _EVERY_DB).clip(max=high)
    path = decision.path and matrix.numel() >= LEAST_PATH
    found = estimates(matrix, lattice_of(base), tried.tolist(), path=path, base_path=path_of(base))
    bits = np.interp(wanted, tried, [min(pair) for pair in found])
    # Allocations go to 16-bit weights above the highest target, and those have no difference.
    difference = np.where(np.asarray(targets_db) > high, np.inf, bits * matrix.numel() / 8 + ENTRY_BYTES)
    smaller: budget.Floats = np.minimum(direct, difference)
    return smaller
