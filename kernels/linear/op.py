"""The registered ops `birkhoff::hyperlinear` and `birkhoff::dense_weight`, as `torch.compile` and export see them.

y = x W^T + b with W on the trajectory. Each op has a shape function, an eager reference for every device and a Triton
implementation. hyperlinear also has a gradient for x and b, never for the compressed weight.

Reference: `birkhoff.codec.reference.decode`, then torch's own matrix product.

`hyperlinear` has two entry points to one implementation. Under autograd, compilers or modes, calls go through the op;
otherwise they skip the dispatcher. How to compute a call is decided once for each form of its arguments, and looked up
afterwards.

Shapes: M = tokens, N = out features, K = in features, P = pairs per row, E = escaped weights.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import has_torch_function_unary
from torch.utils.flop_counter import register_flop_formula

from birkhoff.codec import reference
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.decode.op import TRITON_DTYPES, decode_theta
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.linear import transforms
from birkhoff.kernels.runtime.device import HAS_TRITON, is_interpreting
from birkhoff.kernels.runtime.errors import KernelError

if HAS_TRITON:
    from birkhoff.kernels.decode import triton as decode_triton
    from birkhoff.kernels.linear import triton as linear_triton
    from birkhoff.kernels.linear.launch import form_of, fused_kernel
    from birkhoff.kernels.runtime.prepared import Form, Prepared, Run

Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Computes `hyperlinear` from its arguments."""

Settle = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Call]
"""From (x, the code such as theta, step, escape_index, bias), returns how calls of that form are computed."""

_MOST_CALLS = 1 << 13
_calls: dict[tuple[object, ...], Call] = {}
"""How calls of each form are computed; emptied when full."""


# Defined without `torch.library.custom_op`, which wraps each call in checks that cost more than a launch.
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
    """Return the decoded weights [N, K] in `dtype`, escapes included. The arguments are those of `hyperlinear`."""
    weight: Tensor = torch.ops.birkhoff.dense_weight.default(theta, step, escape_index, escape_value, columns, dtype)
    return weight


