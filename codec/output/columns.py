"""Columns of a matrix rounded one after the other, each with what those before it in its block have lost.

With w the columns as far as earlier blocks have moved them, U the factor of `output.feedback` and p the column whose
coordinate shears column c, if there is one,

    u_c = w_c - sum_(d = start)^(c - 1) e_d U_dc - n_p / 256        n_c = round(u_c), or the path nearest to u_c
    e_c = (u_c - n_c) / U_cc

Where columns are rounded again, what counts is by how much each has moved from where it was, b: there
e_c = (b_c - n_p / 256 - n_c) / U_cc.

Worked example: w_0 = 0.4, w_1 = 0.4, U = [[2.294, -2.065], [0, 1]]: n_0 = 0, e_0 = 0.4 / 2.294 = 0.1744, and
u_1 = 0.4 + 0.1744 * 2.065 = 0.76, less n_0 / 256 = 0 if column 0 shears it; n_1 = 1, e_1 = -0.24.

Shapes: R = rows, K = columns.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.trajectory import N

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


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
    """Round columns start..stop-1, in place: the reference.

    Args:
        w_KR: float32 columns in units of the step, contiguous; becomes u.
        n_KR: float32, gets whole numbers; holds those of all columns before `start`.
        error_KR: float32, gets e.
        upper_KK: float32 U, contiguous.
        partner: int64 [K], p or -1.
        lanes: of the trellis in each column; 0 rounds each weight for itself.
        base_KR: float32 b, if there is one, contiguous; becomes b - n_p / 256.
    """
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
        if lanes:
            trellis.search_(n.copy_(w), lanes)
        else:
            torch.round(w, out=n)
        torch.sub(base, n, out=error_KR[c]).div_(pivots[c - start])


round_block: "CustomOpDef" = torch.library.custom_op(
    "birkhoff::round_block", eager_round_block, mutates_args=("w_KR", "n_KR", "error_KR", "base_KR")
)
"""`eager_round_block` as an operator, so that `birkhoff.kernels.feedback.op` can register kernels for a device."""
