"""Symbols grouped by how large they are expected to be, so that each group gets an entropy code of its own.

Rows and columns of a weight matrix differ in scale. Every row r and every column p of a plane [R, P] has a level (a
byte, `STEPS` an octave of root mean square); symbols are grouped by the sum of the two levels, neighbouring sums
together until a group is large enough to pay for its code table. The grouping is a function of the levels alone, so a
reader rebuilds it.

Order of the symbols in a group: rows sorted by level, columns sorted by level (both stable) cut the plane into tiles of
one level each; a group is its tiles, row levels outside, column levels inside, each tile row by row.

    rows at levels (1, 0), columns at (0, 2, 0), least group 2 symbols: tiles in order (row level, column level) are
    (0, 0) = [r1p0 r1p2], (0, 2) = [r1p1], (1, 0) = [r0p0 r0p2], (1, 2) = [r0p1]; sums 0, 2, 1, 3 with 2, 1, 2, 1
    symbols make the groups {0}, {1}, {2, 3}: [r1p0 r1p2], [r0p0 r0p2], [r1p1 r0p1].

Shapes: R = rows, P = columns of the plane, G = groups.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

STEPS = 4
MAX_LEVEL = 63
LEAST_GROUP = 1 << 14
"""Symbols that a group needs: its code table costs about 100 bytes."""

MAX_GROUPS = 32

Bytes = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.int8]


def levels(mean_square: npt.NDArray[np.float32]) -> Bytes:
    """Levels of rows or columns from the mean squares of their symbols; the smallest is 0."""
    octaves = 0.5 * np.log2(mean_square + 0.05)  # symbols are whole: below this floor all is zero anyway
    level = np.rint(STEPS * octaves).astype(np.int64)
    result: Bytes = np.minimum(level - level.min(), MAX_LEVEL).astype(np.uint8)
    return result


def group_of_sum(rows: Bytes, columns: Bytes) -> npt.NDArray[np.int64]:
    """Group of each possible sum of a row's and a column's level; groups are numbered from 0 without gaps."""
    count = np.convolve(np.bincount(rows), np.bincount(columns))
    group = np.zeros(len(count), dtype=np.int64)
    current, held, left = 0, 0, int(count.sum())
    for total, symbols in enumerate(count):
        group[total] = current
        held += int(symbols)
        left -= int(symbols)
        if held >= LEAST_GROUP and left >= LEAST_GROUP and current < MAX_GROUPS - 1:
            current, held = current + 1, 0
    return group


def group_sizes(rows: Bytes, columns: Bytes) -> list[int]:
    """Symbols in each group."""
    count = np.convolve(np.bincount(rows), np.bincount(columns))
    return [int(size) for size in np.bincount(group_of_sum(rows, columns), weights=count)]


def _tiles(rows: Bytes, columns: Bytes) -> Iterator[tuple[int, slice, slice]]:
    """(group, rows, columns) of every tile of the sorted plane, in the order of the format."""
    group = group_of_sum(rows, columns)
    row_ends, column_ends = (np.cumsum(np.bincount(level)) for level in (rows, columns))
    top = 0
    for row_level, bottom in enumerate(row_ends):
        left = 0
        for column_level, right in enumerate(column_ends):
            if bottom > top and right > left:
                yield int(group[row_level + column_level]), slice(top, bottom), slice(left, right)
            left = right
        top = bottom


def split(plane: Plane, rows: Bytes, columns: Bytes) -> list[Plane]:
    """The groups of a plane [R, P], each a flat array."""
    if not rows.any() and not columns.any():
        return [plane.reshape(-1)]
    ordered = plane[np.argsort(rows, kind="stable")]
    if columns.any():
        ordered = np.take(ordered, np.argsort(columns, kind="stable"), axis=1)
    groups: list[list[Plane]] = [[] for _ in group_sizes(rows, columns)]
    for group, row, column in _tiles(rows, columns):
        groups[group].append(ordered[row, column].reshape(-1))
    return [np.concatenate(tiles) for tiles in groups]


def places(rows: Bytes, columns: Bytes) -> tuple[npt.NDArray[np.int64], ...]:
    """Where each symbol (r, p) lies in the groups, one after the other, as sums of small tables.

    Returns (base, width, row_level, row_rank, column_level, column_rank): symbol (r, p) is number
    `base[row_level[r], column_level[p]] + row_rank[r] * width[column_level[p]] + column_rank[p]`.
    """
    height, width = np.bincount(rows), np.bincount(columns)
    tile = np.outer(height, width).reshape(-1)
    group = group_of_sum(rows, columns)[np.add.outer(np.arange(len(height)), np.arange(len(width)))].reshape(-1)
    order = np.argsort(group, kind="stable")  # groups follow each other; inside one, tiles stay row level by row level
    base = np.empty(len(tile), dtype=np.int64)
    base[order] = np.cumsum(tile[order]) - tile[order]
    tables = base.reshape(len(height), len(width)), width.astype(np.int64)
    return *tables, rows.astype(np.int64), _ranks(rows), columns.astype(np.int64), _ranks(columns)


def _ranks(levels_: Bytes) -> npt.NDArray[np.int64]:
    """Number of each row or column among those of its level."""
    order = np.argsort(levels_, kind="stable")
    counts = np.bincount(levels_)
    ranks = np.empty(len(levels_), dtype=np.int64)
    ranks[order] = np.arange(len(levels_)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def join(groups: list[Plane], rows: Bytes, columns: Bytes) -> Plane:
    """The plane [R, P] of `split`; the groups must have the sizes of `group_sizes`."""
    shape = len(rows), len(columns)
    if not rows.any() and not columns.any():
        return groups[0].reshape(shape)
    ordered = np.empty(shape, dtype=np.int8)
    taken = [0] * len(groups)
    for group, row, column in _tiles(rows, columns):
        tile = ordered[row, column]
        tile[...] = groups[group][taken[group] : taken[group] + tile.size].reshape(tile.shape)
        taken[group] += tile.size
    plane = np.empty(shape, dtype=np.int8)
    if columns.any():
        by_column = np.argsort(np.argsort(columns, kind="stable"), kind="stable")
        ordered = np.take(ordered, by_column, axis=1)
    plane[np.argsort(rows, kind="stable")] = ordered
    return plane
