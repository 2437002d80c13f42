"""Int8HyperLinear: HyperLinear on int8 tensor cores, faster than the `nn.Linear` it replaces."""

from typing import Any

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.reference import plane_columns, plane_of
from birkhoff.kernels.compressed_linear import CompressedLinear, layer_dtype
from birkhoff.kernels.int8.op import MOST_COLUMNS, direct_int8_linear, int8_weight, watched_int8_linear
from birkhoff.kernels.linear.op import code_form, is_watched
from birkhoff.kernels.runtime.errors import KernelError


class Int8HyperLinear(CompressedLinear):
    """y = x W^T + b, with x rounded to int8 by one scale per token, and multiplied exactly by the weight's integer
    coordinates.

    It takes as much memory as HyperLinear and has exactly the same weights. Only the rounding of x loses accuracy:
    about 42 dB SQNR for normally distributed activations, less if a token has outliers. Gradients treat that rounding
    as the identity.

    Shapes: N = out features, K = in features, W and X as in `int8.triton`.

    Buffers, in addition to those of `CompressedLinear`:
        plane: int8 [N, W], the coordinates in the order of the columns (`codec.reference.plane_of`).
        extra: int32 [X], the columns that the last ones of the plane repeat, for coordinates beyond a byte.

    The weight is constant.
    """

    _CODE = (
        ("plane", None),
        ("extra", None),
        ("step_bits", torch.float32),
        ("escape_index", None),
        ("escape_bits", torch.float32),
    )
    _SIZED = ("plane", "extra", *CompressedLinear._SIZED)

    plane: Tensor
    extra: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with weight 0, to load a state dict into. `dtype` is the dtype of the bias.

        Raises:
            KernelError: `in_features` is more than int32 sums can hold.
        """
        if in_features > MOST_COLUMNS:
            raise KernelError(f"Int8HyperLinear takes up to {MOST_COLUMNS} columns, got {in_features}; use HyperLinear")
        super().__init__(in_features, out_features)
        shape = out_features, plane_columns(in_features)
        self.register_buffer("plane", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("extra", torch.zeros(0, dtype=torch.int32, device=device))
        self._register_rest(1.0, bias, device, dtype)

    @classmethod
    def from_lattice(
        cls,
        code: LatticeTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Int8HyperLinear":
        """Return a layer for a coded matrix [N, K] and a copy of its bias [N], if there is one.

        `dtype` defaults to the bias's, or float32; `device` to the code's.

        Raises:
            KernelError: The bias does not have one value per row, or int32 sums cannot hold so many columns.
        """
        rows = code.i.shape[0]
        dtype = layer_dtype(rows, bias, dtype)
        layer = cls(code.columns, rows, bias is not None, device="meta", dtype=dtype)
        device = torch.device(device) if device is not None else code.i.device
        layer.plane, layer.extra = (part.to(device) for part in plane_of(code))
        return layer._take_rest(code.step, code.escaped_weights(), bias, device)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        return int8_weight(self.code(), self.in_features, dtype or self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N].

        Raises:
            KernelError: The last dimension of `x` is not K, or the layer is being exported to ONNX.
        """
        x, bias = self._checked(x), self._own_bias()
        held: dict[str, Any] = self._buffers
        if torch.compiler.is_compiling() or is_watched(x, held["plane"], bias):
            self._refuse_onnx()
            return watched_int8_linear(x, self._watched_code(), bias)
        _, (plane, extra, step, index, value), form = self._keep_code()
        return direct_int8_linear(x, plane, extra, step, index, value, bias, form)

    def _code_form(self, code: tuple[Tensor, ...]) -> tuple[object, ...]:
        plane, extra, step, _, _ = code
        return code_form(plane, step, extra)
