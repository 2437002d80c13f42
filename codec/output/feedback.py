"""Error feedback on the lattice: each column of a matrix compensates the errors of the columns before it.

Let the output errors of a matrix W [R, K] have the Hessian H = E[x x^T] + ... (see `statistics`). We want codes W' that
minimise tr((W - W') H (W - W')^T), and find them column by column. With H^-1 = U^T U and U upper triangular, a column c
that was rounded with the error e_c = (w_c - w'_c) / U_cc moves each later column d by -U_cd e_c. Then sum_c e_c^2 is
left of the outputs' error; rounding each column on its own leaves cross terms too. Any order works. Columns with a
large diagonal come first, because their errors weigh most and many columns are left to compensate for them.

On the lattice a pair (x, y) is x = (I + J/256) h, y = J h, so J shears the first weight. All second weights are rounded
before the first ones. Then J is known, and rounding x to I + J/256 loses nothing.

Worked example, two columns with nearly the same inputs, H = [[1, 0.9], [0.9, 1]], no damping, K = 2, so that they form
one pair (x, y) and y comes first. In the order (y, x), U = [[2.294, -2.065], [0, 1]] (H^-1 = U^T U: 2.294^2 = 5.263
and -2.065 * 2.294 = -4.737). With h = 1 the row (x, y) = (0.4, 0.4) has J = round(0.4) = 0 and the error
e = 0.4 / 2.294 = 0.1744; x becomes 0.4 + 2.065 * 0.1744 = 0.76, and I = 1. The weights lose (-0.6, 0.4), which costs
0.36 + 0.16 - 2 * 0.9 * 0.24 = 0.088. Rounded on their own they lose (0.4, 0.4), which costs 0.608.

Sources: E. Frantar et al., "GPTQ" (ICLR 2023), for the blocks of columns; J. Chee et al., "QuIP" (NeurIPS 2023), which
shows that no other linear feedback is better.

A trellis path runs down a single column. It can be searched because all columns before it are known.

Here all rows count alike. Where their own Hessian is known, `rows` rounds a column with feedback between its rows.

Shapes: R = rows, K = columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from birkhoff.codec import lattice, rate, trellis
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.output.columns import round_all, round_block
from birkhoff.codec.output.hessian import left_by, normalised, upper_of
from birkhoff.codec.output.rows import RowFactor, round_both
from birkhoff.codec.pairs import columns_of_pairs, pairs_per_row, split
from birkhoff.codec.trajectory import reciprocal

DAMPING = 0.05
"""Added to the diagonal of a Hessian, in units of its mean, for directions that the samples lack. Results are the same
from 0.03 to 0.1."""

DOWN = 2
"""The kind of paths that go down columns, see `trellis`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A damped Hessian in the order of rounding.

    `order` is int64 [K]: the columns as they are rounded. `partner` is int64 [K]: the place in that order of the column
    whose coordinate shears this one, or -1. `upper` is float32 [K, K]: U, where U^T U is the inverse of the damped
    Hessian in that order, on the Hessian's device. The others are on the CPU.
    """

    order: Tensor
    partner: Tensor
    upper: Tensor

    def to(self, device: torch.device) -> "Factor":
        """Return the factor with U on another device."""
        return replace(self, upper=self.upper.to(device))


def factorise(hessian_KK: Tensor, damping: float = DAMPING) -> Factor:
    """Return the order and the factor of a Hessian: second weights of pairs first, each kind by decreasing diagonal.

    Raises:
        TensorError: It is not square or not finite, its diagonal has no positive mean, or it is not positive even with
            the damping.
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
    return Factor(order=order, partner=partner, upper=upper_of(hessian_KK, order, damping))


def left(hessian_KK: Tensor, damping: float = DAMPING) -> float:
    """Return the share of the outputs' error that feedback between columns leaves, see `hessian.left_by`. Raises as
    `factorise`."""
    return left_by(factorise(hessian_KK, damping).upper, damping)


def quantise(
    weight_RK: Tensor, step: float, factor: Factor, rows: RowFactor | None = None, *, path: bool = False
) -> LatticeTensor:
    """Quantise a matrix at one step, with feedback.

    Args:
        weight_RK: Real and finite, of any float dtype, on the factor's device.
        step: Of the coordinates, in the unit of the weights.
        rows: For feedback between rows too, on that device. With `path`, of the `lanes_of` the matrix.
        path: Search trellis paths down the columns.
    """
    lanes = lanes_of(*weight_RK.shape) if path else 0
    w_KR = _ordered(weight_RK, step, factor, rows)
    n_KR = _sweep(w_KR, factor.upper.contiguous(), factor.partner, lanes, rows=rows)
    return _code(n_KR, step, factor, rows)


