"""Predict a tensor's compressed size at every target from one histogram, to solve budgets with.

The input is one fine histogram of the weights per context group (see `contexts`). For a step h its bins are merged to
the symbols round(w / h), which gives the error, the entropy and the escapes of that step. Over several steps this gives
a curve of bytes over dB, without encoding anything. A trellis path at the error of single nodes of step h costs as much
as single nodes of 2 h * `rate.path_step`. On trained weights the sum over a model is within about 0.5 % of the
encoder's bytes.

Shapes: R = rows, K = columns, P = pairs per row, G = groups, B = fine bins, S = steps tried, T = knots of a grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, rate, rest
from birkhoff.codec.entropy import rans
from birkhoff.codec.metrics import bulk, sqnr_db
from birkhoff.codec.pairs import matrix_shape, pairs_per_row, split
from birkhoff.codec.profiles import FIXED_POINT_DB, TARGET_DB_RANGE, Decision
from birkhoff.codec.tensor import ESCAPE_BITS, LEAST_PATH, MOST_ESCAPED, encode_tensor, fall_back, fallback
from birkhoff.codec.trajectory import HIGH

Floats = npt.NDArray[np.float64]

_FINE_DB = 54.0
"""SQNR of the fine histogram, far above every target."""

_MOST_BINS = 1 << 14
"""Fine bins on each side. Weights beyond them, above 100 times the root mean square, are escapes at any target."""

_LEVELS_DB = 30.0
"""Target at which the context groups are formed. The groups hardly depend on it."""

_STEPS_DB: Floats = np.arange(TARGET_DB_RANGE[0] - 4.5, TARGET_DB_RANGE[1] + 3, 1.5)
"""S: steps tried, as the SQNR that a fine step of that size would have."""

_EXCESS_DB = 0.03
"""By how much the encoder exceeds its target on average."""

_ENTROPY_BITS = (0.0, 2.5, 3.0, 5.0, 6.0, 8.0)
_EXTRA_BITS = (0.001, 0.0015, 0.002, 0.0065, 0.009, 0.009)
"""Bits per symbol above the entropy, because frequencies are rounded to 4096ths: measured on Gaussian and Laplacian
planes."""

_TABLE_BYTES = (6.0, 0.35)
"""Bytes of a code table, and of each symbol in it."""

_STREAM_BYTES = 5.0
"""Other bytes of a stream, including its length in the index."""

BIT_DB = 20 * math.log10(2)
"""Gain in dB per bit."""

_ENTRY_BYTES = 15
"""Bytes of a tensor's entry in the packed index."""

_SAMPLE = 1 << 18
"""Weights that are binned, in whole rows spread over the matrix."""

_LEAST_ROWS = 8
"""Least number of rows for which context groups can pay."""

