"""A matrix as a difference to the decoded matrix of another version, on one lattice.

Both lie on lattices of their own. Let b be the coordinates of the base, of step h_b. With h = h_b / q, the coordinates
q b are the same weights on a lattice q times as fine; what the weights w differ by is coded on that lattice too, in
strides of m of its nodes, so that the sum

    I = q I_b + m I_d,    J = q J_b + m J_d

is an ordinary matrix of step h again: decoding is exact on every device, and whoever computes on coordinates (see
`HyperLinear`) needs to know nothing of differences. The stride m h is the step at which the difference is rounded. Its
choice is coarse, m / q being a small fraction; what a stride leaves of the allowed error is used up by a dead zone:
values are moved towards 0 by t strides before they are rounded, which saves bits. From about 2 bits a weight on, a path
of the trellis is better.

**What must not be saved.** A mild fine-tune moves each weight by less than the error that is allowed. The least bits
for that error would leave all of it away and give the base back: by its SQNR a good version of the fine-tune, by its
masks one of the base. Small as they are, the moves are all in directions that the outputs feel, where an error of
rounding has any direction. Rounding weights for themselves does keep a small move, on average: it carries some weights
over to the next node, as many as it is long. So a difference must be rounded that way too. The *response* of a rounding
is its mean slope: strides times the density of values at its thresholds; 1 keeps every small move, 0 none. It must be
nearly that of the direct form. On the demo model, fine-tuned until 63 dB lie between, masks agree at 0.86 with the
base's, at 0.95 in either form so rounded; with least bits for the error they were at 0.92 where the direct form is at
0.96.

If the base's coordinates lie on paths, the weights' own path is searched too, at the base's step: for a mild fine-tune
it is the base's but for short detours, whose symbols are what is stored then (q = m = 1, without paths).

Worked example, h_b = 0.5 and a base of I_b = (3, -1), J_b = 0: the base holds (1.5, -0.5). For q = 2 and m = 3 the step
is 0.25 and the stride 0.75. Weights of (2.3, -0.4) differ by (0.8, 0.1), which is about 1.07 and 0.13 strides: I_d =
(1, 0), and I = 2 (3, -1) + 3 (1, 0) = (9, -2), decoded to (2.25, -0.5).

Shapes: R = rows, K = columns, P = pairs a row, E = escapes, B = bins of a histogram.
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
from birkhoff.codec.metrics import Fidelity, bulk, fidelity, to_host
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.codec.trajectory import LOW

Floats = npt.NDArray[np.float64]

_MOST_TIMES = 3
"""Greatest q that is tried: the base's coordinates must still be bytes, most of them."""

MOST_OUTSIDE = 1 / 400
"""Share of pairs that may be escapes in memory because of the base's coordinates times q."""

_BINS = 4096
_BINS_A_STEP = 64
"""Of the histogram of the difference, per step of plain rounding at the allowed error or of the base, the finer one."""

_FARTHEST_RMS = 6.0
"""The bins reach so many times the root mean square of the difference, at least."""

_COARSER = 8
"""Bins of the histogram of the weights are so much wider."""

_MILD = 1.03
"""Of the allowed error: differences up to which the weights' path may be the base's but for short detours."""

_ZONE = 0.025
_DEAD_ZONES: Floats = np.arange(0.0, 0.5, _ZONE)
"""t, in strides."""

_MARGIN = 0.996
"""Share of the allowed error that is aimed at: what is known of it comes from a sample."""

PATH_BITS = 0.17
"""What a path of the trellis saves."""

LEAST_RESPONSE = 0.97
"""Of a difference's rounding, over that of the direct form."""

_FREE_BITS = 0.88, 1.52
"""What a path costs besides, a exp(-b bits): it leaves 0 more often than nodes do. Measured from 0.5 to 3 bits."""

_SPARSE, _MANY = 7, 1 << 18
"""Every so manyth value of a sample, or of a code of so many symbols, tells enough."""

_FINER_STRIDES = 16
"""Strides begin at so small a share of the allowed error: longer ones may keep no small move."""

_TRIES = 5

FINER = 0.98
"""A base's lattice may be made finer down to this share of its step, where the target is missed by little. More would
move the base itself by what a difference of 34 dB below it is."""

_LEAST_MISS_DB = 0.01
"""A step is made finer by so much at least."""

_SAME = 1e-6
"""How far from 1 a scale of the base may be that is left out; 100 dB below the weights are far below any error."""

LIKE = 0.5
"""Bits a weight within which an estimate does not tell which form is smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a difference is to be rounded: q, m, t, kind of its paths (0 for none), and about its bits a weight."""

    times: int
    stride: int
    dead: float
    path: int
    bits: float
    follows: int = 0
    """Kind of the base's paths, if the weights are put on such too and how they differ is what is stored; else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference that was found: the coordinates to be stored, of step m h, and what they come to with the base."""

    plan: Plan
    code: LatticeTensor
    sum: LatticeTensor
    error: Fidelity
    """Of the sum against the weights."""
    direct_bits: float
    """About the bits a weight of the direct form."""


