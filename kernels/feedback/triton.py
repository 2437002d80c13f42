"""Error feedback inside a block of columns on a GPU: rows in parallel, columns one after another.

`birkhoff.codec.output.columns` has the formula and its worked example. Rows are independent, so a program takes some
rows and goes through all columns of a block, if weights are rounded one by one. With a trellis, a path joins the rows
of a column: then each launch prepares u for one column, and the search of `trellis.triton` follows.

Toy: one row, w = (0.4, 0.4), U = [[2.294, -2.065], [0, 1]]. The first column stores n = 0 and e = 0.1744. The second
loads e and U_01, and stores u = 0.4 + 0.1744 * 2.065 = 0.76, n = 1 and e = -0.24.

Shapes: R = rows, K = columns.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.trajectory import N
from birkhoff.kernels.trellis import triton as trellis_triton
from birkhoff.kernels.trellis.triton import _nearest

_ROWS_PER_BLOCK = 64


@triton.jit
def _lose(base_ptr, n_ptr, error_ptr, inside_ptr, at, place, inside, COLUMNS: tl.constexpr):
    """Store and return the scaled error e of a column, for the weights `at` masked by `inside`."""
    pivot = tl.load(inside_ptr + place * COLUMNS + place)
    base = tl.load(base_ptr + at, mask=inside, other=0.0)
    e = (base - tl.load(n_ptr + at, mask=inside, other=0.0)) / pivot
    tl.store(error_ptr + at, e, mask=inside)
    return e


@triton.jit
def _columns_kernel(
    w_ptr, n_ptr, error_ptr, base_ptr, inside_ptr, partner_ptr, start, first, stop, rows,
    STEPS: tl.constexpr, ROUNDS: tl.constexpr, AGAIN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row, rows = row.to(tl.int64), tl.cast(rows, tl.int64)  # columns times rows can pass 2^31
    for column in range(first, stop):
        u = tl.load(w_ptr + column * rows + row, mask=inside, other=0.0)
        factors = inside_ptr + (column - start) * COLUMNS
        known = column
        if not ROUNDS:
            previous = column - 1
            if previous >= start:  # the trellis found its path after the last launch
                known, place = previous, previous - start
                e = _lose(base_ptr, n_ptr, error_ptr, inside_ptr, previous * rows + row, place, inside, COLUMNS)
                u -= e * tl.load(factors + place)
        for before in range(start, known):
            e = tl.load(error_ptr + before * rows + row, mask=inside, other=0.0)
            u -= e * tl.load(factors + before - start)
        partner = tl.load(partner_ptr + column)
        shear = tl.zeros([BLOCK], tl.float32)
        if partner >= 0:
            shear = tl.load(n_ptr + partner * rows + row, mask=inside, other=0.0) * (1.0 / STEPS)
        u -= shear
        base = u
        if AGAIN:
            base = tl.load(base_ptr + column * rows + row, mask=inside, other=0.0) - shear
        tl.store(base_ptr + column * rows + row, base, mask=inside)
        if ROUNDS:
            n = _nearest(u)
            tl.store(n_ptr + column * rows + row, n, mask=inside)
            tl.store(error_ptr + column * rows + row, (base - n) / tl.load(factors + column - start), mask=inside)
            tl.debug_barrier()  # the next column reads these values
        else:
            tl.store(n_ptr + column * rows + row, u, mask=inside)


@triton.jit
def _last_kernel(
    base_ptr, n_ptr, error_ptr, inside_ptr, start, column, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = column * tl.cast(rows, tl.int64) + row
    _lose(base_ptr, n_ptr, error_ptr, inside_ptr, at, column - start, row < rows, COLUMNS)


def round_block(
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
    """Round columns start..stop-1 in place, as `birkhoff.codec.output.columns.eager_round_block`."""
    rows, count = w_KR.shape[1], stop - start
    if not count:
        return
    inside = upper_KK[start:stop, start:stop].T.contiguous()  # the factors of a column are contiguous
    base = w_KR if base_KR is None else base_KR  # u overwrites w
    grid, fixed = (triton.cdiv(rows, _ROWS_PER_BLOCK),), {"COLUMNS": count, "BLOCK": _ROWS_PER_BLOCK, "num_warps": 2}
    matrices, how = (w_KR, n_KR, error_KR, base, inside, partner), fixed | {"STEPS": N, "AGAIN": base_KR is not None}
    if not lanes:
        _columns_kernel[grid](*matrices, start, start, stop, rows, ROUNDS=True, **how)
        return
    taken = torch.empty(triton.cdiv(rows, lanes) * lanes, dtype=torch.uint8, device=w_KR.device)
    for column in range(start, stop):
        _columns_kernel[grid](*matrices, start, column, column + 1, rows, ROUNDS=False, **how)
        trellis_triton.search_column_(n_KR[column], taken, lanes)
    _last_kernel[grid](base, n_KR, error_KR, inside, start, stop - 1, rows, **fixed)
