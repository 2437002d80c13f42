"""HyperLinear: an `nn.Linear` whose weight stays on the trajectory, 8 bits a weight."""

from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.errors import KernelError
from birkhoff.kernels.linear import dense_weight, hyperlinear

_FLOAT32 = ("step", "escape_value")
"""Buffers that keep float32 whatever dtype the module is moved to."""


_ORIGIN = 0x8080 - 0x10000
"""The step number of the weight 0, as int16: not every device fills uint16."""


class HyperLinear(nn.Module):
    """y = x W^T + b, the weight decoded on the fly.

    Buffers (N = out features, K = in features, P = ceil(K/2) pairs a row, E = escaped weights):
        theta: uint16 [N, P], step numbers of the trajectory.
        step: float32 [], the trajectory's step in the weights' unit.
        escape_index, escape_value: int64 and float32 [E], weights outside the trajectory's box, by row*K + column.

    They keep their dtypes under `.to(dtype)`, `.half()` and so on; the result has the dtype of the input, or
    autocast's. The weight is constant: gradients reach the input and the bias.
    """

    theta: Tensor
    step: Tensor
    escape_index: Tensor
    escape_value: Tensor
    _like: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer of zeros, to load a state dict into; `dtype` is the bias's."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        shape = out_features, pairs_per_row(in_features)
        self.register_buffer("theta", torch.full(shape, _ORIGIN, dtype=torch.int16, device=device).view(torch.uint16))
        self.register_buffer("step", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("escape_index", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("escape_value", torch.empty(0, dtype=torch.float32, device=device))
        # Follows `.to(dtype)`, so that a layer without bias knows its dtype too.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_lattice(
        cls,
        code: LatticeTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "HyperLinear":
        """A layer of a coded matrix [N, K] and, if given, its bias [N], copied.

        `dtype` defaults to the bias's, or float32; `device` to the code's.

        Raises:
            KernelError: the bias has not one value per row.
        """
        rows = code.i.shape[0]
        if bias is not None and bias.shape != (rows,):
            raise KernelError(f"a weight of {rows} rows takes a bias [{rows}], got {list(bias.shape)}")
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        layer = cls(code.columns, rows, bias is not None, device="meta", dtype=dtype)
        device = torch.device(device) if device is not None else code.i.device
        index, value = code.escaped_weights()
        layer.theta = code.theta().contiguous().to(device)
        layer.step = torch.tensor(code.step, dtype=torch.float32, device=device)
        layer.escape_index, layer.escape_value = index.to(device), value.to(device)
        layer._like = torch.empty(0, dtype=dtype, device=device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        return layer

    @property
    def weight(self) -> Tensor:
        """The decoded weight in the layer's dtype, made anew on every access; see `dense_weight`."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        return dense_weight(
            self.theta, self.step, self.escape_index, self.escape_value, self.in_features, dtype or self._like.dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N].

        Raises:
            KernelError: the last dimension of `x` is not K.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise KernelError(f"HyperLinear of {self.in_features} features got an input of shape {list(x.shape)}")
        kind = "cuda" if x.is_cuda else x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        held: dict[str, Any] = self._buffers  # attributes of a module cost three times as much
        bias = self._parameters["bias"]
        return hyperlinear(x, held["theta"], held["step"], held["escape_index"], held["escape_value"], bias)

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` prints it, and the escapes if any."""
        escapes = f", escapes={self.escape_index.numel()}" if self.escape_index.numel() else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}{escapes}"

    def _apply(self, fn: Any, recurse: bool = True) -> "HyperLinear":
        kept = {name: getattr(self, name) for name in _FLOAT32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle (Ray's too) cannot carry uint16 tensors; their bits can go as int16.
        return {**self.__dict__, "_buffers": {**self._buffers, "theta": self.theta.view(torch.int16)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.theta = self.theta.view(torch.uint16)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("escape_index", "escape_value"):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(getattr(self, name)).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
