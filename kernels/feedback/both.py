"""Error feedback between columns and between rows of a matrix on a GPU.

`birkhoff.codec.output.columns` and `rows` have the formulas. With U [K, K], V [R, R] and the shear s, each weight takes

    u[c, r] = w[c, r] - sum_(d < c) U[d, c] e[d, r] - s        m = u[c, r] - sum_(q < r) V[q, r] f[q, c]
    n = round(m)        e[c, r] = (u - n) / U[c, c]            f[r, c] = (m - n) / V[r, r]

so it waits for the earlier columns of its row and the earlier rows of its column alone: all weights of an antidiagonal
are independent. That holds for tiles too. Two launches round the tiles of an antidiagonal side by side: the first takes
over the errors of the tiles above and to the left as products of matrices, the second goes down a tile's own
antidiagonals.

A trellis path joins the rows of a lane, so a tile of paths goes column by column, with eight survivors that each have
their own m. It decides for one at its last row, where the tile below begins. Decisions at the end of every lane only
would keep the next column waiting; those after 64 rows cost about 3/64 of what paths gain.

Toy: two columns by two rows. Step 0 rounds (0, 0), step 1 (1, 0) and (0, 1), step 2 (1, 1). With one row, and
w = (0.4, 0.4), U = [[2.294, -2.065], [0, 1]]: step 0 stores n = 0, e = 0.1744; step 1 has u = 0.4 + 0.1744 * 2.065
= 0.76 and stores n = 1, e = -0.24.

Shapes: R = rows, K = columns.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.trajectory import N
from birkhoff.kernels.trellis.triton import _nearest

_SIDE, _WARPS = 32, 4

PATH_ROWS = 64
"""Rows after which a path is decided."""

_PATH_COLUMNS = 16
"""Columns of a tile of paths: the fewest that the tensor cores take."""

_FAR = tl.constexpr(1e30)


@triton.jit(do_not_specialize=["diagonal", "first"])
def _earlier_kernel(
    w_ptr, n_ptr, error_ptr, below_ptr, upper_kk_ptr, upper_rr_ptr, start_ptr, rows, columns, diagonal, first,
    WIDE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Take over the errors of earlier tiles: those of columns are taken off w, those of rows stored in the place of n.

    `below` holds f [R, K]. `start` holds the first row of each tile, and R.
    """
    tile = first + tl.program_id(0)
    start_c = tile * WIDE
    start_r, stop_r = tl.load(start_ptr + diagonal - tile), tl.load(start_ptr + diagonal - tile + 1)
    c, r = start_c + tl.arange(0, WIDE), (start_r + tl.arange(0, HIGH)).to(tl.int64)
    in_c, in_r = c < columns, r < stop_r
    by_columns = tl.zeros([WIDE, HIGH], tl.float32)
    for start in range(0, start_c, WIDE):
        d = (start + tl.arange(0, WIDE)).to(tl.int64)
        factors = tl.load(upper_kk_ptr + d[None, :] * columns + c[:, None], mask=in_c[:, None], other=0.0)
        errors = tl.load(error_ptr + d[:, None] * rows + r[None, :], mask=in_r[None, :], other=0.0)
        by_columns = tl.dot(factors, errors, acc=by_columns, input_precision="tf32x3")
    by_rows = tl.zeros([WIDE, HIGH], tl.float32)
    for start in range(0, start_r, HIGH):
        q = (start + tl.arange(0, HIGH)).to(tl.int64)
        known = q < start_r
        errors = tl.load(below_ptr + q[None, :] * columns + c[:, None], mask=known[None, :] & in_c[:, None], other=0.0)
        factors = tl.load(upper_rr_ptr + q[:, None] * rows + r[None, :], mask=known[:, None] & in_r[None, :], other=0.0)
        by_rows = tl.dot(errors, factors, acc=by_rows, input_precision="tf32x3")
    at = c.to(tl.int64)[:, None] * rows + r[None, :]
    inside = in_c[:, None] & in_r[None, :]
    tl.store(w_ptr + at, tl.load(w_ptr + at, mask=inside, other=0.0) - by_columns, mask=inside)
    tl.store(n_ptr + at, by_rows, mask=inside)


