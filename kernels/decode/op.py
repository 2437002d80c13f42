"""Decode step numbers or coordinate planes to dense weights, on the device of the tensors.

Reference: `birkhoff.codec.reference.decode`.

Shapes: N = rows, K = columns, P = pairs a row.
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
"""What the kernels compute in; other types run eagerly."""


def decode_theta(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, K] of step numbers, without escapes (those decode to 0).

    Args:
        theta_NP: uint16.
        step: float32 scalar tensor on the same device, in the weights' unit.
        columns: K.
        dtype: float32, bfloat16, float16 or float64; float32 values are rounded to it once.

    Raises:
        KernelError: theta is not uint16 of the shape that K asks for.
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
    """Weights [N, K] in `dtype` straight from the coordinate planes, escapes included; `code.decode`'s bits."""
    if dtype not in TRITON_DTYPES or not triton_serves(code.i.device):
        return code.decode(dtype)
    step = torch.full((), code.step, dtype=torch.float32, device=code.i.device)  # a copy from the host would wait
    weight = decode_triton.decode_planes(code.i.contiguous(), code.j.contiguous(), step, code.columns, dtype)
    return reference.put_escapes(weight, *code.escaped_weights())
