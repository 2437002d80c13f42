"""Pack Hessians into an eighth of their float64 bytes, keeping all that error feedback needs.

The packed form is the lower triangle of L, where L L^T = H / mean(diag H) + eps I, row by row as little-endian float16:
K (K + 1) bytes for a matrix [K, K]. A rounded triangle of H itself may no longer be positive if few columns carry
nearly all of it. The product of a rounded L always is. eps is the least power of ten, from 1e-6 on, at which L exists.
The factor of the columns comes first, then that of the rows if there is one.

Worked example: H = [[4, 2], [2, 4]] has the mean 4, so H / 4 = [[1, 0.5], [0.5, 1]] and L = [[1, 0], [0.5, 0.8660]],
stored as 1, 0.5, 0.8660: six bytes.

Shapes: R = rows, K = columns.
"""

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.errors import FormatError, TensorError
from birkhoff.codec.output.hessian import Hessian, cholesky, normalised

_DAMPINGS = tuple(10.0**power for power in range(-6, 0))
"""Values of eps in units of the diagonal's mean. Feedback adds 0.05 anyway."""

_NOT_FINITE = 0x7C00
"""The exponent's bits of a float16, which all are set in NaN and Inf alone."""


def packed_bytes(columns: int, rows: int) -> int:
    """Return the bytes of the packed Hessian of a matrix; `rows` is 0 if those have none."""
    return columns * (columns + 1) + rows * (rows + 1)


def pack(hessian: Hessian) -> bytes:
    """Pack a Hessian (any float dtype, any device), each factor up to its scale.

    Raises:
        TensorError: A factor is not square or not finite, its diagonal has no positive mean, or it is far from
            positive.
    """
    return _packed(hessian.columns) + (b"" if hessian.rows is None else _packed(hessian.rows))


def _packed(hessian_KK: Tensor) -> bytes:
    h = normalised(hessian_KK)
    columns, diagonal = len(h), h.diagonal().clone()
    for damping in _DAMPINGS:
        h.diagonal().copy_(diagonal + damping)
        if (lower := cholesky(h)) is not None:
            kept = lower.half()[_triangle(columns, h.device)]
            packed: bytes = kept.cpu().numpy().astype("<f2").tobytes()
            return packed
    raise TensorError(f"Hessian: not positive with a damping of {_DAMPINGS[-1]:g}; take it again")


def unpack(data: bytes, columns: int, rows: int, device: torch.device | str = "cpu") -> Hessian:
    """Unpack a Hessian: factors on a device, each with a diagonal of mean about 1. `rows` is 0 if those have none.

    Raises:
        FormatError: The bytes are not a Hessian of this shape.
    """
    if len(data) != packed_bytes(columns, rows):
        raise FormatError(
            f"Hessian: {len(data)} bytes stored, expected {packed_bytes(columns, rows)} for {columns} columns and "
            f"{rows} rows"
        )
    numbers = torch.from_numpy(np.frombuffer(data, dtype="<f2").astype(np.float16)).to(device)
    if bool(((numbers.view(torch.int16) & _NOT_FINITE) == _NOT_FINITE).any()):
        raise FormatError("Hessian: the bytes stored hold NaN or Inf")
    of_columns = columns * (columns + 1) // 2
    return Hessian(
        columns=_unpacked(numbers[:of_columns], columns),
        rows=_unpacked(numbers[of_columns:], rows) if rows else None,
    )


def _unpacked(numbers: Tensor, columns: int) -> Tensor:
    lower = torch.zeros(columns, columns, dtype=torch.float32, device=numbers.device)
    lower.masked_scatter_(_triangle(columns, lower.device), numbers.float())
    return lower @ lower.T


def _triangle(columns: int, device: torch.device) -> Tensor:
    return torch.ones(columns, columns, dtype=torch.bool, device=device).tril_()
