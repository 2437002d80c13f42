"""Eager references: what every kernel is held to, and what runs where there is no GPU.

Shapes: N = rows (out features), K = columns (in features), P = pairs a row, E = escaped weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import join, pairs_per_row, split
from birkhoff.codec.trajectory import Escapes, coordinates_from_theta


def decode(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, K] in `dtype` of uint16 step numbers, without escapes; `step` is a float32 scalar tensor."""
    i, j = coordinates_from_theta(theta_NP)
    code = LatticeTensor(i=i, j=j, escapes=Escapes.none(theta_NP.device), step=float(step), columns=columns)
    return code.decode(dtype)


def put_escapes(weight_NK: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Write float32 escape values [E] at their flat indices [E] into contiguous weights, in place."""
    if index.numel():
        weight_NK.view(-1)[index] = value.to(weight_NK.dtype)
    return weight_NK


PLANE_ALIGNMENT = 16
"""Bytes that rows of a plane begin at multiples of: what the copy engine of a GPU asks for."""


def plane_columns(columns: int) -> int:
    """W, the columns of the plane of a matrix of K = `columns`: whole pairs, rounded up to a multiple of 16."""
    return -(-2 * pairs_per_row(columns) // PLANE_ALIGNMENT) * PLANE_ALIGNMENT


def plane_of(i_NP: Tensor, j_NP: Tensor, columns: int) -> Tensor:
    """Coordinates as one int8 plane [N, W] in the order of the columns: I where x stands, J where y does, then 0."""
    plane = i_NP.new_zeros((i_NP.shape[0], plane_columns(columns)), dtype=torch.int8)
    join(i_NP, j_NP, 2 * i_NP.shape[1], out=plane[:, : 2 * i_NP.shape[1]])
    return plane


def coordinates_of(plane_NW: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(I, J), int8 [N, P], of a plane."""
    return split(plane_NW[:, : 2 * pairs_per_row(columns)])


def quantise_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as int8 [M, W], one float32 scale a token [M]: what a plane is multiplied with.

    The shear of the weights, x = (I + J/256) h, is moved to the activations: b = (a_x, a_y + a_x/256); then
    scale = max |b| / 127 and q = round(b / scale), halves to even. A token that holds NaN or infinity gets a scale that
    is not finite.
    """
    tokens, columns = x_MK.shape
    pairs = pairs_per_row(columns)
    both = torch.nn.functional.pad(x_MK.to(torch.float32), (0, 2 * pairs - columns))
    first, second = split(both)
    second = second.add_(first, alpha=1 / 256)
    greatest = torch.maximum(first.abs().amax(1), second.abs().amax(1)) if pairs else x_MK.new_zeros(tokens)
    greatest = greatest.to(torch.float32).clamp(min=2.0**-100)
    inverse = torch.full_like(greatest, 127).div_(greatest)[:, None]  # 127 / greatest rounds twice in torch
    q = x_MK.new_zeros((tokens, plane_columns(columns)), dtype=torch.int8)
    join(first.mul_(inverse).round_(), second.mul_(inverse).round_(), 2 * pairs, out=q[:, : 2 * pairs])
    return q, greatest / 127


def exact_product(q_MW: Tensor, plane_NW: Tensor) -> Tensor:
    """q w^T of int8 matrices: whole numbers below 2^53, exact in float64."""
    return q_MW.double() @ plane_NW.double().T


def int8_linear(
    x_MK: Tensor,
    plane_NW: Tensor,
    step: Tensor,
    escape_index: Tensor,
    escape_value: Tensor,
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor] = exact_product,
) -> Tensor:
    """x W^T + b, [M, N] in the dtype of x, of quantised tokens and a plane.

    Escaped weights (float32 values [E] at row*K + column, places where the plane holds 0) meet the tokens as they are.
    `step` is float32 [], `multiply` takes int8 [M, W] and [N, W] to the exact product [M, N].
    """
    q, scale = quantise_tokens(x_MK)
    y = multiply(q, plane_NW).float() * (scale * step)[:, None]
    if bias is not None:
        y += bias.float()
    if escape_index.numel():
        columns = x_MK.shape[1]
        y.index_add_(1, escape_index // columns, x_MK[:, escape_index % columns].float() * escape_value)
    return y.to(x_MK.dtype)