def find(
    weight_RK: Tensor,
    base: LatticeTensor,
    target_db: float,
    *,
    path: bool,
    base_path: int = 0,
    longest: float = math.inf,
) -> Difference | None:
    """The difference of a matrix to its base, for the error that `target_db` allows; None where direct is better.

    Args:
        weight_RK: real and finite, any float dtype and device.
        base: a matrix of the same shape, on the same device.
        target_db: least SQNR of what is decoded, against the energy of the weights themselves (as `rate.encode`).
        path: allow paths of the trellis.
        base_path: kind of the paths that the base's coordinates lie on, 0 for none.
        longest: stride of single nodes that is allowed, in the weights' unit, whatever the error.

    Raises:
        TargetError: the target is out of range.
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
        followed = _settle(weight_RK, base, decoded_RK, follow, target_db, longest * look.path_step)
        if followed is not None and _bits(followed.code) < min((plan.bits for plan in plans), default=math.inf):
            return replace(followed, direct_bits=direct)
    for plan in plans[:_TRIES]:
        if plan.bits > direct + LIKE:
            return None
        most = longest * (look.path_step if plan.path else 1.0) / plan.stride
        found = _settle(weight_RK, base, decoded_RK, plan, target_db, most)
        if found is not None and is_short(found.sum, base):
            return replace(found, direct_bits=direct)
    return None


def _bits(code: LatticeTensor) -> float:
    """About the bits a weight of a code's symbols."""
    bits = 0.0
    for plane in (code.i, code.j):
        symbols = plane.reshape(-1)[:: _SPARSE if plane.numel() > _MANY else 1].to(torch.int64)
        shares = torch.bincount(symbols + 128, minlength=256).double() / symbols.numel()
        bits -= float(torch.special.xlogy(shares, shares).sum()) / math.log(2) / 2
    return bits


def is_short(code: LatticeTensor, base: LatticeTensor) -> bool:
    """Whether few enough of a sum's coordinates are escapes in memory; as few as the base has at least."""
    return len(code.escapes) <= max(MOST_OUTSIDE * code.i.numel(), 1.25 * len(base.escapes))


