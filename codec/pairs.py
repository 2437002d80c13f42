"""The layout of pairs: which two weights belong together.

A weight matrix [R, K] is cut along K into blocks of 64 columns, and column k of a block pairs with column k + 32. The
last block of a row may be narrower: with w columns left its halves are ceil(w/2) wide, and an odd w leaves the last
pair without a partner (its y is 0, and is dropped after decoding). A decoded tile of 32 pairs is thus two contiguous
runs of 32 weights, so a matrix product never interleaves.

    K = 5:  columns 0 1 2 | 3 4 .   pairs (0,3) (1,4) (2,-)

Shapes: R = rows, K = columns, P = pairs per row = the sum of ceil(w/2) over blocks, H = half a block = 32.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

HALF = 32
"""H, pairs in a full block."""


def pairs_per_row(columns: int) -> int:
    """Return P, the pairs in a row of `columns` weights."""
    return (columns + 1) // 2


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the [R, K] in which a tensor is coded.

    Matrices keep their rows (HyperLinear needs them). Convolutions and tables keep their first dimension as rows if a
    row fills a block. Other tensors become one row, so that padding is at most one weight.
    """
    count = prod(shape)
    if len(shape) == 2 and shape[1] > 1:
        return shape[0], shape[1]
    if len(shape) > 2 and shape[0] and count // shape[0] >= 2 * HALF:
        return shape[0], count // shape[0]
    return 1, count


def _spans(columns: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Yield (columns, pairs, half width, missing partners) of all full blocks together, then of the narrow one."""
    full = columns // (2 * HALF)
    if full:
        yield slice(0, full * 2 * HALF), slice(0, full * HALF), HALF, 0
    rest = columns - full * 2 * HALF
    if rest:
        half = (rest + 1) // 2
        yield slice(full * 2 * HALF, columns), slice(full * HALF, full * HALF + half), half, 2 * half - rest


def split(weight_RK: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the first and second weights of every pair, (x_RP, y_RP), in the dtype of `weight_RK`.

    `out`, if given, is a [2, R, P] buffer to fill.
    """
    rows, columns = weight_RK.shape
    xy = weight_RK.new_empty(2, rows, pairs_per_row(columns)) if out is None else out
    for span, pairs, half, missing in _spans(columns):
        block = weight_RK[:, span]
        if missing:
            block = torch.nn.functional.pad(block, (0, missing))
        halves = block.unflatten(1, (-1, 2, half))
        xy[:, :, pairs].unflatten(2, (-1, half)).copy_(halves.permute(2, 0, 1, 3))
    return xy[0], xy[1]


def join(x_RP: Tensor, y_RP: Tensor, columns: int, out: Tensor | None = None) -> Tensor:
    """Return the weights [R, K] of pairs, in the dtype of `out` if given (a buffer to fill), else of `x_RP`."""
    weight = x_RP.new_empty(x_RP.shape[0], columns) if out is None else out
    for span, pairs, half, missing in _spans(columns):
        if missing:
            both = torch.cat((x_RP[:, pairs], y_RP[:, pairs]), dim=1)
            weight[:, span] = both[:, : 2 * half - missing]
        else:
            halves = weight[:, span].unflatten(1, (-1, 2, half))
            halves[:, :, 0] = x_RP[:, pairs].unflatten(1, (-1, half))
            halves[:, :, 1] = y_RP[:, pairs].unflatten(1, (-1, half))
    return weight


def columns_of_pairs(pair: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the columns of x and of y of pair numbers 0..P-1 of any shape. A missing partner has a column >=
    `columns`."""
    block = pair // HALF
    half = ((columns - block * 2 * HALF + 1) // 2).clamp(max=HALF)
    first = block * 2 * HALF + pair % HALF
    return first, first + half
