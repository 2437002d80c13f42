"""The two forms of a lattice tensor: int8 coordinates in memory, grouped and entropy-coded symbols at rest.

At rest each coordinate n is a symbol: n itself, or k = n >> 1 for coordinates on trellis paths. The symbols of both
coordinates form one plane [R, 2P], I before J, which is grouped by the levels of its rows and columns (see `contexts`).
A symbol is stored as the byte symbol + 128.

A symbol outside -128..127 is written as k & 1 (so that the path continues), or as 0 without a trellis. The escape
stream holds the pair's coordinates and overrides such symbols. More pairs are escapes in memory than at rest: a path's
coordinates may be outside -128..127 while its symbols are inside.

Shapes: R = rows, P = pairs per row, G = groups (see `contexts`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, rest, trellis
from birkhoff.codec.container import Consecutive
from birkhoff.codec.contexts import RULE_1, RULE_2, Bytes, Rule
from birkhoff.codec.entropy import tables
from birkhoff.codec.entropy.tables import Tables
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import to_host
from birkhoff.codec.native.dispatch import Dispatched
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.trajectory import HIGH, LOW, Escapes

Stream = bytes | memoryview

SMALL = 1 << 16
"""Symbols up to which the encoder tries more ways of grouping."""

_ONE_PAIR = 2
"""Symbols in a row of one pair."""

Item = tuple[LatticeTensor, int]
"""A coded matrix and its trellis path: 0 for none, 1 through the rows, 2 down the columns."""

Packed = tuple[tuple[Stream, ...], int]
"""The streams of a matrix, and how many escapes they store."""


def pack(code: LatticeTensor, *, path: int) -> Packed:
    """Return the streams (levels of the rows and columns, groups, escapes) and the number of stored escapes.

    An empty stream of levels means that all levels are 0 and the plane is one group. `path` is 0 for coordinates off
    the trellis, 1 for paths through the rows, 2 for paths down the columns.
    """
    return pack_all([(code, path)])[0]


def reference_pack_all(items: Sequence[Item]) -> list[Packed]:
    """`pack_all` on the CPU."""
    return [reference_pack(code, path=path) for code, path in items]


def _device_of(items: Sequence[Item]) -> torch.device:
    return items[0][0].i.device if items else torch.device("cpu")


pack_all: Dispatched[[Sequence[Item]], list[Packed]] = Dispatched(reference_pack_all, _device_of)
"""Packs several matrices, all on one type of device. A version for a device makes the same bytes."""


def reference_pack(code: LatticeTensor, *, path: int) -> Packed:
    """`pack` on the CPU."""
    code = code.to("cpu")
    both = symbols_of(code, path=path)
    best = min(_groupings(both), key=lambda grouping: grouping.bytes)
    stored = explicit(code.escapes, path=path)
    return (best.levels, *rest.pack_all(best.flat, best.sizes, best.fits), rest.pack_escapes(stored)), len(stored)


class _Grouping(NamedTuple):
    """One way to group a plane's symbols."""

    levels: bytes
    """The stream of the levels."""
    flat: Bytes
    """The groups, one after the other."""
    sizes: contexts.Integers
    counts: tables.Counts
    """The histogram of each group, [G, 256]."""
    fits: Tables
    bytes: float
    """Estimated size of all streams."""


def tries_more(columns: int, size: int) -> bool:
    """Return whether the encoder tries more ways of grouping a plane of this size.

    It does for small planes, and if a row is one pair: in fixed point the pair's symbols differ in scale, rows do not.
    """
    return size <= SMALL or columns == _ONE_PAIR


def _groupings(both: Bytes) -> Iterator[_Grouping]:
    """Yield ways to group the plane of all symbols: as one group, by the levels of rows and columns, and for small
    planes by columns alone."""
    rows, columns = map(contexts.levels, contexts.mean_squares(both))
    first = _grouping(both, rows, columns, contexts.USUAL_BITS)
    flat, sizes = both.reshape(-1), np.array([both.size])
    counts = tables.histograms(flat, sizes) if first is None else first.counts.sum(axis=0, keepdims=True)
    fits = tables.fit(counts)
    yield _Grouping(b"", flat, sizes, counts, fits, float(rest.estimates(sizes, fits)[0]))
    if first is not None:
        yield first
    if tries_more(both.shape[1], both.size):
        for row, bits in (
            (rows, contexts.SMALL_BITS),
            (0 * rows, contexts.SMALL_BITS),
            (0 * rows, contexts.USUAL_BITS),
        ):
            grouping = _grouping(both, row, columns, bits)
            if grouping is not None:
                yield grouping


