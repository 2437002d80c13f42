"""Feedback between the rows of a matrix: within a column, each row compensates the errors of the rows before it.

`feedback` compensates errors between columns, as if all rows mattered alike and by themselves. Their outputs meet again
in the layers behind, so errors of two rows can cancel. Let H_R be the Hessian of the rows (see `statistics`) and H_K
that of the columns. We want W' that minimises tr(H_R E H_K E^T) with E = W - W'. Once the columns before a column are
rounded, the best real values of that column do not depend on H_R; `feedback` finds them as u. Rounding u to n leaves
(u - n)^T H_R (u - n), for which we go down the rows as `feedback` goes through the columns. With H_R^-1 = V^T V and V
upper triangular, a row r that was rounded with the error e_r = (u_r - n_r) / V_rr moves each later row s by -V_rs e_r,
and sum_r e_r^2 is left.

Rows go in order of decreasing diagonal if each is rounded on its own. A trellis path takes the rows of a lane in their
own order, lane after lane. The values that a step of the path rounds depend on the steps before, so each of the eight
survivors of the search keeps its own (per-survivor processing).

Worked example, two rows, H_R = [[1, 0.9], [0.9, 1]], so V = [[2.294, -2.065], [0, 1]] as in `feedback`. u = (0.4, 0.4)
has n_0 = 0 and e_0 = 0.1744, so u_1 becomes 0.76 and n_1 = 1: 0.088 is left, instead of 0.608 for n = (0, 0).

Sources: A. Tseng, Z. Sun, C. De Sa, "Model-Preserving Adaptive Rounding" (YAQA, arXiv 2505.22988), for feedback on both
sides; R. Raheli, A. Polydoros, C. Tzou, "Per-survivor processing" (IEEE Trans. Comm. 43, 1995).

Shapes: R = rows, L = lanes of a column.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.native.dispatch import Dispatched
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.output.columns import round_all, round_columns
from birkhoff.codec.output.hessian import Hessian, left_by, normalised, upper_of

DAMPING = 0.2
"""Added to the diagonal of a rows' Hessian, in units of its mean. Gradients have fewer samples than inputs."""

SHARE = 0.3
"""Power of the share that feedback between rows leaves, where bits are allotted. The Hessian of a matrix is no product
of two, so outputs gain less than the product says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFactor:
    """A damped Hessian of rows in the order of rounding.

    `order` is int64 [R]: the rows as they are rounded. `upper` is float32 [R, R]: V, on the Hessian's device. `steps`
    is int64 [L]: the rows of each lane, which follow each other in that order; [0] if rows are rounded one by one.
    """

    order: Tensor
    upper: Tensor
    steps: np.ndarray[tuple[int], np.dtype[np.int64]]

    def to(self, device: torch.device) -> "RowFactor":
        """Return the factor with V on another device."""
        return replace(self, upper=self.upper.to(device))


def factorise(hessian_RR: Tensor, lanes: int = 0, damping: float = DAMPING) -> RowFactor:
    """Return the order and the factor of a rows' Hessian (any float dtype and device).

    Args:
        lanes: Lanes of the trellis in each column; 0 if rows are rounded one by one.

    Raises:
        TensorError: It is not square or not finite, its diagonal has no positive mean, or it is not positive even with
            the damping.
    """
    rows = len(hessian_RR)
    if lanes:
        order = torch.cat([torch.arange(lane, rows, lanes) for lane in range(lanes)])
        steps = np.array([len(range(lane, rows, lanes)) for lane in range(lanes)], dtype=np.int64)
    else:
        diagonal = normalised(hessian_RR).diagonal().cpu()
        order = torch.argsort(diagonal, descending=True, stable=True)
        steps = np.empty(0, dtype=np.int64)
    return RowFactor(order=order, upper=upper_of(hessian_RR, order, damping).contiguous(), steps=steps)


def factor_of(hessian: Hessian, device: torch.device, lanes: int = 0) -> RowFactor | None:
    """Return `factorise` of a Hessian's rows on the device that rounds, or None if there are none."""
    return None if hessian.rows is None else factorise(hessian.rows, lanes).to(device)


def left(hessian_RR: Tensor, damping: float = DAMPING) -> float:
    """Return the share of the outputs' error that feedback between rows leaves, as `feedback.left`. Raises as
    `factorise`."""
    return left_by(factorise(hessian_RR, damping=damping).upper, damping)


def round_rows_(u: Tensor, out: Tensor, factor: RowFactor, scratch: Tensor) -> None:
    """Round one column with feedback between its rows.

    Args:
        u: Float32 [R] in the order of the factor and in units of the step, contiguous, on the CPU. Overwritten.
        out: Receives whole numbers, float32 [R], contiguous.
        scratch: Of `scratch_of`.
    """
    library = native()
    if library is None:
        reference_round_rows_(u, out, factor)
        return
    done = library.birkhoff_round_rows(
        u.data_ptr(),
        out.data_ptr(),
        factor.upper.data_ptr(),
        len(u),
        len(factor.steps),
        pointer(factor.steps),
        scratch.data_ptr(),
    )
    assert done, "the lanes' steps are not all rows"


def nearest_in(factor: RowFactor) -> Callable[[Tensor, Tensor], None]:
    """Return `round_rows_` of this factor with memory of its own, which keeps u."""
    moved, scratch = torch.empty(len(factor.order), dtype=torch.float32), scratch_of(factor)

    def nearest(u: Tensor, out: Tensor) -> None:
        round_rows_(moved.copy_(u), out, factor, scratch)

    return nearest


def eager_round_both(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    upper_RR: Tensor,
    steps: Sequence[int],
) -> None:
    """Round a matrix with feedback between its columns and its rows, in place, on the CPU. This is the reference.

    Args:
        w_KR, n_KR, error_KR, upper_KK, partner: As in `columns.eager_round_block`, rows in the order of rounding.
        upper_RR: Float32 V, contiguous.
        steps: Rows of each lane, see `RowFactor`.
    """
    lanes = np.array(steps, dtype=np.int64)
    factor = RowFactor(order=torch.arange(len(upper_RR)), upper=upper_RR.cpu(), steps=lanes)
    w, n, error, upper, partners = (tensor.cpu() for tensor in (w_KR, n_KR, error_KR, upper_KK, partner))
    rounded = partial(round_columns, w, n, error, upper, partners, base_KR=None, nearest=nearest_in(factor))
    round_all(w, error, upper, rounded)
    for there, here in ((w_KR, w), (n_KR, n), (error_KR, error)):
        there.copy_(here)


round_both: Dispatched[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[int]], None] = Dispatched(
    eager_round_both
)
"""`eager_round_both`, or the kernels that `birkhoff.kernels.feedback.op` registers."""


def scratch_of(factor: RowFactor) -> Tensor:
    """Return memory for `round_rows_`."""
    longest = int(factor.steps.max()) if len(factor.steps) else 0
    return torch.empty(len(factor.order) + 34 * longest, dtype=torch.float32)


def reference_round_rows_(u: Tensor, out: Tensor, factor: RowFactor, decided: int | None = None) -> None:
    """`round_rows_` in torch, row by row. A path is decided at the end of its lane, or after every `decided` rows."""
    upper = factor.upper
    if not len(factor.steps):
        for row in range(len(u)):
            torch.round(u[row], out=out[row])
            u[row + 1 :] -= upper[row, row + 1 :] * ((u[row] - out[row]) / upper[row, row])
        return
    begin = 0
    for steps in factor.steps.tolist():
        end, state = begin + steps, 0
        for first in range(begin, end, decided or steps):
            last = min(first + (decided or steps), end)
            out[first:last], errors, state = _path(u[first:last], upper[first:last, first:last], state)
            for row, error in enumerate(errors, first):
                u[last:] -= upper[row, last:] * error
        begin = end


_FROM = torch.tensor([[q, q + 4] for q in (0, 0, 1, 1, 2, 2, 3, 3)])
"""The two states before each state 2q + o."""

_SUBSET = torch.tensor([[q ^ 2 * o, q ^ 2 * (1 - o)] for q in range(4) for o in range(2)], dtype=torch.float32)
"""The subsets n mod 4 on the branches from those states, see `trellis`."""


def _path(u: Tensor, upper_TT: Tensor, state: int) -> tuple[Tensor, Tensor, int]:
    """Return the numbers of the best path from a state [T], the errors e [T], and the state where it ends."""
    steps = len(u)
    metric = torch.full((8,), 1e30, dtype=torch.float32)
    metric[state] = 0
    targets = u.repeat(8, 1)
    numbers, errors = torch.empty(2, steps, 8, dtype=torch.float32)
    before = torch.empty(steps, 8, dtype=torch.int64)
    for t in range(steps):
        x = targets[:, t][_FROM]
        near = torch.round((x - _SUBSET) * 0.25) * 4 + _SUBSET
        lost = (x - near) / upper_TT[t, t]
        sums = metric[_FROM] + lost * lost
        high = (sums[:, 1] < sums[:, 0]).long()[:, None]
        metric, numbers[t], errors[t], before[t] = (found.gather(1, high)[:, 0] for found in (sums, near, lost, _FROM))
        targets = targets[before[t]]
        targets[:, t + 1 :] -= errors[t][:, None] * upper_TT[t, t + 1 :]
    last, n, e = int(metric.argmin()), *torch.empty(2, steps, dtype=torch.float32)
    state = last
    for t in range(steps - 1, -1, -1):
        n[t], e[t], state = numbers[t, state], errors[t, state], int(before[t, state])
    return n, e, last
