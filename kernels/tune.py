"""Measure kernel plans on this machine's GPU and keep the fastest, for shapes that the shipped tables lack.

    from birkhoff.kernels.tune import tune_model
    tune_model(model, tokens=[1, 4096])

Results go to `plans.json` in the cache folder (`~/.cache/birkhoff`, or `cache` below BIRKHOFF_HOME), under the GPU's
name and the versions that made them; other GPUs and versions are tuned again. Tuning runs only on request: without it,
a first call costs one compilation.

Shapes: N = out features, K = in features, P = pairs per row.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from birkhoff.codec.pairs import pairs_per_row
from birkhoff.codec.reference import exact_product, plane_columns, quantise_tokens
from birkhoff.kernels.decode.op import decode_theta
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.int8 import launch as int8_launch
from birkhoff.kernels.int8 import plan as int8_plan
from birkhoff.kernels.linear import plan, tuned
from birkhoff.kernels.linear.launch import form_of, gpu_of, launcher
from birkhoff.kernels.linear.op import forget_plans
from birkhoff.kernels.linear.plan import Plan, Problem
from birkhoff.kernels.runtime.timing import Times, compare, copies

_log = logging.getLogger("birkhoff.kernels")

_TOLERANCE = 5e-3
"""Largest relative error of bfloat16 outputs. A plan with a larger error is not used."""


def tune_model(model: nn.Module, tokens: Sequence[int], *, seconds: float = 120) -> int:
    """Tune every shape of a model's HyperLinear and Int8HyperLinear for these numbers of tokens, for about `seconds`.

    Returns:
        How many pairs (shape, tokens) were measured. Pairs in the cache are not measured again.
    """
    layers = [m for m in model.modules() if isinstance(m, (HyperLinear, Int8HyperLinear))]
    shapes = sorted({(m.out_features, m.in_features, isinstance(m, Int8HyperLinear)) for m in layers})
    device = torch.device("cuda", torch.cuda.current_device())
    name, until, found = gpu_of(device).name, time.monotonic() + seconds, dict[str, Plan]()
    for rows, columns, int8 in shapes:
        for count in tokens:
            problem = problem_of(rows, columns, count, int8=int8)
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
    int8_launch.plan_for.cache_clear()
    forget_plans()
    return len(found)


def problem_of(rows: int, columns: int, tokens: int, *, int8: bool) -> Problem:
    """Return the problem that plans are measured for: bfloat16, aligned like rows of this length."""
    aligned = int8 or columns % 8 == 0
    return Problem(tokens=tokens, rows=rows, columns=columns, dtype=torch.bfloat16, aligned=aligned, int8=int8)


def tune(problem: Problem, device: torch.device, *, rounds: int = 5) -> tuple[Plan, dict[Plan, Times]]:
    """Return the fastest plan that computes the right product, and the times of all that do, for random weights in a
    cold cache.

    Times of int8 include the quantization of the tokens.
    """
    calls, expected = (_int8_calls if problem.int8 else _float_calls)(problem, device)
    right = {chosen: made for chosen, made in calls.items() if _is_right(made[0], expected, chosen)}
    times = compare(right, rounds)
    return min(times, key=lambda chosen: times[chosen].median), times


_Calls = dict[Plan, list[Callable[[], Tensor]]]


def _float_calls(problem: Problem, device: torch.device) -> tuple[_Calls, Tensor]:
    """Return calls of each plan, one per copy of the weight, and the expected result of the first."""
    theta = _random_bytes(problem.rows, 2 * pairs_per_row(problem.columns), device).view(torch.uint16)
    x, bias, step = _inputs(problem, device)
    dense = decode_theta(theta, step, problem.columns, problem.dtype)
    expected = functional.linear(x, dense, bias).float()
    thetas = copies(theta, most=_copies(problem))
    plans = plan.candidates(problem, gpu_of(device).kernels)
    return {chosen: [_call(chosen, x, t, step, bias) for t in thetas] for chosen in plans}, expected


def _int8_calls(problem: Problem, device: torch.device) -> tuple[_Calls, Tensor]:
    """Return the same for int8 plans."""
    plane = _random_bytes(problem.rows, plane_columns(problem.columns), device)
    plane[:, 2 * pairs_per_row(problem.columns) :] = 0
    x, bias, step = _inputs(problem, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    q, scale = quantise_tokens(x, none)
    expected = (exact_product(q, plane) * (scale * step)[:, None] + bias).float()
    planes = copies(plane, most=_copies(problem))
    plans = int8_plan.candidates(problem, int8_launch.kernels_of(device))
    form = form_of(x, problem.rows, bias)
    return {
        chosen: [
            partial(_into_new, int8_launch.prepare(chosen, form, plane.shape[1], 0), x, p, none, step, bias)
            for p in planes
        ]
        for chosen in plans
    }, expected


def _into_new(run: int8_launch.Run, x: Tensor, plane: Tensor, extra: Tensor, step: Tensor, bias: Tensor) -> Tensor:
    y = x.new_empty((x.shape[0], plane.shape[0]))
    run(x, plane, y, step, bias, extra)
    return y


def _copies(problem: Problem) -> int:
    return 8 if problem.tokens >= 2048 else 48


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [M, K], bias [N] and step []."""
    x = torch.randn(problem.tokens, problem.columns, device=device).to(problem.dtype)
    return x, torch.randn(problem.rows, device=device).to(problem.dtype), torch.tensor(0.01, device=device)


def _random_bytes(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), device=device, dtype=torch.int8)


def _call(chosen: Plan, x: Tensor, theta: Tensor, step: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return partial(launcher(chosen) or _decode_and_multiply, x, theta, step, bias)


def _decode_and_multiply(x: Tensor, theta: Tensor, step: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, decode_theta(theta, step, x.shape[1], x.dtype), bias)


def _is_right(call: Callable[[], Tensor], expected: Tensor, chosen: Plan) -> bool:
    try:
        y = call()
    except OutOfResources as lack:  # a smaller GPU than the one that these plans were chosen on
        _log.info("%s is not tried: %s", chosen, lack)
        return False
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < _TOLERANCE:
        _log.warning("%s is off by %.2g and not used", chosen, error)
    return error < _TOLERANCE
