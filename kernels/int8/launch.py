"""Turn plans into launches of the int8 product. A trial run shows whether the Gluon kernel works on a device.

Shapes: M = tokens, N = out features, K = in features, W = columns of the plane, X = those that repeat another.
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from birkhoff.codec import reference
from birkhoff.kernels.int8 import fused as int8_fused
from birkhoff.kernels.int8 import triton as int8_triton
from birkhoff.kernels.int8.plan import by_rule, int8_hopper
from birkhoff.kernels.int8.triton import Product
from birkhoff.kernels.int8.tuned_h200 import PLANS as H200
from birkhoff.kernels.linear import tuned
from birkhoff.kernels.linear.plan import Plan, Problem
from birkhoff.kernels.runtime.prepared import Form, Prepared

_log = logging.getLogger("birkhoff.kernels")

SHIPPED: dict[str, tuned.Table] = {"NVIDIA H200": H200}
"""Measured plans by the name of the GPU."""


Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Writes y from (x [M, K], plane [N, W], y [M, N], step [], bias [N], extra [X]). Without a bias, any tensor takes its
place."""


def run_for(form: Form, width: int, extras: int, *, aligned: bool) -> Run:
    """Return the launch for a form and planes of `width` columns. `aligned` planes begin at multiples of 16 bytes."""
    problem = Problem(
        tokens=form.tokens, rows=form.rows, columns=form.columns, dtype=form.dtype, aligned=aligned, int8=True
    )
    return prepare(plan_for(problem, form.device), form, width, extras)


@lru_cache(1 << 12)
def prepare(chosen: Plan, form: Form, width: int, extras: int) -> Run:
    """Return the launch of a plan for a form and planes of `width` columns, `extras` of which repeat another."""
    if chosen.path == "int8_fused":
        return int8_fused.prepare(
            form,
            width,
            extras,
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            block_p=chosen.block_k,
            warps=chosen.warps,
            stages=chosen.stages,
        )
    quantise = int8_triton.prepare_quantise(form, extras)
    return partial(_quantise_and_multiply, quantise, product(chosen, form, width), form.tokens)


def _quantise_and_multiply(
    quantise: Prepared,
    multiply: Product,
    tokens: int,
    x: Tensor,
    plane: Tensor,
    y: Tensor,
    step: Tensor,
    bias: Tensor,
    extra: Tensor,
) -> None:
    q = plane.new_empty((tokens, plane.shape[1]))
    scale = step.new_empty((tokens,))
    quantise(x, q, scale, extra)
    multiply(q, plane, y, scale, step, bias)


@cache
def plan_for(problem: Problem, device: torch.device) -> Plan:
    """Return the plan for a problem on a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernels = kernels_of(device)
    return tuned.measured(problem, name, kernels, SHIPPED.get(name, {})) or by_rule(problem, kernels)


def product(chosen: Plan, form: Form, width: int) -> Product:
    """Return the kernel of a plan for quantised tokens and planes of `width` columns."""
    if chosen.path == "int8_hopper":
        from birkhoff.kernels.int8 import hopper

        tile = chosen.block_m, chosen.block_n, chosen.in_turn
        return hopper.prepare(form, width, tile, split=chosen.split)
    return int8_triton.prepare(
        form,
        width,
        block_m=chosen.block_m,
        block_n=chosen.block_n,
        block_k=chosen.block_k,
        warps=chosen.warps,
        stages=chosen.stages,
    )


@cache
def kernels_of(device: torch.device) -> frozenset[str]:
    """Return the Gluon kernels ("int8_hopper") that run on a device."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    trials = int8_hopper(128, 256, split=True), int8_hopper(128, 128, in_turn=True)
    return frozenset({"int8_hopper"} if hopper and all(_works(trial, device) for trial in trials) else ())


def _works(chosen: Plan, device: torch.device) -> bool:
    """Compare a plan with the reference on a small problem. If it fails, log that and return False."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q, plane = (
        torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((300, 640), (264, 640))
    )
    step = torch.tensor(0.01, dtype=torch.float32)
    expected = reference.exact_product(q, plane) * 1e-4
    form = Form(
        tokens=300, rows=264, columns=640, stride=640, dtype=torch.bfloat16, tf32=False, bias=None, device=device
    )
    try:
        run, (q, plane, step) = product(chosen, form, 640), (part.to(device) for part in (q, plane, step))
        scale = torch.full((300,), 0.01, dtype=torch.float32, device=device)
        # Run twice, because the second launch takes the short way of `prepared`.
        errors = [_error(run, q, plane, scale, step, expected) for _ in range(2)]
    except Exception as error:  # Gluon is young, and for any failure the portable kernel does the same work
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    else:
        if all(error < 5e-3 for error in errors):
            return True
        problem = f"its results are off by {errors[0]:.2g} and {errors[1]:.2g}"
    _log.warning("kernel %r is not used on %s: %s", chosen.path, device, problem)
    return False


def _error(run: Product, q: Tensor, plane: Tensor, scale: Tensor, step: Tensor, expected: Tensor) -> float:
    y = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=q.device)
    run(q, plane, y, scale, step, step)
    return float((y.cpu().double() - expected).norm() / expected.norm())
