"""Hessians as bytes: what error feedback needs of them, in an eighth of their float64.

Kept is the lower triangle of L, L L^T = H / mean(diag H) + eps I, row by row as little-endian float16: K (K + 1) bytes
of a matrix [K, K]. A rounded triangle of H itself need not be positive any more, where few columns carry nearly all of
it; the product of a rounded L always is. eps is the least power of ten from 1e-6 on with which L can be found.

Worked example: H = [[4, 2], [2, 4]] has the mean 4, so H / 4 = [[1, 0.5], [0.5, 1]] and L = [[1, 0], [0.5, 0.8660]],
which are stored as 1, 0.5, 0.8660: six bytes.

Shapes: K = columns.
"""

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.errors import FormatError, TensorError
from birkhoff.codec.output.feedback import normalised

_DAMPINGS = tuple(10.0**power for power in range(-6, 0))
"""eps, in units of the diagonal's mean; feedback adds 0.05 in any case."""


def packed_bytes(columns: int) -> int:
    """Bytes of a packed Hessian."""
    return columns * (columns + 1)


def pack(hessian_KK: Tensor) -> bytes:
    """A Hessian (any float dtype, any device) up to its scale.

    Raises:
        TensorError: it is not square, not finite, its diagonal has no positive mean, or it is far from positive.
    """
    h = normalised(hessian_KK)
    columns, diagonal = len(h), h.diagonal().clone()
    for damping in _DAMPINGS:
        h.diagonal().copy_(diagonal + damping)
        lower, wrong = torch.linalg.cholesky_ex(h)
        if not int(wrong):
            kept = lower.half()[_triangle(columns, h.device)]
            packed: bytes = kept.cpu().numpy().astype("<f2").tobytes()
            return packed
    raise TensorError(f"Hessian: not positive with a damping of {_DAMPINGS[-1]:g}; take it again")


def unpack(data: bytes, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """A Hessian float32 [K, K] on a device, its diagonal's mean about 1.

    Raises:
        FormatError: these are not the bytes of one with so many columns.
    """
    if len(data) != packed_bytes(columns):
        raise FormatError(f"Hessian: {len(data)} bytes stored, {packed_bytes(columns)} are one of {columns} columns")
    kept = torch.from_numpy(np.frombuffer(data, dtype="<f2").astype(np.float16)).to(device)
    if not bool(torch.isfinite(kept).all()):
        raise FormatError("Hessian: the bytes stored hold NaN or Inf")
    lower = torch.zeros(columns, columns, dtype=torch.float32, device=device)
    lower[_triangle(columns, lower.device)] = kept.float()
    return lower @ lower.T


def _triangle(columns: int, device: torch.device) -> Tensor:
    return torch.ones(columns, columns, dtype=torch.bool, device=device).tril_()
