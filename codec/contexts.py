"""Group symbols by their expected size, so that each group gets its own entropy code.

Rows and columns of a weight matrix differ in scale. Every row r and every column p of a plane [R, P] has a level (a
byte, `STEPS` per octave of root mean square). Symbols are grouped by the sum of the two levels, and neighbouring sums
are joined until a group is large enough to pay for its code table. The grouping is a function of the levels alone, so a
reader can compute it. Version 2 of the format groups both coordinates together, as the columns of one plane; version 1
grouped each separately, by another rule.

Order of the symbols in a group: rows sorted by level, columns sorted by level (both stable) cut the plane into tiles of
one level each. A group consists of its tiles, with row levels in the outer loop and column levels in the inner loop,
each tile row by row.

    rows at levels (1, 0), columns at (0, 2, 0), least group 2 symbols: tiles in order (row level, column level) are
    (0, 0) = [r1p0 r1p2], (0, 2) = [r1p1], (1, 0) = [r0p0 r0p2], (1, 2) = [r0p1]; sums 0, 2, 1, 3 with 2, 1, 2, 1
    symbols make the groups {0}, {1}, {2, 3}: [r1p0 r1p2], [r0p0 r0p2], [r1p1 r0p1].

Shapes: R = rows, P = columns of the plane, G = groups.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from birkhoff.codec.native.library import native, pointer

STEPS = 3
LEVELS = 64
MAX_LEVEL = LEVELS - 1

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


class Rule(NamedTuple):
    """A group ends at `least` symbols if as many remain and fewer than `most` groups have begun."""

    least: int
    most: int


RULE_1 = Rule(least=1 << 14, most=32)
"""The rule of version 1, whose code tables took about 100 bytes."""

LEAST_BITS = (8, 24)
"""Range of log2 of the least group, which version 2 stores."""

SMALL_BITS, USUAL_BITS = 10, 12
"""Values that the encoder tries. A group costs about 50 bytes for its table and states."""


def rule_2(least_bits: int) -> Rule:
    """Return the rule of version 2."""
    return Rule(least=1 << least_bits, most=64)


RULE_2 = rule_2(USUAL_BITS)


def mean_squares(plane: Bytes) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean squares of the rows and of the columns of symbols stored as n + 128, from exact sums."""
    rows, columns = plane.shape
    by_row, by_column = np.empty(rows, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    library = native()
    if library is not None:
        library.birkhoff_squares(pointer(plane), rows, columns, pointer(by_row), pointer(by_column))
        return by_row / columns, by_column / rows
    height = max(1, _CHUNK // columns)
    for top in range(0, rows, height):
        square = np.square(plane[top : top + height].astype(np.int32) - 128)
        square.sum(axis=1, out=by_row[top : top + height], dtype=np.int64)
        by_column += square.sum(axis=0, dtype=np.int64)
    return by_row / columns, by_column / rows


_CHUNK = 1 << 16
"""Symbols squared together. They fit in a core's cache."""


def levels(mean_square: npt.NDArray[np.float64]) -> Bytes:
    """Return the levels of rows or columns from the mean squares of their symbols. The smallest is 0."""
    level = _absolute_levels(mean_square)
    result: Bytes = np.minimum(level - level.min(), MAX_LEVEL).astype(np.uint8)
    return result


def _absolute_levels(mean_square: npt.NDArray[np.float64]) -> Integers:
    octaves = 0.5 * np.log2(mean_square + 0.05)  # symbols are whole: below this floor all is zero anyway
    level: Integers = np.rint(STEPS * octaves).astype(np.int64)
    return level


_GREATEST_SQUARE = 1 << 14


@cache
def level_bounds() -> npt.NDArray[np.float64]:
    """Return the least mean square of symbols at which each level but the lowest begins, increasing.

    Devices with another logarithm use it: the level of x, before the smallest is subtracted, is the number of bounds
    that are no greater than x.
    """
    lowest, highest = _absolute_levels(np.array([0.0, _GREATEST_SQUARE])).tolist()
    bounds = []
    for level in range(lowest + 1, highest + 1):
        bound = np.exp2((2 * level - 1) / STEPS) - 0.05  # to the last digits
        while _absolute_levels(np.array([bound]))[0] >= level:
            bound = np.nextafter(bound, -1.0)
        while _absolute_levels(np.array([bound]))[0] < level:
            bound = np.nextafter(bound, _GREATEST_SQUARE)
        bounds.append(bound)
    return np.array(bounds)


def group_of_sum(rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> Integers:
    """Return the group of each possible sum of a row's and a column's level. Groups are numbered from 0 without
    gaps."""
    count = np.convolve(np.bincount(rows), np.bincount(columns))
    group = np.zeros(len(count), dtype=np.int64)
    current, held, left = 0, 0, int(count.sum())
    for total, symbols in enumerate(count):
        group[total] = current
        held += int(symbols)
        left -= int(symbols)
        if held >= rule.least and left >= rule.least and current < rule.most - 1:
            current, held = current + 1, 0
    return group


def group_sizes(rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> list[int]:
    """Return the number of symbols in each group."""
    count = np.convolve(np.bincount(rows), np.bincount(columns))
    return [int(size) for size in np.bincount(group_of_sum(rows, columns, rule), weights=count)]


def _tiles(rows: Bytes, columns: Bytes, rule: Rule) -> Iterator[tuple[int, slice, slice]]:
    """Yield (group, rows, columns) of every tile of the sorted plane, in the order of the format."""
    group = group_of_sum(rows, columns, rule)
    row_ends, column_ends = (np.cumsum(np.bincount(level)) for level in (rows, columns))
    top = 0
    for row_level, bottom in enumerate(row_ends):
        left = 0
        for column_level, right in enumerate(column_ends):
            if bottom > top and right > left:
                yield int(group[row_level + column_level]), slice(top, bottom), slice(left, right)
            left = right
        top = bottom


def split(plane: Bytes, rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> list[Bytes]:
    """Return the groups of a plane [R, P], each as a flat array."""
    return cut(*gather(plane, rows, columns, rule))


def gather(plane: Bytes, rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> tuple[Bytes, Integers]:
    """Return the groups of a plane [R, P], one after the other, and the size of each."""
    if not rows.any() and not columns.any():
        return plane.reshape(-1), np.array([plane.size])
    if native() is None:
        groups = reference_split(plane, rows, columns, rule)
        return np.concatenate(groups), np.array(list(map(len, groups)))
    flat, where = np.empty(plane.size, dtype=np.uint8), addresses(rows, columns, rule)
    _regroup(plane, flat, where, into=True)
    return flat, where.sizes


def cut(flat: Bytes, sizes: Integers) -> list[Bytes]:
    """Cut `flat` into groups of these sizes."""
    return np.split(flat, np.cumsum(sizes)[:-1])


def join(flat: Bytes, rows: Bytes, columns: Bytes, rule: Rule = RULE_2, where: "Addresses | None" = None) -> Bytes:
    """Return the plane [R, P] whose groups follow each other in `flat`, undoing `split`. `where` are its addresses."""
    shape = len(rows), len(columns)
    if not rows.any() and not columns.any():
        return flat.reshape(shape)
    if native() is None:
        return reference_join(flat, rows, columns, rule)
    plane = np.empty(shape, dtype=np.uint8)
    _regroup(plane, flat, where or addresses(rows, columns, rule), into=False)
    return plane


def _regroup(plane: Bytes, flat: Bytes, where: "Addresses", *, into: bool) -> None:
    library = native()
    assert library is not None
    columns = plane.shape[1]
    order, scratch = np.empty(columns, dtype=np.uint32), np.empty(4 * columns, dtype=np.uint8)
    arrays = where.row, where.column, where.base, where.width, order, scratch
    library.birkhoff_regroup(pointer(plane), *plane.shape, pointer(flat), *map(pointer, arrays), int(into))


def reference_split(plane: Bytes, rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> list[Bytes]:
    """`split` in numpy."""
    ordered = plane[np.argsort(rows, kind="stable")]
    if columns.any():
        ordered = np.take(ordered, np.argsort(columns, kind="stable"), axis=1)
    groups: list[list[Bytes]] = [[] for _ in group_sizes(rows, columns, rule)]
    for group, row, column in _tiles(rows, columns, rule):
        groups[group].append(ordered[row, column].reshape(-1))
    return [np.concatenate(tiles) for tiles in groups]


def reference_join(flat: Bytes, rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> Bytes:
    """`join` in numpy."""
    sizes = group_sizes(rows, columns, rule)
    ordered = np.empty((len(rows), len(columns)), dtype=np.uint8)
    taken = [sum(sizes[:group]) for group in range(len(sizes))]
    for group, row, column in _tiles(rows, columns, rule):
        tile = ordered[row, column]
        tile[...] = flat[taken[group] : taken[group] + tile.size].reshape(tile.shape)
        taken[group] += tile.size
    plane = np.empty_like(ordered)
    if columns.any():
        by_column = np.argsort(np.argsort(columns, kind="stable"), kind="stable")
        ordered = np.take(ordered, by_column, axis=1)
    plane[np.argsort(rows, kind="stable")] = ordered
    return plane


def places(rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> tuple[Integers, ...]:
    """Return the position of each symbol (r, p) in the concatenated groups, as sums of small tables.

    Returns (base, width, row_level, row_rank, column_level, column_rank): symbol (r, p) has the number
    `base[row_level[r], column_level[p]] + row_rank[r] * width[column_level[p]] + column_rank[p]`.
    """
    height, width = np.bincount(rows), np.bincount(columns)
    tile = np.outer(height, width).reshape(-1)
    group = group_of_sum(rows, columns, rule)[np.add.outer(np.arange(len(height)), np.arange(len(width)))].reshape(-1)
    order = np.argsort(group, kind="stable")  # sort by group, keeping the order of tiles within
    base = np.empty(len(tile), dtype=np.int64)
    base[order] = np.cumsum(tile[order]) - tile[order]
    tables = base.reshape(len(height), len(width)), width.astype(np.int64)
    return *tables, rows.astype(np.int64), _ranks(rows), columns.astype(np.int64), _ranks(columns)


class Addresses(NamedTuple):
    """The position of each symbol (r, c) of a plane in its concatenated groups, as sums of table entries.

    An entry of `row` [R] or `column` [P] is 64 * rank + level, where the rank counts within its level. At levels a and
    b, symbol (r, c) has the number `base[a, b] + rank of r * width[b] + rank of c`. `base` is [64, 64], `width` [64].
    """

    row: Integers
    column: Integers
    base: Integers
    width: Integers
    sizes: Integers
    """Number of symbols in each group."""


def addresses(rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> Addresses:
    """Return the positions that `places` describes, in the form that kernels take."""
    library = native()
    if library is None:
        return reference_addresses(rows, columns, rule)
    rows, columns = np.ascontiguousarray(rows), np.ascontiguousarray(columns)
    row, column = np.empty(len(rows), dtype=np.int64), np.empty(len(columns), dtype=np.int64)
    base, width, sizes = np.empty((LEVELS, LEVELS), np.int64), np.empty(LEVELS, np.int64), np.empty(LEVELS, np.int64)
    groups = library.birkhoff_addresses(
        pointer(rows),
        len(rows),
        pointer(columns),
        len(columns),
        *rule,
        *map(pointer, (row, column, base, width, sizes)),
    )
    return Addresses(row=row, column=column, base=base, width=width, sizes=sizes[:groups])


def reference_addresses(rows: Bytes, columns: Bytes, rule: Rule = RULE_2) -> Addresses:
    """`addresses` in numpy."""
    found, widths, row_level, row_rank, column_level, column_rank = places(rows, columns, rule)
    height = np.bincount(rows)
    base, width = np.zeros((LEVELS, LEVELS), dtype=np.int64), np.zeros(LEVELS, dtype=np.int64)
    base[: found.shape[0], : found.shape[1]] = np.where((height > 0)[:, None] & (widths > 0), found, 0)
    width[: len(widths)] = widths
    return Addresses(
        row=row_rank * LEVELS + row_level,
        column=column_rank * LEVELS + column_level,
        base=base,
        width=width,
        sizes=np.array(group_sizes(rows, columns, rule), dtype=np.int64),
    )


class Groupings(NamedTuple):
    """The `Addresses` of several planes, with their levels.

    `levels` holds the levels of the first plane's rows, then of its columns, then the next plane's. `entries` holds
    `row` and `column` in the same order. The others have one row per plane, [T]: `tables` [4160] is `base`, then
    `width`; `sizes` [64]; `groups`, their number.
    """

    levels: Bytes
    entries: Integers
    tables: Integers
    sizes: Integers
    groups: Integers


def groupings(
    shapes: Sequence[tuple[int, int]], absolute: Bytes, rules: Sequence[Rule], even: Sequence[bool] | None = None
) -> Groupings:
    """Group planes (rows, columns) by the levels of all their rows and columns, laid out as in `Groupings`, and by a
    rule each.

    The smallest level of a plane's rows is subtracted from them first, and likewise for its columns, as in `levels`.
    If all rows of a plane have one level, `even` may say so: then its rows have no levels here and get no entries.
    The entry of row r would be 64 * r.
    """
    library = native()
    if library is None:
        return reference_groupings(shapes, absolute, rules, even)
    count = len(shapes)
    found = Groupings(
        levels=absolute.copy(),
        entries=np.empty(len(absolute), dtype=np.int64),
        tables=np.empty((count, LEVELS * LEVELS + LEVELS), dtype=np.int64),
        sizes=np.empty((count, LEVELS), dtype=np.int64),
        groups=np.empty(count, dtype=np.int64),
    )
    given = (
        np.array(shapes, dtype=np.int64),
        np.array(rules, dtype=np.int64),
        np.array(even or [False] * count, dtype=bool),
    )
    library.birkhoff_groupings(count, *map(pointer, (*given, *found)))
    return found


def reference_groupings(
    shapes: Sequence[tuple[int, int]], absolute: Bytes, rules: Sequence[Rule], even: Sequence[bool] | None = None
) -> Groupings:
    """`groupings` in numpy."""
    count = len(shapes)
    levels_, entries = np.empty(len(absolute), dtype=np.uint8), np.empty(len(absolute), dtype=np.int64)
    tables, sizes = np.empty((count, LEVELS * LEVELS + LEVELS), np.int64), np.zeros((count, LEVELS), np.int64)
    groups = np.empty(count, dtype=np.int64)
    begin = 0
    each = zip(shapes, rules, even or [False] * count, strict=True)
    for number, ((rows, columns), rule, same) in enumerate(each):
        own = 0 if same else rows
        end = begin + own + columns
        row, column = (
            np.minimum(part - part.min(initial=255), MAX_LEVEL) for part in np.split(absolute[begin:end], [own])
        )
        found = reference_addresses(np.zeros(rows, np.uint8) if same else row, column, rule)
        levels_[begin:end] = np.concatenate((row, column))
        entries[begin:end] = np.concatenate((found.row[:own], found.column))
        tables[number] = np.concatenate((found.base.reshape(-1), found.width))
        groups[number] = len(found.sizes)
        sizes[number, : len(found.sizes)] = found.sizes
        begin = end
    return Groupings(levels_, entries, tables, sizes, groups)


def _ranks(levels_: Bytes) -> Integers:
    """Return the rank of each row or column among those of its level."""
    order = np.argsort(levels_, kind="stable")
    counts = np.bincount(levels_)
    ranks = np.empty(len(levels_), dtype=np.int64)
    ranks[order] = np.arange(len(levels_)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks
