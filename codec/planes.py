"""The two forms of one lattice tensor: int8 coordinates in memory, grouped and entropy-coded symbol planes at rest.

At rest a plane holds a symbol for every pair: the coordinate n itself, or k = n >> 1 where the coordinates lie on a
path of the trellis. A symbol outside -128..127 is written as k & 1 (so that the path goes on), or as 0 off the trellis,
and every pair that is an escape in memory has its coordinates in the escape stream, which has the last word.

Shapes: R = rows, P = pairs a row, G = groups (see `contexts`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, trellis
from birkhoff.codec.contexts import Bytes, Plane
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import to_host
from birkhoff.codec.rest import compress, decompress, pack_escapes, unpack_escapes
from birkhoff.codec.trajectory import HIGH, LOW, Escapes

_CHUNK = 1 << 16
"""Symbols squared together: they stay in a core's cache."""

Stream = bytes | memoryview
Floats = npt.NDArray[np.float32]


def pack(code: LatticeTensor, *, path: bool) -> tuple[bytes, ...]:
    """Streams: row levels, column levels of i and of j, groups of i, groups of j, escapes.

    Levels of no bytes are all 0: the plane is one group. `path` says that the coordinates lie on a trellis path.
    """
    code = code.to("cpu")
    escapes = code.escapes
    planes = [
        _symbols(plane, true, escapes.pair, path=path) for plane, true in ((code.i, escapes.i), (code.j, escapes.j))
    ]
    levels = _levels(planes)
    flat = tuple(np.zeros_like(level) for level in levels)
    fewest = min((_pack_grouped(planes, choice) for choice in (flat, levels)), key=lambda parts: sum(map(len, parts)))
    return (*fewest, pack_escapes(escapes))


def unpack(
    streams: Sequence[Stream],
    shape: tuple[int, int],
    escapes: int,
    *,
    path: bool,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Escapes]:
    """(i, j, escapes) in memory: int8 [R, P] each, from the streams of `pack`.

    On another `device` than the CPU only the entropy decoding is done here; symbols become coordinates there.

    Raises:
        FormatError: there are more or fewer streams than the levels ask for, or one is not what it should be.
    """
    rows, pairs = shape
    if len(streams) < 4:
        raise FormatError(f"{len(streams)} streams stored, a lattice tensor has at least 4")
    levels = [_unpack_levels(stream, count) for stream, count in zip(streams, (rows, pairs, pairs), strict=False)]
    sizes = [contexts.group_sizes(levels[0], columns) for columns in levels[1:]]
    if len(streams) != 4 + len(sizes[0]) + len(sizes[1]):
        raise FormatError(f"{len(streams)} streams stored where {4 + len(sizes[0]) + len(sizes[1])} were expected")
    groups = iter(streams[3:-1])
    numbers = []
    place = torch.device(device)
    for columns, wanted in zip(levels[1:], sizes, strict=True):
        symbols = [_unpack_group(next(groups), size) for size in wanted]
        if place.type == "cpu":
            numbers.append(_numbers(contexts.join(symbols, levels[0], columns), path=path))
        else:
            plane = _join_on(place, symbols, levels[0], columns)
            numbers.append(trellis.numbers(plane) if path else plane)
    found = unpack_escapes(streams[-1], escapes, rows * pairs).to(place)
    return (*_in_box(numbers, found, shape), found)


def _join_on(device: torch.device, groups: list[Plane], rows: Bytes, columns: Bytes) -> Tensor:
    """`contexts.join` on a device: int8 [S]."""
    symbols = torch.from_numpy(np.concatenate(groups)).to(device)
    if not rows.any() and not columns.any():
        return symbols
    base, width, row, row_rank, column, column_rank = (
        torch.from_numpy(table).to(device) for table in contexts.places(rows, columns)
    )
    index = base[row[:, None], column] + row_rank[:, None] * width[column] + column_rank
    return symbols[index.view(-1)]


def _symbols(plane: Tensor, true: Tensor, pair: Tensor, *, path: bool) -> Plane:
    """The symbols int8 [R, P] of a plane; `true` holds the coordinates of the escapes, at `pair`; all on the CPU."""
    coordinates = plane.numpy()
    symbols = coordinates >> 1 if path else coordinates
    if len(pair):
        symbols = symbols if path else symbols.copy()
        escaped = true.numpy() >> 1 if path else true.numpy()
        outside = (escaped < LOW) | (escaped > HIGH)
        symbols.reshape(-1)[pair.numpy()] = np.where(outside, escaped & 1 if path else 0, escaped)
    return symbols


def _numbers(symbols: Plane, *, path: bool) -> Tensor:
    """Coordinates, int16 [S] or int8 [S], of a plane of symbols."""
    flat = torch.from_numpy(np.require(symbols, requirements=["C", "W"])).reshape(-1)
    return trellis.numbers(flat) if path else flat


def _in_box(numbers: list[Tensor], escapes: Escapes, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    for plane in numbers:
        plane[escapes.pair] = 0
        low, high = to_host(*torch.aminmax(plane)) if plane.numel() else (0.0, 0.0)
        if low < LOW or high > HIGH:
            raise FormatError("a coordinate outside -128..127 has no escape")
    i, j = (plane.to(torch.int8).view(shape) for plane in numbers)
    return i, j


def _levels(planes: Sequence[Plane]) -> tuple[Bytes, ...]:
    """Levels of the rows, and of each plane's columns."""
    rows, columns = zip(*map(_mean_squares, planes), strict=True)
    return contexts.levels(np.mean(rows, axis=0)), *map(contexts.levels, columns)


def _mean_squares(plane: Plane) -> tuple[Floats, Floats]:
    """Mean squares of the rows and of the columns."""
    rows, columns = np.empty(plane.shape[0], dtype=np.float32), np.zeros(plane.shape[1], dtype=np.float64)
    height = max(1, _CHUNK // plane.shape[1])
    for top in range(0, len(plane), height):
        square = np.square(plane[top : top + height], dtype=np.float32)
        square.mean(axis=1, out=rows[top : top + height])
        columns += square.sum(axis=0)
    return rows, (columns / len(plane)).astype(np.float32)


def _pack_grouped(planes: Sequence[Plane], levels: Sequence[Bytes]) -> tuple[bytes, ...]:
    """Streams of the levels and of the planes grouped by them."""
    rows, *columns = levels
    groups = (
        group for plane, level in zip(planes, columns, strict=True) for group in contexts.split(plane, rows, level)
    )
    return *map(_pack_levels, levels), *map(_pack_group, groups)


def _pack_levels(levels: Bytes) -> bytes:
    return compress(levels.tobytes()) if levels.any() else b""


def _unpack_levels(stream: Stream, count: int) -> Bytes:
    if not len(stream):
        return np.zeros(count, dtype=np.uint8)
    levels = np.frombuffer(decompress(stream, count), dtype=np.uint8)
    if levels.max() > contexts.MAX_LEVEL:
        raise FormatError(f"level {levels.max()} is above {contexts.MAX_LEVEL}")
    return levels


def _pack_group(symbols: Plane) -> bytes:
    return compress(symbols.data.cast("B"))


def _unpack_group(stream: Stream, size: int) -> Plane:
    return np.frombuffer(decompress(stream, size), dtype=np.int8)
