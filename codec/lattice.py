"""A weight matrix on the trajectory: quantise, choose the step for a target in dB, decode.

The step h is found from the error itself, never from an assumed distribution: E(h) = sum (w - w')^2 is measured on a
sample of blocks and log h moved along E ~ h^2 until the SQNR meets the target; then the whole matrix is coded once,
and again only if the sample misled.

Shapes: R = rows, K = columns, P = pairs a row (see `pairs`), E = escapes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec.errors import TargetError
from birkhoff.codec.metrics import Fidelity, fidelity, sqnr_db
from birkhoff.codec.pairs import HALF, columns_of_pairs, join, pairs_per_row, split
from birkhoff.codec.trajectory import HIGH, LOW, Escapes, nearest, position, theta_from_coordinates

TARGET_DB_RANGE = (6.0, 48.0)
"""Targets the trajectory can serve: below, tensors die; above, most pairs would be escapes."""

TOLERANCE_DB = 0.3
"""A coded tensor lies at most this far above its target."""

_MARGIN_DB = 0.02
"""The search aims this far above the target, so that the first whole pass nearly always meets it."""

_CHUNK = 1 << 16
"""Weights coded together on a CPU: about ten such float32 buffers stay in a core's cache."""

_CHUNK_GPU = 1 << 26

_EscapedPairs = tuple[Tensor, Tensor, Tensor]
"""(flat pair index, I, J) of the escapes of one tile."""

_TRIES = 12

_SAMPLE = 1 << 18
"""Weights sampled for the step search; tensors up to four times as large are searched whole."""


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
        for row, column, pair in _tiles(rows, self.columns, self.i.device):
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


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
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
    for row, column, pair in _tiles(rows, columns, weight_RK.device):
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


def encode(weight_RK: Tensor, target_db: float) -> tuple[LatticeTensor, Fidelity]:
    """Code a matrix at the least fidelity that meets `target_db` (SQNR in dB, in `TARGET_DB_RANGE`).

    Returns the coded matrix and its measured error. The SQNR lies within 0.3 dB above the target wherever the weights
    allow it; a matrix of few distinct values can jump over that window and then lies above it.

    Raises:
        TargetError: the target is out of range, the weights have no finite energy, or no step meets the target.
    """
    low, high = TARGET_DB_RANGE
    if not low <= target_db <= high:
        raise TargetError(f"target {target_db:g} dB is outside {low:g}..{high:g} dB; store the tensor lossless instead")
    energy = _energy(weight_RK)
    if not 0 < energy < math.inf:
        raise TargetError(f"the weights' energy is {energy:g}: no relative error can be met; store the tensor lossless")
    step = _search(weight_RK, energy, target_db + _MARGIN_DB)
    best: tuple[LatticeTensor, Fidelity] | None = None
    below, above = 0.0, math.inf  # greatest step known to meet the target, least known to miss it
    for _ in range(_TRIES):
        coded = quantise(weight_RK, step)
        found = fidelity(weight_RK, coded.decode(weight_RK.dtype))
        excess = found.sqnr_db - target_db
        if excess >= 0 and (best is None or found.error > best[1].error):
            best = coded, found
        if 0 <= excess <= TOLERANCE_DB:
            break
        below, above = (step, above) if excess > 0 else (below, step)
        step = _round(step * 10 ** ((min(excess, 20) - _MARGIN_DB) / 20))
        if not below < step < above:
            step = _round((below + above) / 2)
    if best is None:
        raise TargetError(f"no step meets {target_db:g} dB after {_TRIES} tries; store the tensor lossless instead")
    return best


def _round(step: float) -> float:
    """The step as the float32 that is stored."""
    return float(torch.tensor(step, dtype=torch.float32))


def _energy(weight_RK: Tensor) -> float:
    rows, columns = weight_RK.shape
    tiles = _tiles(rows, columns, weight_RK.device)
    return sum(float(weight_RK[row, column].to(torch.float32).square().sum()) for row, column, _ in tiles)


def _sample(weight_RK: Tensor) -> Tensor:
    """A matrix [S, 64] of blocks spread evenly over the weights, or all of them where they are few."""
    flat = weight_RK.reshape(-1)
    blocks = flat.numel() // (2 * HALF)
    wanted = _SAMPLE // (2 * HALF)
    if blocks <= 4 * wanted:
        return weight_RK
    return flat[: blocks * 2 * HALF].view(blocks, 2 * HALF)[:: blocks // wanted].contiguous()


def _search(weight_RK: Tensor, energy: float, target_db: float) -> float:
    """A step whose SQNR on the sample is within 0.01 dB of the target, or the last tried."""
    sample = _sample(weight_RK)
    # Quantisation error spreads evenly over a tensor even where its energy does not: scale the error, not the energy.
    scale = weight_RK.numel() / sample.numel()
    step = math.sqrt(12 * energy / weight_RK.numel()) * 10 ** (-target_db / 20)
    for _ in range(6):
        error = fidelity(sample, quantise(sample, step).decode(sample.dtype)).error * scale
        excess = sqnr_db(energy, error) - target_db
        if abs(excess) < 0.01:
            break
        step *= 10 ** (min(excess, 20) / 20)
    return float(torch.tensor(step, dtype=torch.float32))