@triton.jit(do_not_specialize=["diagonal", "first"])
def _tile_kernel(
    w_ptr, n_ptr, error_ptr, below_ptr, upper_kk_ptr, upper_rr_ptr, partner_ptr, start_ptr, rows, columns, diagonal,
    first, STEPS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """After `_earlier_kernel`, with the same arguments."""
    tile = first + tl.program_id(0)
    start_c, start_r = tile * SIDE, tl.load(start_ptr + diagonal - tile)
    place = tl.arange(0, SIDE)
    c, r = start_c + place, (start_r + place).to(tl.int64)
    in_c, in_r = c < columns, r < rows
    wide_c = c.to(tl.int64)
    later = (place[:, None] < place[None, :]) & (start_r + place < rows)[:, None] & in_r[None, :]
    factors_q = tl.load(upper_rr_ptr + r[:, None] * rows + r[None, :], mask=later, other=0.0)  # V[q, r], q < r
    pivot_r = tl.load(upper_rr_ptr + r * rows + r, mask=in_r, other=1.0)
    errors_d = tl.zeros([SIDE, SIDE], tl.float32)  # e[d, r]
    for step in range(0, 2 * SIDE - 1):
        here = step - place  # the column of each row's weight
        inside = (here >= 0) & (here < SIDE) & (start_c + here < columns) & in_r
        column = (start_c + here).to(tl.int64)
        known = inside[None, :] & in_c[:, None]
        factors_d = tl.load(upper_kk_ptr + wide_c[:, None] * columns + column[None, :], mask=known, other=0.0)
        errors_q = tl.load(
            below_ptr + r[:, None] * columns + column[None, :], mask=inside[None, :] & in_r[:, None], other=0.0
        )
        at = column * rows + r
        partner = tl.load(partner_ptr + column, mask=inside, other=-1)
        sheared = inside & (partner >= 0)
        shear = tl.load(n_ptr + partner * rows + r, mask=sheared, other=0.0) * (1.0 / STEPS)
        u = tl.load(w_ptr + at, mask=inside, other=0.0) - tl.sum(factors_d * errors_d, axis=0) - shear
        m = u - tl.load(n_ptr + at, mask=inside, other=0.0) - tl.sum(factors_q * errors_q, axis=0)
        n = _nearest(m)
        pivot = tl.load(upper_kk_ptr + column * columns + column, mask=inside, other=1.0)
        e = (u - n) / pivot
        errors_d = tl.where((place[:, None] == here[None, :]) & inside[None, :], e[None, :], errors_d)
        tl.debug_barrier()  # all have read what was in the place of n
        tl.store(w_ptr + at, u, mask=inside)
        tl.store(n_ptr + at, n, mask=inside)
        tl.store(error_ptr + at, e, mask=inside)
        tl.store(below_ptr + r * columns + column, (m - n) / pivot_r, mask=inside)
        tl.debug_barrier()  # the next step reads these values


@triton.jit
def _branch(x, metric, inverse, c: tl.constexpr):
    """Return (the metric ahead, the nearest number of the subset c, the error)."""
    fourth = (x - c) * 0.25
    near = ((fourth + 12582912.0) - 12582912.0) * 4.0 + c  # as `_nearest`; above 2^22 any number of the subset will do
    lost = (x - near) * inverse
    return metric + lost * lost, near, lost


@triton.jit
def _ahead(x, other_x, metric, other_metric, m, other_m, n, other_n, here, inverse, factors,
           c: tl.constexpr, other_c: tl.constexpr):  # fmt: skip
    """Return a survivor's (metric, m, n) after this row: the better of two branches."""
    low, low_n, low_e = _branch(x, metric, inverse, c)
    high, high_n, high_e = _branch(other_x, other_metric, inverse, other_c)
    wins = high < low
    number, error = tl.where(wins, high_n, low_n), tl.where(wins, high_e, low_e)
    m = tl.where(wins, other_m, m) - factors * error
    n = tl.where(here, number, tl.where(wins, other_n, n))
    return tl.minimum(low, high), m, n


@triton.jit
def _better(metric, m, n, state, other_metric, other_m, other_n, other_state):
    wins = other_metric < metric
    return (
        tl.minimum(metric, other_metric),
        tl.where(wins, other_m, m),
        tl.where(wins, other_n, n),
        tl.where(wins, other_state, state),
    )


@triton.jit(do_not_specialize=["diagonal", "first"])
def _path_kernel(
    w_ptr, n_ptr, error_ptr, below_ptr, state_ptr, upper_kk_ptr, upper_rr_ptr, partner_ptr, start_ptr, begins_ptr,
    rows, columns, diagonal, first, STEPS: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """After `_earlier_kernel`, with the same arguments. `begins` says of each tile whether a lane begins there, `state`
    [K] holds the state in which each column's path left the tile above. Of one warp, as its parts would wait for each
    other in every row."""
    tile = first + tl.program_id(0)
    down = diagonal - tile
    start_c, start_r, stop_r = tile * WIDE, tl.load(start_ptr + down), tl.load(start_ptr + down + 1)
    begins = tl.load(begins_ptr + down) != 0
    place, column = tl.arange(0, HIGH), tl.arange(0, WIDE)
    c, r = start_c + column, (start_r + place).to(tl.int64)
    in_r, wide_c = r < stop_r, c.to(tl.int64)

    pivots = tl.load(upper_rr_ptr + r * rows + r, mask=in_r, other=1.0)
    errors_d = tl.zeros([WIDE, HIGH], tl.float32)  # e[d, r]
    for k in range(0, tl.minimum(WIDE, columns - start_c)):
        this = start_c + k
        at = this.to(tl.int64) * rows + r
        factors_d = tl.load(upper_kk_ptr + wide_c * columns + this, mask=column < k, other=0.0)
        partner = tl.load(partner_ptr + this)
        shear = tl.load(n_ptr + partner * rows + r, mask=in_r & (partner >= 0), other=0.0) * (1.0 / STEPS)
        u = tl.load(w_ptr + at, mask=in_r, other=0.0) - tl.sum(factors_d[:, None] * errors_d, axis=0) - shear
        m0 = u - tl.load(n_ptr + at, mask=in_r, other=0.0)
        m1, m2, m3, m4, m5, m6, m7 = m0, m0, m0, m0, m0, m0, m0
        n0 = tl.zeros([HIGH], tl.float32)
        n1, n2, n3, n4, n5, n6, n7 = n0, n0, n0, n0, n0, n0, n0
        came = tl.load(state_ptr + this)
        state = tl.where(begins, 0, came)
        l0, l1 = tl.where(state == 0, 0.0, _FAR), tl.where(state == 1, 0.0, _FAR)
        l2, l3 = tl.where(state == 2, 0.0, _FAR), tl.where(state == 3, 0.0, _FAR)
        l4, l5 = tl.where(state == 4, 0.0, _FAR), tl.where(state == 5, 0.0, _FAR)
        l6, l7 = tl.where(state == 6, 0.0, _FAR), tl.where(state == 7, 0.0, _FAR)
        for t in range(0, stop_r - start_r):
            here, row = place == t, (start_r + t).to(tl.int64)
            factors = tl.load(upper_rr_ptr + row * rows + r, mask=in_r & (place > t), other=0.0)
            inverse = 1.0 / tl.load(upper_rr_ptr + row * rows + row)
            x0, x1 = tl.sum(tl.where(here, m0, 0.0), axis=0), tl.sum(tl.where(here, m1, 0.0), axis=0)
            x2, x3 = tl.sum(tl.where(here, m2, 0.0), axis=0), tl.sum(tl.where(here, m3, 0.0), axis=0)
            x4, x5 = tl.sum(tl.where(here, m4, 0.0), axis=0), tl.sum(tl.where(here, m5, 0.0), axis=0)
            x6, x7 = tl.sum(tl.where(here, m6, 0.0), axis=0), tl.sum(tl.where(here, m7, 0.0), axis=0)
            a0, b0, d0 = _ahead(x0, x4, l0, l4, m0, m4, n0, n4, here, inverse, factors, 0.0, 2.0)
            a1, b1, d1 = _ahead(x0, x4, l0, l4, m0, m4, n0, n4, here, inverse, factors, 2.0, 0.0)
            a2, b2, d2 = _ahead(x1, x5, l1, l5, m1, m5, n1, n5, here, inverse, factors, 1.0, 3.0)
            a3, b3, d3 = _ahead(x1, x5, l1, l5, m1, m5, n1, n5, here, inverse, factors, 3.0, 1.0)
            a4, b4, d4 = _ahead(x2, x6, l2, l6, m2, m6, n2, n6, here, inverse, factors, 2.0, 0.0)
            a5, b5, d5 = _ahead(x2, x6, l2, l6, m2, m6, n2, n6, here, inverse, factors, 0.0, 2.0)
            a6, b6, d6 = _ahead(x3, x7, l3, l7, m3, m7, n3, n7, here, inverse, factors, 3.0, 1.0)
            a7, b7, d7 = _ahead(x3, x7, l3, l7, m3, m7, n3, n7, here, inverse, factors, 1.0, 3.0)
            l0, l1, l2, l3, l4, l5, l6, l7 = a0, a1, a2, a3, a4, a5, a6, a7
            m0, m1, m2, m3, m4, m5, m6, m7 = b0, b1, b2, b3, b4, b5, b6, b7
            n0, n1, n2, n3, n4, n5, n6, n7 = d0, d1, d2, d3, d4, d5, d6, d7
        l0, m0, n0, state = _better(l0, m0, n0, state * 0, l1, m1, n1, 1)
        l0, m0, n0, state = _better(l0, m0, n0, state, l2, m2, n2, 2)
        l0, m0, n0, state = _better(l0, m0, n0, state, l3, m3, n3, 3)
        l0, m0, n0, state = _better(l0, m0, n0, state, l4, m4, n4, 4)
        l0, m0, n0, state = _better(l0, m0, n0, state, l5, m5, n5, 5)
        l0, m0, n0, state = _better(l0, m0, n0, state, l6, m6, n6, 6)
        l0, m0, n0, state = _better(l0, m0, n0, state, l7, m7, n7, 7)
        e = (u - n0) / tl.load(upper_kk_ptr + this.to(tl.int64) * columns + this)
        errors_d = tl.where((column == k)[:, None], e[None, :], errors_d)
        tl.debug_barrier()  # all have read what was in the place of n
        tl.store(state_ptr + this, state)
        tl.store(w_ptr + at, u, mask=in_r)
        tl.store(n_ptr + at, n0, mask=in_r)
        tl.store(error_ptr + at, e, mask=in_r)
        tl.store(below_ptr + r * columns + this, (m0 - n0) / pivots, mask=in_r)
        tl.debug_barrier()  # the next column reads these values


def round_both(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    upper_RR: Tensor,
    steps: Sequence[int],
) -> None:
    """Round a matrix in place, as `birkhoff.codec.output.rows.eager_round_both`, on a GPU. Paths are decided after
    `PATH_ROWS` rows."""
    columns, rows = w_KR.shape
    below_RK = torch.zeros(rows, columns, dtype=torch.float32, device=w_KR.device)
    wide, high = (_PATH_COLUMNS, PATH_ROWS) if steps else (_SIDE, _SIDE)
    starts = [
        first for begin, end in pairwise(accumulate(steps or [rows], initial=0)) for first in range(begin, end, high)
    ]
    start = torch.tensor([*starts, rows], dtype=torch.int32, device=w_KR.device)
    matrices, sizes = (w_KR, n_KR, error_KR, below_RK), (rows, columns)
    if steps:
        lanes = set(accumulate(steps, initial=0))
        begins = torch.tensor([first in lanes for first in starts], dtype=torch.int8, device=w_KR.device)
        state = torch.zeros(columns, dtype=torch.int32, device=w_KR.device)
    across, down = triton.cdiv(columns, wide), len(starts)
    for diagonal in range(across + down - 1):
        first = max(0, diagonal - down + 1)
        grid, where = (min(diagonal, across - 1) - first + 1,), (*sizes, diagonal, first)
        _earlier_kernel[grid](*matrices, upper_KK, upper_RR, start, *where, WIDE=wide, HIGH=high, num_warps=4)
        if steps:
            _path_kernel[grid](
                *matrices, state, upper_KK, upper_RR, partner, start, begins, *where, STEPS=N, WIDE=wide, HIGH=high,
                num_warps=1,
            )  # fmt: skip
        else:
            _tile_kernel[grid](
                *matrices, upper_KK, upper_RR, partner, start, *where, STEPS=N, SIDE=wide, num_warps=_WARPS
            )
