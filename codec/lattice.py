"""A weight matrix on the trajectory: quantise it at one step, decode it, add a difference to a base.

Shapes: R = rows, K = columns, P = pairs per row (see `pairs`), E = escapes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.errors import FormatError, TargetError
from birkhoff.codec.metrics import greatest_of, to_host
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.pairs import HALF, columns_of_pairs, join, pairs_per_row, split
from birkhoff.codec.trajectory import (
    FARTHEST,
    HIGH,
    LOW,
    Escapes,
    N,
    nearest,
    position,
    reciprocal,
    theta_from_coordinates,
)

_CHUNK = 1 << 16
"""Weights coded together on a CPU. About ten float32 buffers of this size fit in a core's cache."""

_CHUNK_GPU = 1 << 26

_ROOM = 1 << 12
"""Expected maximum number of coordinates outside the box."""

_PATH_SCRATCH = 160
"""Bytes that `birkhoff_paths` needs for each step of its lanes and for one more."""

_EscapedPairs = tuple[Tensor, Tensor, Tensor]
"""(flat pair index, I, J) of the escapes of one tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeTensor:
    """A matrix [R, K] as lattice coordinates: int8 `i` and `j` [R, P], `escapes`, float `step`, K = `columns`."""

    i: Tensor
    j: Tensor
    escapes: Escapes
    step: float
    columns: int

    def theta(self) -> Tensor:
        """Return step numbers, uint16 [R, P], the in-memory form."""
        return theta_from_coordinates(self.i, self.j)

    def to(self, device: torch.device | str) -> "LatticeTensor":
        """Return the same matrix on another device."""
        return replace(self, i=self.i.to(device), j=self.j.to(device), escapes=self.escapes.to(device))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [R, K] in `dtype`, on the device of the coordinates."""
        rows = self.i.shape[0]
        out = empty((rows, self.columns), dtype, self.i.device)
        library = native() if out.device.type == "cpu" and dtype == torch.float32 else None
        if library is not None and self.i.is_contiguous() and self.j.is_contiguous():
            planes, escapes = (self.i.data_ptr(), self.j.data_ptr()), self.escapes
            places = (t.data_ptr() for t in (escapes.pair, escapes.i, escapes.j))
            library.birkhoff_positions(*planes, rows, self.columns, self.step, len(escapes), *places, out.data_ptr())
            return out
        self.decode_into(out)
        if len(self.escapes):
            index, value = self.escaped_weights()
            out.view(-1)[index.to(out.device)] = value.to(out.device, dtype)
        return out

    def decode_into(self, out: Tensor) -> None:
        """Write the weights [R, K] in the dtype of `out`, without those of escapes. This is the reference for faster
        decoders."""
        for row, column, pair in tiles(self.i.shape[0], self.columns, self.i.device):
            x, y = position(self.i[row, pair], self.j[row, pair], self.step)
            join(x, y, column.stop - column.start, out=out[row, column])

    def equals(self, other: "LatticeTensor") -> bool:
        """Return whether both have the same coordinates and step."""
        mine, theirs = self.escapes, other.escapes
        same = ((self.i, other.i), (self.j, other.j), (mine.pair, theirs.pair), (mine.i, theirs.i), (mine.j, theirs.j))
        return (self.step, self.columns) == (other.step, other.columns) and all(torch.equal(a, b) for a, b in same)

    def rows(self, start: int, stop: int) -> "LatticeTensor":
        """Return rows start..stop-1 as a matrix whose planes are views."""
        count = self.i.shape[1]
        first, last = torch.searchsorted(
            self.escapes.pair, self.escapes.pair.new_tensor([start, stop]) * count
        ).tolist()
        part = slice(first, last)
        escapes = Escapes(pair=self.escapes.pair[part] - start * count, i=self.escapes.i[part], j=self.escapes.j[part])
        return replace(self, i=self.i[start:stop], j=self.j[start:stop], escapes=escapes)

    def escaped_weights(self) -> tuple[Tensor, Tensor]:
        """Return flat indices row*K + column (int64 [E], increasing) and values (float32 [E]) of the escapes' weights,
        on the device of the escapes or of the coordinates."""
        if self.escapes.weights is not None:
            return self.escapes.weights
        if not len(self.escapes):  # common, and even operations on empty tensors cost time on a GPU
            return self.escapes.pair, self.escapes.i.to(torch.float32)
        if self.escapes.pair.device.type == "cpu":
            return escaped_weights_all([self])[0]
        row, first, second, paired = escape_places(self.escapes.pair, self.columns)
        x, y = position(self.escapes.i, self.escapes.j, self.step)
        start = row * self.columns
        index = torch.cat((start + first, (start + second)[paired]))
        order = torch.argsort(index)
        return index[order], torch.cat((x, y[paired]))[order]

    def _escaped_in_numpy(self) -> tuple[Tensor, Tensor]:
        """`escaped_weights` on the CPU. Numpy's operations on few numbers take a tenth of torch's time."""
        pair, i, j = (part.numpy() for part in (self.escapes.pair, self.escapes.i, self.escapes.j))
        row, within = np.divmod(pair, pairs_per_row(self.columns))
        block = within // HALF
        half = np.minimum((self.columns - block * 2 * HALF + 1) // 2, HALF)
        first = row * self.columns + block * 2 * HALF + within % HALF
        paired = first + half < (row + 1) * self.columns
        step, i, j = np.float32(self.step), i.astype(np.float32), j.astype(np.float32)
        index = np.concatenate((first, (first + half)[paired]))
        value = np.concatenate(((i + j * np.float32(1 / N)) * step, (j * step)[paired]))
        order = np.argsort(index)
        return torch.from_numpy(index[order]), torch.from_numpy(value[order])


def escaped_weights_all(codes: Sequence[LatticeTensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the `escaped_weights` of each matrix, whose escapes are on the CPU, computed together."""
    if not codes:
        return []
    parts = [[getattr(code.escapes, name) for code in codes] for name in ("pair", "i", "j")]
    pair, i, j = (own[0].contiguous() if len(own) == 1 else torch.cat(own) for own in parts)
    index, value, counts = escaped_weights_joined(codes, Escapes(pair=pair, i=i, j=j))
    return list(zip(index.split(counts), value.split(counts), strict=True))


def escaped_weights_joined(codes: Sequence[LatticeTensor], every: Escapes) -> tuple[Tensor, Tensor, list[int]]:
    """Return the `escaped_weights` of matrices: all indices, all values, and how many there are of each matrix.

    There is at least one. `every` holds their escapes one after the other, on the CPU.
    """
    library = native()
    if library is None:
        own = [code._escaped_in_numpy() for code in codes]
        joined = [torch.cat(column) for column in zip(*own, strict=True)]
        return joined[0], joined[1], [len(index) for index, _ in own]
    pair, i, j = (part.numpy() for part in (every.pair, every.i, every.j))
    ends = np.cumsum([len(code.escapes) for code in codes], dtype=np.int64)
    columns = np.array([code.columns for code in codes], dtype=np.int64)
    steps = np.array([code.step for code in codes], dtype=np.float32)
    index, value = np.empty(2 * len(pair), dtype=np.int64), np.empty(2 * len(pair), dtype=np.float32)
    lasts = np.empty(len(codes), dtype=np.int64)
    arrays = ends, columns, steps, pair, i, j, index, value, lasts
    library.birkhoff_escaped_weights(len(codes), *map(pointer, arrays))
    last: list[int] = lasts.tolist()
    joined = [torch.from_numpy(found[: last[-1]]) for found in (index, value)]
    return joined[0], joined[1], [high - low for low, high in itertools.pairwise([0, *last])]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor without values.

    On a CPU numpy allocates large ones in huge pages. In small pages, touching 4 bytes per weight takes as long as
    decoding them.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def escape_places(pair: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (row, column of x, column of y, mask of pairs that have a y), each [E], for flat pair indices."""
    count = pairs_per_row(columns)
    first, second = columns_of_pairs(pair % count, columns)
    return pair // count, first, second, second < columns


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Yield (rows, columns, pairs) of tiles of about `_CHUNK` weights. Tiles never divide a block of columns."""
    chunk = _CHUNK if device.type == "cpu" else _CHUNK_GPU
    width = min(columns, max(chunk // (2 * HALF), 1) * 2 * HALF)
    height = max(1, chunk // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            right = min(left + width, columns)
            start = left // 2
            yield (
                slice(top, min(top + height, rows)),
                slice(left, right),
                slice(start, start + pairs_per_row(right - left)),
            )


def quantise(weight_RK: Tensor, step: float, *, less_RK: Tensor | None = None, dead: float = 0.0) -> LatticeTensor:
    """Quantise a real, finite matrix to the nearest node of every pair.

    Args:
        weight_RK: Of any float dtype.
        step: In the unit of the weights.
        less_RK: Float32 weights to subtract first, contiguous.
        dead: By how much values are moved towards 0 before that, in the unit of the weights.
    """
    library = native() if weight_RK.device.type == "cpu" and weight_RK.dtype == torch.float32 else None
    if library is not None and weight_RK.numel() and weight_RK.is_contiguous():
        greatest = sum(greatest_of(matrix) for matrix in (weight_RK, less_RK) if matrix is not None)
        if greatest * reciprocal(step) < FARTHEST / 2:
            return _native_nodes(library, weight_RK, less_RK, dead, step)

    def coordinates(row: slice, column: slice, _pair: slice) -> tuple[Tensor, Tensor]:
        value = weight_RK[row, column].to(torch.float32)
        if less_RK is not None:
            value = value - less_RK[row, column]
        if dead:
            value = value - value.clamp(-dead, dead)
        return nearest(*split(value), step)

    return _gather((weight_RK.shape[0], weight_RK.shape[1]), weight_RK.device, step, coordinates)


def quantise_path(weight_RK: Tensor, step: float, path: int = 1, greatest: float | None = None) -> LatticeTensor:
    """Quantise to the nodes on the best trellis paths: about 1 dB nearer than nodes of twice this step.

    The search finds the second weights first; their coordinates then shear the first weights. `path` is 1 for paths
    through the rows, 2 for paths down the columns (see `trellis`). `greatest` is the greatest |w|, if known.

    Raises:
        TargetError: Weights are so many steps long that float32 cannot tell even nodes from odd ones.
    """
    if not weight_RK.numel():
        return quantise(weight_RK, step)
    if greatest is None:
        greatest = greatest_of(weight_RK)
    farthest = float(np.float32(greatest) * np.float32(reciprocal(step)))
    if farthest > FARTHEST:
        raise TargetError(f"a weight is {farthest:.3g} steps long, paths are exact up to {FARTHEST}: use single nodes")
    lanes = trellis.lanes_of(weight_RK.shape[0], pairs_per_row(weight_RK.shape[1]), path)
    library = native() if weight_RK.device.type == "cpu" and weight_RK.dtype == torch.float32 else None
    if library is not None and weight_RK.is_contiguous():
        return _native_path(library, weight_RK, step, lanes)
    planes = weight_RK.new_empty(2, weight_RK.shape[0], pairs_per_row(weight_RK.shape[1]), dtype=torch.float32)
    i, j = split(weight_RK, out=planes)
    planes.mul_(reciprocal(step))
    trellis.search_(j.view(-1), lanes)
    trellis.search_(i.sub_(j, alpha=1 / N).view(-1), lanes)
    return of_coordinates(i, j, step, weight_RK.shape[1])


def _native_nodes(library: CDLL, weight_RK: Tensor, less_RK: Tensor | None, dead: float, step: float) -> LatticeTensor:
    rows, columns = weight_RK.shape
    less = None if less_RK is None else less_RK.data_ptr()
    sizes = rows, columns, dead, reciprocal(step)
    return _native(weight_RK, step, lambda *places: library.birkhoff_nodes(weight_RK.data_ptr(), less, *sizes, *places))


def _native_path(library: CDLL, weight_RK: Tensor, step: float, lanes: int) -> LatticeTensor:
    rows, columns = weight_RK.shape
    scratch = np.empty(_PATH_SCRATCH * (1 + -(-rows * pairs_per_row(columns) // lanes)), dtype=np.uint8)
    sizes = rows, columns, reciprocal(step), lanes
    return _native(
        weight_RK,
        step,
        lambda *places: library.birkhoff_paths(weight_RK.data_ptr(), *sizes, pointer(scratch), *places),
    )


def _native(weight_RK: Tensor, step: float, quantiser: Callable[..., int]) -> LatticeTensor:
    """Return what a native quantiser writes to planes, and lists as escapes in any order."""
    rows, columns = weight_RK.shape
    i, j = empty((2, rows, pairs_per_row(columns)), torch.int8, weight_RK.device)
    room = _ROOM
    while True:
        index, wide = torch.empty(room, dtype=torch.int64), torch.empty(room, 2, dtype=torch.int32)
        found = quantiser(i.data_ptr(), j.data_ptr(), index.data_ptr(), wide.data_ptr(), room)
        if found <= room:
            break
        room = found
    pair, order = index[:found].sort()
    escapes = Escapes(pair=pair, i=wide[:found, 0][order], j=wide[:found, 1][order])
    return LatticeTensor(i=i, j=j, escapes=escapes, step=step, columns=columns)


def fixed_point(weight_RK: Tensor, step: float) -> LatticeTensor:
    """Return weights as whole multiples of `step`, of 16 bits and rarely more. Each is a row with one pair, without a
    second weight."""
    return _of_numbers(weight_RK, step, lambda part: torch.round(part.double() / step))


def of_numbers(n: Tensor, step: float) -> LatticeTensor:
    """Return weights that are these whole numbers of `step`, float of any shape, as `fixed_point` does."""
    return _of_numbers(n, step, lambda part: part)


def _of_numbers(source: Tensor, step: float, numbers: Callable[[Tensor], Tensor]) -> LatticeTensor:
    flat, chunk = source.reshape(-1), _CHUNK if source.device.type == "cpu" else _CHUNK_GPU
    i, j = (torch.empty(flat.numel(), 1, dtype=torch.float32, device=flat.device) for _ in range(2))
    for start in range(0, flat.numel(), chunk):
        n = numbers(flat[start : start + chunk])
        high = torch.floor((n + N // 2) / N)
        i[start : start + chunk, 0] = high
        j[start : start + chunk, 0] = n - N * high
    return of_coordinates(i, j, N * step, 1)


def of_coordinates(i: Tensor, j: Tensor, step: float, columns: int) -> LatticeTensor:
    """Return a matrix of these coordinates, float32 whole numbers [R, P] each. Overwrites them."""
    library = native() if i.device.type == "cpu" and i.is_contiguous() and j.is_contiguous() else None
    if library is not None:
        planes = empty((2, *i.shape), torch.int8, i.device)
        outside = []
        for c, plane in zip((i, j), planes, strict=True):
            index = torch.empty(_ROOM, dtype=torch.int64)
            size, places = c.numel(), (c.data_ptr(), plane.data_ptr())
            found = library.birkhoff_narrow(places[0], size, places[1], index.data_ptr(), len(index))
            if found > len(index):
                index = torch.empty(found, dtype=torch.int64)
                library.birkhoff_narrow(places[0], size, places[1], index.data_ptr(), found)
            outside.append(index[:found])
        pair = torch.unique(torch.cat(outside))
        escapes = Escapes(pair=pair, i=i.view(-1)[pair].to(torch.int32), j=j.view(-1)[pair].to(torch.int32))
        planes.view(2, -1)[:, pair] = 0
        return LatticeTensor(i=planes[0], j=planes[1], escapes=escapes, step=step, columns=columns)
    return _gather((i.shape[0], columns), i.device, step, lambda row, _column, pair: (i[row, pair], j[row, pair]))


def _gather(
    shape: tuple[int, int],
    device: torch.device,
    step: float,
    coordinates: Callable[[slice, slice, slice], tuple[Tensor, Tensor]],
) -> LatticeTensor:
    """Collect the coordinates of all tiles of [R, K] as int8 planes and escapes. They are float32 whole numbers, and
    are overwritten."""
    rows, columns = shape
    count = pairs_per_row(columns)
    planes = torch.empty(2, rows, count, dtype=torch.int8, device=device)
    escaped: list[_EscapedPairs] = []
    for row, column, pair in tiles(rows, columns, device):
        found = coordinates(row, column, pair)
        bounds = to_host(*(bound for c in found for bound in torch.aminmax(c)))
        if min(bounds) < LOW or max(bounds) > HIGH:
            escaped.append(_take_escapes(*found, first_row=row.start, first_pair=pair.start, count=count))
        for plane, c in zip(planes, found, strict=True):
            plane[row, pair] = c.to(torch.int8)
    escapes = _gather_escapes(escaped, device)
    return LatticeTensor(i=planes[0], j=planes[1], escapes=escapes, step=step, columns=columns)


def _take_escapes(i: Tensor, j: Tensor, *, first_row: int, first_pair: int, count: int) -> _EscapedPairs:
    """Return a tile's pairs outside the box, and set them to 0 in (i, j)."""
    outside = (i < LOW) | (i > HIGH) | (j < LOW) | (j > HIGH)
    places = row, pair = outside.nonzero(as_tuple=True)
    taken = ((row + first_row) * count + pair + first_pair, i[places].to(torch.int32), j[places].to(torch.int32))
    i[places] = 0
    j[places] = 0
    return taken


def _gather_escapes(parts: list[_EscapedPairs], device: torch.device) -> Escapes:
    if not parts:
        return Escapes.none(device)
    pair, i, j = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort(pair)
    return Escapes(pair=pair[order], i=i[order], j=j[order])


def combine(base: LatticeTensor, code: LatticeTensor, *, times: int, stride: int, step: float) -> LatticeTensor:
    """Return the matrix of coordinates `times` * base + `stride` * code with step `step`. Both matrices have one shape
    and device.

    Raises:
        FormatError: A sum exceeds 32 bits.
    """
    planes, outside = _added(base, code, times, stride)
    pair = torch.unique(torch.cat((base.escapes.pair, code.escapes.pair)))
    if len(pair):
        outside = _with_escapes(base, code, times, stride, planes, outside, pair)
    return LatticeTensor(i=planes[0], j=planes[1], escapes=outside, step=step, columns=base.columns)


def _added(base: LatticeTensor, code: LatticeTensor, times: int, stride: int) -> tuple[list[Tensor], Escapes]:
    """Return int8 planes with the sums of two matrices' planes, and the pairs outside the box, which are 0 in the
    planes."""
    sources = (base.i, base.j, code.i, code.j)
    library = native() if base.i.device.type == "cpu" and all(plane.is_contiguous() for plane in sources) else None
    if library is None:
        planes = [
            b.to(torch.int16).mul_(times).add_(c, alpha=stride) for b, c in zip(sources, sources[2:], strict=False)
        ]
        i, j = (plane.view(-1) for plane in planes)
        pair = ((i < LOW) | (i > HIGH) | (j < LOW) | (j > HIGH)).nonzero().view(-1)
        escapes = Escapes(pair=pair, i=i[pair].to(torch.int32), j=j[pair].to(torch.int32))
        i[pair] = 0
        j[pair] = 0
        return [plane.to(torch.int8) for plane in planes], escapes
    out = [torch.empty_like(base.i), torch.empty_like(base.j)]
    size, room = base.i.numel(), _ROOM + 2 * (len(base.escapes) + len(code.escapes))
    while True:
        index, wide = torch.empty(room, dtype=torch.int64), torch.empty(room, 2, dtype=torch.int32)
        places = (index.data_ptr(), wide.data_ptr())
        found = library.birkhoff_add(
            *(plane.data_ptr() for plane in sources), size, times, stride, *(p.data_ptr() for p in out), *places, room
        )
        if found <= room:
            return out, Escapes(pair=index[:found], i=wide[:found, 0].contiguous(), j=wide[:found, 1].contiguous())
        room = found


def _with_escapes(
    base: LatticeTensor,
    code: LatticeTensor,
    times: int,
    stride: int,
    planes: list[Tensor],
    outside: Escapes,
    pair: Tensor,
) -> Escapes:
    """Return all escapes of a sum. `outside` are the escapes of the planes' sums, `pair` those of either matrix."""
    i, j = (
        times * _coordinates(own, base.escapes.pair, wide, pair)
        + stride * _coordinates(other, code.escapes.pair, other_wide, pair)
        for own, wide, other, other_wide in (
            (base.i, base.escapes.i, code.i, code.escapes.i),
            (base.j, base.escapes.j, code.j, code.escapes.j),
        )
    )
    bounds = to_host(*(bound.double() for exact in (i, j) for bound in torch.aminmax(exact)))
    if max(map(abs, bounds)) >= 1 << 31:
        raise FormatError("a coordinate of a difference and its base exceeds 32 bits")
    inside = (i >= LOW) & (i <= HIGH) & (j >= LOW) & (j <= HIGH)
    for plane, exact in zip(planes, (i, j), strict=True):
        plane.view(-1)[pair] = torch.where(inside, exact, 0).to(torch.int8)
    others = torch.isin(outside.pair, pair, invert=True)
    found = torch.cat((outside.pair[others], pair[~inside]))
    order = torch.argsort(found)
    wide_i, wide_j = (
        torch.cat((known[others], exact[~inside].to(torch.int32)))[order]
        for known, exact in ((outside.i, i), (outside.j, j))
    )
    return Escapes(pair=found[order], i=wide_i, j=wide_j)


def _coordinates(plane: Tensor, escaped: Tensor, wide: Tensor, pair: Tensor) -> Tensor:
    """Return int64 coordinates at flat pair indices. `wide` are the coordinates of the escapes at `escaped`."""
    found = plane.view(-1)[pair].to(torch.int64)
    if len(escaped):
        place = torch.searchsorted(escaped, pair).clamp(max=len(escaped) - 1)
        found = torch.where(escaped[place] == pair, wide[place].to(torch.int64), found)
    return found
