"""From a plan to a launch; which of the Gluon kernels run on a device is found by trial.

Shapes: M = tokens, N = out features, K = in features, P = pairs a row.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from birkhoff.kernels import linear_triton, reference, tuned
from birkhoff.kernels.plan import Plan, Problem, few, hopper

_log = logging.getLogger("birkhoff.kernels")

MANY_ESCAPES = 64
"""Above, a dense weight with the escapes in it costs less than adding their products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device as plans see it: its name and the Gluon kernels ("few", "hopper") that run there."""

    name: str
    kernels: frozenset[str]


Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x [M, K], theta [N, P], step [], bias [N] or None) to y [M, N], escapes left out."""


def fused_kernel(x_MK: Tensor, rows: int, escapes: int) -> Fused | None:
    """The fused kernel for inputs [M, K] and a weight of `rows` rows; None where the weight is better decoded first."""
    tokens, columns = x_MK.shape
    if escapes > MANY_ESCAPES and tokens > 16:
        return None
    tf32 = x_MK.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return _fused(tokens, rows, columns, x_MK.dtype, is_aligned(x_MK), tf32, x_MK.device)


@lru_cache(1 << 14)
def _fused(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, aligned: bool, tf32: bool, device: torch.device
) -> Fused | None:
    problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=dtype, aligned=aligned, tf32=tf32)
    return launcher(plan_for(problem, device))


def forget_plans() -> None:
    """Choose anew from now on; for after `tuned.save`."""
    _fused.cache_clear()


def plan_for(problem: Problem, device: torch.device) -> Plan:
    """The plan for a problem on a device."""
    gpu = gpu_of(device)
    return tuned.choose(problem, gpu.name, gpu.kernels)


def is_aligned(x_MK: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes."""
    return x_MK.stride(0) * x_MK.element_size() % 16 == 0 and x_MK.data_ptr() % 16 == 0


def launcher(chosen: Plan) -> Fused | None:
    """The kernel of a plan with its launch parameters; None for `decode`, which has none."""
    if chosen.path == "hopper":
        from birkhoff.kernels import linear_hopper

        return partial(linear_hopper.linear, block_m=chosen.block_m, split=chosen.split)
    if chosen.path == "few":
        from birkhoff.kernels import linear_few

        return partial(linear_few.linear, block_n=chosen.block_n, warps=chosen.warps, unroll=chosen.unroll)
    if chosen.path == "tiles":
        return partial(
            linear_triton.linear,
            block_m=chosen.block_m,
            block_n=chosen.block_n,
            warps=chosen.warps,
            stages=chosen.stages,
        )
    return None


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The device's name and kernels; for a CPU (interpreted kernels) there are no Gluon ones."""
    if device.type != "cuda":
        return Gpu(name=device.type, kernels=frozenset())
    trials = {"few": (8, few(16, 8, 1))}
    if torch.cuda.get_device_capability(device)[0] == 9:
        trials["hopper"] = 300, hopper(256, split=True)
    working = frozenset(path for path, (tokens, chosen) in trials.items() if _works(chosen, tokens, device))
    return Gpu(name=torch.cuda.get_device_name(device), kernels=working)


def _works(chosen: Plan, tokens: int, device: torch.device) -> bool:
    """Run a plan on a small problem and compare with the reference; a failure is logged and the plan not used."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    theta = torch.randint(1 << 16, (136, 320), generator=generator, dtype=torch.int32).to(torch.uint16)
    x = torch.randn(tokens, 640, generator=generator).to(torch.bfloat16)
    step = torch.tensor(0.01)
    expected = x.double() @ reference.decode(theta, step, 640, torch.float32).double().T
    try:
        kernel = launcher(chosen)
        got = kernel(x.to(device), theta.to(device), step.to(device), None).cpu().double() if kernel else expected
    except Exception as error:  # Gluon is young: whatever it is, other kernels do the same work
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    else:
        off = float((got - expected).norm() / expected.norm())
        if off < 5e-3:
            return True
        problem = f"its result is off by {off:.2g}"
    _log.warning("kernel %r is not used on %s: %s", chosen.path, device, problem)
    return False
