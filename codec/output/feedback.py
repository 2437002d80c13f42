"""Error feedback on the lattice: each column of a matrix takes up what the columns before it have lost.

For a matrix W [R, K] whose output errors have the Hessian H = E[x x^T] + ... (see `statistics`), the codes W' of least
tr((W - W') H (W - W')^T) are looked for column by column: with H^-1 = U^T U, U upper triangular, a column c that was
rounded with the error e_c = (w_c - w'_c) / U_cc moves each later column d by -U_cd e_c. What is left of the output's
error is sum_c e_c^2, where rounding each column for itself leaves cross terms too. The order is free: columns of large
diagonal first, whose errors weigh most and which then have most columns left to make up for them.

On the lattice a pair (x, y) stands at x = (I + J/256) h, y = J h, so that J shears the first weight. All second weights
are rounded before the first ones: J is then known, and x is rounded to I + J/256 at no loss.

Worked example, two columns whose inputs are nearly the same, H = [[1, 0.9], [0.9, 1]], no damping, K = 2, so that they
are one pair (x, y) and y comes first. In the order (y, x), U = [[2.294, -2.065], [0, 1]] (H^-1 = U^T U: 2.294^2 = 5.263
and -2.065 * 2.294 = -4.737). With h = 1 the row (x, y) = (0.4, 0.4) has J = round(0.4) = 0 and the error
e = 0.4 / 2.294 = 0.1744; x becomes 0.4 + 2.065 * 0.1744 = 0.76, and I = 1. The weights lose (-0.6, 0.4), which costs
0.36 + 0.16 - 2 * 0.9 * 0.24 = 0.088; rounded each for itself they lose (0.4, 0.4), which costs 0.608.

Sources: E. Frantar et al., "GPTQ" (ICLR 2023), whose blocks of columns these are; J. Chee et al., "QuIP" (NeurIPS
2023), which shows that no other linear feedback does better.

Where a column is searched for a path of the trellis, its runs go down that column alone, which all columns before it
are known for.

Shapes: R = rows, K = columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec import lattice, rate, trellis
from birkhoff.codec.errors import TensorError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.output.columns import eager_round_block, round_block
from birkhoff.codec.pairs import columns_of_pairs, pairs_per_row, split
from birkhoff.codec.trajectory import reciprocal

DAMPING = 0.05
"""Added to the diagonal of a Hessian, in units of its mean: what so few samples do not tell. Flat from 0.03 to 0.1."""

DOWN = 2
"""The kind of path that goes down columns: see `trellis`."""

_BLOCK = 64
"""Columns after which the others are brought up to date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A damped Hessian in the order of rounding.

    `order` int64 [K]: columns as they are rounded. `partner` int64 [K]: place in that order of the column whose
    coordinate shears this one, or -1. `upper` float32 [K, K]: U with U^T U the inverse of the damped Hessian in that
    order, on the Hessian's device; the others are on the CPU.
    """

    order: Tensor
    partner: Tensor
    upper: Tensor


def normalised(hessian_KK: Tensor) -> Tensor:
    """A Hessian over the mean of its diagonal, float64.

    Raises:
        TensorError: it is not square, not finite, or its diagonal has no positive mean.
    """
    columns = len(hessian_KK)
    if hessian_KK.shape != (columns, columns) or not bool(torch.isfinite(hessian_KK).all()):
        raise TensorError(f"Hessian: expected finite numbers [K, K], got {list(hessian_KK.shape)}; take it again")
    h = hessian_KK.double()
    mean = float(h.diagonal().mean())
    if not mean > 0:
        raise TensorError(f"Hessian: its diagonal has the mean {mean:g}, expected a positive one; take it again")
    return h / mean


def damped(hessian_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """A Hessian over the mean of its diagonal, float64, with `damping` added to that. Raises as `normalised`."""
    h = normalised(hessian_KK)
    h.diagonal().add_(damping)
    return h


def factorise(hessian_KK: Tensor, damping: float = DAMPING) -> Factor:
    """The order and the factor of a Hessian: second weights of pairs first, each kind by falling diagonal.

    Raises:
        TensorError: it is not square, not finite, its diagonal has no positive mean, or it is too far from positive
            for the damping.
    """
    h = normalised(hessian_KK)
    columns, diagonal = len(h), h.diagonal().cpu()
    x, y = columns_of_pairs(torch.arange(pairs_per_row(columns)), columns)
    paired = y < columns
    order = torch.cat([kind[torch.argsort(diagonal[kind], descending=True, stable=True)] for kind in (y[paired], x)])
    place = torch.empty_like(order)
    place[order] = torch.arange(columns)
    partner = torch.full_like(order, -1)
    partner[place[x[paired]]] = place[y[paired]]
    there = order.to(h.device)
    lower, wrong = torch.linalg.cholesky_ex(damped(hessian_KK, damping)[there][:, there])
    upper, wrong_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(wrong) or int(wrong_too):
        raise TensorError(f"Hessian: not positive with a damping of {damping:g}; take it again")
    return Factor(order=order, partner=partner, upper=upper.float())


def left(hessian_KK: Tensor, damping: float = DAMPING) -> float:
    """Share of the outputs' error that feedback leaves: of nodes rounded with it, over those rounded each for itself.

    With errors of like size in every column, rounding leaves the trace of H. Feedback leaves the sum of 1 / U_cc^2,
    which the columns after each cannot make up for, without the damping's part of it, sum_d (U_cd / U_cc)^2 a column.
    In the worked example 1 / 2.294^2 + 1 = 1.19 of 2.

    Raises as `factorise`.
    """
    squares = factorise(hessian_KK, damping).upper.double().square_()
    pivots = squares.diagonal().clone()
    return float(((1 - damping * squares.sum(dim=1)) / pivots).mean())


def quantise(weight_RK: Tensor, step: float, factor: Factor, *, path: bool = False) -> LatticeTensor:
    """The matrix on the lattice for one step, with feedback.

    Args:
        weight_RK: real and finite, any float dtype, on the factor's device.
        step: of the coordinates, in the weights' unit.
        path: search paths of the trellis down the columns.
    """
    lanes = _lanes(*weight_RK.shape) if path else 0
    w_KR = _ordered(weight_RK, step, factor)
    n_KR = _sweep(w_KR, factor.upper.contiguous(), factor.partner, lanes)
    return _code(n_KR, step, factor)


def rounded(units_RK: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Rows in units of their steps as whole numbers, with feedback, and the values that were rounded to these.

    Both float32 [K, R], columns in the order of rounding; `units_RK` is float32 on the factor's device.
    """
    values_KR = _ordered(units_RK, 1.0, factor)
    return _sweep(values_KR, factor.upper.contiguous(), factor.partner, 0), values_KR


