"""The registered ops `birkhoff::hyperlinear` and `birkhoff::dense_weight`: what `torch.compile` and export see.

y = x W^T + b with W on the trajectory. Each op has a shape function, an eager reference for every device, a Triton
implementation, and hyperlinear a gradient for x and b (never for the compressed weight).

Shapes: M = tokens, N = out features, K = in features, P = pairs a row, E = escaped weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels import reference, runtime
from birkhoff.kernels.decode import TRITON_DTYPES, decode_theta
from birkhoff.kernels.errors import KernelError

if runtime.HAS_TRITON:
    from birkhoff.kernels import linear_triton
    from birkhoff.kernels.launch import fused_kernel


# Defined and implemented one by one: `torch.library.custom_op` wraps each call in checks that cost more than a launch.
torch.library.define(
    "birkhoff::dense_weight",
    "(Tensor theta, Tensor step, Tensor escape_index, Tensor escape_value, int columns, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "birkhoff::hyperlinear",
    "(Tensor x, Tensor theta, Tensor step, Tensor escape_index, Tensor escape_value, Tensor? bias) -> Tensor",
)


def dense_weight(
    theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """Decoded weights [N, K] in `dtype`, escapes included; the arguments are those of `hyperlinear`."""
    weight: Tensor = torch.ops.birkhoff.dense_weight.default(theta, step, escape_index, escape_value, columns, dtype)
    return weight


def hyperlinear(
    x: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    """x W^T + b.

    Args:
        x: [..., K], any float dtype, which is the dtype computed in and returned.
        theta: uint16 [N, P] step numbers; 0x8080 where a pair is escaped.
        step: float32 [], in the weights' unit.
        escape_index: int64 [E], row*K + column of escaped weights, increasing.
        escape_value: float32 [E], the weights there.
        bias: [N] or None.

    Returns:
        [..., N].

    Raises:
        KernelError: x has not the columns that theta has.
    """
    y: Tensor = torch.ops.birkhoff.hyperlinear.default(x, theta, step, escape_index, escape_value, bias)
    return y


def _dense_weight(
    theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    return reference.put_escapes(decode_theta(theta, step, columns, dtype), escape_index, escape_value)


def _dense_weight_fake(theta: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return theta.new_empty(theta.shape[0], columns, dtype=dtype)


def _hyperlinear(
    x: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    _check(x, theta)
    x_MK = x.reshape(-1, x.shape[-1])
    if x.dtype in TRITON_DTYPES and x_MK.numel() and runtime.triton_serves(x.device):
        if x_MK.stride(1) != 1 or x_MK.stride(0) < x_MK.shape[1]:
            x_MK = x_MK.contiguous()
        y_MN = _planned(x_MK, theta, step, escape_index, escape_value, bias)
    else:
        y_MN = _eager(x_MK, theta, step, escape_index, escape_value, bias)
    return y_MN.view(*x.shape[:-1], theta.shape[0])


def _hyperlinear_fake(x: Tensor, theta: Tensor, *_: Any) -> Tensor:
    _check(x, theta)
    return x.new_empty(*x.shape[:-1], theta.shape[0])


def _check(x: Tensor, theta: Tensor) -> None:
    if x.dim() == 0 or pairs_per_row(x.shape[-1]) != theta.shape[1] or not x.is_floating_point():
        raise KernelError(
            f"hyperlinear with theta [N, {theta.shape[1]}] takes floats [..., {2 * theta.shape[1]}] "
            f"(or one less), got {x.dtype} {list(x.shape)}"
        )


def _planned(
    x_MK: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    fused = fused_kernel(x_MK, theta.shape[0], escape_index.numel())
    if fused is None:
        return _eager(x_MK, theta, step, escape_index, escape_value, bias)
    y_MN = fused(x_MK, theta, step, bias)
    if escape_index.numel():
        linear_triton.add_escapes(y_MN, x_MK, escape_index, escape_value)
    return y_MN


def _eager(
    x_MK: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    weight_NK = _dense_weight(theta, step, escape_index, escape_value, x_MK.shape[1], x_MK.dtype)
    bias = None if bias is None else bias.to(x_MK.dtype)
    if torch.is_autocast_enabled(x_MK.device.type):
        with torch.autocast(x_MK.device.type, enabled=False):  # the op computes in the dtype it was given
            return functional.linear(x_MK, weight_NK, bias)
    return functional.linear(x_MK, weight_NK, bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, theta, step, escape_index, escape_value, bias = inputs
    ctx.save_for_backward(theta, step, escape_index, escape_value)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    theta, step, escape_index, escape_value = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dense_weight(theta, step, escape_index, escape_value, ctx.columns, grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias


torch.library.impl("birkhoff::dense_weight", "default", _dense_weight)
torch.library.register_fake("birkhoff::dense_weight", _dense_weight_fake)
torch.library.impl("birkhoff::hyperlinear", "default", _hyperlinear)
torch.library.register_fake("birkhoff::hyperlinear", _hyperlinear_fake)
torch.library.register_autograd("birkhoff::hyperlinear", _backward, setup_context=_setup)
