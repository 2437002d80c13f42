"""What is known of how the outputs depend on the errors of a matrix: the Hessians of its columns and of its rows.

Shapes: R = rows, K = columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec.errors import TensorError
from birkhoff.codec.lattice import LatticeTensor

MOST_ROWS = 4096
"""Largest number of rows whose Hessian is taken. Feedback between rows reads half of it for every column, 33 MB for so
many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hessian:
    """The quadratic form tr(H_R E H_K E^T) of an error E [R, K], each factor up to its scale.

    `columns` is H_K, float32 [K, K]. `rows` is H_R, float32 [R, R] on the same device, or None if all rows count alike.
    """

    columns: Tensor
    rows: Tensor | None = None

    def error(self, weight_RK: Tensor, code: LatticeTensor) -> float:
        """Return the form of a coded matrix's error, in the weights' unit squared times the scales of the factors. The
        Hessian's device computes it."""
        lost_RK = weight_RK.to(torch.float32) - code.decode(torch.float32).view(weight_RK.shape)
        lost_RK = lost_RK.to(self.columns.device)
        moved_RK = lost_RK @ self.columns
        if self.rows is not None:
            moved_RK = self.rows @ moved_RK
        return float(moved_RK.mul_(lost_RK).sum(dtype=torch.float64))


def rows_of(rows: int) -> int:
    """Return the size of the rows' factor for a matrix with this number of rows; 0 if they have none."""
    return rows if rows <= MOST_ROWS else 0


def normalised(hessian_KK: Tensor) -> Tensor:
    """Return a Hessian divided by the mean of its diagonal, float64.

    Raises:
        TensorError: It is not square or not finite, or its diagonal has no positive mean.
    """
    columns = len(hessian_KK)
    if hessian_KK.shape != (columns, columns) or not bool(torch.isfinite(hessian_KK).all()):
        raise TensorError(f"Hessian: expected finite numbers [K, K], got {list(hessian_KK.shape)}; take it again")
    h = hessian_KK.double()
    mean = float(h.diagonal().mean())
    if not mean > 0:
        raise TensorError(f"Hessian: its diagonal has the mean {mean:g}, expected a positive one; take it again")
    return h / mean


def damped(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return a normalised Hessian, float64, with `damping` added to its diagonal. Raises as `normalised`."""
    h = normalised(hessian_KK)
    h.diagonal().add_(damping)
    return h


def cholesky(matrix_KK: Tensor, *, upper: bool = False) -> Tensor | None:
    """Return the triangular factor of a symmetric float64 matrix, or None if the matrix is not positive definite.

    A GPU's solver can report success and return NaN for a matrix that is barely not positive, so the factor is checked
    as well.
    """
    factor, wrong = torch.linalg.cholesky_ex(matrix_KK, upper=upper)
    return None if int(wrong) or not bool(torch.isfinite(factor).all()) else factor


def upper_of(hessian_KK: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return the factor of feedback in an order (int64 [K]): U, float32 [K, K]. U^T U is the inverse of the damped
    Hessian in that order.

    Raises:
        TensorError: As `normalised`, or the Hessian is not positive even with the damping.
    """
    there = order.to(hessian_KK.device)
    lower = cholesky(damped(hessian_KK, damping)[there][:, there])
    upper = None if lower is None else cholesky(torch.cholesky_inverse(lower), upper=True)
    if upper is None:
        raise TensorError(f"Hessian: not positive with a damping of {damping:g}; take it again")
    return upper.float()


def left_by(upper_KK: Tensor, damping: float) -> float:
    """Return the share of the error that feedback with this factor leaves, relative to rounding each node on its own.

    With errors of similar size everywhere, rounding leaves the trace of H. Feedback leaves the sum of 1 / U_cc^2,
    which what comes later cannot compensate. From each term we subtract the damping's part, sum_d (U_cd / U_cc)^2.
    With U = [[2.294, -2.065], [0, 1]], of H = [[1, 0.9], [0.9, 1]], 1 / 2.294^2 + 1 = 1.19 of 2 is left.
    """
    squares = upper_KK.double().square_()
    return float(((1 - damping * squares.sum(dim=1)) / squares.diagonal()).mean())
