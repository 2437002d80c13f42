"""Measure plans on the GPU at hand and keep the best, for shapes that the shipped tables do not know.

    from birkhoff.kernels.tune import tune_model
    tune_model(model, tokens=[1, 4096])

Results go to `plans.json` in the cache folder (`~/.cache/birkhoff`, or `cache` below BIRKHOFF_HOME) under the GPU's
name and the versions that made them; a new GPU or version starts anew. Nothing tunes by itself: a first call costs one
compilation, no more.

Shapes: N = out features, K = in features, P = pairs a row.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.decode.op import decode_theta
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.linear import plan, tuned
from birkhoff.kernels.linear.launch import gpu_of, launcher
from birkhoff.kernels.linear.op import forget_plans
from birkhoff.kernels.linear.plan import Plan, Problem
from birkhoff.kernels.runtime.timing import Times, compare, copies

_log = logging.getLogger("birkhoff.kernels")

_TOLERANCE = 5e-3
"""Relative error of bfloat16 outputs; a plan beyond it is not used, however fast."""


def tune_model(model: nn.Module, tokens: Sequence[int], *, seconds: float = 120) -> int:
    """Tune every HyperLinear shape of a model for these numbers of tokens, for at most about `seconds`.

    Returns:
        How many (shape, tokens) were measured; those already in the cache are not.
    """
    shapes = sorted({(m.out_features, m.in_features) for m in model.modules() if isinstance(m, HyperLinear)})
    device = torch.device("cuda", torch.cuda.current_device())
    name, until, found = gpu_of(device).name, time.monotonic() + seconds, dict[str, Plan]()
    for rows, columns in shapes:
        for count in tokens:
            problem = Problem(tokens=count, rows=rows, columns=columns, dtype=torch.bfloat16, aligned=columns % 8 == 0)
            key = tuned.key(name, problem)
            if key in found or key in tuned.user_table():
                continue
            if time.monotonic() > until:
                _log.warning("tuning stopped after %g s with shapes left: call again for the rest", seconds)
                return _save(found)
            found[key], _ = tune(replace(problem, tokens=problem.bucket), device)
    return _save(found)


def _save(found: dict[str, Plan]) -> int:
    tuned.save(found)
    forget_plans()
    return len(found)


def tune(problem: Problem, device: torch.device, *, rounds: int = 5) -> tuple[Plan, dict[Plan, Times]]:
    """The fastest plan that computes the right product, and the times of all that do; random weights, cold."""
    plans = plan.candidates(problem, gpu_of(device).kernels)
    few_calls = problem.tokens >= 2048
    theta = _random_theta(problem, device)
    thetas = copies(theta, most=8 if few_calls else 48)
    x = torch.randn(problem.tokens, problem.columns, device=device).to(problem.dtype)
    bias = torch.randn(problem.rows, device=device).to(problem.dtype)
    step = torch.tensor(0.01, device=device)
    dense = decode_theta(theta, step, problem.columns, problem.dtype)
    expected = functional.linear(x, dense, bias).float()
    right = [chosen for chosen in plans if _is_right(_call(chosen, x, theta, step, bias)(), expected, chosen)]
    times = compare({chosen: [_call(chosen, x, t, step, bias) for t in thetas] for chosen in right}, rounds)
    return min(times, key=lambda chosen: times[chosen].median), times


def _random_theta(problem: Problem, device: torch.device) -> Tensor:
    shape = problem.rows, pairs_per_row(problem.columns)
    return torch.randint(-(1 << 15), 1 << 15, shape, device=device, dtype=torch.int16).view(torch.uint16)


def _call(chosen: Plan, x: Tensor, theta: Tensor, step: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return partial(launcher(chosen) or _decode_and_multiply, x, theta, step, bias)


def _decode_and_multiply(x: Tensor, theta: Tensor, step: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, decode_theta(theta, step, x.shape[1], x.dtype), bias)


def _is_right(y: Tensor, expected: Tensor, chosen: Plan) -> bool:
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < _TOLERANCE:
        _log.warning("%s is off by %.2g and not used", chosen, error)
    return error < _TOLERANCE
