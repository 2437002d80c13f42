"""Estimated bytes of a tensor with a base at every target: what budgets are solved with, and `plan` tells.

Of a difference and the direct form the smaller is taken, as `encode` does. The direct form is estimated by
`codec.budget`, the difference at some targets from a sample (see `find`), and as straight between them.

Shapes: T = targets.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from birkhoff.codec import budget
from birkhoff.codec.container import CodedTensor
from birkhoff.codec.difference.encode import ENTRY_BYTES, is_for, path_of
from birkhoff.codec.difference.find import estimates
from birkhoff.codec.output.allocation import tensor_sizes
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import TARGET_DB_RANGE, Decision
from birkhoff.codec.tensor import LEAST_PATH, fallback, lattice_of

_EVERY_DB = 2.0
"""Targets at which differences are estimated lie so far apart."""


def sizes(
    name: str, tensor: Tensor, decision: Decision, targets_db: Sequence[float], base: CodedTensor | None = None
) -> budget.Floats:
    """Estimated bytes of a tensor at each of some targets of its own in dB, its entry in the header included: [T].

    Args:
        tensor: of any shape and stored dtype, on the CPU.
        decision: for codec `lattice`, or lossless; its own target is ignored.
        base: what it may be a difference to.

    Raises:
        TensorError: as `encode_tensor`.
        FormatError: the base's streams are not what its entry declares.
    """
    direct = (tensor_sizes if decision.nominal else budget.sizes)(name, tensor, decision, targets_db)
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
    # Above what other allocations end at a weight is a number of 16 bits, which has no difference.
    difference = np.where(np.asarray(targets_db) > high, np.inf, bits * matrix.numel() / 8 + ENTRY_BYTES)
    smaller: budget.Floats = np.minimum(direct, difference)
    return smaller