def numbers(weight_RK: Tensor, step: float, factor: Factor) -> Tensor:
    """The matrix as whole multiples of a step, with feedback, none of which shears another: float32 [R, K].

    Arguments as `quantise`.
    """
    alone = torch.full_like(factor.partner, -1)
    n_KR = _sweep(_ordered(weight_RK, step, factor), factor.upper.contiguous(), alone, 0)
    return _in_place(n_KR, factor)


def refine(
    weight_RK: Tensor, code: LatticeTensor, hessian_KK: Tensor, factor: Factor, damping: float = DAMPING
) -> LatticeTensor:
    """The matrix in single nodes for the same step, each column rounded once more, now that all others are known.

    A column c whose error is e_c does best, the errors e_d of the others being what they are, at w'_c + sum_d e_d H_dc
    / H_cc, d = c included. Rounded to that, the outputs' error cannot grow (but for the shear of first weights, which
    is small); twice it falls by 8 %. Paths of the trellis, whose neighbours have to move along, would lose 1 %.
    Source: K. Behdin et al., "QuantEase" (arXiv 2309.01885).

    Args:
        code: what `quantise` made of the weight in single nodes, on the same device.
        factor: of that Hessian and damping.
    """
    there = factor.order.to(hessian_KK.device)
    h_KK = normalised(hessian_KK)[there][:, there]
    h_KK.diagonal().add_(damping)
    h_KK = h_KK.float()
    was_KR = _ordered(code.decode(torch.float32), code.step, factor)
    lost_KR = _ordered(weight_RK, code.step, factor).sub_(was_KR)
    w_KR = was_KR + (h_KK @ lost_KR) / h_KK.diagonal()[:, None]
    moves_KK = -h_KK / h_KK.diagonal()
    moves_KK.diagonal().fill_(1)
    return _code(_sweep(w_KR, moves_KK, factor.partner, 0, was_KR), code.step, factor)


def _sweep(w_KR: Tensor, factor_KK: Tensor, partner: Tensor, lanes: int, base_KR: Tensor | None = None) -> Tensor:
    """Coordinates of columns in the order of rounding, float32 [K, R]: see `columns`. Overwrites `w_KR`, `base_KR`."""
    n_KR, error_KR = torch.empty_like(w_KR), torch.empty_like(w_KR)
    partner = partner.to(w_KR.device)
    # On a CPU not through the operator: its first call imports the whole compiler.
    rounded = eager_round_block if w_KR.device.type == "cpu" else round_block
    for start in range(0, len(w_KR), _BLOCK):
        stop = min(start + _BLOCK, len(w_KR))
        rounded(w_KR, n_KR, error_KR, factor_KK, partner, start, stop, lanes, base_KR)
        w_KR[stop:].addmm_(factor_KK[start:stop, stop:].T, error_KR[start:stop], alpha=-1)
    return n_KR


def _ordered(weight_RK: Tensor, step: float, factor: Factor) -> Tensor:
    """Weights in units of the step, columns in the order of rounding: float32 [K, R], contiguous."""
    ordered: Tensor = weight_RK.to(torch.float32).mul(reciprocal(step)).T[factor.order.to(weight_RK.device)]
    return ordered.contiguous()


def _code(n_KR: Tensor, step: float, factor: Factor) -> LatticeTensor:
    return lattice.of_coordinates(*split(_in_place(n_KR, factor)), step, len(n_KR))


def _in_place(n_KR: Tensor, factor: Factor) -> Tensor:
    """Rows of coordinates, their columns where the matrix has them: [R, K]."""
    n_RK = n_KR.new_empty(n_KR.shape[::-1])
    n_RK[:, factor.order.to(n_KR.device)] = n_KR.T
    return n_RK


def _lanes(rows: int, columns: int) -> int:
    """Lanes side by side in each column of a matrix."""
    pairs = pairs_per_row(columns)
    return trellis.lanes_of(rows, pairs, DOWN) // pairs


def path_step(rows: int, columns: int) -> float:
    """Step of a path down columns over that of single nodes at equal error, as `rate.path_step`."""
    return rate.step_of_run(rows // _lanes(rows, columns))


def output_error(weight_RK: Tensor, code: LatticeTensor, hessian_KK: Tensor) -> float:
    """tr(E H E^T) of the error E of a coded matrix, in the weights' unit squared times the Hessian's."""
    error = weight_RK.to(torch.float32) - code.decode(torch.float32).view(weight_RK.shape)
    return float((error @ hessian_KK).mul_(error).sum(dtype=torch.float64))
