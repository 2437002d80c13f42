"""The registered ops `birkhoff::int8_linear` and `birkhoff::int8_weight`: HyperLinear on int8 tensor cores.

y = x W^T + b, with x rounded to int8 token by token and W on the trajectory: see `int8.triton` for the arithmetic. The
gradient for x and b is that of the decoded weight; rounding counts as the identity (straight through).

Reference: `birkhoff.codec.reference.int8_linear`.

Shapes: M = tokens, N = out features, K = in features, W = columns of the plane, X = columns that repeat another, E =
escaped weights.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from birkhoff.codec import reference
from birkhoff.codec.trajectory import theta_from_coordinates
from birkhoff.kernels.decode.op import TRITON_DTYPES
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.linear import transforms
from birkhoff.kernels.linear.op import (
    Call,
    as_matrix,
    check_rest,
    dense_linear,
    dense_weight,
    direct_call,
    is_watched,
    linear_flops,
)
from birkhoff.kernels.runtime.device import HAS_TRITON
from birkhoff.kernels.runtime.errors import KernelError

if HAS_TRITON:
    from birkhoff.kernels.int8.launch import Run, run_for
    from birkhoff.kernels.linear.launch import form_of

MOST_COLUMNS = 1 << 17
"""Columns up to which a sum of products of bytes, each at most 127 * 128, fits int32."""

_EXACT = 1024
"""Columns up to which that sum is exact in float32."""

_CODE = "Tensor plane, Tensor extra, Tensor step, Tensor escape_index, Tensor escape_value"

Code = tuple[Tensor, ...]
"""plane, extra, step, escape_index, escape_value."""

torch.library.define("birkhoff::int8_weight", f"({_CODE}, int columns, ScalarType dtype) -> Tensor")
torch.library.define("birkhoff::int8_linear", f"(Tensor x, {_CODE}, Tensor? bias) -> Tensor")


def int8_weight(code: Code, columns: int, dtype: torch.dtype) -> Tensor:
    """Return weights [N, K] in `dtype`, escapes included, with the same bits as `dense_weight` of the coordinates."""
    weight: Tensor = torch.ops.birkhoff.int8_weight.default(*code, columns, dtype)
    return weight


def int8_linear(x: Tensor, code: Code, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, [..., N] for x [..., K], in the dtype of x. Float64 is computed in float32.

    Args:
        x: [..., K], of any float dtype.
        code: plane and extra, int8 [N, W] and int32 [X], `reference.plane_of` the weight; step, float32 [], in the
            unit of the weight; escape_index and escape_value, int64 and float32 [E], the decoded values at row*K +
            column.
        bias: [N] or None.

    Raises:
        KernelError: x does not have the plane's columns, or there are more than `MOST_COLUMNS`.
    """
    if torch.compiler.is_compiling() or is_watched(x, code[0], bias):
        return watched_int8_linear(x, code, bias)
    plane, extra, step, escape_index, escape_value = code
    return direct_int8_linear(x, plane, extra, step, escape_index, escape_value, bias)


def watched_int8_linear(x: Tensor, code: Code, bias: Tensor | None) -> Tensor:
    """Run `int8_linear` by the registered op, or by its form for transforms while one is active."""
    if not torch.compiler.is_compiling() and transforms.is_transformed():
        return transforms.linear(_LAYER, x, code, bias)
    y: Tensor = torch.ops.birkhoff.int8_linear.default(x, *code, bias)
    return y


def direct_int8_linear(
    x: Tensor,
    plane: Tensor,
    extra: Tensor,
    step: Tensor,
    _escape_index: Tensor,
    _escape_value: Tensor,
    bias: Tensor | None,
    form: tuple[object, ...] | None = None,
) -> Tensor:
    """Run `int8_linear` past the dispatcher, with its arguments in a row, for calls that nothing watches.

    `form` is the `code_form` of plane, step and extra, from callers that already have it. The plane holds the escapes
    too.
    """
    return direct_call(_settle, x, plane, step, extra, extra, bias, form)


def _check(x: Tensor, plane: Tensor, extra: Tensor) -> None:
    width, extras = plane.shape[1], extra.shape[0]
    if x.dim() == 0 or reference.plane_columns(x.shape[-1], extras) != width or not x.is_floating_point():
        raise KernelError(
            f"int8_linear with a plane of {width} columns ({extras} of them repeated) expects floats [..., K] of "
            f"{width - extras - 15} to {width - extras} columns, got {x.dtype} {list(x.shape)}"
        )
    if width > MOST_COLUMNS:
        raise KernelError(f"int8_linear sums up to {MOST_COLUMNS} columns in int32, got {width}; use HyperLinear")


