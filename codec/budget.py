"""What a tensor will take at every target, foretold from one look at its weights: what a budget is solved with.

One fine histogram of the weights per context group (see `contexts`) holds all of it. For a step h its bins are merged
to the symbols round(w / h), which gives the error, the entropy and the escapes of that step at once, and so a curve of
bytes over dB; nothing is encoded. The trellis is taken for what it is worth: paths at the error of single nodes of
step h cost what single nodes of twice `rate.path_step` times h cost. On trained
weights the sum over a model lies within about half a percent of what the encoder then makes.

Shapes: R = rows, K = columns, P = pairs a row, G = groups, B = fine bins, S = steps tried, T = knots of a grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, rate, rest
from birkhoff.codec.dtypes import dtype_name
from birkhoff.codec.metrics import bulk, sqnr_db
from birkhoff.codec.pairs import matrix_shape, pairs_per_row, split
from birkhoff.codec.profiles import TARGET_DB_RANGE, Override, Profile
from birkhoff.codec.tensor import ESCAPE_BITS, LEAST_PATH, PATH_GAIN_BITS, encode_tensor, fallback
from birkhoff.codec.trajectory import HIGH

Floats = npt.NDArray[np.float64]

GRID_DB = 0.05
"""Targets that a budget chooses from lie so far apart."""

_FINE_DB = 54.0
"""SQNR of the fine histogram: far above every target."""

_MOST_BINS = 1 << 14
"""Fine bins on each side; what lies beyond, 100 times the root mean square, is an escape at any target."""

_LEVELS_DB = 30.0
"""Target at which the context groups are formed; they hardly depend on it."""

_STEPS_DB: Floats = np.arange(TARGET_DB_RANGE[0] - 4.5, TARGET_DB_RANGE[1] + 3, 1.5)
"""S: steps tried, as the SQNR that a fine step of that size would have."""

_EXCESS_DB = 0.03
"""What the encoder stays above its target on average."""

_ENTROPY_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 8.0)
_EXTRA_BITS = {
    1 << 14: (0.0, 0.53, 0.76, 0.70, 0.63, 0.53, 0.38, 0.20, 0.08, 0.04, 0.03),
    1 << 18: (0.0, 0.52, 0.73, 0.67, 0.59, 0.46, 0.25, 0.08, 0.045, 0.047, 0.05),
    1 << 62: (0.0, 0.52, 0.71, 0.63, 0.55, 0.37, 0.16, 0.04, 0.047, 0.05, 0.05),
}
"""What zstd level 1 takes a symbol above its entropy, in frames of up to so many symbols (its parameters change there):
measured on Gaussian and Laplacian planes. Where symbols are few in kind it finds repeats that do not pay."""

_BLOCK = 1 << 17
"""Symbols to which zstd gives a code table of its own."""

_TABLE_BYTES = (25.0, 0.5)
"""Of a code table, and of each symbol in it."""

_FRAME_BYTES = 20.0
"""Of a frame, its length in the header included."""

_ENTRY_BYTES = 250
"""A tensor's two entries in the container's header, without its name."""

_SAMPLE = 1 << 18
"""Weights that are binned, in whole rows spread over the matrix."""

_LEAST_ROWS = 8
"""Rows from which context groups can pay."""

_CHUNK = 1 << 20
"""Weights looked at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planes:
    """Fine histograms of a sample of both planes: counts [G, B] by plane, bin b lies at (b - B // 2) * `step`.

    `sizes` [G] by plane are the symbols of each group of the whole, `spread` [B] by plane those of each bin, `rms` is
    that of the whole too, of its bulk.
    """

    counts: tuple[Floats, Floats]
    sizes: tuple[Floats, Floats]
    spread: tuple[Floats, Floats]
    step: float
    rms: float
    levels_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The targets that a budget can choose from: every `GRID_DB` from `low` to `high`, whole numbers of dB.

    Sizes are foretold at the whole dB, the `knots` [T], and are as good as straight between them.
    """

    low: float
    high: float

    @classmethod
    def of(cls, profile: Profile) -> "Grid":
        """The grid of a profile's targets."""
        low, high = profile.target_range
        return cls(low=low, high=high)

    @property
    def knots(self) -> tuple[float, ...]:
        """Targets at which `sizes` are foretold, dB."""
        return tuple(np.arange(self.low, self.high + 1).tolist())

    def target(self, step: int) -> float:
        """Target of a step of the grid, dB; step 0 is the lowest."""
        return round(self.low + step * GRID_DB, 2)

    def step(self, target_db: float) -> int:
        """The step nearest to a target."""
        return round((min(max(self.low, target_db), self.high) - self.low) / GRID_DB)

    def steps(self, db: float) -> int:
        """Steps that lie within so many dB."""
        return round(db / GRID_DB)

    def fill(self, at_knots: Floats) -> Floats:
        """Sizes at every step from those at the knots, [T]; they never fall."""
        steps = self.steps(self.high - self.low) + 1
        found: Floats = np.interp([self.target(step) for step in range(steps)], self.knots, at_knots)
        return np.maximum.accumulate(found)


