"""The derivatives of a linear layer with a constant weight, for the registered ops and for `torch.func`.

A registered op has gradients, but supports no transform of `torch.func` and no forward-mode AD. `linear` is the same
layer as an autograd function with a rule for each: `grad`, `jacrev`, `jacfwd`, `hessian`, `vmap`, dual tensors.

Shapes: B = vmap's dimension, N = out features, K = in features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A kind of layer as functions of its constant tensors, the code.

    `product` computes (x [..., K], code, bias [N] or None) to [..., N] as the registered op does; `transformed` does so
    under any active transforms. `weight` decodes (code, K, dtype) to [N, K]. `tangent` computes the output's tangent
    from those of x and the bias; None if `transformed` does so, as for an exactly linear layer.
    """

    product: Callable[[Tensor, tuple[Tensor, ...], Tensor | None], Tensor]
    transformed: Callable[[Tensor, tuple[Tensor, ...], Tensor | None], Tensor]
    weight: Callable[[tuple[Tensor, ...], int, torch.dtype], Tensor]
    tangent: Callable[[Tensor, tuple[Tensor, ...], Tensor | None], Tensor] | None = None


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def linear(layer: Layer, x: Tensor, code: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """Return x W^T + b, differentiable in x and b by every mode and transform."""
    y: Tensor = _Linear.apply(layer, x, bias, *code)  # type: ignore[no-untyped-call]
    return y


def gradients(
    grad: Tensor, needed: tuple[bool, bool], weight: Callable[[], Tensor], bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input and the bias, if needed, for that of the output [..., N]. `weight` returns
    [N, K]."""
    grad_x = grad @ weight() if needed[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias_dtype) if needed[1] else None
    return grad_x, grad_bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(layer: Layer, x: Tensor, bias: Tensor | None, *code: Tensor) -> Tensor:
        return layer.product(x, code, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        layer, x, bias, *code = inputs
        ctx.save_for_backward(*code)
        ctx.save_for_forward(*code)
        ctx.layer, ctx.columns, ctx.dtype, ctx.leading = layer, x.shape[-1], x.dtype, x.shape[:-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        code = ctx.saved_tensors

        def weight() -> Tensor:
            decoded: Tensor = ctx.layer.weight(code, ctx.columns, grad.dtype)
            return decoded

        return None, *gradients(grad, ctx.needs_input_grad[1:3], weight, ctx.bias_dtype), *[None] * len(code)

    @staticmethod
    def jvp(ctx: Any, _layer: None, x: Tensor | None, bias: Tensor | None, *_code: None) -> Tensor:
        """Return the tangent of the output for those of the input and the bias, of which one may be None."""
        code = ctx.saved_tensors
        if x is not None:
            moved: Tensor = (ctx.layer.tangent or ctx.layer.transformed)(x, code, bias)
            return moved
        assert bias is not None  # called only if there is a tangent
        return bias.to(ctx.dtype).expand(*ctx.leading, -1)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], layer: Layer, x: Tensor, bias: Tensor | None, *code: Tensor
    ) -> tuple[Tensor, int]:
        """Compute one product for a batch of inputs. A batch of weights is processed one by one."""
        _, x_dim, bias_dim, *code_dims = in_dims
        if any(dim is not None for dim in code_dims):
            each = [
                layer.transformed(
                    _taken(x, x_dim, index),
                    tuple(_taken(part, dim, index) for part, dim in zip(code, code_dims, strict=True)),
                    None if bias is None else _taken(bias, bias_dim, index),
                )
                for index in range(info.batch_size)
            ]
            return torch.stack(each), 0
        if x_dim is not None:
            x = x.movedim(x_dim, 0)
        if bias is None or bias_dim is None:
            y = layer.transformed(x, code, bias)
            return (y, 0) if x_dim is not None else (y.expand(info.batch_size, *y.shape), 0)
        y = layer.transformed(x, code, None)
        if x_dim is None:
            y = y[None]
        bias_BN = bias.movedim(bias_dim, 0).to(y.dtype)
        return y + bias_BN.reshape(-1, *[1] * (y.dim() - 2), bias_BN.shape[-1]), 0


def _taken(tensor: Tensor, dim: int | None, index: int) -> Tensor:
    return tensor if dim is None else tensor.select(dim, index)
