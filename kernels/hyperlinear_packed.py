"""PackedHyperLinear: an `nn.Linear` whose weight stays at 10 or 12 bits per pair, 5.06 or 6.06 bits per weight."""

import torch
from torch import Tensor

from birkhoff.codec.packed import GROUP, Bits, PackedTensor, high_bytes
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.compressed_linear import CompressedLinear, layer_dtype
from birkhoff.kernels.linear.op import is_watched
from birkhoff.kernels.packed.op import Planes, direct_packed_linear, packed_weight, watched_packed_linear


class PackedHyperLinear(CompressedLinear):
    """y = x W^T + b, with the weight decoded on every call. It takes less memory than HyperLinear and is less accurate.

    Buffers (N = out features, K = in features, P, H, G as in `birkhoff.codec.packed`), in addition to those of
    `CompressedLinear`:
        low, high, scale: uint8 [N, P], [N, H], [N, G].

    The weight is constant.
    """

    _CODE = (
        ("low", None),
        ("high", None),
        ("scale", None),
        ("step_bits", torch.float32),
        ("escape_index", None),
        ("escape_bits", torch.float32),
    )

    low: Tensor
    high: Tensor
    scale: Tensor

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
        """Make a layer to load a state dict into. `dtype` is the dtype of the bias."""
        super().__init__(in_features, out_features)
        self.bits = bits
        pairs = pairs_per_row(in_features)
        for name, width in (("low", pairs), ("high", high_bytes(pairs, bits)), ("scale", -(-pairs // GROUP))):
            self.register_buffer(name, torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self._register_rest(0.0, bias, device, dtype)

    @classmethod
    def from_packed(
        cls,
        packed: PackedTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "PackedHyperLinear":
        """Return a layer for a packed matrix [N, K] and a copy of its bias [N], if there is one.

        `dtype` defaults to the bias's, or float32; `device` to the planes'.

        Raises:
            KernelError: The bias does not have one value per row.
        """
        rows = packed.low.shape[0]
        dtype = layer_dtype(rows, bias, dtype)
        device = torch.device(device) if device is not None else packed.low.device
        layer = cls(packed.columns, rows, bias is not None, bits=packed.bits, device="meta", dtype=dtype)
        for name in ("low", "high", "scale"):
            setattr(layer, name, getattr(packed, name).to(device))
        return layer._take_rest(packed.step, (packed.escape_index, packed.escape_value), bias, device)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        return packed_weight(self._planes(), self.bits, self.in_features, dtype or self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N].

        Raises:
            KernelError: The last dimension of `x` is not K, or the layer is being exported to ONNX.
        """
        x, bias = self._checked(x), self._own_bias()
        if torch.compiler.is_compiling() or is_watched(x, self.low, bias):
            self._refuse_onnx()
            return watched_packed_linear(x, self._watched_code(), self.bits, bias)
        return direct_packed_linear(x, *self._keep_code()[1], self.bits, bias)

    def _form(self) -> str:
        return f", bits={self.bits}"

    def _planes(self) -> Planes:
        return self.code()