def highest(sizes: Floats, limit: float) -> int | None:
    """The step with the most bytes within `limit`, of rising sizes; of equal ones the lowest. None where none fits."""
    if sizes[0] > limit:
        return None
    last = int(np.searchsorted(sizes, limit, side="right")) - 1
    return int(np.searchsorted(sizes, sizes[last]))


def sizes(name: str, tensor: Tensor, profile: Profile, override: Override | None = None) -> Floats:
    """Bytes of a stored tensor at each knot of the profile's grid, its entry in the header included: [T].

    Lossless tensors are measured, not foretold. An override takes the tensor out of the profile's hands: all its sizes
    are then the same.

    Args:
        tensor: of any shape and stored dtype, on the CPU.
        profile: of codec `lattice`; its own target is ignored.

    Raises:
        TensorError: as `encode_tensor`.
    """
    shape = tuple(tensor.shape)
    shares = [replace(profile, target_db=db).of_tensor(shape, override) for db in Grid.of(profile).knots]
    entry = _ENTRY_BYTES + 2 * len(name.encode())
    coded = shares[0].action(shape, dtype_name(tensor.dtype))[0] == "coded"
    matrix = tensor.detach().reshape(matrix_shape(shape))
    if not coded or fallback(matrix) is not None:
        return np.full(len(shares), encode_tensor(name, tensor, shares[0]).tensor.nbytes + entry, dtype=np.float64)
    targets = [share.target_db or 0.0 for share in shares]
    return _curve(_histograms(matrix), targets, matrix, path=profile.path) + entry


