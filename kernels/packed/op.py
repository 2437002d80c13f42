"""The packed form (`birkhoff.codec.packed`) as operators: `birkhoff::packed_weight` and `birkhoff::packed_linear`.

y = x W^T + b with W at 10 or 12 bits per pair. The weight is decoded, then multiplied. There is no fused kernel, so a
product of few tokens also costs a pass over the dense weight, which lives for one call, backward included.

Reference: `birkhoff.codec.packed.PackedTensor`.

Shapes: N = rows (out features), K = columns (in features), P = pairs per row, H = bytes of high bits per row, G =
groups per row, E = escaped weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from birkhoff.codec import reference
from birkhoff.codec.packed import GROUP, PackedTensor, high_bytes
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.decode.op import TRITON_DTYPES
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.linear import transforms
from birkhoff.kernels.linear.op import dense_linear, is_watched, linear_flops
from birkhoff.kernels.runtime.device import HAS_TRITON
from birkhoff.kernels.runtime.errors import KernelError

if HAS_TRITON:
    from birkhoff.kernels.packed import triton as decode_packed_triton

Planes = tuple[Tensor, ...]
"""low, high, scale, step, escape_index, escape_value."""

_PLANES = "Tensor low, Tensor high, Tensor scale, Tensor step, Tensor escape_index, Tensor escape_value, int bits"

torch.library.define("birkhoff::packed_weight", f"({_PLANES}, int columns, ScalarType dtype) -> Tensor")
torch.library.define("birkhoff::packed_linear", f"(Tensor x, {_PLANES}, Tensor? bias) -> Tensor")


def packed_weight(planes: Planes, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the decoded weights [N, K] in `dtype`, escapes included.

    Args:
        planes: low, high and scale, uint8 [N, P], [N, H] and [N, G]; step, float32 [] on their device; escape_index
            and escape_value, int64 and float32 [E], by row*K + column.
        bits: Per pair, 10 or 12.
        columns: K.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        KernelError: The planes do not fit together.
    """
    weight: Tensor = torch.ops.birkhoff.packed_weight.default(*planes, bits, columns, dtype)
    return weight


def packed_linear(x: Tensor, planes: Planes, bits: int, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, [..., K] to [..., N] in the dtype of x. The other arguments are those of `packed_weight`."""
    if torch.compiler.is_compiling() or is_watched(x, planes[0], bias):
        return watched_packed_linear(x, planes, bits, bias)
    return direct_packed_linear(x, *planes, bits, bias)


def watched_packed_linear(x: Tensor, planes: Planes, bits: int, bias: Tensor | None) -> Tensor:
    """Compute `packed_linear` by the registered op, or by its autograd function while a transform is active."""
    if not torch.compiler.is_compiling() and transforms.is_transformed():
        return transforms.linear(_LAYERS[bits], x, planes, bias)
    y: Tensor = torch.ops.birkhoff.packed_linear.default(x, *planes, bits, bias)
    return y


def _packed_weight(
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(low, high, scale, bits, columns)
    if dtype in TRITON_DTYPES and triton_serves(low.device):
        planes = low.contiguous(), high.contiguous(), scale.contiguous()
        weight = decode_packed_triton.decode(*planes, step, bits, columns, dtype)
        return reference.put_escapes(weight, escape_index, escape_value)
    return PackedTensor(
        bits=10 if bits == 10 else 12,
        low=low,
        high=high,
        scale=scale,
        step=float(step),
        columns=columns,
        escape_index=escape_index,
        escape_value=escape_value,
    ).decode(dtype)


def _check(low: Tensor, high: Tensor, scale: Tensor, bits: int, columns: int) -> None:
    rows, pairs = low.shape[0], pairs_per_row(columns)
    wanted = [(rows, pairs), (rows, high_bytes(pairs, bits)), (rows, -(-pairs // GROUP))]
    planes = (low, high, scale)
    if (
        bits not in (10, 12)
        or [tuple(p.shape) for p in planes] != wanted
        or any(p.dtype != torch.uint8 for p in planes)
    ):
        raise KernelError(
            f"{columns} columns at 10 or 12 bits a pair take uint8 planes {wanted}, got {bits} bits in "
            f"{[(p.dtype, list(p.shape)) for p in planes]}; pass those of codec.packed.pack"
        )


def direct_packed_linear(x: Tensor, *rest: Any) -> Tensor:
    """Compute `packed_linear` without the dispatcher, for calls that are not watched."""
    low, high, scale, step, index, value, bits, bias = rest
    return dense_linear(x, _packed_weight(low, high, scale, step, index, value, bits, x.shape[-1], x.dtype), bias)


def _packed_weight_fake(low: Tensor, *rest: Any) -> Tensor:
    columns, dtype = rest[-2:]
    return low.new_empty((low.shape[0], columns), dtype=dtype)


def _packed_linear_fake(x: Tensor, low: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], low.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *planes, bits, bias = inputs
    ctx.save_for_backward(*planes)
    ctx.bits, ctx.columns = bits, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    planes: Planes = ctx.saved_tensors

    def weight() -> Tensor:
        return packed_weight(planes, ctx.bits, ctx.columns, grad.dtype)

    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
    grad_x, grad_bias = transforms.gradients(grad, needed, weight, ctx.bias_dtype)
    return grad_x, *[None] * 7, grad_bias


def _flops(x_shape: tuple[int, ...], low_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return linear_flops(x_shape, low_shape[0])


def _layer(bits: int) -> transforms.Layer:
    return transforms.Layer(
        product=lambda x, planes, bias: torch.ops.birkhoff.packed_linear.default(x, *planes, bits, bias),
        transformed=lambda x, planes, bias: packed_linear(x, planes, bits, bias),
        weight=lambda planes, columns, dtype: packed_weight(planes, bits, columns, dtype),
    )


_LAYERS = {bits: _layer(bits) for bits in (10, 12)}

torch.library.impl("birkhoff::packed_weight", "default", _packed_weight)
torch.library.register_fake("birkhoff::packed_weight", _packed_weight_fake)
torch.library.impl("birkhoff::packed_linear", "default", direct_packed_linear)
torch.library.register_fake("birkhoff::packed_linear", _packed_linear_fake)
torch.library.register_autograd("birkhoff::packed_linear", _backward, setup_context=_setup)
register_flop_formula(torch.ops.birkhoff.packed_linear)(_flops)
