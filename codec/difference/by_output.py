"""Code a matrix as a difference under a nominal target, with error feedback through the Hessian of its outputs.

The encoder rounds the weights less the base's decoded weights, on a lattice that the base's lattice divides (see
`find`), with the feedback of `output.feedback`. The sum has the error of the difference. No stride is longer than the
direct form's step at the target, so the outputs' error matches that form's too. The encoder takes the coarsest stride
that keeps small moves (see `find` on responses). Here the response is the density of the values to round at the
thresholds of their rounding, relative to the mean density: feedback spreads the values, which a histogram of the
weights would not show. A few rows give the response of all strides at once, because between columns each row has
feedback of its own. Feedback between rows, which spreads the values further, is left out there.

Worked example, h_b = 0.5 and a nominal step of 0.4: q = 1 has no stride this short, q = 2 has 0.25 (m = 1), and q = 3
has 0.333 (m = 2), which is tried first.

Shapes: R = rows, K = columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from birkhoff.codec import lattice
from birkhoff.codec.container import MAX_STRIDE, MAX_TIMES
from birkhoff.codec.difference import find as by_weights
from birkhoff.codec.difference.find import FINER, LEAST_RESPONSE, MOST_OUTSIDE, Difference, Plan, is_short
from birkhoff.codec.lattice import LatticeTensor, combine
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import feedback
from birkhoff.codec.output.encode import Form, nominal_step, refined
from birkhoff.codec.output.hessian import Hessian, damped
from birkhoff.codec.output.rows import factor_of
from birkhoff.codec.profiles import TARGET_DB_RANGE
from birkhoff.codec.tensor import LEAST_PATH
from birkhoff.codec.trajectory import HIGH

_VALUES, _LEAST_ROWS = 1 << 14, 8
"""Number of weights, in whole rows, on which strides are compared, and the least number of rows."""

_SHARES = 1.0, 0.8, 0.62, 0.5
"""Strides to try, the coarsest first: the longest up to each of these shares of the nominal step."""

_WINDOW = 1 / 8
"""Width, in strides, on each side of a threshold, over which the density of values is measured."""

_SLACK = 1e-6
"""Relative tolerance of steps, which are stored as float32."""

_FARTHEST = 1 << 12
"""Larger whole numbers are counted as one symbol."""

_PATHS_FROM = 2.0
"""Bits of single nodes below which paths save little and take longest to search."""

_MILD = 1.1
"""Highest output error of the base's weights, relative to the direct form's, at which the weights may follow the base's
paths with short detours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A way to round, and what it costs and keeps on a few rows."""

    times: int
    stride: int
    step: float
    """The step of the sum."""
    bits: float = math.inf
    response: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """A matrix, its base, and what is needed to round their difference."""

    weight: Tensor
    """[R, K]."""
    base: LatticeTensor
    decoded: Tensor
    """The base's weights, [R, K]."""
    single: float
    """The nominal step of single nodes."""
    hessian: Hessian
    factor: feedback.Factor
    """The factor of the columns' Hessian."""

    def quantise(self, values_RK: Tensor, step: float, *, path: bool = False) -> LatticeTensor:
        """Quantise values of the matrix's shape with all the feedback there is."""
        lanes = feedback.lanes_of(*self.weight.shape) if path else 0
        rows = factor_of(self.hessian, values_RK.device, lanes)
        return feedback.quantise(values_RK, step, self.factor, rows, path=path)

    def rest(self, trial: _Trial) -> Tensor:
        """Return the values to round, float32: the weights less the base's, which a finer step scales."""
        scale = trial.times * trial.step / self.base.step
        held_RK = self.decoded if by_weights.is_one(scale) else self.decoded * scale
        return self.weight.to(torch.float32) - held_RK

    def rows(self, rows: Tensor) -> "_Problem":
        """Return the problem for some rows only. `base` stays whole."""
        return replace(self, weight=self.weight[rows], decoded=self.decoded[rows])


