"""What the layers that compute on compressed weights share: bias, escapes, dtypes, checks."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from birkhoff.kernels.errors import KernelError

_FLOAT32 = ("step", "escape_value")
"""Buffers that keep float32 whatever dtype the module is moved to."""


class CompressedLinear(nn.Module):
    """y = x W^T + b with a constant weight in buffers; a layer of one kind adds those of its code before the rest.

    Buffers (N = out features, K = in features, E = escaped weights):
        step: float32 [], in the weights' unit.
        escape_index, escape_value: int64 and float32 [E], weights kept beside the code, by row*K + column.

    They keep their dtypes under `.to(dtype)`, `.half()` and so on; the result has the dtype of the input, or
    autocast's. Gradients reach the input and the bias.
    """

    step: Tensor
    escape_index: Tensor
    escape_value: Tensor
    _like: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def _register_rest(
        self, step: float, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register step, escapes and bias, empty: to load a state dict into."""
        self.register_buffer("step", torch.full((), step, dtype=torch.float32, device=device))
        self.register_buffer("escape_index", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("escape_value", torch.empty(0, dtype=torch.float32, device=device))
        # Follows `.to(dtype)`, so that a layer without bias knows its dtype too.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        zeros = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    def _take_rest(
        self, step: float, escapes: tuple[Tensor, Tensor], bias: Tensor | None, device: torch.device
    ) -> Self:
        """Fill what was registered on the meta device: step, (index, value) of the escapes, and a copy of the bias."""
        dtype = self._like.dtype
        self.step = torch.tensor(step, dtype=torch.float32, device=device)
        self.escape_index, self.escape_value = (part.to(device) for part in escapes)
        self._like = torch.empty(0, dtype=dtype, device=device)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        return self

    @property
    def weight(self) -> Tensor:
        """The decoded weight in the layer's dtype, made anew on every access; see `dense_weight`."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        raise NotImplementedError

    def _checked(self, x: Tensor) -> Tensor:
        """The input in autocast's dtype, if that is on. Raises KernelError if its last dimension is not K."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            name = type(self).__name__
            raise KernelError(f"{name} of {self.in_features} features got an input of shape {list(x.shape)}")
        kind = "cuda" if x.is_cuda else x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return x

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` prints it, and the escapes if any."""
        escapes = f", escapes={self.escape_index.numel()}" if self.escape_index.numel() else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}{self._form()}{escapes}"

    def _form(self) -> str:
        """What `extra_repr` says of the code."""
        return ""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in _FLOAT32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("escape_index", "escape_value"):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def layer_dtype(rows: int, bias: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of a layer of a matrix of `rows`: as asked for, else the bias's, else float32.

    Raises:
        KernelError: the bias has not one value per row.
    """
    if bias is not None and bias.shape != (rows,):
        raise KernelError(f"a weight of {rows} rows takes a bias [{rows}], got {list(bias.shape)}")
    return dtype or (torch.float32 if bias is None else bias.dtype)
