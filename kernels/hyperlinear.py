"""HyperLinear: an `nn.Linear` whose weight stays compressed on the trajectory, 8 bits per weight."""

from typing import Any

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.compressed_linear import CompressedLinear, as_bits, layer_dtype
from birkhoff.kernels.linear.op import code_form, dense_weight, direct_hyperlinear, is_watched, watched_hyperlinear

_ORIGIN = 0x80
"""Both bytes of 0x8080, the step number of the weight 0."""


class HyperLinear(CompressedLinear):
    """y = x W^T + b, with the weight decoded on the fly.

    Shapes: N = out features, K = in features, P = ceil(K/2) pairs per row.

    Buffers, in addition to those of `CompressedLinear`:
        theta_bytes: uint8 [N, 2P], the bytes of `theta`, uint16 [N, P], the step numbers of the trajectory.

    The escapes are the weights outside the trajectory's box. The weight is constant.
    """

    _CODE = (
        ("theta_bytes", torch.uint16),
        ("step_bits", torch.float32),
        ("escape_index", None),
        ("escape_bits", torch.float32),
    )

    theta_bytes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with weight 0, to load a state dict into. `dtype` is the dtype of the bias."""
        super().__init__(in_features, out_features)
        shape = out_features, 2 * pairs_per_row(in_features)
        self.register_buffer("theta_bytes", torch.full(shape, _ORIGIN, dtype=torch.uint8, device=device))
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
        """Return a layer for a coded matrix [N, K] and a copy of its bias [N], if there is one.

        `dtype` defaults to the bias's, or float32; `device` to the code's.

        Raises:
            KernelError: The bias does not have one value per row.
        """
        rows = code.i.shape[0]
        dtype = layer_dtype(rows, bias, dtype)
        device = torch.device(device) if device is not None else code.i.device
        layer = cls._bare(code.columns, rows)
        layer.register_buffer("theta_bytes", as_bits("theta", code.theta().contiguous().to(device)))
        return layer._take_rest(code.step, code.escaped_weights(), bias, device, dtype)

    @property
    def theta(self) -> Tensor:
        """uint16 [N, P], step numbers of the trajectory; a view of `theta_bytes`."""
        return self.theta_bytes.view(torch.uint16)

    @theta.setter
    def theta(self, value: Tensor) -> None:
        self.theta_bytes = as_bits("theta", value)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        theta, step, escape_index, escape_value = self.code()
        return dense_weight(theta, step, escape_index, escape_value, self.in_features, dtype or self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N].

        Raises:
            KernelError: The last dimension of `x` is not K, or the layer is being exported to ONNX.
        """
        x, bias = self._checked(x), self._own_bias()
        held: dict[str, Any] = self._buffers
        if torch.compiler.is_compiling() or is_watched(x, held["theta_bytes"], bias):
            self._refuse_onnx()
            theta, step, escape_index, escape_value = self._watched_code()
            return watched_hyperlinear(x, theta, step, escape_index, escape_value, bias)
        _, (theta, step, escape_index, escape_value), form = self._keep_code()
        return direct_hyperlinear(x, theta, step, escape_index, escape_value, bias, form)

    def _code_form(self, code: tuple[Tensor, ...]) -> tuple[object, ...]:
        theta, step, escape_index, _ = code
        return code_form(theta, step, escape_index)