_CHUNK = 1 << 20
"""Weights processed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planes:
    """Fine histograms of a sample of both planes: counts [G, B], with bin b at (b - B // 2) * `step`.

    `sizes` [G] are the symbols of each group of the whole tensor, `spread` [B] are the whole tensor's symbols of each
    bin, and `rms` is the root mean square of its bulk.
    """

    counts: Floats
    sizes: Floats
    spread: Floats
    step: float
    rms: float
    levels_bytes: int


def sizes(name: str, tensor: Tensor, decision: Decision, targets_db: Sequence[float]) -> Floats:
    """Return the bytes of a stored tensor at each target in dB, including its entry in the header: [T]. The targets are
    nominal if the decision's is.

    Lossless tensors are measured, not estimated, so all their sizes are equal.

    Args:
        tensor: Of any shape and stored dtype, on the CPU.
        decision: For codec `lattice`, or lossless. Its own target is ignored.

    Raises:
        TensorError: As `encode_tensor`.
    """
    matrix = tensor.detach().reshape(matrix_shape(tuple(tensor.shape)))
    reason = None if decision.action == "lossless" else fallback(matrix)
    if decision.action == "lossless" or reason is not None:
        # A target that cannot be reached matters to no tensor that falls back: nominal ones go beyond the lattice's.
        encoded = encode_tensor(name, tensor, decision) if reason is None else fall_back(name, tensor, reason)
        return np.full(len(targets_db), encoded.tensor.nbytes + _ENTRY_BYTES, dtype=np.float64)
    wanted = np.asarray(targets_db, dtype=np.float64)
    fixed = wanted > (FIXED_POINT_DB if decision.nominal else TARGET_DB_RANGE[1])
    coarse = np.where(fixed, FIXED_POINT_DB, wanted)  # where fixed point takes as many bits as the trajectory
    finer = np.where(fixed, wanted - coarse, 0.0) * tensor.numel() / (8 * BIT_DB)
    return _curve(_histograms(matrix), coarse.tolist(), matrix, path=decision.path) + finer + _ENTRY_BYTES


def _histograms(matrix_RK: Tensor) -> _Planes:
    """Bin the weights by plane and context group, with the groups that the encoder would form at `_LEVELS_DB`."""
    weights = matrix_RK.numel()
    energy = sum(float(part.to(torch.float32).square().sum()) for part in _bands(matrix_RK))
    rms = math.sqrt(bulk(matrix_RK, energy).energy / weights)
    levels = _levels(matrix_RK, _step(rms, _LEVELS_DB))
    step = _step(rms, _FINE_DB)
    stride = max(1, min(matrix_RK.shape[0], weights // _SAMPLE))
    sample = matrix_RK[::stride].to(torch.float32)
    bins = min(_MOST_BINS, math.ceil(float(sample.abs().max()) / step) + 1)
    rows, columns = levels
    both = torch.cat(split(sample), dim=1).numpy()
    group = contexts.group_of_sum(rows, columns)
    index = np.clip(np.rint(both * np.float32(1 / step)), -bins, bins).astype(np.int64) + bins
    index += group[rows[::stride, None].astype(np.int64) + columns] * (2 * bins + 1)
    flat = np.bincount(index.reshape(-1), minlength=int(group[-1] + 1) * (2 * bins + 1))
    counts = flat.reshape(-1, 2 * bins + 1).astype(np.float64)
    sizes = np.array(contexts.group_sizes(rows, columns), dtype=np.float64)
    return _Planes(
        counts=counts,
        sizes=sizes,
        spread=(sizes / np.maximum(1, counts.sum(axis=1))) @ counts,
        step=step,
        rms=rms,
        levels_bytes=len(rest.pack(np.concatenate(levels))) if len(sizes) > 1 else 0,
    )


def _bands(matrix_RK: Tensor) -> tuple[Tensor, ...]:
    """Return runs of rows small enough for float32 copies."""
    return tuple(torch.split(matrix_RK, max(1, _CHUNK // matrix_RK.shape[1])))


def _step(rms: float, db: float) -> float:
    """Return the step of single nodes for a high SQNR."""
    return math.sqrt(12) * rms * 10 ** (-db / 20)


def _levels(matrix_RK: Tensor, step: float) -> tuple[contexts.Bytes, contexts.Bytes]:
    """Return the levels of the rows, and of the columns of both planes, from the mean squares of their symbols."""
    rows, pairs = matrix_RK.shape[0], pairs_per_row(matrix_RK.shape[1])
    if rows < _LEAST_ROWS:
        return np.zeros(rows, dtype=np.uint8), np.zeros(2 * pairs, dtype=np.uint8)
    by_row, by_column = [], torch.zeros(2, pairs, dtype=torch.float64)
    for part in _bands(matrix_RK):
        squares = torch.stack(split(part.to(torch.float32))).div_(step).square_()
        by_row.append(squares.mean(dim=(0, 2)))
        by_column += squares.sum(dim=1)
    by_rows, by_columns = torch.cat(by_row).double(), by_column.view(-1) / rows
    return contexts.levels(by_rows.add_(1 / 12).numpy()), contexts.levels(by_columns.add_(1 / 12).numpy())


def _curve(planes: _Planes, targets_db: Sequence[float], matrix_RK: Tensor, *, path: bool) -> Floats:
    """Return the bytes of the streams at each target."""
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
    pairs = matrix_RK.shape[0] * pairs_per_row(matrix_RK.shape[1])
    symbol = wanted - math.log(2 * rate.path_step(pairs))
    paths = at(coded, symbol) + at(escapes[0], symbol) * ESCAPE_BITS / 8
    escaped = np.expm1(at(np.log1p(escapes[1]), symbol))  # it varies by orders of magnitude, so interpolate its log
    return np.where(escaped > MOST_ESCAPED * pairs, single, paths)


def _at_step(planes: _Planes, step: float) -> tuple[float, float, float, float]:
    """Return (SQNR of single nodes in dB, bytes of the symbols, those outside them, outside half of them) at a step."""
    half = planes.counts.shape[1] // 2
    fine = np.arange(-half, half + 1) * planes.step
    symbol = np.rint(fine / step)
    error = float(planes.spread @ ((fine - symbol * step) ** 2 + planes.step**2 / 12))
    starts = np.concatenate(([0], np.flatnonzero(np.diff(symbol)) + 1))
    merged, size = np.add.reduceat(planes.counts, starts, axis=1), np.abs(symbol[starts])
    outside = np.add.reduceat(planes.spread, starts)
    escapes = [float(outside[size > most].sum()) for most in (HIGH, HIGH // 2)]
    merged = merged[:, size <= HIGH]
    weights = float(planes.sizes.sum())
    *framing, framing_of_all = rans.encoded_bytes(np.array([*planes.sizes, weights], dtype=np.int64)).tolist()
    grouped = sum(map(_stream_bytes, merged, planes.sizes, framing)) + planes.levels_bytes
    flat = _stream_bytes(merged.sum(axis=0), weights, framing_of_all)
    energy = planes.rms**2 * weights
    return sqnr_db(energy, error), min(flat, grouped), escapes[0], escapes[1]


def _stream_bytes(counts: Floats, symbols: float, framing: int) -> float:
    """Estimate the bytes of a stream of this many symbols, as entropy and the code's excess.

    `counts` is the histogram of a sample. `framing` is the result of `rans.encoded_bytes` for the stream.
    """
    used = counts[counts > 0]
    sampled = float(used.sum())
    if not sampled:
        return 0.0
    bits = math.log2(sampled) - float(used @ np.log2(used)) / sampled
    bits += (len(used) - 1) / (2 * sampled * math.log(2))  # Miller-Madow correction for few samples
    bits += float(np.interp(bits, _ENTROPY_BITS, _EXTRA_BITS))
    table = _TABLE_BYTES[0] + _TABLE_BYTES[1] * len(used) + framing
    return min(symbols * bits / 8 + table, symbols) + _STREAM_BYTES