def hyperlinear(
    x: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    """Return x W^T + b.

    Args:
        x: [..., K], any float dtype. It is also the dtype of the computation and the result.
        theta: uint16 [N, P] step numbers; 0x8080 for an escaped pair.
        step: float32 [], in the unit of the weights.
        escape_index: int64 [E], row*K + column of escaped weights, increasing.
        escape_value: float32 [E], the weights there.
        bias: [N] or None.

    Returns:
        [..., N].

    Raises:
        KernelError: The columns of x and theta differ.
    """
    if torch.compiler.is_compiling() or is_watched(x, theta, bias):
        return watched_hyperlinear(x, theta, step, escape_index, escape_value, bias)
    return direct_hyperlinear(x, theta, step, escape_index, escape_value, bias)


def watched_hyperlinear(
    x: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute `hyperlinear` by the registered op, or by its autograd function while a transform is active."""
    if not torch.compiler.is_compiling() and transforms.is_transformed():
        return transforms.linear(_LAYER, x, (theta, step, escape_index, escape_value), bias)
    y: Tensor = torch.ops.birkhoff.hyperlinear.default(x, theta, step, escape_index, escape_value, bias)
    return y


def forget_plans() -> None:
    """Choose kernels again from now on. To be called after `tuned.save`."""
    _calls.clear()


def is_watched(x: Tensor, code: Tensor, bias: Tensor | None) -> bool:
    """Return whether the call must be an op: gradients, transforms, tracing, modes, subclasses, devices without
    memory."""
    return (
        type(x) is not Tensor
        or type(code) is not Tensor
        or not (x.is_cuda or x.is_cpu)
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or has_torch_function_unary(x)  # also true within a function mode
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _dense_weight(
    theta: Tensor, step: Tensor, escape_index: Tensor, escape_value: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    return reference.put_escapes(decode_theta(theta, step, columns, dtype), escape_index, escape_value)


def _dense_weight_fake(theta: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return theta.new_empty(theta.shape[0], columns, dtype=dtype)


def direct_hyperlinear(
    x: Tensor,
    theta: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bias: Tensor | None,
    form: tuple[object, ...] | None = None,
) -> Tensor:
    """Compute `hyperlinear` without the dispatcher, for calls that are not watched, and for the op itself.

    `form` is the `code_form` of theta, step and escape_index, if the caller has it.
    """
    return direct_call(_settle, x, theta, step, escape_index, escape_value, bias, form)


def direct_call(
    settle: Settle,
    x: Tensor,
    code: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bias: Tensor | None,
    form: tuple[object, ...] | None,
) -> Tensor:
    """Compute a linear layer as `settle` decides, once for each form of its arguments."""
    if form is None:
        form = code_form(code, step, escape_index)
    key = (
        settle, x.shape, x.dtype, x.get_device(), form,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        x.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32, is_interpreting(),
    )  # fmt: skip
    if form[0] and x.is_contiguous() and x.data_ptr() % 16 == 0 and (bias is None or bias.is_contiguous()):
        call = _calls.get(key) or _keep(key, settle(x, code, step, escape_index, bias))
    else:
        code, bias = code.contiguous(), None if bias is None else bias.contiguous()
        call = settle(x, code, step, escape_index, bias)
    return call(x, code, step, escape_index, escape_value, bias)


def code_form(theta: Tensor, step: Tensor, escape_index: Tensor) -> tuple[object, ...]:
    """Return what a call depends on in these tensors except their values and addresses. The first item says whether
    theta is regular."""
    return (
        theta.is_contiguous() and theta.data_ptr() % 16 == 0,
        *(theta.shape, theta.dtype, theta.get_device()),
        *(step.dtype, step.get_device()),
        *(escape_index.shape, escape_index.get_device()),
    )


def _keep(key: tuple[object, ...], call: Call) -> Call:
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[key] = call
    return call


def _hyperlinear_fake(x: Tensor, theta: Tensor, *_: Any) -> Tensor:
    _check(x, theta)
    return x.new_empty(*x.shape[:-1], theta.shape[0])


def _check(x: Tensor, theta: Tensor) -> None:
    if x.dim() == 0 or pairs_per_row(x.shape[-1]) != theta.shape[1] or not x.is_floating_point():
        raise KernelError(
            f"hyperlinear with theta [N, {theta.shape[1]}] takes floats [..., {2 * theta.shape[1]}] "
            f"(or one less), got {x.dtype} {list(x.shape)}"
        )


def _settle(x: Tensor, theta: Tensor, step: Tensor, escape_index: Tensor, bias: Tensor | None) -> Call:
    """Check the arguments and choose how calls of their form are computed."""
    _check(x, theta)
    check_rest(x, {"theta": theta, "step": step, "escape_index": escape_index}, theta.shape[0], bias)
    if x.dtype not in TRITON_DTYPES or not x.numel() or not theta.numel() or not triton_serves(x.device):
        return partial(_decode_first, decode_theta)
    x_MK = as_matrix(x)
    form = form_of(x_MK, theta.shape[0], bias)
    pointers = x_MK.data_ptr() | theta.data_ptr()
    aligned = (pointers | form.stride * x.element_size()) % 16 == 0
    run = fused_kernel(form, escape_index.numel(), aligned=aligned)
    if run is None:
        decode = decode_triton.prepare(form.rows, form.columns, form.dtype, form.device)
        return partial(_decode_first, partial(_decoded, decode))
    return partial(_fused, run, form, (*x.shape[:-1], theta.shape[0]))


def check_rest(x: Tensor, code: Mapping[str, Tensor], rows: int, bias: Tensor | None) -> None:
    """Raise KernelError if tensors of a layer are on another device than x, or the bias does not have one value per
    row."""
    rest = {**code, "bias": bias}
    elsewhere = [name for name, tensor in rest.items() if tensor is not None and tensor.device != x.device]
    if elsewhere:
        raise KernelError(f"hyperlinear got x on {x.device} but {', '.join(elsewhere)} elsewhere; move the layer there")
    if bias is not None and bias.shape != (rows,):
        raise KernelError(f"hyperlinear with {rows} rows takes a bias of as many, got {list(bias.shape)}")


def as_matrix(x: Tensor) -> Tensor:
    """Return [..., K] as [M, K] with contiguous rows, copied if necessary."""
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.stride(1) != 1 or x_MK.stride(0) < x_MK.shape[1]:
        x_MK = x_MK.contiguous()
    return x_MK


def _fused(
    run: "Run",
    form: "Form",
    shape: tuple[int, ...],
    x: Tensor,
    theta: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bias: Tensor | None,
) -> Tensor:
    if not x.is_contiguous():
        x = as_matrix(x)
    y = x.new_empty(shape)
    run(x, theta, step, bias, y)
    if escape_index.shape[0]:
        linear_triton.add_escapes(y, x, form, escape_index, escape_value)
    return y


def _decoded(decode: "Prepared", theta: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Decode as `decode_theta` does, with its choices made."""
    weight_NK = theta.new_empty((theta.shape[0], columns), dtype=dtype)
    decode(theta, theta, step, weight_NK)
    return weight_NK


def _decode_first(
    decode: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
    x: Tensor,
    theta: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bias: Tensor | None,
) -> Tensor:
    weight_NK = decode(theta, step, x.shape[-1], x.dtype)
    if escape_index.shape[0]:
        weight_NK = reference.put_escapes(weight_NK, escape_index, escape_value)
    return dense_linear(x, weight_NK, bias)


def dense_linear(x: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, [..., K] to [..., N], in the dtype of x and the weight. The bias may have another dtype."""
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    # For a matrix, cuBLAS adds the bias; for more dimensions, another kernel does.
    x_MK = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # the op computes in the dtype of its input
            y_MN = functional.linear(x_MK, weight_NK, bias)
    else:
        y_MN = functional.linear(x_MK, weight_NK, bias)
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], weight_NK.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, theta, step, escape_index, escape_value, bias = inputs
    ctx.save_for_backward(theta, step, escape_index, escape_value)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    theta, step, escape_index, escape_value = ctx.saved_tensors

    def weight() -> Tensor:
        return dense_weight(theta, step, escape_index, escape_value, ctx.columns, grad.dtype)

    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    grad_x, grad_bias = transforms.gradients(grad, needed, weight, ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias


def linear_flops(x_shape: tuple[int, ...], rows: int) -> int:
    """Return the multiplications and additions of x [..., K] with a weight of `rows` rows, as torch counts them."""
    return 2 * math.prod(x_shape) * rows


def _flops(x_shape: tuple[int, ...], theta_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return linear_flops(x_shape, theta_shape[0])


def _transformed(x: Tensor, code: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    theta, step, escape_index, escape_value = code
    return hyperlinear(x, theta, step, escape_index, escape_value, bias)


_LAYER = transforms.Layer(
    product=lambda x, code, bias: torch.ops.birkhoff.hyperlinear.default(x, *code, bias),
    transformed=_transformed,
    weight=lambda code, columns, dtype: torch.ops.birkhoff.dense_weight.default(*code, columns, dtype),
)

torch.library.impl("birkhoff::dense_weight", "default", _dense_weight)
torch.library.register_fake("birkhoff::dense_weight", _dense_weight_fake)
torch.library.impl("birkhoff::hyperlinear", "default", direct_hyperlinear)
torch.library.register_fake("birkhoff::hyperlinear", _hyperlinear_fake)
torch.library.register_autograd("birkhoff::hyperlinear", _backward, setup_context=_setup)
register_flop_formula(torch.ops.birkhoff.hyperlinear)(_flops)
