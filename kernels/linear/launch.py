"""Launch plans, and find by trial which of the Gluon kernels run on a device.

Shapes: M = tokens, N = out features, K = in features, P = pairs per row.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from birkhoff.codec import reference
from birkhoff.kernels.linear import triton as linear_triton
from birkhoff.kernels.linear import tuned
from birkhoff.kernels.linear.plan import Plan, Problem, hopper, small_m
from birkhoff.kernels.runtime.prepared import Form, Run

_log = logging.getLogger("birkhoff.kernels")

MANY_ESCAPES = 64
"""Above this number, a dense weight with the escapes costs less than adding their products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device as plans see it: its name and the Gluon kernels ("small_m", "hopper") that run on it."""

    name: str
    kernels: frozenset[str]


Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x [M, K], theta [N, P], step [], bias [N] or None) to y [M, N], without escapes."""


def fused_kernel(form: Form, escapes: int, *, aligned: bool) -> Run | None:
    """Return the fused kernel for a form, ready to run; None if the weight should be decoded first.

    `aligned`: x, theta and the rows of x begin at multiples of 16 bytes.
    """
    if escapes > MANY_ESCAPES and form.tokens > 16:
        return None
    problem = Problem(
        tokens=form.tokens, rows=form.rows, columns=form.columns, dtype=form.dtype, aligned=aligned, tf32=form.tf32
    )
    return prepare(plan_for(problem, form.device), form)


def form_of(x_MK: Tensor, rows: int, bias: Tensor | None) -> Form:
    """Return the form of inputs [M, K] to a weight of `rows` rows and its bias [N], if any."""
    (tokens, columns), dtype = x_MK.shape, x_MK.dtype
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return Form(
        tokens=tokens,
        rows=rows,
        columns=columns,
        stride=x_MK.stride(0),
        dtype=dtype,
        tf32=tf32,
        bias=None if bias is None else bias.dtype,
        device=x_MK.device,
    )


def plan_for(problem: Problem, device: torch.device) -> Plan:
    """Return the plan for a problem on a device."""
    gpu = gpu_of(device)
    return tuned.choose(problem, gpu.name, gpu.kernels)


def is_aligned(x_MK: Tensor) -> bool:
    """Return whether rows begin at multiples of 16 bytes."""
    return x_MK.stride(0) * x_MK.element_size() % 16 == 0 and x_MK.data_ptr() % 16 == 0


def launcher(chosen: Plan) -> Fused | None:
    """Return the kernel of a plan as a function of tensors; None for `decode`."""
    return None if chosen.path == "decode" else partial(_launch, chosen)


def _launch(chosen: Plan, x_MK: Tensor, theta: Tensor, step: Tensor, bias: Tensor | None) -> Tensor:
    y_MN = x_MK.new_empty((x_MK.shape[0], theta.shape[0]))
    run = prepare(chosen, form_of(x_MK, theta.shape[0], bias))
    if run is not None:
        run(x_MK, theta, step, bias, y_MN)
    return y_MN


@lru_cache(1 << 12)
def prepare(chosen: Plan, form: Form) -> Run | None:
    """Return the kernel of a plan, ready to run on a form; None for `decode`."""
    match chosen.path:
        case "hopper":
            from birkhoff.kernels.linear import hopper as linear_hopper

            return linear_hopper.prepare(form, block_m=chosen.block_m, split=chosen.split)
        case "small_m":
            from birkhoff.kernels.linear import small_m as linear_few

            return linear_few.prepare(form, block_n=chosen.block_n, warps=chosen.warps, unroll=chosen.unroll)
        case "tiles":
            return linear_triton.prepare(
                form,
                block_m=chosen.block_m,
                block_n=chosen.block_n,
                warps=chosen.warps,
                stages=chosen.stages,
                unroll=chosen.unroll,
            )
        case _:
            return None


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the device's name and kernels. A CPU (interpreted kernels) has no Gluon kernels."""
    if device.type != "cuda":
        return Gpu(name=device.type, kernels=frozenset())
    trials = {"small_m": (8, small_m(16, 8, 1))}
    if torch.cuda.get_device_capability(device)[0] == 9:
        trials["hopper"] = 300, hopper(256, split=True)
    working = frozenset(path for path, (tokens, chosen) in trials.items() if _works(chosen, tokens, device))
    return Gpu(name=torch.cuda.get_device_name(device), kernels=working)


def _works(chosen: Plan, tokens: int, device: torch.device) -> bool:
    """Run a plan on a small problem and compare with the reference. A failure is logged, and the plan not used."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    theta = torch.randint(1 << 16, (136, 320), generator=generator, dtype=torch.int32).to(torch.uint16)
    x = torch.randn(tokens, 640, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    step = torch.tensor(0.01, dtype=torch.float32)
    expected = x.double() @ reference.decode(theta, step, 640, torch.float32).double().T
    x, theta, step = x.to(device), theta.to(device), step.to(device)
    try:
        # Twice, because the second launch takes the fast path of `prepared`.
        errors = [_error(_launch(chosen, x, theta, step, None), expected) for _ in range(2)]
    except Exception as error:  # Gluon may fail in any way; other kernels do the same work
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    else:
        if all(error < 5e-3 for error in errors):
            return True
        problem = f"its results are off by {errors[0]:.2g} and {errors[1]:.2g}"
    _log.warning("kernel %r is not used on %s: %s", chosen.path, device, problem)
    return False


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected).norm() / expected.norm())
