"""Decode step numbers or coordinate planes to dense weights, on the device of the tensors.

Reference: `birkhoff.codec.reference.decode`.

Shapes: N = rows, K = columns, P = pairs per row.
"""

import torch
from torch import Tensor

from birkhoff.codec import reference
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.runtime.device import HAS_TRITON
from birkhoff.kernels.runtime.errors import KernelError

if HAS_TRITON:
    from birkhoff.kernels.decode import triton as decode_triton

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernels. Others run eagerly."""


def decode_theta(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weights [N, K] of step numbers. Escapes decode to 0.

    Args:
        theta_NP: uint16.
        step: float32 scalar tensor on the same device, in the unit of the weights.
        columns: K.
        dtype: float32, bfloat16, float16 or float64; float32 values are rounded to it once.

    Raises:
        KernelError: theta is not uint16, or has the wrong shape for K.
    """
    if theta_NP.dtype != torch.uint16 or theta_NP.dim() != 2 or theta_NP.shape[1] != pairs_per_row(columns):
        raise KernelError(
            f"theta of {columns} columns must be uint16 [N, {pairs_per_row(columns)}], "
            f"got {theta_NP.dtype} {list(theta_NP.shape)}; pass LatticeTensor.theta() and its columns"
        )
    if dtype in TRITON_DTYPES and triton_serves(theta_NP.device):
        return decode_triton.decode(theta_NP.contiguous(), step, columns, dtype)
    return reference.decode(theta_NP, step, columns, dtype)


def decode_lattice(code: LatticeTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights [N, K] in `dtype` from the coordinate planes, escapes included, bit-identical to
    `code.decode`."""
    if dtype not in TRITON_DTYPES or not triton_serves(code.i.device):
        return code.decode(dtype)
    step = torch.full((), code.step, dtype=torch.float32, device=code.i.device)  # no copy from the host
    weight = decode_triton.decode_planes(code.i.contiguous(), code.j.contiguous(), step, code.columns, dtype)
    return reference.put_escapes(weight, *code.escaped_weights())
