"""One tensor to its stored form at a nominal target, with feedback where that lowers the output's error.

What comes out is what every reader knows: coordinates, a step, and on which paths they lie.
"""

import math

import torch
from torch import Tensor

from birkhoff.codec import lattice, planes, rate
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import feedback
from birkhoff.codec.output.allocation import root_mean_square, step
from birkhoff.codec.output.targets import FIXED_POINT_DB, RANGE_DB
from birkhoff.codec.pairs import matrix_shape, pairs_per_row
from birkhoff.codec.tensor import LEAST_PATH, MOST_ESCAPED, Encoded, encoded_code, fall_back, fallback
from birkhoff.codec.trajectory import N

_LEAST_ERROR = 1e-30
"""Of an output, where none is left."""

REFINEMENTS = 2
"""Times that single nodes are all rounded once more."""

REFINED_BITS = 0.08
"""More than that saves a weight, at equal error of the output: 0.06 bits, where paths save up to 0.17 above 2 bits and
nothing at 1.5."""

_LOSS_SLACK = 1e-4
"""Sums may be taken in another order, and a Hessian on another device."""


def encode(name: str, tensor: Tensor, target_db: float, hessian_KK: Tensor | None, *, path: bool = True) -> Encoded:
    """Code one tensor for a nominal target (see `allocation`), whatever SQNR its weights then have.

    With a Hessian (of the columns in which the codec holds the tensor, on its device) errors are fed back, in single
    nodes or in paths of the trellis down the columns: whichever takes fewer bits for the same error of the output, a
    bit being worth 6.02 dB. Where that does not lower the output's error below that of nodes rounded each for itself,
    these are taken. Without a Hessian weights are rounded each for itself, in paths where those take fewer bits.

    From `FIXED_POINT_DB` on, where more and more nodes of pairs are escapes, a weight is a number of 16 bits, which the
    format holds as a pair without a second weight, x = (I + J/256) h. HyperLinear is built from pairs: a linear layer
    of such a matrix is loaded dense.

    Args:
        tensor: of any shape and dtype that is coded, finite.
        path: search paths of the trellis.

    Raises:
        TargetError: the target is out of range.
        TensorError: the Hessian is none.
    """
    low, high = RANGE_DB
    if not low <= target_db <= high:
        raise TargetError(f"tensor {name!r}: target {target_db:g} dB is outside {low:g}..{high:g} dB")
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    reason = fallback(matrix)
    if reason is not None:
        return fall_back(name, tensor, reason)
    single = nominal_step(matrix, target_db)
    fixed = is_fixed(target_db)
    code, kind = (_fixed_point(matrix, single), 0) if fixed else _plain(matrix, single, path=path)
    if hessian_KK is not None:
        fed, fed_kind, error_fed = _fed_back(matrix, single, hessian_KK, path=path, fixed=fixed)
        if error_fed < feedback.output_error(matrix, code, hessian_KK):
            code, kind = fed, fed_kind
    decoded = code.decode(matrix.dtype).view(matrix.shape)
    error = fidelity(matrix, decoded)
    if not error.error < math.inf:
        return fall_back(name, tensor, "range")
    if not bool(decoded.any()):  # weights that are all about as large, at 4 dB or less
        return fall_back(name, tensor, "target")
    return encoded_code(name, tensor, code, error, path=kind)


def nominal_step(matrix: Tensor, target_db: float) -> float:
    """The step of single nodes that a nominal target gives weights, as the float32 that is stored."""
    return _round(step(root_mean_square(matrix), target_db))


def stored_step(tensor: Tensor, target_db: float, *, path: int, columns: int) -> float:
    """The step that `encode` stores for a tensor that it codes: what a check expects.

    `path` is the kind of its paths, `columns` those of its code: what tells fixed point, which older versions begin at
    other targets.
    """
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    single = nominal_step(matrix, target_db)
    if columns != matrix.shape[1]:
        return N * single
    return _round(single * _path_step(matrix, path)) if path else single


