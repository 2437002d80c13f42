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
from birkhoff.codec.rest import compress, decompress, pack_escapes, unpack_escapes
from birkhoff.codec.trajectory import HIGH, LOW, Escapes

_TABLE_BITS = 8 * 100
"""What a group's code table costs, about."""

Stream = bytes | memoryview


def pack(code: LatticeTensor, *, path: bool) -> tuple[bytes, ...]:
    """Streams: row levels, column levels of i and of j, groups of i, groups of j, escapes.

    Levels of no bytes are all 0: the plane is one group. `path` says that the coordinates lie on a trellis path.
    """
    planes = [_symbols(plane, path=path) for plane in _with_escapes(code)]
    rows, *columns = _useful_levels(planes)
    groups = [
        group for plane, levels in zip(planes, columns, strict=True) for group in contexts.split(plane, rows, levels)
    ]
    return (
        *(_pack_levels(levels) for levels in (rows, *columns)),
        *map(_pack_group, groups),
        pack_escapes(code.escapes),
    )


def unpack(
    streams: Sequence[Stream], shape: tuple[int, int], escapes: int, *, path: bool
) -> tuple[Tensor, Tensor, Escapes]:
    """(i, j, escapes) in memory: int8 [R, P] each, from the streams of `pack`.

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
    for columns, wanted in zip(levels[1:], sizes, strict=True):
        plane = contexts.join([_unpack_group(next(groups), size) for size in wanted], levels[0], columns)
        numbers.append(_numbers(plane, path=path))
    found = unpack_escapes(streams[-1], escapes, rows * pairs)
    return (*_in_box(numbers, found, shape), found)


def _with_escapes(code: LatticeTensor) -> tuple[npt.NDArray[np.int32], ...]:
    """The coordinate planes [R, P] with the true coordinates of escapes."""
    planes = []
    for plane, true in ((code.i, code.escapes.i), (code.j, code.escapes.j)):
        whole = plane.cpu().numpy().astype(np.int32) if len(code.escapes) else plane.cpu().numpy()
        if len(code.escapes):
            whole.reshape(-1)[code.escapes.pair.cpu().numpy()] = true.cpu().numpy()
        planes.append(whole)
    return tuple(planes)


def _symbols(numbers: npt.NDArray[np.int32], *, path: bool) -> Plane:
    symbols = numbers >> 1 if path else numbers
    outside = (symbols < LOW) | (symbols > HIGH) if symbols.dtype != np.int8 else np.zeros(0, dtype=bool)
    if outside.any():
        symbols = np.where(outside, symbols & 1 if path else 0, symbols)
    return symbols.astype(np.int8, copy=False)


def _numbers(symbols: Plane, *, path: bool) -> Tensor:
    """Coordinates, int16 [S] or int8 [S], of a plane of symbols."""
    flat = torch.from_numpy(np.require(symbols, requirements=["C", "W"])).reshape(-1)
    return trellis.numbers(flat) if path else flat


def _in_box(numbers: list[Tensor], escapes: Escapes, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    for plane in numbers:
        plane[escapes.pair] = 0
        low, high = torch.aminmax(plane) if plane.numel() else (torch.zeros(()), torch.zeros(()))
        if low < LOW or high > HIGH:
            raise FormatError("a coordinate outside -128..127 has no escape")
    i, j = (plane.to(torch.int8).view(shape) for plane in numbers)
    return i, j


def _useful_levels(planes: Sequence[Plane]) -> tuple[Bytes, Bytes, Bytes]:
    """Levels of rows and of each plane's columns where grouping by them saves bits, else all 0."""
    squares = [np.square(plane, dtype=np.float32) for plane in planes]
    rows = contexts.levels(np.mean([square.mean(axis=1) for square in squares], axis=0))
    columns = [contexts.levels(square.mean(axis=0)) for square in squares]
    flat = np.zeros_like(rows), *(np.zeros_like(level) for level in columns)
    levels = rows, *columns
    return min((flat, levels), key=lambda choice: _bits(planes, choice))  # type: ignore[return-value]


def _bits(planes: Sequence[Plane], levels: Sequence[Bytes]) -> float:
    """Size of the planes when grouped by these levels: entropies, code tables and the levels themselves."""
    groups = [
        g for plane, columns in zip(planes, levels[1:], strict=True) for g in contexts.split(plane, levels[0], columns)
    ]
    return sum(8 * len(_pack_levels(level)) for level in levels) + sum(_entropy(g) + _TABLE_BITS for g in groups)


def _entropy(symbols: Plane) -> float:
    """Bits of the symbols under their own distribution."""
    count = np.bincount(symbols.view(np.uint8), minlength=256).astype(np.float64)
    return float(symbols.size * np.log2(max(1, symbols.size)) - (count * np.log2(np.maximum(count, 1))).sum())


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
