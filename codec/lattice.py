"""A weight matrix on the trajectory: quantise for one step, decode.

Shapes: R = rows, K = columns, P = pairs a row (see `pairs`), E = escapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.pairs import HALF, columns_of_pairs, join, pairs_per_row, split
from birkhoff.codec.trajectory import HIGH, LOW, Escapes, N, nearest, position, reciprocal, theta_from_coordinates

_CHUNK = 1 << 16
"""Weights coded together on a CPU: about ten such float32 buffers stay in a core's cache."""

_CHUNK_GPU = 1 << 26

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
        """Step numbers, uint16 [R, P]; the in-memory form."""
        return theta_from_coordinates(self.i, self.j)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [R, K] in `dtype`, on the device of the coordinates."""
        rows = self.i.shape[0]
        out = torch.empty(rows, self.columns, dtype=dtype, device=self.i.device)
        for row, column, pair in tiles(rows, self.columns, self.i.device):
            x, y = position(self.i[row, pair], self.j[row, pair], self.step)
            join(x, y, column.stop - column.start, out=out[row, column])
        if len(self.escapes):
            self._decode_escapes(out)
        return out

    def _decode_escapes(self, out: Tensor) -> None:
        x, y = position(self.escapes.i, self.escapes.j, self.step)
        row, first, second, paired = escape_places(self.escapes.pair, self.columns)
        out[row, first] = x.to(out.dtype)
        out[row[paired], second[paired]] = y[paired].to(out.dtype)


def escape_places(pair: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, column of x, column of y, mask of those that have a y), each [E], of flat pair indices."""
    count = pairs_per_row(columns)
    first, second = columns_of_pairs(pair % count, columns)
    return pair // count, first, second, second < columns


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, columns, pairs) of tiles of about `_CHUNK` weights; columns are cut between blocks only."""
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


def quantise(weight_RK: Tensor, step: float) -> LatticeTensor:
    """The nearest node of every pair of a real, finite matrix, for one step (in the weights' unit)."""
    rows, columns = weight_RK.shape
    count = pairs_per_row(columns)
    planes = torch.empty(2, rows, count, dtype=torch.int8, device=weight_RK.device)
    escaped: list[_EscapedPairs] = []
    for row, column, pair in tiles(rows, columns, weight_RK.device):
        x, y = split(weight_RK[row, column].to(torch.float32))
        coordinates = nearest(x, y, step)
        low, high = zip(*(torch.aminmax(c) for c in coordinates), strict=True)
        if min(map(float, low)) < LOW or max(map(float, high)) > HIGH:
            escaped.append(_take_escapes(*coordinates, first_row=row.start, first_pair=pair.start, count=count))
        for plane, c in zip(planes, coordinates, strict=True):
            plane[row, pair] = c.to(torch.int8)
    return LatticeTensor(
        i=planes[0], j=planes[1], escapes=_gather_escapes(escaped, weight_RK.device), step=step, columns=columns
    )


def quantise_path(weight_RK: Tensor, step: float) -> LatticeTensor:
    """Nodes on the best path of the trellis, for one step: about 1 dB nearer than nodes of twice that step.

    The second weights are searched first; the first weights then move by the shear that those decide.
    """
    x, y = split(weight_RK.to(torch.float32))
    shape, inverse = x.shape, reciprocal(step)
    j = trellis.search(y.mul_(inverse).reshape(-1))
    i = trellis.search(x.mul_(inverse).reshape(-1).sub_(j * (1 / N))).view(shape)
    j = j.view(shape)
    escapes = _gather_escapes([_take_escapes(i, j, first_row=0, first_pair=0, count=shape[1])], weight_RK.device)
    return LatticeTensor(i=i.to(torch.int8), j=j.to(torch.int8), escapes=escapes, step=step, columns=weight_RK.shape[1])


def _take_escapes(i: Tensor, j: Tensor, *, first_row: int, first_pair: int, count: int) -> _EscapedPairs:
    """Move the pairs outside the box of a tile out of (i, j), which become 0 there."""
    outside = (i < LOW) | (i > HIGH) | (j < LOW) | (j > HIGH)
    row, pair = outside.nonzero(as_tuple=True)
    taken = ((row + first_row) * count + pair + first_pair, i[outside].to(torch.int32), j[outside].to(torch.int32))
    i[outside] = 0
    j[outside] = 0
    return taken


def _gather_escapes(parts: list[_EscapedPairs], device: torch.device) -> Escapes:
    if not parts:
        return Escapes.none(device)
    pair, i, j = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort(pair)
    return Escapes(pair=pair[order], i=i[order], j=j[order])