def _histograms(matrix_RK: Tensor) -> _Planes:
    """Weights binned by plane and context group; groups as the encoder would form them at `_LEVELS_DB`."""
    weights = matrix_RK.numel()
    energy = sum(float(part.to(torch.float32).square().sum()) for part in _bands(matrix_RK))
    rms = math.sqrt(bulk(matrix_RK, energy).energy / weights)
    levels = _levels(matrix_RK, _step(rms, _LEVELS_DB))
    step = _step(rms, _FINE_DB)
    stride = max(1, min(matrix_RK.shape[0], weights // _SAMPLE))
    sample = matrix_RK[::stride].to(torch.float32)
    bins = min(_MOST_BINS, math.ceil(float(sample.abs().max()) / step) + 1)
    rows = levels[0].astype(np.int64)
    counts = []
    for plane, columns in zip(split(sample), levels[1:], strict=True):
        group = contexts.group_of_sum(levels[0], columns)
        index = np.clip(np.rint(plane.numpy() * np.float32(1 / step)), -bins, bins).astype(np.int64) + bins
        index += group[rows[::stride, None] + columns] * (2 * bins + 1)
        count = np.bincount(index.reshape(-1), minlength=int(group[-1] + 1) * (2 * bins + 1))
        counts.append(count.reshape(-1, 2 * bins + 1).astype(np.float64))
    packed = sum(len(rest.compress(level.tobytes())) for level in levels if level.any())
    sizes = [np.array(contexts.group_sizes(levels[0], columns), dtype=np.float64) for columns in levels[1:]]
    first, second = ((n / np.maximum(1, c.sum(axis=1))) @ c for c, n in zip(counts, sizes, strict=True))
    return _Planes(
        counts=(counts[0], counts[1]),
        sizes=(sizes[0], sizes[1]),
        spread=(first, second),
        step=step,
        rms=rms,
        levels_bytes=packed,
    )


def _bands(matrix_RK: Tensor) -> tuple[Tensor, ...]:
    """Runs of rows small enough for float32 copies."""
    return tuple(torch.split(matrix_RK, max(1, _CHUNK // matrix_RK.shape[1])))


def _step(rms: float, db: float) -> float:
    """Step of single nodes at an SQNR where it is fine."""
    return math.sqrt(12) * rms * 10 ** (-db / 20)


def _levels(matrix_RK: Tensor, step: float) -> tuple[contexts.Bytes, ...]:
    """Levels of the rows, and of the columns of both planes, from the mean squares of their symbols."""
    rows, pairs = matrix_RK.shape[0], pairs_per_row(matrix_RK.shape[1])
    if rows < _LEAST_ROWS:
        return tuple(np.zeros(count, dtype=np.uint8) for count in (rows, pairs, pairs))
    by_row, by_column = [], torch.zeros(2, pairs, dtype=torch.float64)
    for part in _bands(matrix_RK):
        squares = torch.stack(split(part.to(torch.float32))).div_(step).square_()
        by_row.append(squares.mean(dim=(0, 2)))
        by_column += squares.sum(dim=1)
    means = (torch.cat(by_row), *(by_column / rows).to(torch.float32))
    return tuple(contexts.levels(mean.add_(1 / 12).numpy()) for mean in means)


def _curve(planes: _Planes, targets_db: Sequence[float], matrix_RK: Tensor, *, path: bool) -> Floats:
    """Bytes of the streams at each target."""
    weights = matrix_RK.numel()
    steps = np.array([_step(planes.rms, db) for db in _STEPS_DB])
    reached, coded, *escapes = np.array([_at_step(planes, step) for step in steps]).T
    log_steps = -np.log(steps)
    wanted = np.interp(np.asarray(targets_db) + _EXCESS_DB, np.maximum.accumulate(reached), log_steps)

    def at(values: Floats, log_step: Floats) -> Floats:
        result: Floats = np.interp(log_step, log_steps, values)
        return result

    single = at(coded, wanted) + at(escapes[0], wanted) * ESCAPE_BITS / 8
    if not path or weights < LEAST_PATH:
        return single
    symbol = wanted - math.log(2 * rate.path_step(matrix_RK.shape[0] * pairs_per_row(matrix_RK.shape[1])))
    escaped = at(escapes[1], symbol)
    paths = at(coded, symbol) + escaped * ESCAPE_BITS / 8
    return np.where(escaped * ESCAPE_BITS > PATH_GAIN_BITS * weights, np.minimum(single, paths), paths)


def _at_step(planes: _Planes, step: float) -> tuple[float, float, float, float]:
    """(SQNR of single nodes in dB, bytes of the symbols, escapes of single nodes, of a path) at a step of symbols."""
    error = grouped = flat = 0.0
    escapes = [0.0, 0.0]
    for counts, sizes, spread in zip(planes.counts, planes.sizes, planes.spread, strict=True):
        half = counts.shape[1] // 2
        fine = np.arange(-half, half + 1) * planes.step
        symbol = np.rint(fine / step)
        error += float(spread @ ((fine - symbol * step) ** 2 + planes.step**2 / 12))
        starts = np.concatenate(([0], np.flatnonzero(np.diff(symbol)) + 1))
        merged, size = np.add.reduceat(counts, starts, axis=1), np.abs(symbol[starts])
        outside = np.add.reduceat(spread, starts)
        escapes = [n + float(outside[size > most].sum()) for n, most in zip(escapes, (HIGH, HIGH // 2), strict=True)]
        merged = merged[:, size <= HIGH]
        grouped += sum(map(_frame_bytes, merged, sizes))
        flat += _frame_bytes(merged.sum(axis=0), float(sizes.sum()))
    energy = planes.rms**2 * sum(float(sizes.sum()) for sizes in planes.sizes)
    return sqnr_db(energy, error), min(flat, grouped + planes.levels_bytes), escapes[0], escapes[1]


def _frame_bytes(counts: Floats, symbols: float) -> float:
    """Bytes of a frame of so many symbols, `counts` being the histogram of a sample: entropy, and zstd's excess."""
    used = counts[counts > 0]
    sampled = float(used.sum())
    if not sampled:
        return 0.0
    bits = math.log2(sampled) - float(used @ np.log2(used)) / sampled
    bits += (len(used) - 1) / (2 * sampled * math.log(2))  # what a histogram of few samples lacks (Miller and Madow)
    extra = next(extra for size, extra in _EXTRA_BITS.items() if symbols <= size)
    bits += float(np.interp(bits, _ENTROPY_BITS, extra))
    tables = math.ceil(symbols / _BLOCK) * (_TABLE_BYTES[0] + _TABLE_BYTES[1] * len(used))
    return min(symbols * bits / 8 + tables, symbols) + _FRAME_BYTES