def _settle(x: Tensor, plane: Tensor, step: Tensor, extra: Tensor, bias: Tensor | None) -> Call:
    """Check the arguments and choose how to compute all calls of this form."""
    _check(x, plane, extra)
    check_rest(x, {"plane": plane, "extra": extra, "step": step}, plane.shape[0], bias)
    if x.dtype not in TRITON_DTYPES or not x.numel() or not plane.numel() or not triton_serves(x.device):
        return _eager
    form = form_of(as_matrix(x), plane.shape[0], bias)
    run = run_for(form, plane.shape[1], extra.shape[0], aligned=plane.data_ptr() % 16 == 0)
    return partial(_prepared, run, (*x.shape[:-1], plane.shape[0]))


def _prepared(
    run: "Run",
    shape: tuple[int, ...],
    x: Tensor,
    plane: Tensor,
    step: Tensor,
    extra: Tensor,
    _extra: Tensor,
    bias: Tensor | None,
) -> Tensor:
    if not x.is_contiguous():
        x = as_matrix(x)
    y = x.new_empty(shape)
    run(x, plane, y, step, step if bias is None else bias, extra)
    return y


def _eager(x: Tensor, plane: Tensor, step: Tensor, extra: Tensor, _extra: Tensor, bias: Tensor | None) -> Tensor:
    multiply = _byte_product if x.device.type == "cpu" else reference.exact_product
    y_MN = reference.int8_linear(x.reshape(-1, x.shape[-1]), plane, extra, step, bias, multiply=multiply)
    return y_MN.view(*x.shape[:-1], plane.shape[0])


def _byte_product(q_MW: Tensor, plane_NW: Tensor) -> Tensor:
    """Compute `exact_product` on a CPU: by its instructions for bytes if torch gets them right, else in float32."""
    if not q_MW.numel() or not plane_NW.numel():
        return q_MW.new_zeros((q_MW.shape[0], plane_NW.shape[0]), dtype=torch.int32)
    if _int_mm_is_exact():
        return torch._int_mm(q_MW, plane_NW.T)
    total = q_MW.new_zeros((q_MW.shape[0], plane_NW.shape[0]), dtype=torch.int32)
    for start in range(0, q_MW.shape[1], _EXACT):
        part = slice(start, start + _EXACT)
        total += (q_MW[:, part].float() @ plane_NW[:, part].float().T).to(torch.int32)
    return total


@cache
def _int_mm_is_exact() -> bool:
    """Return whether torch multiplies even the greatest bytes exactly on this CPU. Older instructions saturate."""
    q = torch.full((32, 256), 127, dtype=torch.int8)
    plane = torch.full((32, 256), -128, dtype=torch.int8)
    q[1::2], plane[1::2] = -127, 127
    try:
        return torch.equal(torch._int_mm(q, plane.T).double(), reference.exact_product(q, plane))
    except (AttributeError, RuntimeError):
        return False


def _int8_weight(
    plane: Tensor,
    _extra: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    theta = theta_from_coordinates(*reference.coordinates_of(plane, columns))
    return dense_weight(theta, step, escape_index, escape_value, columns, dtype)


def _int8_weight_fake(plane: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return plane.new_empty((plane.shape[0], columns), dtype=dtype)


def _int8_linear_fake(x: Tensor, plane: Tensor, extra: Tensor, *_: Any) -> Tensor:
    _check(x, plane, extra)
    return x.new_empty((*x.shape[:-1], plane.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *code, bias = inputs
    ctx.save_for_backward(*code)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    code: Code = ctx.saved_tensors

    def weight() -> Tensor:
        return int8_weight(code, ctx.columns, grad.dtype)

    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[6]
    grad_x, grad_bias = transforms.gradients(grad, needed, weight, ctx.bias_dtype)
    return grad_x, *[None] * 5, grad_bias


def _flops(x_shape: tuple[int, ...], plane_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return linear_flops(x_shape, plane_shape[0])


def _tangent(x: Tensor, code: Code, bias: Tensor | None) -> Tensor:
    return dense_linear(x, int8_weight(code, x.shape[-1], x.dtype), bias)


_LAYER = transforms.Layer(
    product=lambda x, code, bias: torch.ops.birkhoff.int8_linear.default(x, *code, bias),
    transformed=int8_linear,
    weight=int8_weight,
    tangent=_tangent,
)

torch.library.impl("birkhoff::int8_weight", "default", _int8_weight)
torch.library.register_fake("birkhoff::int8_weight", _int8_weight_fake)
torch.library.impl("birkhoff::int8_linear", "default", direct_int8_linear)
torch.library.register_fake("birkhoff::int8_linear", _int8_linear_fake)
torch.library.register_autograd("birkhoff::int8_linear", _backward, setup_context=_setup)
register_flop_formula(torch.ops.birkhoff.int8_linear)(_flops)