def is_no_worse(
    tensor: Tensor, code: LatticeTensor, target_db: float, hessian_KK: Tensor | None, *, path: bool
) -> bool:
    """Whether a code's output error is at most that of nodes rounded each for itself, in paths where `path` allows it.

    Without a Hessian every output counts alike, so that the weights' own error does.
    """
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    single = nominal_step(matrix, target_db)

    def loss(of: LatticeTensor) -> float:
        if hessian_KK is not None:
            return feedback.output_error(matrix, of, hessian_KK)
        error = matrix.to(torch.float32) - of.decode(torch.float32).view(matrix.shape)
        return float(error.square_().sum(dtype=torch.float64))

    most = loss(code) * (1 - _LOSS_SLACK)
    if code.columns != matrix.shape[1]:
        return most <= loss(_fixed_point(matrix, single))
    # The search for a path takes longest: only where the nodes have not told.
    return most <= loss(lattice.quantise(matrix, single)) or most <= loss(_plain(matrix, single, path=path)[0])


def is_fixed(target_db: float) -> bool:
    """Whether weights are numbers of 16 bits at a nominal target."""
    return target_db >= FIXED_POINT_DB


def _path_step(matrix: Tensor, kind: int) -> float:
    rows, columns = matrix.shape
    if kind == feedback.DOWN:
        return feedback.path_step(rows, columns)
    return rate.path_step(rows * pairs_per_row(columns))


def _fed_back(
    matrix: Tensor, single: float, hessian_KK: Tensor, *, path: bool, fixed: bool
) -> tuple[LatticeTensor, int, float]:
    """Code, kind of its paths, and the error of the output."""
    factor = feedback.factorise(hessian_KK)
    if fixed:
        code = _of_numbers(feedback.numbers(matrix, single, factor), single)
        return code, 0, feedback.output_error(matrix, code, hessian_KK)
    code = feedback.quantise(matrix, single, factor)
    nodes = code, 0, feedback.output_error(matrix, code, hessian_KK)
    if not path or matrix.numel() < LEAST_PATH:
        return refined(matrix, nodes, hessian_KK, factor)
    code = feedback.quantise(matrix, _round(single * _path_step(matrix, feedback.DOWN)), factor, path=True)
    if not _is_short(code):
        return refined(matrix, nodes, hessian_KK, factor)
    paths = code, feedback.DOWN, feedback.output_error(matrix, code, hessian_KK)
    if bits_at_equal_error(nodes) - REFINED_BITS * matrix.numel() < bits_at_equal_error(paths):
        nodes = refined(matrix, nodes, hessian_KK, factor)
    return min(nodes, paths, key=bits_at_equal_error)


def refined(
    matrix: Tensor, nodes: tuple[LatticeTensor, int, float], hessian_KK: Tensor, factor: feedback.Factor
) -> tuple[LatticeTensor, int, float]:
    """Single nodes (code, 0, error of the output) rounded again while that lowers the error."""
    for _ in range(REFINEMENTS):
        code = feedback.refine(matrix, nodes[0], hessian_KK, factor)
        error = feedback.output_error(matrix, code, hessian_KK)
        if error >= nodes[2]:
            break
        nodes = code, 0, error
    return nodes


def bits_at_equal_error(choice: tuple[LatticeTensor, int, float]) -> float:
    """The bits that (code, kind of its paths, error of the output) takes, and what an error of 1 would take more."""
    code, kind, error = choice
    streams, _ = planes.pack(code, path=kind)
    weights = code.i.shape[0] * code.columns
    return 8 * sum(map(len, streams)) + weights * 0.5 * math.log2(max(error, _LEAST_ERROR))


def _plain(matrix: Tensor, single: float, *, path: bool) -> tuple[LatticeTensor, int]:
    if path and matrix.numel() >= LEAST_PATH:
        try:
            code = lattice.quantise_path(matrix, _round(single * _path_step(matrix, 1)))
        except TargetError:  # weights too many steps long
            pass
        else:
            if _is_short(code):
                return code, 1
    return lattice.quantise(matrix, single), 0


def _fixed_point(matrix: Tensor, single: float) -> LatticeTensor:
    """Weights as whole multiples of `single`, each a row of one pair that has no second weight."""
    return _of_numbers(torch.round(matrix.double() / single), single)


def _of_numbers(n: Tensor, single: float) -> LatticeTensor:
    n = n.reshape(-1, 1)
    i = torch.floor((n + N // 2) / N)
    return lattice.of_coordinates(i.float(), (n - N * i).float(), N * single, 1)


def _is_short(code: LatticeTensor) -> bool:
    """Whether few enough of a path's coordinates are escapes in memory."""
    return len(code.escapes) <= MOST_ESCAPED * code.i.numel()


def _round(value: float) -> float:
    """The step as the float32 that is stored."""
    return float(torch.tensor(value, dtype=torch.float32))