def estimates(
    weight_RK: Tensor, base: LatticeTensor, targets_db: Iterable[float], *, path: bool, base_path: int = 0
) -> list[tuple[float, float]]:
    """About the bits a weight of the difference and of the direct form at each of some targets, dB, from a sample.

    Of a difference that none is for, they are infinite. Arguments as of `find`.
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
    """About the bits a weight of the detours that the weights' paths make from the base's, from its first rows."""
    rows = max(1, min(len(weight_RK), _MANY // weight_RK.shape[1]))
    held = base.rows(0, rows)
    try:
        whole = quantise_path(weight_RK[:rows].contiguous(), base.step, base_path)
    except TargetError:
        return math.inf
    return _bits(combine(held, whole, times=-1, stride=1, step=base.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What a sample tells: the allowed error, histograms [B] of |w - b| in bins of `width` and of |w| in wider ones."""

    allowed: float
    """Of a weight, squared."""
    sampled: int
    """Values in the histograms."""
    moved: float
    """Mean square of what lies between the weights and the base."""
    width: float
    difference: Floats
    weights: Floats
    base_step: float
    reach: float
    """Magnitude that all but a few of the base's weights stay below."""
    path_step: float
    """Step of a path over that of single nodes at equal error."""

    def allows(self, stride: float, dead: float, allowed: float, response: float) -> bool:
        """Whether a rounding of the difference keeps an error and a response."""
        if _rounded(self.difference, self.width, stride, dead)[0] > allowed:
            return False
        window = _window(self.sampled)
        # So many values lie in the windows of a response of 1: what it is known to.
        known = 1 / math.sqrt(2 * window * self.sampled)
        return _response(self.difference, self.width, stride, dead, window) >= response - known

    def least_response(self) -> float:
        """What the rounding of the difference must keep of small moves."""
        return LEAST_RESPONSE * min(1.0, self._direct_response())

    def _direct_response(self) -> float:
        step = math.sqrt(12 * self.allowed)
        return _response(self.weights, _COARSER * self.width, step, 0.0, _window(self.sampled))

    def direct_bits(self, *, path: bool) -> float:
        """About the bits a weight of the weights themselves, rounded at the allowed error."""
        _, bits = _rounded(self.weights, _COARSER * self.width, math.sqrt(12 * self.allowed), 0.0)
        return bits - (PATH_BITS if path else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What is known of a matrix and its base, whatever the target; values are those of a sample."""

    weights: int
    energy: float
    """Of the bulk of all."""
    moved: float
    reach: float
    difference: Tensor
    values: Tensor
    base_step: float
    path_step: float


def _sampled(weight_RK: Tensor, base: LatticeTensor, decoded_RK: Tensor) -> _Sample | None:
    # Sums in float64 here and in `_settle`: a GPU decides as a CPU does, and makes the same bytes.
    energy = bulk(weight_RK, _squares(weight_RK), exact=True).energy
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
    """Sum of squares, in float64."""
    return sum(to_host(*(part.float().square().sum(dtype=torch.float64) for part in values.reshape(-1).split(1 << 20))))


def _histogram(values: Tensor, width: float) -> Floats:
    """Shares [B] of magnitudes; what lies beyond the last bin is in it."""
    bins = values.abs().mul_(1 / width).clamp_(max=_BINS - 1).to(torch.int64).reshape(-1)
    shares: Floats = torch.bincount(bins, minlength=_BINS).cpu().numpy().astype(np.float64) / max(1, bins.numel())
    return shares


_CENTRES: Floats = np.arange(_BINS, dtype=np.float64) + 0.5


def _rounded(shares: Floats, width: float, stride: float, dead: float) -> tuple[float, float]:
    """(mean squared error, bits) of a weight whose magnitude is rounded to strides after a dead zone."""
    value = _CENTRES * width
    node = np.floor(np.maximum(value / stride - dead, 0.0) + 0.5)
    error = float(np.dot(shares, (value - node * stride) ** 2)) + width**2 / 12
    counts = np.bincount(node.astype(np.int64), weights=shares)
    found = counts[counts > 0]
    bits = -float(np.dot(found, np.log2(found))) + (1.0 - float(counts[0]))  # a sign for all but 0
    return error, bits


def _response(shares: Floats, width: float, stride: float, dead: float, window: float) -> float:
    """Mean slope of a rounding: what it keeps, on average, of a small move of the values.

    `window`, of a stride, is how far on both sides of a threshold their density is taken.
    """
    thresholds = (np.arange(0.5 + dead, _BINS * width / stride - 1) * stride) / width
    reach = max(1.0, stride / width * window)
    below = np.concatenate(([0.0], np.cumsum(shares)))
    edges = np.arange(_BINS + 1)
    density = np.interp(thresholds + reach, edges, below) - np.interp(thresholds - reach, edges, below)
    return float(density.sum()) / (2 * reach) * stride / width


_WINDOWS = 1 / 32, 1 / 8
_IN_WINDOWS = 1 << 12
"""Values that should lie in them: few values have wider ones."""


def _window(sampled: int) -> float:
    """Window of a response that so many values tell."""
    return min(max(_WINDOWS[0], _IN_WINDOWS / (2 * sampled)), _WINDOWS[1])


def _plans(look: _Look, *, path: bool, longest: float = math.inf) -> Iterator[Plan]:
    """Ways to round the difference that should keep the allowed error, and small moves."""
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


def _settle(
    weight_RK: Tensor, base: LatticeTensor, decoded_RK: Tensor, plan: Plan, target_db: float, most: float
) -> Difference | None:
    """Round by a plan, with a lesser dead zone or a somewhat finer step where the sample misled; None if that fails.

    `most` is the longest step of the sum that is allowed.
    """
    step = as_stored(min(base.step / plan.times, most))
    if step < FINER * base.step / plan.times:
        return None
    for _ in range(_TRIES):
        # A finer step moves what the base stands for; the difference makes up for it.
        scale = plan.times * step / base.step
        held = decoded_RK if is_one(scale) else decoded_RK * scale
        rest = weight_RK.to(torch.float32) - held
        stride = as_stored(plan.stride * step)
        if plan.follows:
            whole = quantise_path(weight_RK, step, plan.follows)
            code = combine(base, whole, times=-1, stride=1, step=step)
        else:
            if plan.path:
                code = quantise_path(rest, stride)
            else:
                dead = plan.dead * stride
                code = quantise(rest.sub_(rest.clamp(-dead, dead)) if dead else rest, stride)
            whole = combine(base, code, times=plan.times, stride=plan.stride, step=step)
        error = fidelity(weight_RK, whole.decode(weight_RK.dtype), exact=True)
        rate.check_error(error.error)
        if error.sqnr_db >= target_db:
            return Difference(plan=plan, code=code, sum=whole, error=error, direct_bits=math.inf)
        if plan.dead > 0:
            plan = replace(plan, dead=max(0.0, plan.dead - 0.03))
            continue
        step = as_stored(step * 10 ** (min(error.sqnr_db - target_db, -_LEAST_MISS_DB) / 20))
        if step < FINER * base.step / plan.times:
            return None
    return None


def is_one(scale: float) -> bool:
    """Whether a scale of the base may be left out."""
    return abs(scale - 1) < _SAME


def as_stored(step: float) -> float:
    """The step as the float32 that is stored."""
    return float(torch.tensor(step, dtype=torch.float32))
