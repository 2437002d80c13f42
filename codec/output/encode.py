"""Encode one tensor at a nominal target, with error feedback if that lowers the outputs' error.

Readers need nothing new: the result consists of coordinates, a step, and the kind of paths.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from birkhoff.codec import lattice, planes, rate
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import feedback, rows
from birkhoff.codec.output.allocation import root_mean_square, step
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.targets import RANGE_DB
from birkhoff.codec.pairs import matrix_shape, pairs_per_row
from birkhoff.codec.profiles import FIXED_POINT_DB
from birkhoff.codec.tensor import LEAST_PATH, MOST_ESCAPED, Encoded, encoded_code, fall_back, fallback
from birkhoff.codec.trajectory import N

_LEAST_ERROR = 1e-30
"""Stands for an output error of 0."""

REFINEMENTS = 2
"""Number of times that all single nodes are rounded again."""

REFINED_BITS = 0.08
"""Bits per weight that refinement cannot save. It saves 0.06 at equal error of the outputs, while paths save up to 0.17
above 2 bits and nothing at 1.5."""

PATHS_FROM = 3.0
"""Bits per weight from which paths with feedback between rows are taken without a look at single nodes, which take as
long to find and win below 2 bits, or where the order of the rows matters most."""

_LOSS_SLACK = 1e-4
"""Relative tolerance, because another device may sum in another order or hold the Hessian."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to code a matrix: its coordinates, the kind of their paths, and the error of the outputs."""

    code: LatticeTensor
    kind: int
    error: float

    @cached_property
    def packed(self) -> planes.Packed:
        """The streams, which both a comparison and the tensor that is stored need."""
        return planes.pack(self.code, path=self.kind)

    @property
    def bits(self) -> int:
        """Stored bits of the streams."""
        return 8 * sum(map(len, self.packed[0]))

    @property
    def bits_at_equal_error(self) -> float:
        """Bits when scaled to an error of 1."""
        weights = self.code.i.shape[0] * self.code.columns
        return self.bits + weights * 0.5 * math.log2(max(self.error, _LEAST_ERROR))


def encode(name: str, tensor: Tensor, target_db: float, hessian: Hessian | None, *, path: bool = True) -> Encoded:
    """Code one tensor at a nominal target (see `allocation`), whatever the SQNR of its weights.

    With a Hessian (of the matrix in which the codec holds the tensor, on its device) errors are fed back, in single
    nodes or in trellis paths down the columns. The form with fewer bits at the same error of the outputs wins; one bit
    counts as 6.02 dB. With feedback between rows, paths of `PATHS_FROM` bits and more win without a look at nodes. If
    neither lowers the outputs' error below that of rounding each node on its own, the result is that rounding. Without
    a Hessian, each weight is rounded on its own, in paths if those take fewer bits.

    From `FIXED_POINT_DB` on, more and more nodes of pairs would be escapes. There a weight is a 16-bit number, which
    the format holds as a pair without a second weight, x = (I + J/256) h. HyperLinear needs pairs, so a linear layer
    with such a matrix is loaded dense.

    Args:
        tensor: Finite, of any shape and of a dtype that is coded.
        path: Search trellis paths.

    Raises:
        TargetError: The target is out of range.
        TensorError: The Hessian is not valid.
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
    code, kind = (lattice.fixed_point(matrix, single), 0) if fixed else _plain(matrix, single, path=path)
    packed = None
    if hessian is not None:
        fed = _fed_back(matrix, single, hessian, path=path, fixed=fixed)
        if fed.error < hessian.error(matrix, code):
            code, kind, packed = fed.code, fed.kind, fed.packed
    decoded = code.decode(matrix.dtype).view(matrix.shape)
    error = fidelity(matrix, decoded)
    if not error.error < math.inf:
        return fall_back(name, tensor, "range")
    if not bool(decoded.any()):  # weights of similar size, at 4 dB or less
        return fall_back(name, tensor, "target")
    return encoded_code(name, tensor, code, error, path=kind, packed=packed)


def left(hessian: Hessian) -> float:
    """Return the share of the outputs' error that feedback leaves, as bits are allotted by it. Raises TensorError."""
    by_rows = 1.0 if hessian.rows is None else math.pow(rows.left(hessian.rows), rows.SHARE)
    return feedback.left(hessian.columns) * by_rows


def nominal_step(matrix: Tensor, target_db: float) -> float:
    """Return the step of single nodes at a nominal target, as the float32 that is stored."""
    return _round(step(root_mean_square(matrix), target_db))


