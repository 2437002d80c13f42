"""Eager references: what every kernel is held to, and what runs where there is no GPU.

Shapes: N = rows (out features), K = columns (in features), P = pairs a row, E = escaped weights.
"""

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.trajectory import Escapes, coordinates_from_theta


def decode(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, K] in `dtype` of uint16 step numbers, without escapes; `step` is a float32 scalar tensor."""
    i, j = coordinates_from_theta(theta_NP)
    code = LatticeTensor(i=i, j=j, escapes=Escapes.none(theta_NP.device), step=float(step), columns=columns)
    return code.decode(dtype)


def put_escapes(weight_NK: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Write float32 escape values [E] at their flat indices [E], of any device, into contiguous weights, in place."""
    if index.numel():
        weight_NK.view(-1)[index.to(weight_NK.device)] = value.to(weight_NK.device, weight_NK.dtype)
    return weight_NK