def rounded(units_RK: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Round rows, given in units of their steps, with feedback. Return whole numbers and the values that they round.

    Both are float32 [K, R], with columns in the order of rounding. `units_RK` is float32 on the factor's device.
    """
    values_KR = _ordered(units_RK, 1.0, factor)
    return _sweep(values_KR, factor.upper.contiguous(), factor.partner, 0), values_KR


def numbers(weight_RK: Tensor, step: float, factor: Factor) -> Tensor:
    """Round a matrix to whole multiples of a step, float32 [R, K], with feedback and without shear.

    Arguments as for `quantise`.
    """
    alone = torch.full_like(factor.partner, -1)
    n_KR = _sweep(_ordered(weight_RK, step, factor), factor.upper.contiguous(), alone, 0)
    return _in_place(n_KR, factor)


def refine(
    weight_RK: Tensor,
    code: LatticeTensor,
    hessian_KK: Tensor,
    factor: Factor,
    damping: float = DAMPING,
) -> LatticeTensor:
    """Round each column of a matrix in single nodes once more at the same step, now that all others are known.

    For a column c with the error e_c, and with the errors e_d of the others unchanged, the best value is w'_c + sum_d
    e_d H_dc / H_cc, including d = c. Rounding to it cannot increase the outputs' error (except for the small shear of
    first weights); doing so twice lowers it by 8 %. Trellis paths would lose 1 %, because neighbours move along, and
    columns with feedback between their rows more, because the nearest nodes of a whole column are not known.
    Source: K. Behdin et al., "QuantEase" (arXiv 2309.01885).

    Args:
        code: Result of `quantise` in single nodes, on the same device.
        factor: Of the same Hessian and damping.
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


def _sweep(
    w_KR: Tensor,
    factor_KK: Tensor,
    partner: Tensor,
    lanes: int,
    base_KR: Tensor | None = None,
    rows: RowFactor | None = None,
) -> Tensor:
    """Return coordinates of columns in the order of rounding, float32 [K, R], see `columns`. Overwrites `w_KR` and
    `base_KR`."""
    n_KR, error_KR = torch.empty_like(w_KR), torch.empty_like(w_KR)
    matrices = w_KR, n_KR, error_KR, factor_KK, partner.to(w_KR.device)
    if rows is not None:
        round_both(*matrices, rows.upper, rows.steps.tolist())
    else:
        round_all(w_KR, error_KR, factor_KK, lambda begin, end: round_block(*matrices, begin, end, lanes, base_KR))
    return n_KR


def _ordered(weight_RK: Tensor, step: float, factor: Factor, rows: RowFactor | None = None) -> Tensor:
    """Return weights in units of the step, with columns and rows in the order of rounding: float32 [K, R],
    contiguous."""
    ordered: Tensor = weight_RK.to(torch.float32).mul(reciprocal(step)).T[factor.order.to(weight_RK.device)]
    return ordered.contiguous() if rows is None else ordered[:, rows.order].contiguous()


def _code(n_KR: Tensor, step: float, factor: Factor, rows: RowFactor | None = None) -> LatticeTensor:
    if rows is not None:
        n_KR = torch.empty_like(n_KR).index_copy_(1, rows.order.to(n_KR.device), n_KR)
    return lattice.of_coordinates(*split(_in_place(n_KR, factor)), step, len(n_KR))


def _in_place(n_KR: Tensor, factor: Factor) -> Tensor:
    """Return rows of coordinates with the columns back in the matrix's order: [R, K]."""
    n_RK = n_KR.new_empty(n_KR.shape[::-1])
    n_RK[:, factor.order.to(n_KR.device)] = n_KR.T
    return n_RK


def lanes_of(rows: int, columns: int) -> int:
    """Return the number of lanes side by side in each column of a matrix."""
    pairs = pairs_per_row(columns)
    return trellis.lanes_of(rows, pairs, DOWN) // pairs


def path_step(rows: int, columns: int) -> float:
    """Return the step of a path down columns relative to single nodes at equal error, as `rate.path_step` does."""
    return rate.step_of_run(rows // lanes_of(rows, columns))