def find(
    weight_RK: Tensor,
    base: LatticeTensor,
    target_db: float,
    hessian: Hessian | None,
    *,
    path: bool,
    base_path: int = 0,
) -> Difference | None:
    """Find the difference of a matrix to its base at a nominal target. Return None if the direct form is better.

    Args:
        weight_RK: Real and finite, of any float dtype, on any device.
        base: A matrix of the same shape, on the same device.
        hessian: Of the outputs, on that device; None without error feedback.
        path: Allow paths of the trellis.
        base_path: The kind of the paths that the base's coordinates are on, 0 for none.

    Raises:
        TensorError: The Hessian is not valid.
    """
    single = nominal_step(weight_RK, target_db)
    if hessian is None:
        return _by_weights(weight_RK, base, single, path=path, base_path=base_path)
    problem = _Problem(
        weight=weight_RK,
        base=base,
        decoded=base.decode(),
        single=single,
        hessian=hessian,
        factor=feedback.factorise(hessian.columns).to(weight_RK.device),
    )
    direct, trials, mild = _tried(problem)
    # The standard error: this many values fall into the windows if the response is 1.
    known = 1 / math.sqrt(2 * _WINDOW * min(weight_RK.numel(), _VALUES))
    least = LEAST_RESPONSE * min(1.0, direct.response) - known
    chosen = next((trial for trial in trials if trial.response >= least), None)
    path = path and weight_RK.numel() >= LEAST_PATH
    found: list[tuple[float, Difference]] = []
    if path and mild and base_path == feedback.DOWN:
        found += _followed(problem)
    if chosen is not None and chosen.bits <= direct.bits + by_weights.LIKE:
        found += _nodes(problem, chosen)
        if path and chosen.bits >= _PATHS_FROM:
            found += _paths(problem)
    found = [(bits, one) for bits, one in found if is_short(one.sum, base) and math.isfinite(one.error.error)]
    if not found:
        return None
    best = min(found, key=lambda one: one[0])[1]
    direct_bits = direct.bits - (by_weights.PATH_BITS if path else 0.0)
    return replace(best, direct_bits=direct_bits)


def _by_weights(
    weight_RK: Tensor, base: LatticeTensor, single: float, *, path: bool, base_path: int
) -> Difference | None:
    """Meet the error that rounding at the nominal step makes, because without a Hessian all outputs count alike."""
    plain = lattice.quantise(weight_RK, single)
    reached = fidelity(weight_RK, plain.decode(weight_RK.dtype), exact=True).sqnr_db
    low, high = TARGET_DB_RANGE
    if not low <= reached <= high:
        return None
    return by_weights.find(weight_RK, base, reached, path=path, base_path=base_path, longest=single)


