"""Code a matrix as a difference to the decoded matrix of another version, on one lattice.

The two matrices lie on different lattices. Let b be the base's coordinates and h_b its step. With h = h_b / q, the
coordinates q b are the same weights on a lattice q times as fine. The difference to the weights w is coded on that
lattice too, in strides of m nodes, so the sum

    I = q I_b + m I_d,    J = q J_b + m J_d

is an ordinary matrix of step h again. Every device decodes it exactly, and code that computes with coordinates (see
`HyperLinear`) need not know about differences. The stride m h is the step at which the difference is rounded. Few
strides exist, because m / q is a fraction of small numbers. A dead zone uses up the rest of the allowed error: values
move towards 0 by t strides before rounding, which saves bits. From about 2 bits per weight, a trellis path is better.

**What must not be saved.** A mild fine-tune moves each weight by less than the allowed error. A code with the fewest
bits for that error would drop all moves and return the base. By its SQNR that is a good version of the fine-tune; by
its masks it is the base. The moves are small, but all of them point in directions that matter to the outputs, while
errors of rounding point in any direction. Rounding the weights directly does keep a small move on average: it carries a
share of the weights over to the next node, in proportion to its length. So a difference must be rounded that way too.
The *response* of a rounding is its mean slope: strides times the density of values at its thresholds. A response of 1
keeps every small move, 0 keeps none. It must be close to the direct form's. On the demo model, fine-tuned to 63 dB from
its base, the masks agree at 0.86 with the base's, and at 0.95 with those of either form if rounded like this. Rounded
to the fewest bits for the error they agreed at 0.92, where the direct form reached 0.96.

If the base's coordinates are on paths, the encoder also searches the weights' own path at the base's step. For a mild
fine-tune it is the base's path with short detours, and only the symbols of the detours are stored (q = m = 1, without
paths).

Worked example, h_b = 0.5 and a base of I_b = (3, -1), J_b = 0: the base holds (1.5, -0.5). For q = 2 and m = 3 the step
is 0.25 and the stride 0.75. Weights of (2.3, -0.4) differ by (0.8, 0.1), which is about 1.07 and 0.13 strides: I_d =
(1, 0), and I = 2 (3, -1) + 3 (1, 0) = (9, -2), decoded to (2.25, -0.5).

Shapes: R = rows, K = columns, P = pairs per row, E = escapes, B = bins of a histogram.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import rate
from birkhoff.codec.container import MAX_STRIDE
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor, combine, quantise, quantise_path
from birkhoff.codec.metrics import Fidelity, bulk, fidelity, in_parts, survey, to_host
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.codec.trajectory import LOW

Floats = npt.NDArray[np.float64]

_MOST_TIMES = 3
"""Greatest q to try. Most of the base's coordinates times q must still fit a byte."""

MOST_OUTSIDE = 1 / 400
"""Largest share of pairs that may be escapes in memory because q times the base's coordinates exceeds a byte."""

_BINS = 4096
_BINS_A_STEP = 64
"""Bins of the difference's histogram per step: the base's, or that of plain rounding at the allowed error, if finer."""

_FARTHEST_RMS = 6.0
"""The bins reach at least this many times the root mean square of the difference."""

_COARSER = 8
"""Width of the weights' histogram bins, relative to the difference's."""

_MILD = 1.03
"""Largest mean square of a difference, relative to the allowed error, at which the weights may follow the base's paths
with short detours."""

_ZONE = 0.025
_DEAD_ZONES: Floats = np.arange(0.0, 0.5, _ZONE)
"""Values of t to try, in strides."""

_MARGIN = 0.996
"""Share of the allowed error to aim for, because a sample gives the error only approximately."""

PATH_BITS = 0.17
"""Bits per weight that a trellis path saves."""

LEAST_RESPONSE = 0.97
"""Least response of a difference's rounding, relative to the direct form's."""

