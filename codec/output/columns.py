"""Round the columns of a matrix one after the other. Each takes over the errors of the earlier columns in its block.

Let w be the columns as earlier blocks have moved them, U the factor of `output.feedback`, and p the column whose
coordinate shears column c, if any. Then

    u_c = w_c - sum_(d = start)^(c - 1) e_d U_dc - n_p / 256        n_c = round(u_c), or the path nearest to u_c
    e_c = (u_c - n_c) / U_cc

When columns are rounded again, the error is the distance of each column from its original place b: then
e_c = (b_c - n_p / 256 - n_c) / U_cc.

Worked example: w_0 = 0.4, w_1 = 0.4, U = [[2.294, -2.065], [0, 1]]: n_0 = 0, e_0 = 0.4 / 2.294 = 0.1744, and
u_1 = 0.4 + 0.1744 * 2.065 = 0.76, less n_0 / 256 = 0 if column 0 shears it; n_1 = 1, e_1 = -0.24.

Shapes: R = rows, K = columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.native.dispatch import Dispatched
from birkhoff.codec.trajectory import N


def eager_round_block(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    start: int,
    stop: int,
    lanes: int,
    base_KR: Tensor | None,
) -> None:
    """Round columns start..stop-1, in place. This is the reference.

    Args:
        w_KR: Float32 columns in units of the step, contiguous. Becomes u.
        n_KR: Float32. Receives whole numbers, and holds those of all columns before `start`.
        error_KR: Float32. Receives e.
        upper_KK: Float32 U, contiguous.
        partner: Int64 [K], p or -1.
        lanes: Lanes of the trellis in each column; 0 rounds each weight on its own.
        base_KR: Float32 b, contiguous, or None. Becomes b - n_p / 256.
    """

    def nearest(w: Tensor, n: Tensor) -> None:
        if lanes:
            trellis.search_(n.copy_(w), lanes)
        else:
            torch.round(w, out=n)

    round_columns(w_KR, n_KR, error_KR, upper_KK, partner, start, stop, base_KR, nearest)


def round_columns(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    start: int,
    stop: int,
    base_KR: Tensor | None,
    nearest: Callable[[Tensor, Tensor], None],
) -> None:
    """Do the same with any rounding of a column: `nearest` receives u, which it keeps, and writes n."""
    inside, partners = upper_KK[start:stop, start:stop].T.contiguous(), partner[start:stop].tolist()
    pivots = inside.diagonal().tolist()
    for c in range(start, stop):
        w, n, p = w_KR[c], n_KR[c], partners[c - start]
        base = w if base_KR is None else base_KR[c]
        if c > start:
            w.addmv_(error_KR[start:c].T, inside[c - start, : c - start], alpha=-1)
        if p >= 0:
            w.sub_(n_KR[p], alpha=1 / N)
            if base_KR is not None:
                base.sub_(n_KR[p], alpha=1 / N)
        nearest(w, n)
        torch.sub(base, n, out=error_KR[c]).div_(pivots[c - start])


def round_all(w_KR: Tensor, error_KR: Tensor, factor_KK: Tensor, rounded: Callable[[int, int], None]) -> None:
    """Let `rounded` round columns start..stop-1 of `w_KR`, and move the columns behind by their errors, block by
    block."""
    for start in range(0, len(w_KR), _BLOCK):
        stop = min(start + _BLOCK, len(w_KR))
        rounded(start, stop)
        w_KR[stop:].addmm_(factor_KK[start:stop, stop:].T, error_KR[start:stop], alpha=-1)


_BLOCK = 64
"""Columns after which the remaining columns are updated."""

round_block: Dispatched[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, Tensor | None], None] = Dispatched(
    eager_round_block
)
"""`eager_round_block`, or the kernels that `birkhoff.kernels.feedback.op` registers."""