def _strides(base: LatticeTensor, longest: float) -> Iterator[_Trial]:
    """Yield strides up to `longest` on lattices that the base's divides; for each q the coarsest first."""
    size = torch.maximum(*(plane.to(torch.int16).abs() for plane in (base.i, base.j)))
    for times in range(1, MAX_TIMES + 1):
        if times > 1 and float((size > HIGH // times).float().mean()) > MOST_OUTSIDE:
            break  # too many coordinates of the sum would be escapes
        step = base.step / times
        for stride in range(min(MAX_STRIDE, math.floor(longest / (FINER * step))), 0, -1):
            if math.gcd(times, stride) == 1:
                yield _Trial(times=times, stride=stride, step=by_weights.as_stored(min(step, longest / stride)))


def _longest(base: LatticeTensor, longest: float, shares: Sequence[float]) -> list[_Trial]:
    """Return the longest stride up to each of some shares of `longest`, without repeats."""
    found = sorted(_strides(base, longest), key=lambda trial: (-trial.stride * trial.step, trial.times))
    limits = [share * longest * (1 + _SLACK) for share in shares]
    picked = (next((trial for trial in found if trial.stride * trial.step <= limit), None) for limit in limits)
    return list(dict.fromkeys(trial for trial in picked if trial is not None))


def _tried(problem: _Problem) -> tuple[_Trial, Sequence[_Trial], bool]:
    """Round a few rows in each way.

    Return the trial of the direct form, the trials of the strides, and whether the base's weights give the outputs
    nearly as small an error as the direct form does.
    """
    count = min(len(problem.weight), max(_LEAST_ROWS, _VALUES // problem.weight.shape[1]))
    rows = torch.linspace(0, len(problem.weight) - 1, count).round().long().to(problem.weight.device)
    some, single, factor = problem.rows(rows), problem.single, problem.factor
    weight = some.weight.to(torch.float32)
    trials = _longest(problem.base, single, _SHARES)
    units = [weight / single]
    units += [some.rest(trial) / (trial.stride * trial.step) for trial in trials]
    nodes_KR, values_KR = feedback.rounded(torch.cat(units), factor)
    looked = [
        (_entropy(nodes), _response(values))
        for nodes, values in zip(nodes_KR.split(len(rows), 1), values_KR.split(len(rows), 1), strict=True)
    ]
    lost = (values_KR - nodes_KR)[:, : len(rows)] / factor.upper.diagonal()[:, None]
    error = float(lost.square().sum(dtype=torch.float64)) * single**2
    damped_KK = damped(problem.hessian.columns, feedback.DAMPING).float().to(weight.device)
    rest = weight - some.decoded
    mild = float(((rest @ damped_KK) * rest).sum(dtype=torch.float64)) < _MILD * error
    made = [
        _Trial(times=trial.times, stride=trial.stride, step=trial.step, bits=bits, response=response)
        for trial, (bits, response) in zip((_Trial(times=1, stride=1, step=single), *trials), looked, strict=True)
    ]
    return made[0], made[1:], mild


def _entropy(nodes: Tensor) -> float:
    """Return the entropy of whole numbers, in bits per weight."""
    symbols = nodes.reshape(-1).clamp(-_FARTHEST, _FARTHEST).to(torch.int64) + _FARTHEST
    shares = torch.bincount(symbols).double() / nodes.numel()
    return -float(torch.special.xlogy(shares, shares).sum()) / math.log(2)


def _response(values: Tensor) -> float:
    """Return the mean slope of rounding these values to whole numbers."""
    near = (values - values.floor() - 0.5).abs() < _WINDOW
    return float(near.double().mean()) / (2 * _WINDOW)


_Found = Iterator[tuple[float, Difference]]
"""Differences, each after the bits that it takes at an output error of 1."""


def _difference(problem: _Problem, trial: _Trial, form: Form, follows: int = 0) -> tuple[float, Difference]:
    code, weight_RK = form.code, problem.weight
    whole = combine(problem.base, code, times=trial.times, stride=trial.stride, step=trial.step)
    plan = Plan(times=trial.times, stride=trial.stride, dead=0.0, path=form.kind, bits=trial.bits, follows=follows)
    error = fidelity(weight_RK, whole.decode(weight_RK.dtype), exact=True)
    return form.bits_at_equal_error, Difference(plan=plan, code=code, sum=whole, error=error, direct_bits=math.inf)


def _nodes(problem: _Problem, trial: _Trial) -> _Found:
    """Yield the difference in single nodes."""
    rest = problem.rest(trial)
    code = problem.quantise(rest, by_weights.as_stored(trial.stride * trial.step))
    nodes = Form(code=code, kind=0, error=problem.hessian.error(rest, code))
    yield _difference(problem, trial, refined(rest, nodes, problem.hessian, problem.factor))


def _paths(problem: _Problem) -> _Found:
    """Yield the difference in paths down the columns."""
    longest = by_weights.as_stored(problem.single * feedback.path_step(*problem.weight.shape))
    for trial in _longest(problem.base, longest, (1.0,)):
        rest = problem.rest(trial)
        code = problem.quantise(rest, by_weights.as_stored(trial.stride * trial.step), path=True)
        form = Form(code=code, kind=feedback.DOWN, error=problem.hessian.error(rest, code))
        yield _difference(problem, trial, form)


def _followed(problem: _Problem) -> _Found:
    """Yield the weights' own paths at the base's step, as detours from the base's paths."""
    weight_RK, base = problem.weight, problem.base
    longest = problem.single * feedback.path_step(*weight_RK.shape)
    step = by_weights.as_stored(min(base.step, longest))
    if step < FINER * base.step:
        return
    whole = problem.quantise(weight_RK, step, path=True)
    code = combine(base, whole, times=-1, stride=1, step=step)
    form = Form(code=code, kind=0, error=problem.hessian.error(weight_RK, whole))
    yield _difference(problem, _Trial(times=1, stride=1, step=step), form, follows=feedback.DOWN)