def stored_step(tensor: Tensor, target_db: float, *, path: int, columns: int) -> float:
    """Return the step that `encode` stores for a tensor it codes, so that a check can expect it.

    `path` is the kind of its paths. `columns` are those of its code; they tell whether it is fixed point, which older
    versions begin at other targets.
    """
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    single = nominal_step(matrix, target_db)
    if columns != matrix.shape[1]:
        return N * single
    return _round(single * _path_step(matrix, path)) if path else single


def is_no_worse(tensor: Tensor, code: LatticeTensor, target_db: float, hessian: Hessian | None, *, path: bool) -> bool:
    """Return whether a code's output error is at most that of rounding each node on its own, in paths if `path` is set.

    Without a Hessian all outputs count alike, so the weights' own error decides.
    """
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    single = nominal_step(matrix, target_db)

    def loss(of: LatticeTensor) -> float:
        if hessian is not None:
            return hessian.error(matrix, of)
        error = matrix.to(torch.float32) - of.decode(torch.float32).view(matrix.shape)
        return float(error.square_().sum(dtype=torch.float64))

    most = loss(code) * (1 - _LOSS_SLACK)
    if code.columns != matrix.shape[1]:
        return most <= loss(lattice.fixed_point(matrix, single))
    # The search for a path takes longest, so it comes last.
    return most <= loss(lattice.quantise(matrix, single)) or most <= loss(_plain(matrix, single, path=path)[0])


def is_fixed(target_db: float) -> bool:
    """Return whether weights are 16-bit numbers at a nominal target."""
    return target_db >= FIXED_POINT_DB


def _path_step(matrix: Tensor, kind: int) -> float:
    rows, columns = matrix.shape
    if kind == feedback.DOWN:
        return feedback.path_step(rows, columns)
    return rate.path_step(rows * pairs_per_row(columns))


def _fed_back(matrix: Tensor, single: float, hessian: Hessian, *, path: bool, fixed: bool) -> Form:
    if fixed:
        factor = feedback.factorise(hessian.columns)
        code = lattice.of_numbers(feedback.numbers(matrix, single, factor), single)
        return Form(code=code, kind=0, error=hessian.error(matrix, code))
    return _in_nodes_or_paths(matrix, single, hessian, path=path)


def _in_nodes_or_paths(matrix: Tensor, single: float, hessian: Hessian, *, path: bool) -> Form:
    factor = feedback.factorise(hessian.columns).to(matrix.device)
    paths = None
    if path and matrix.numel() >= LEAST_PATH:
        by_lane = rows.factor_of(hessian, matrix.device, feedback.lanes_of(*matrix.shape))
        code = feedback.quantise(matrix, _round(single * _path_step(matrix, feedback.DOWN)), factor, by_lane, path=True)
        if _is_short(code):
            paths = Form(code=code, kind=feedback.DOWN, error=hessian.error(matrix, code))
            if hessian.rows is not None and paths.bits >= PATHS_FROM * matrix.numel():
                return paths
    by_row = rows.factor_of(hessian, matrix.device)
    code = feedback.quantise(matrix, single, factor, by_row)
    nodes = Form(code=code, kind=0, error=hessian.error(matrix, code))
    saved = REFINED_BITS * matrix.numel()
    if paths is None or nodes.bits_at_equal_error - saved < paths.bits_at_equal_error:
        nodes = refined(matrix, nodes, hessian, factor)
    return nodes if paths is None else min(nodes, paths, key=lambda form: form.bits_at_equal_error)


def refined(matrix: Tensor, nodes: Form, hessian: Hessian, factor: feedback.Factor) -> Form:
    """Round single nodes again as long as that lowers the error, if no feedback between rows made them."""
    if hessian.rows is not None:
        return nodes
    for _ in range(REFINEMENTS):
        code = feedback.refine(matrix, nodes.code, hessian.columns, factor)
        error = hessian.error(matrix, code)
        if error >= nodes.error:
            break
        nodes = Form(code=code, kind=0, error=error)
    return nodes


def _plain(matrix: Tensor, single: float, *, path: bool) -> tuple[LatticeTensor, int]:
    if path and matrix.numel() >= LEAST_PATH:
        try:
            code = lattice.quantise_path(matrix, _round(single * _path_step(matrix, 1)))
        except TargetError:  # weights that are too many steps long
            pass
        else:
            if _is_short(code):
                return code, 1
    return lattice.quantise(matrix, single), 0


def _is_short(code: LatticeTensor) -> bool:
    """Return whether few enough coordinates of a path are escapes in memory."""
    return len(code.escapes) <= MOST_ESCAPED * code.i.numel()


def _round(value: float) -> float:
    """Return the step as the float32 that is stored."""
    return float(torch.tensor(value, dtype=torch.float32))
