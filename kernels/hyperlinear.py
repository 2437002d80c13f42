"""HyperLinear: an `nn.Linear` whose weight stays on the trajectory, 8 bits a weight."""

from typing import Any

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.compressed_linear import CompressedLinear, layer_dtype
from birkhoff.kernels.linear import dense_weight, hyperlinear

_ORIGIN = 0x8080 - 0x10000
"""The step number of the weight 0, as int16: not every device fills uint16."""


class HyperLinear(CompressedLinear):
    """y = x W^T + b, the weight decoded on the fly.

    Buffers (N = out features, K = in features, P = ceil(K/2) pairs a row, E = escaped weights):
        theta: uint16 [N, P], step numbers of the trajectory.
        step: float32 [], the trajectory's step in the weights' unit.
        escape_index, escape_value: int64 and float32 [E], weights outside the trajectory's box, by row*K + column.

    They keep their dtypes under `.to(dtype)`, `.half()` and so on; the result has the dtype of the input, or
    autocast's. The weight is constant: gradients reach the input and the bias.
    """

    theta: Tensor

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
        super().__init__(in_features, out_features)
        shape = out_features, pairs_per_row(in_features)
        self.register_buffer("theta", torch.full(shape, _ORIGIN, dtype=torch.int16, device=device).view(torch.uint16))
        self._register_rest(1.0, bias, device, dtype)

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
        dtype = layer_dtype(rows, bias, dtype)
        layer = cls(code.columns, rows, bias is not None, device="meta", dtype=dtype)
        device = torch.device(device) if device is not None else code.i.device
        layer.theta = code.theta().contiguous().to(device)
        return layer._take_rest(code.step, code.escaped_weights(), bias, device)

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
        x = self._checked(x)
        held: dict[str, Any] = self._buffers  # attributes of a module cost three times as much
        bias = self._parameters["bias"]
        return hyperlinear(x, held["theta"], held["step"], held["escape_index"], held["escape_value"], bias)

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle (Ray's too) cannot carry uint16 tensors; their bits can go as int16.
        return {**self.__dict__, "_buffers": {**self._buffers, "theta": self.theta.view(torch.int16)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.theta = self.theta.view(torch.uint16)