def _grouping(both: Bytes, rows: Bytes, columns: Bytes, bits: int) -> _Grouping | None:
    """Group the plane by levels. Return None if all symbols fall into one group, which needs no levels."""
    flat, sizes = contexts.gather(both, rows, columns, contexts.rule_2(bits))
    if len(sizes) == 1:
        return None
    counts = tables.histograms(flat, sizes)
    fits = tables.fit(counts)
    levels = rest.pack(np.concatenate(([bits], rows, columns)).astype(np.uint8))
    return _Grouping(levels, flat, sizes, counts, fits, len(levels) + sum(rest.estimates(sizes, fits).tolist()))


def unpack(
    streams: Sequence[Stream], shape: tuple[int, int], escapes: int, *, path: int
) -> tuple[Tensor, Tensor, Escapes]:
    """Return (i, j, escapes) in memory, on the CPU: int8 [R, P] each, from the streams of `pack`.

    Raises:
        FormatError: The number of streams does not fit the levels, or a stream is damaged.
    """
    rows, pairs = shape
    row, column, rule = unpack_levels(streams, shape)
    where = contexts.addresses(row, column, rule)
    sizes = where.sizes.tolist()
    check_count(streams, len(sizes))
    flat = np.empty(2 * rows * pairs, dtype=np.uint8)
    groups = streams.inner() if isinstance(streams, Consecutive) else streams[1:-1]
    rest.unpack_all(groups, sizes, flat)
    stored = unpack_escapes(streams, shape, escapes, path=path)
    joined = contexts.join(flat, row, column, rule, where)
    if path and native() is not None:
        return _paths_of(joined, path, stored)
    plane = torch.from_numpy(joined)
    return _in_memory([_coordinates(half, path) for half in (plane[:, :pairs], plane[:, pairs:])], stored)


def unpack_escapes(streams: Sequence[Stream], shape: tuple[int, int], escapes: int, *, path: int) -> Escapes:
    """Return the stored escapes. Raises FormatError."""
    return rest.unpack_escapes(streams[-1], escapes, shape[0] * shape[1], reach=2 if path else 1)


def check_count(streams: Sequence[Stream], groups: int) -> None:
    """Raise FormatError if the number of streams does not fit the number of groups."""
    if len(streams) != 2 + groups:
        raise FormatError(f"{len(streams)} streams stored, expected {2 + groups}")


def unpack_levels(streams: Sequence[Stream], shape: tuple[int, int]) -> tuple[Bytes, Bytes, Rule]:
    """Return the levels of the rows, the levels of both planes' columns, and the grouping rule. Raises FormatError."""
    (found,) = unpack_levels_all([streams], [shape])
    return found or (np.zeros(shape[0], dtype=np.uint8), np.zeros(2 * shape[1], dtype=np.uint8), RULE_2)


def unpack_levels_all(
    tensors: Sequence[Sequence[Stream]], shapes: Sequence[tuple[int, int]]
) -> list[tuple[Bytes, Bytes, Rule] | None]:
    """Unpack the levels of many tensors, as `unpack_levels`. A tensor whose symbols are one group gives None.

    Raises FormatError.
    """
    few = next((len(streams) for streams in tensors if len(streams) < 3), None)
    if few is not None:
        raise FormatError(f"{few} streams stored, a lattice tensor has at least 3")
    sizes = [
        1 + rows + 2 * pairs if len(streams[0]) else 0 for streams, (rows, pairs) in zip(tensors, shapes, strict=True)
    ]
    whole = np.empty(sum(sizes), dtype=np.uint8)
    stored = [(streams[0], size) for streams, size in zip(tensors, sizes, strict=True) if size]
    rest.unpack_all([stream for stream, _ in stored], [size for _, size in stored], whole)
    found: list[tuple[Bytes, Bytes, Rule] | None] = []
    end = 0
    for size, (rows, _) in zip(sizes, shapes, strict=True):
        if not size:
            found.append(None)
            continue
        own, end = whole[end : end + size], end + size
        least, most = contexts.LEAST_BITS
        if not least <= own[0] <= most:
            raise FormatError(f"least group of 2^{own[0]} symbols; 2^{least} to 2^{most} are allowed")
        levels = _check_levels(own[1:])
        found.append((levels[:rows], levels[rows:], contexts.rule_2(int(own[0]))))
    return found


def unpack_1(
    streams: Sequence[Stream], shape: tuple[int, int], escapes: int, *, path: int
) -> tuple[Tensor, Tensor, Escapes]:
    """`unpack` for version 1 of the format. Raises FormatError."""
    planes, stored = _planes_1(streams, shape, escapes)
    found = [_coordinates(plane, path) for plane in planes]
    for coordinates in found:
        coordinates.view(-1)[stored.pair] = 0
        low, high = to_host(*torch.aminmax(coordinates)) if coordinates.numel() else (0.0, 0.0)
        if low < LOW or high > HIGH:
            raise FormatError("a coordinate outside -128..127 has no escape")
    return _in_memory(found, stored)


def _planes_1(streams: Sequence[Stream], shape: tuple[int, int], escapes: int) -> tuple[list[Tensor], Escapes]:
    """Return both planes of version 1's symbols, as bytes symbol + 128, and its escapes."""
    rows, pairs = shape
    if len(streams) < 4:
        raise FormatError(f"{len(streams)} streams stored, a lattice tensor has at least 4")
    levels = [_levels_1(stream, count) for stream, count in zip(streams, (rows, pairs, pairs), strict=False)]
    sizes = [contexts.group_sizes(levels[0], columns, RULE_1) for columns in levels[1:]]
    if len(streams) != 4 + len(sizes[0]) + len(sizes[1]):
        raise FormatError(f"{len(streams)} streams stored, expected {4 + len(sizes[0]) + len(sizes[1])}")
    groups = iter(streams[3:-1])
    planes = []
    for columns, wanted in zip(levels[1:], sizes, strict=True):
        data = b"".join(rest.decompress(next(groups), size) for size in wanted)
        flat: Bytes = np.frombuffer(data, dtype=np.uint8) ^ np.uint8(128)
        planes.append(torch.from_numpy(contexts.join(flat, levels[0], columns, RULE_1)))
    return planes, rest.unpack_escapes(streams[-1], escapes, rows * pairs, version=1)


def _levels_1(stream: Stream, count: int) -> Bytes:
    if not len(stream):
        return np.zeros(count, dtype=np.uint8)
    return _check_levels(np.frombuffer(rest.decompress(stream, count), dtype=np.uint8))


def _check_levels(levels: Bytes) -> Bytes:
    if levels.max(initial=0) > contexts.MAX_LEVEL:
        raise FormatError(f"level {levels.max()} is above {contexts.MAX_LEVEL}")
    return levels


def symbols_of(code: LatticeTensor, *, path: int) -> Bytes:
    """Return the symbols + 128, [R, 2P], of both planes of a matrix on the CPU."""
    (rows, pairs), library = code.i.shape, native()
    if library is not None and code.i.is_contiguous() and code.j.is_contiguous():
        both = np.empty((rows, 2 * pairs), dtype=np.uint8)
        library.birkhoff_symbols(code.i.data_ptr(), code.j.data_ptr(), rows, pairs, int(path > 0), pointer(both))
    else:
        coordinates = np.concatenate((code.i.numpy(), code.j.numpy()), axis=1)
        both = (coordinates >> 1 if path else coordinates).view(np.uint8) ^ np.uint8(128)
    if len(code.escapes):
        row, pair = np.divmod(code.escapes.pair.numpy(), pairs)
        for first, true in ((0, code.escapes.i), (pairs, code.escapes.j)):
            both[row, first + pair] = escaped_symbols(true, path=path).numpy()
    return both


def escaped_symbols(true: Tensor, *, path: int) -> Tensor:
    """Return the symbols + 128, uint8 [E], that are stored for escapes with these coordinates (int32 [E])."""
    escaped = true >> 1 if path else true
    outside = (escaped < LOW) | (escaped > HIGH)
    return (torch.where(outside, escaped & 1 if path else 0, escaped) + 128).to(torch.uint8)


def explicit(escapes: Escapes, *, path: int) -> Escapes:
    """Return the escapes whose coordinates do not fit the symbols."""
    if not path or not len(escapes):
        return escapes
    outside = torch.zeros(len(escapes), dtype=torch.bool, device=escapes.pair.device)
    for true in (escapes.i, escapes.j):
        outside |= ((true >> 1) < LOW) | ((true >> 1) > HIGH)
    return Escapes(pair=escapes.pair[outside], i=escapes.i[outside], j=escapes.j[outside])


def _coordinates(symbols: Tensor, path: int) -> Tensor:
    """Return coordinates [R, P] from symbols + 128, which may be a view: int16 for paths, else int8."""
    k = (symbols ^ 128).contiguous().view(torch.int8)
    return trellis.numbers(k.view(-1), trellis.lanes_of(k.shape[0], k.shape[1], path)).view(k.shape) if path else k


def _paths_of(both: Bytes, path: int, stored: Escapes) -> tuple[Tensor, Tensor, Escapes]:
    """Return the same as `_in_memory` of both planes' `_coordinates`, computed natively from symbols + 128."""
    library = native()
    assert library is not None
    rows, pairs = both.shape[0], both.shape[1] // 2
    lanes = trellis.lanes_of(rows, pairs, path)
    planes: list[Tensor] = []
    outside: list[tuple[Tensor, Tensor]] = []
    for half in range(2):
        coordinates: npt.NDArray[np.int8] = np.empty((rows, pairs), dtype=np.int8)
        room = _ROOM
        while True:
            delays = np.zeros(3 * lanes, dtype=np.uint8)
            index, value = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int32)
            found = library.birkhoff_path_numbers(
                pointer(both) + half * pairs,
                rows,
                pairs,
                2 * pairs,
                lanes,
                *map(pointer, (delays, coordinates, index, value)),
                room,
            )
            if found <= room:
                break
            room = found
        planes.append(torch.from_numpy(coordinates))
        outside.append((torch.from_numpy(index[:found]), torch.from_numpy(value[:found])))
    found_escapes = take_outside(planes, outside, stored)
    return planes[0], planes[1], found_escapes


def take_outside(planes: Sequence[Tensor], outside: Sequence[tuple[Tensor, Tensor]], stored: Escapes) -> Escapes:
    """Return the escapes in memory, on the CPU, and set them to 0 in both `planes` (int8 [R, P], on any device).

    `outside` lists for each plane the coordinates outside -128..127, on the CPU: increasing flat indices, and values.
    `stored` escapes override them.
    """
    if not any(len(at) for at, _ in outside):
        return _emptied(planes, stored)
    # numpy's calls take a fraction of torch's time. There are few escapes, but many tensors.
    found = np.unique(np.concatenate([index.numpy() for index, _ in outside]))
    if len(stored):
        found = found[np.isin(found, stored.pair.numpy(), invert=True)]
    pair, true = torch.from_numpy(found), []
    for plane, (at, wide) in zip(planes, outside, strict=True):
        exact = plane.view(-1)[pair.to(plane.device)].to("cpu", torch.int32)
        if len(at):
            place = np.searchsorted(at.numpy(), found).clip(max=len(at) - 1)
            exact = torch.from_numpy(np.where(at.numpy()[place] == found, wide.numpy()[place], exact.numpy()))
        true.append(exact)
    return _emptied(planes, merged(stored, Escapes(pair=pair, i=true[0], j=true[1])))


def _emptied(planes: Sequence[Tensor], escapes: Escapes) -> Escapes:
    for plane in planes if len(escapes) else ():
        plane.view(-1)[escapes.pair.to(plane.device)] = 0
    return escapes


_ROOM = 1 << 12
"""Expected maximum number of coordinates outside the box."""


def merged(a: Escapes, b: Escapes) -> Escapes:
    """Return the escapes of both, by increasing index."""
    if not len(a) or not len(b):
        return a if len(a) else b
    pair = torch.cat((a.pair, b.pair))
    order = torch.argsort(pair)
    return Escapes(pair=pair[order], i=torch.cat((a.i, b.i))[order], j=torch.cat((a.j, b.j))[order])


def _in_memory(coordinates: list[Tensor], stored: Escapes) -> tuple[Tensor, Tensor, Escapes]:
    """Return int8 planes that are 0 at every escape, and all escapes: the stored ones and others outside the box."""
    for plane in coordinates:
        plane.view(-1)[stored.pair] = 0
    i, j = coordinates
    found = stored
    if i.dtype != torch.int8 and i.numel():
        bounds = to_host(*(bound for plane in coordinates for bound in torch.aminmax(plane)))
        if min(bounds) < LOW or max(bounds) > HIGH:
            found = _take_out(i.view(-1), j.view(-1), stored)
    return i.to(torch.int8), j.to(torch.int8), found


def _take_out(i: Tensor, j: Tensor, stored: Escapes) -> Escapes:
    """Set the pairs outside the box to 0. Return them and the stored ones, by increasing index."""
    pair = ((i < LOW) | (i > HIGH) | (j < LOW) | (j > HIGH)).nonzero().view(-1)
    taken = Escapes(pair=pair, i=i[pair].to(torch.int32), j=j[pair].to(torch.int32))
    i[pair] = 0
    j[pair] = 0
    return merged(stored, taken)
