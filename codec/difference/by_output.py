"""A matrix as a difference under a nominal target, its errors fed back through the Hessian of its own outputs.

What is rounded is the weights less the base's decoded ones, on a lattice that the base's divides (see `find`), by the
feedback of `output.feedback`: the error of the sum is the error of the difference. A stride is at most as long as the
step that the direct form has at the target, so the outputs' error is that form's too. The coarsest stride is taken that
keeps small moves (see `find` on responses). Here the response is the density of the values that are rounded, at the
thresholds of their rounding and over the mean one: feedback has spread them, which a histogram of the weights would not
tell. A few rows tell it of all strides at once: each row is rounded by itself.

Worked example, h_b = 0.5 and a nominal step of 0.4: q = 1 has no stride so short, q = 2 that of m = 1, 0.25, q = 3 that
of m = 2, 0.333, which is tried first.

Shapes: R = rows, K = columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec import lattice
from birkhoff.codec.container import MAX_STRIDE, MAX_TIMES
from birkhoff.codec.difference import find as by_weights
from birkhoff.codec.difference.find import FINER, LEAST_RESPONSE, MOST_OUTSIDE, Difference, Plan, is_short
from birkhoff.codec.lattice import LatticeTensor, combine
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import encode as output
from birkhoff.codec.output import feedback
from birkhoff.codec.profiles import TARGET_DB_RANGE
from birkhoff.codec.tensor import LEAST_PATH
from birkhoff.codec.trajectory import HIGH

_VALUES, _LEAST_ROWS = 1 << 14, 8
"""Weights that tell of a stride, in whole rows, and the fewest of these."""

_SHARES = 1.0, 0.8, 0.62, 0.5
"""Strides that are tried, the coarsest first: the longest up to each of these shares of the nominal step."""

_WINDOW = 1 / 8
"""Of a stride, on both sides of a threshold, where the density of values is taken."""

_SLACK = 1e-6
"""A step is a float32."""

_FARTHEST = 1 << 12
"""Whole numbers beyond count as one."""

_PATHS_FROM = 2.0
"""Bits of single nodes below which paths save little, and their search takes longest."""

_MILD = 1.1
"""Of the outputs' error of the direct form: that of the base, up to which the weights' paths may be the base's but for
short detours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A way to round, and what a few rows tell of it."""

    times: int
    stride: int
    step: float
    """Of the sum."""
    bits: float = math.inf
    response: float = 0.0


def find(
    weight_RK: Tensor,
    base: LatticeTensor,
    target_db: float,
    hessian_KK: Tensor | None,
    *,
    path: bool,
    base_path: int = 0,
) -> Difference | None:
    """The difference of a matrix to its base at a nominal target; None where direct is better.

    Args:
        weight_RK: real and finite, any float dtype and device.
        base: a matrix of the same shape, on the same device.
        hessian_KK: of the outputs, on that device; None where errors are not fed back.
        path: allow paths of the trellis.
        base_path: kind of the paths that the base's coordinates lie on, 0 for none.

    Raises:
        TensorError: the Hessian is none.
    """
    single = output.nominal_step(weight_RK, target_db)
    if hessian_KK is None:
        return _by_weights(weight_RK, base, single, path=path, base_path=base_path)
    factor, decoded_RK = feedback.factorise(hessian_KK), base.decode()
    direct, trials, mild = _tried(weight_RK, base, decoded_RK, single, hessian_KK, factor)
    # So many values lie in the windows of a response of 1: what it is known to.
    known = 1 / math.sqrt(2 * _WINDOW * min(weight_RK.numel(), _VALUES))
    least = LEAST_RESPONSE * min(1.0, direct.response) - known
    chosen = next((trial for trial in trials if trial.response >= least), None)
    path = path and weight_RK.numel() >= LEAST_PATH
    found: list[tuple[float, Difference]] = []
    if path and mild and base_path == feedback.DOWN:
        found += _followed(weight_RK, base, single, hessian_KK, factor)
    if chosen is not None and chosen.bits <= direct.bits + by_weights.LIKE:
        found += _nodes(weight_RK, base, decoded_RK, chosen, hessian_KK, factor)
        if path and chosen.bits >= _PATHS_FROM:
            found += _paths(weight_RK, base, decoded_RK, single, hessian_KK, factor)
    found = [(bits, one) for bits, one in found if is_short(one.sum, base) and math.isfinite(one.error.error)]
    if not found:
        return None
    best = min(found, key=lambda one: one[0])[1]
    direct_bits = direct.bits - (by_weights.PATH_BITS if path else 0.0)
    return Difference(plan=best.plan, code=best.code, sum=best.sum, error=best.error, direct_bits=direct_bits)


def _by_weights(
    weight_RK: Tensor, base: LatticeTensor, single: float, *, path: bool, base_path: int
) -> Difference | None:
    """For the error that rounding at the nominal step makes of the weights: every output counts alike."""
    plain = lattice.quantise(weight_RK, single)
    reached = fidelity(weight_RK, plain.decode(weight_RK.dtype), exact=True).sqnr_db
    low, high = TARGET_DB_RANGE
    if not low <= reached <= high:
        return None
    return by_weights.find(weight_RK, base, reached, path=path, base_path=base_path, longest=single)


def _strides(base: LatticeTensor, longest: float) -> Iterator[_Trial]:
    """Strides on lattices that the base's divides, none longer than `longest`; for each q the coarsest first."""
    size = torch.maximum(*(plane.to(torch.int16).abs() for plane in (base.i, base.j)))
    for times in range(1, MAX_TIMES + 1):
        if times > 1 and float((size > HIGH // times).float().mean()) > MOST_OUTSIDE:
            break  # too many coordinates of the sum would be escapes
        step = base.step / times
        for stride in range(min(MAX_STRIDE, math.floor(longest / (FINER * step))), 0, -1):
            if math.gcd(times, stride) == 1:
                yield _Trial(times=times, stride=stride, step=by_weights.as_stored(min(step, longest / stride)))


def _longest(base: LatticeTensor, longest: float, shares: Sequence[float]) -> list[_Trial]:
    """The longest stride up to each of some shares of `longest`, each once."""
    found = sorted(_strides(base, longest), key=lambda trial: (-trial.stride * trial.step, trial.times))
    limits = [share * longest * (1 + _SLACK) for share in shares]
    picked = (next((trial for trial in found if trial.stride * trial.step <= limit), None) for limit in limits)
    return list(dict.fromkeys(trial for trial in picked if trial is not None))


def _rest(weight_RK: Tensor, base: LatticeTensor, decoded_RK: Tensor, trial: _Trial) -> Tensor:
    """What is to be rounded, float32: a finer step moves what the base stands for."""
    scale = trial.times * trial.step / base.step
    return weight_RK.to(torch.float32) - (decoded_RK if by_weights.is_one(scale) else decoded_RK * scale)


def _tried(
    weight_RK: Tensor,
    base: LatticeTensor,
    decoded_RK: Tensor,
    single: float,
    hessian_KK: Tensor,
    factor: feedback.Factor,
) -> tuple[_Trial, Sequence[_Trial], bool]:
    """The direct form and strides as a few rows tell them; whether the base is as good for the outputs as the first."""
    count = min(len(weight_RK), max(_LEAST_ROWS, _VALUES // weight_RK.shape[1]))
    rows = torch.linspace(0, len(weight_RK) - 1, count).round().long().to(weight_RK.device)
    weight, held = weight_RK[rows], decoded_RK[rows]
    trials = _longest(base, single, _SHARES)
    units = [weight.to(torch.float32) / single]
    units += [_rest(weight, base, held, trial) / (trial.stride * trial.step) for trial in trials]
    nodes_KR, values_KR = feedback.rounded(torch.cat(units), factor)
    looked = [
        (_entropy(nodes), _response(values))
        for nodes, values in zip(nodes_KR.split(len(rows), 1), values_KR.split(len(rows), 1), strict=True)
    ]
    lost = (values_KR - nodes_KR)[:, : len(rows)] / factor.upper.diagonal()[:, None]
    error = float(lost.square().sum(dtype=torch.float64)) * single**2
    damped = feedback.damped(hessian_KK).float()
    rest = weight.to(torch.float32) - held
    mild = float(((rest @ damped) * rest).sum(dtype=torch.float64)) < _MILD * error
    made = [
        _Trial(times=trial.times, stride=trial.stride, step=trial.step, bits=bits, response=response)
        for trial, (bits, response) in zip((_Trial(times=1, stride=1, step=single), *trials), looked, strict=True)
    ]
    return made[0], made[1:], mild


def _entropy(nodes: Tensor) -> float:
    """Bits a weight of whole numbers."""
    symbols = nodes.reshape(-1).clamp(-_FARTHEST, _FARTHEST).to(torch.int64) + _FARTHEST
    shares = torch.bincount(symbols).double() / nodes.numel()
    return -float(torch.special.xlogy(shares, shares).sum()) / math.log(2)


def _response(values: Tensor) -> float:
    """Mean slope of the rounding of values to whole numbers."""
    near = (values - values.floor() - 0.5).abs() < _WINDOW
    return float(near.double().mean()) / (2 * _WINDOW)


_Found = Iterator[tuple[float, Difference]]
"""A difference, and the bits that it takes at an output error of 1."""


def _difference(
    weight_RK: Tensor, base: LatticeTensor, trial: _Trial, choice: tuple[LatticeTensor, int, float], follows: int = 0
) -> tuple[float, Difference]:
    code, kind, _ = choice
    whole = combine(base, code, times=trial.times, stride=trial.stride, step=trial.step)
    plan = Plan(times=trial.times, stride=trial.stride, dead=0.0, path=kind, bits=trial.bits, follows=follows)
    error = fidelity(weight_RK, whole.decode(weight_RK.dtype), exact=True)
    return output.bits_at_equal_error(choice), Difference(
        plan=plan, code=code, sum=whole, error=error, direct_bits=math.inf
    )


def _nodes(
    weight_RK: Tensor,
    base: LatticeTensor,
    decoded_RK: Tensor,
    trial: _Trial,
    hessian_KK: Tensor,
    factor: feedback.Factor,
) -> _Found:
    """The difference in single nodes."""
    rest = _rest(weight_RK, base, decoded_RK, trial)
    code = feedback.quantise(rest, by_weights.as_stored(trial.stride * trial.step), factor)
    nodes = code, 0, feedback.output_error(rest, code, hessian_KK)
    yield _difference(weight_RK, base, trial, output.refined(rest, nodes, hessian_KK, factor))


def _paths(
    weight_RK: Tensor,
    base: LatticeTensor,
    decoded_RK: Tensor,
    single: float,
    hessian_KK: Tensor,
    factor: feedback.Factor,
) -> _Found:
    """The difference in paths down the columns."""
    longest = by_weights.as_stored(single * feedback.path_step(*weight_RK.shape))
    for trial in _longest(base, longest, (1.0,)):
        rest = _rest(weight_RK, base, decoded_RK, trial)
        code = feedback.quantise(rest, by_weights.as_stored(trial.stride * trial.step), factor, path=True)
        choice = code, feedback.DOWN, feedback.output_error(rest, code, hessian_KK)
        yield _difference(weight_RK, base, trial, choice)


def _followed(
    weight_RK: Tensor, base: LatticeTensor, single: float, hessian_KK: Tensor, factor: feedback.Factor
) -> _Found:
    """The weights' own paths at the base's step, less the base's: its detours."""
    longest = single * feedback.path_step(*weight_RK.shape)
    step = by_weights.as_stored(min(base.step, longest))
    if step < FINER * base.step:
        return
    whole = feedback.quantise(weight_RK, step, factor, path=True)
    code = combine(base, whole, times=-1, stride=1, step=step)
    choice = code, 0, feedback.output_error(weight_RK, whole, hessian_KK)
    yield _difference(weight_RK, base, _Trial(times=1, stride=1, step=step), choice, follows=feedback.DOWN)
