"""PackedHyperLinear: an `nn.Linear` whose weight stays at 10 or 12 bits a pair, 5.06 or 6.06 bits a weight."""

from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.codec.packed import GROUP, Bits, PackedTensor, high_bytes
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.decode_packed import Planes, packed_linear, packed_weight
from birkhoff.kernels.errors import KernelError

_FLOAT32 = ("step", "escape_value")
"""Buffers that keep float32 whatever dtype the module is moved to."""


class PackedHyperLinear(nn.Module):
    """y = x W^T + b, the weight decoded for every call; less memory than HyperLinear and less fidelity.

    Buffers (N = out features, K = in features, P, H, G as in `birkhoff.codec.packed`, E = escaped weights):
        low, high, scale: uint8 [N, P], [N, H], [N, G].
        step: float32 [], in the weights' unit.
        escape_index, escape_value: int64 and float32 [E], weights kept as they are, by row*K + column.

    They keep their dtypes under `.to(dtype)`; the result has the dtype of the input, or autocast's. The weight is
    constant: gradients reach the input and the bias.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
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
        bits: Bits,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer to load a state dict into; `dtype` is the bias's."""
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        pairs = pairs_per_row(in_features)
        for name, width in (("low", pairs), ("high", high_bytes(pairs, bits)), ("scale", -(-pairs // GROUP))):
            self.register_buffer(name, torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("escape_index", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("escape_value", torch.empty(0, dtype=torch.float32, device=device))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_packed(
        cls,
        packed: PackedTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "PackedHyperLinear":
        """A layer of a packed matrix [N, K] and, if given, its bias [N], copied.

        `dtype` defaults to the bias's, or float32; `device` to the planes'.

        Raises:
            KernelError: the bias has not one value per row.
        """
        rows = packed.low.shape[0]
        if bias is not None and bias.shape != (rows,):
            raise KernelError(f"a weight of {rows} rows takes a bias [{rows}], got {list(bias.shape)}")
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        device = torch.device(device) if device is not None else packed.low.device
        layer = cls(packed.columns, rows, bias is not None, bits=packed.bits, device="meta", dtype=dtype)
        for name in ("low", "high", "scale", "escape_index", "escape_value"):
            setattr(layer, name, getattr(packed, name).to(device))
        layer.step = torch.tensor(packed.step, dtype=torch.float32, device=device)
        layer._like = torch.empty(0, dtype=dtype, device=device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        return layer

    @property
    def weight(self) -> Tensor:
        """The decoded weight in the layer's dtype, made anew on every access."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        return packed_weight(*self._planes(), self.bits, self.in_features, dtype or self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N].

        Raises:
            KernelError: the last dimension of `x` is not K.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise KernelError(f"PackedHyperLinear of {self.in_features} features got an input of shape {list(x.shape)}")
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return packed_linear(x, *self._planes(), self.bits, self.bias)

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` prints it, the bits, and the escapes if any."""
        escapes = f", escapes={self.escape_index.numel()}" if self.escape_index.numel() else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}, bits={self.bits}{escapes}"

    def _planes(self) -> Planes:
        return self.low, self.high, self.scale, self.step, self.escape_index, self.escape_value

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedHyperLinear":
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