_FREE_BITS = 0.88, 1.52
"""Extra cost of a path, a exp(-b bits), because it leaves 0 more often than nodes do. Measured from 0.5 to 3 bits."""

_SPARSE, _MANY = 7, 1 << 18
"""Statistics take every 7th value of a sample, and of a code with more than this many symbols."""

_FINER_STRIDES = 16
"""The shortest stride to try, as a divisor of the root of the allowed error. Longer ones may lose all small moves."""

_TRIES = 5

FINER = 0.98
"""Least scale of a base's step. If the target is narrowly missed, the lattice may become this much finer. Beyond that,
the base itself would move by as much as a difference 34 dB below it."""

_LEAST_MISS_DB = 0.01
"""Least decrease of a step, in dB."""

_SAME = 1e-6
"""Largest deviation from 1 at which a scale of the base is ignored. It is 100 dB below the weights, far below any
error."""

LIKE = 0.5
"""Bits per weight within which an estimate cannot tell which form is smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A way to round a difference: q, m, t, the kind of its paths (0 for none), and its approximate bits per weight."""

    times: int
    stride: int
    dead: float
    path: int
    bits: float
    follows: int = 0
    """The kind of the base's paths if the weights follow them and only the detours are stored; else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference that was found: `code`, the coordinates to store, of step m h, and `sum`, them added to the base."""

    plan: Plan
    code: LatticeTensor
    sum: LatticeTensor
    error: Fidelity
    """The error of the sum."""
    direct_bits: float
    """Approximate bits per weight of the direct form."""


def find(
    weight_RK: Tensor,
    base: LatticeTensor,
    target_db: float,
    *,
    path: bool,
    base_path: int = 0,
    longest: float = math.inf,
) -> Difference | None:
    """Find the difference of a matrix to its base at the error that `target_db` allows.

    Return None if the direct form is better.

    Args:
        weight_RK: Real and finite, of any float dtype, on any device.
        base: A matrix of the same shape, on the same device.
        target_db: Least SQNR of the decoded sum, relative to the energy of the weights themselves (as `rate.encode`).
        path: Allow paths of the trellis.
        base_path: The kind of the paths that the base's coordinates are on, 0 for none.
        longest: Longest stride of single nodes in the unit of the weights, at any error.

    Raises:
        TargetError: The target is out of range.
    """
    rate.check_target(target_db)
    decoded_RK = base.decode()
    sample = _sampled(weight_RK, base, decoded_RK)
    if sample is None:
        return None
    look = _look(sample, target_db)
    direct = look.direct_bits(path=path)
    plans = sorted(_plans(look, path=path, longest=longest), key=lambda plan: (plan.bits, plan.path))
    followed = None
    if path and base_path and look.moved < _MILD * look.allowed:
        follow = Plan(times=1, stride=1, dead=0.0, path=0, bits=0.0, follows=base_path)
        goal = _Goal(target_db=target_db, energy=sample.energy, most=longest * look.path_step)
        followed = _settle(weight_RK, base, decoded_RK, follow, goal)
        if followed is not None and _bits(followed.code) < min((plan.bits for plan in plans), default=math.inf):
            return replace(followed, direct_bits=direct)
    for plan in plans[:_TRIES]:
        if plan.bits > direct + LIKE:
            return None
        most = longest * (look.path_step if plan.path else 1.0) / plan.stride
        goal = _Goal(target_db=target_db, energy=sample.energy, most=most)
        found = _settle(weight_RK, base, decoded_RK, plan, goal)
        if found is not None and is_short(found.sum, base):
            return replace(found, direct_bits=direct)
    return None


def _bits(code: LatticeTensor) -> float:
    """Return the approximate bits per weight of a code's symbols."""
    bits = 0.0
    for plane in (code.i, code.j):
        symbols = plane.reshape(-1)[:: _SPARSE if plane.numel() > _MANY else 1].to(torch.int64)
        shares = torch.bincount(symbols + 128, minlength=256).double() / symbols.numel()
        bits -= float(torch.special.xlogy(shares, shares).sum()) / math.log(2) / 2
    return bits


def is_short(code: LatticeTensor, base: LatticeTensor) -> bool:
    """Return whether the sum has few enough escapes in memory, or few more than the base has."""
    return len(code.escapes) <= max(MOST_OUTSIDE * code.i.numel(), 1.25 * len(base.escapes))


def estimates(
    weight_RK: Tensor, base: LatticeTensor, targets_db: Iterable[float], *, path: bool, base_path: int = 0
) -> list[tuple[float, float]]:
    """Estimate the bits per weight of the difference and of the direct form from a sample, at each target in dB.

    Both are infinite for a matrix that cannot have a difference. Arguments as for `find`.
    """
    sample = _sampled(weight_RK, base, base.decode())
    if sample is None:
        return [(math.inf, math.inf) for _ in targets_db]
    followed = None
    found = []
    for target_db in targets_db:
        look = _look(sample, target_db)
        bits = min((plan.bits for plan in _plans(look, path=path)), default=math.inf)
        if path and base_path and look.moved < _MILD * look.allowed:
            if followed is None:
                followed = _followed_bits(weight_RK, base, base_path)
            bits = min(bits, followed)
        found.append((bits, look.direct_bits(path=path)))
    return found


def _followed_bits(weight_RK: Tensor, base: LatticeTensor, base_path: int) -> float:
    """Estimate the bits per weight of the detours that the weights' paths take from the base's, from the first rows."""
    rows = max(1, min(len(weight_RK), _MANY // weight_RK.shape[1]))
    held = base.rows(0, rows)
    try:
        whole = quantise_path(weight_RK[:rows].contiguous(), base.step, base_path)
    except TargetError:
        return math.inf
    return _bits(combine(held, whole, times=-1, stride=1, step=base.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """Statistics of a sample at one target: histograms [B] of |w - b| in bins of `width`, and of |w| in wider ones."""

    allowed: float
    """The allowed squared error per weight."""
    sampled: int
    """Number of values in the histograms."""
    moved: float
    """Mean squared distance between the weights and the base."""
    width: float
    difference: Floats
    weights: Floats
    base_step: float
    reach: float
    """Magnitude that nearly all of the base's weights stay below."""
    path_step: float
    """Step of a path relative to that of single nodes at equal error."""

    def allows(self, stride: float, dead: float, allowed: float, response: float) -> bool:
        """Return whether rounding the difference meets an error and keeps a response."""
        if _rounded(self.difference, self.width, stride, dead)[0] > allowed:
            return False
        window = _window(self.sampled)
        # The standard error: this many values fall into the windows if the response is 1.
        known = 1 / math.sqrt(2 * window * self.sampled)
        return _response(self.difference, self.width, stride, dead, window) >= response - known

    def least_response(self) -> float:
        """Return the least response that the difference's rounding must keep."""
        return LEAST_RESPONSE * min(1.0, self._direct_response())

    def _direct_response(self) -> float:
        step = math.sqrt(12 * self.allowed)
        return _response(self.weights, _COARSER * self.width, step, 0.0, _window(self.sampled))

    def direct_bits(self, *, path: bool) -> float:
        """Return the approximate bits per weight of the direct form, rounded at the allowed error."""
        _, bits = _rounded(self.weights, _COARSER * self.width, math.sqrt(12 * self.allowed), 0.0)
        return bits - (PATH_BITS if path else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Statistics of a matrix and its base that hold for every target. The values are those of a sample."""

    weights: int
    energy: float
    """Energy of the bulk of all weights."""
    moved: float
    reach: float
    difference: Tensor
    values: Tensor
    base_step: float
    path_step: float


def _sampled(weight_RK: Tensor, base: LatticeTensor, decoded_RK: Tensor) -> _Sample | None:
    # These sums and those in `_settle` are float64, so that a GPU decides as a CPU does and makes the same bytes.
    seen = survey(weight_RK) if in_parts(weight_RK) else None
    squares, greatest = (_squares(weight_RK), None) if seen is None else (seen.energy, seen.greatest)
    energy = bulk(weight_RK, squares, greatest, exact=True).energy
    if not 0 < energy < math.inf:
        return None
    sample, held = (rate._sample(matrix).to(torch.float32) for matrix in (weight_RK, decoded_RK))
    magnitude = held.reshape(-1)[::_SPARSE].abs()
    at = max(1, math.ceil((1 - MOST_OUTSIDE / 2) * magnitude.numel()))
    (reach,) = to_host(magnitude.kthvalue(at).values)
    rest = sample - held
    return _Sample(
        weights=weight_RK.numel(),
        energy=energy,
        moved=_squares(rest) / rest.numel(),
        reach=reach,
        difference=rest,
        values=sample,
        base_step=base.step,
        path_step=rate.path_step(weight_RK.shape[0] * pairs_per_row(weight_RK.shape[1])),
    )


def _look(sample: _Sample, target_db: float) -> _Look:
    allowed = sample.energy / 10 ** (target_db / 10) / sample.weights
    finest = min(math.sqrt(12 * allowed), sample.base_step) / _BINS_A_STEP
    width = max(finest, _FARTHEST_RMS * math.sqrt(sample.moved) / _BINS)
    return _Look(
        allowed=allowed,
        sampled=sample.values.numel(),
        moved=sample.moved,
        width=width,
        difference=_histogram(sample.difference, width),
        weights=_histogram(sample.values, _COARSER * width),
        base_step=sample.base_step,
        reach=sample.reach,
        path_step=sample.path_step,
    )


def _squares(values: Tensor) -> float:
    """Return the sum of squares, in float64."""
    if in_parts(values):
        return survey(values).energy
    return sum(to_host(*(part.float().square().sum(dtype=torch.float64) for part in values.reshape(-1).split(1 << 20))))


def _histogram(values: Tensor, width: float) -> Floats:
    """Return the share of magnitudes in each bin, [B]. The last bin also holds everything beyond it."""
    bins = values.abs().mul_(1 / width).clamp_(max=_BINS - 1).to(torch.int64).reshape(-1)
    shares: Floats = torch.bincount(bins, minlength=_BINS).cpu().numpy().astype(np.float64) / max(1, bins.numel())
    return shares


_CENTRES: Floats = np.arange(_BINS, dtype=np.float64) + 0.5


def _rounded(shares: Floats, width: float, stride: float, dead: float) -> tuple[float, float]:
    """Return (mean squared error, bits) per weight, for magnitudes rounded to strides after a dead zone."""
    value = _CENTRES * width
    node = np.floor(np.maximum(value / stride - dead, 0.0) + 0.5)
    error = float(np.dot(shares, (value - node * stride) ** 2)) + width**2 / 12
    counts = np.bincount(node.astype(np.int64), weights=shares)
    found = counts[counts > 0]
    bits = -float(np.dot(found, np.log2(found))) + (1.0 - float(counts[0]))  # a sign for all but 0
    return error, bits


def _response(shares: Floats, width: float, stride: float, dead: float, window: float) -> float:
    """Return the mean slope of a rounding: the share of a small move of the values that it keeps on average.

    `window` is the width, in strides, on each side of a threshold over which the density of values is measured.
    """
    thresholds = (np.arange(0.5 + dead, _BINS * width / stride - 1) * stride) / width
    reach = max(1.0, stride / width * window)
    below = np.concatenate(([0.0], np.cumsum(shares)))
    edges = np.arange(_BINS + 1)
    density = np.interp(thresholds + reach, edges, below) - np.interp(thresholds - reach, edges, below)
    return float(density.sum()) / (2 * reach) * stride / width


_WINDOWS = 1 / 32, 1 / 8
_IN_WINDOWS = 1 << 12
"""Number of values that should fall into the windows. A small sample therefore gets wider ones."""


def _window(sampled: int) -> float:
    """Return the window for measuring a response on a sample of this size."""
    return min(max(_WINDOWS[0], _IN_WINDOWS / (2 * sampled)), _WINDOWS[1])


def _plans(look: _Look, *, path: bool, longest: float = math.inf) -> Iterator[Plan]:
    """Yield ways to round the difference that should meet the allowed error and keep small moves."""
    allowed, least = look.allowed * _MARGIN, look.least_response()
    for times in range(1, _MOST_TIMES + 1):
        step = look.base_step / times
        if times > 1 and look.reach > -LOW * step:
            break
        finest = max(1, math.floor(math.sqrt(allowed) / (_FINER_STRIDES * step)))
        for stride in range(finest, MAX_STRIDE + 1):
            if math.gcd(times, stride) > 1:
                continue
            nodes = stride * step / look.path_step
            if FINER * stride * step > longest:
                break
            if path and FINER * nodes <= longest and look.allows(FINER * nodes, 0.0, look.allowed, least):
                bits = _rounded(look.difference, look.width, 2 * stride * step, 0.0)[1]
                bits += _FREE_BITS[0] * math.exp(-_FREE_BITS[1] * bits)
                yield Plan(times=times, stride=stride, dead=0.0, path=1, bits=bits)
            if not look.allows(FINER * stride * step, 0.0, allowed, least):
                break
            zones = (zone for zone in _DEAD_ZONES.tolist() if not look.allows(stride * step, zone, allowed, least))
            dead = max(0.0, next(zones, 0.5) - _ZONE)
            bits = _rounded(look.difference, look.width, stride * step, dead)[1]
            yield Plan(times=times, stride=stride, dead=dead, path=0, bits=bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Goal:
    """What a difference must reach."""

    target_db: float
    energy: float
    """Of the bulk of the weights, to which the target is relative."""
    most: float
    """Longest step of the sum."""


def _settle(weight_RK: Tensor, base: LatticeTensor, decoded_RK: Tensor, plan: Plan, goal: _Goal) -> Difference | None:
    """Round by a plan. If the sample was misleading, reduce the dead zone, then the step; return None if that fails."""
    step = as_stored(min(base.step / plan.times, goal.most))
    if step < FINER * base.step / plan.times:
        return None
    for _ in range(_TRIES):
        # A finer step moves the base's weights, and the difference makes up for that.
        scale = plan.times * step / base.step
        held = decoded_RK if is_one(scale) else decoded_RK * scale
        stride = as_stored(plan.stride * step)
        if plan.follows:
            whole = quantise_path(weight_RK, step, plan.follows)
            code = combine(base, whole, times=-1, stride=1, step=step)
        else:
            if plan.path:
                code = quantise_path(weight_RK.to(torch.float32) - held, stride)
            else:
                code = quantise(weight_RK, stride, less_RK=held, dead=plan.dead * stride)
            whole = combine(base, code, times=plan.times, stride=plan.stride, step=step)
        if in_parts(weight_RK):
            error = rate.errors(weight_RK, whole).fidelity(goal.energy)
        else:
            error = fidelity(weight_RK, whole.decode(weight_RK.dtype), exact=True)
        rate.check_error(error.error)
        if error.sqnr_db >= goal.target_db:
            return Difference(plan=plan, code=code, sum=whole, error=error, direct_bits=math.inf)
        if plan.dead > 0:
            plan = replace(plan, dead=max(0.0, plan.dead - 0.03))
            continue
        step = as_stored(step * 10 ** (min(error.sqnr_db - goal.target_db, -_LEAST_MISS_DB) / 20))
        if step < FINER * base.step / plan.times:
            return None
    return None


def is_one(scale: float) -> bool:
    """Return whether a scale of the base is close enough to 1 to be ignored."""
    return abs(scale - 1) < _SAME


def as_stored(step: float) -> float:
    """Return the step as the float32 that is stored."""
    return float(torch.tensor(step, dtype=torch.float32))
