"""Eager references for all kernels. They run without a GPU.

Shapes: N = rows (out features), K = columns (in features), P = pairs per row, E = escaped weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from birkhoff.codec.lattice import LatticeTensor, empty
from birkhoff.codec.native.library import native
from birkhoff.codec.pairs import columns_of_pairs, join, pairs_per_row, split
from birkhoff.codec.trajectory import HIGH, LOW, Escapes, coordinates_from_theta


def decode(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return weights [N, K] in `dtype` from uint16 step numbers, without escapes. `step` is a float32 scalar tensor."""
    library = native() if theta_NP.device.type == "cpu" and dtype == torch.float32 else None
    if library is not None and theta_NP.is_contiguous():
        out = empty((theta_NP.shape[0], columns), dtype, theta_NP.device)
        library.birkhoff_thetas(theta_NP.data_ptr(), *out.shape, float(step), out.data_ptr())
        return out
    return decode_planes(theta_NP, step, columns, dtype)


def decode_planes(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`decode` in torch."""
    i, j = coordinates_from_theta(theta_NP)
    code = LatticeTensor(i=i, j=j, escapes=Escapes.none(theta_NP.device), step=float(step), columns=columns)
    return code.decode(dtype)


def put_escapes(weight_NK: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Write float32 escape values [E] to their flat indices [E] in contiguous weights, in place. Values and indices may
    be on any device."""
    if index.numel():
        weight_NK.view(-1)[index.to(weight_NK.device)] = value.to(weight_NK.device, weight_NK.dtype)
    return weight_NK


PLANE_ALIGNMENT = 16
"""Alignment in bytes of a plane's rows, as a GPU's copy engine requires."""


def plane_columns(columns: int, extra: int = 0) -> int:
    """Return W, the columns of the plane of a matrix with K = `columns`: whole pairs and `extra` columns, rounded up to
    a multiple of 16."""
    return -(-(2 * pairs_per_row(columns) + extra) // PLANE_ALIGNMENT) * PLANE_ALIGNMENT


def plane_of(code: LatticeTensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates as one int8 plane [N, W] in the order of the columns, with I in place of x and J of y.

    If an escaped coordinate exceeds a byte, further columns after the pairs hold the excess, as many as needed. The
    second result, int32 [X], is the column that each of them repeats. The rest of W is 0.
    """
    pairs = code.i.shape[1]
    parts = [join(code.i, code.j, 2 * pairs)]
    row, column, rest = _escaped(code)
    parts[0][row, column] = rest.clamp(LOW, HIGH).to(torch.int8)
    extra = [column[:0]]
    while (beyond := rest - rest.clamp(LOW, HIGH)).any():
        row, column, rest = (part[beyond != 0] for part in (row, column, beyond))
        repeated, place = torch.unique(column, return_inverse=True)
        parts.append(parts[0].new_zeros(len(parts[0]), len(repeated)))
        parts[-1][row, place] = rest.clamp(LOW, HIGH).to(torch.int8)
        extra.append(repeated)
    count = sum(map(len, extra))
    padding = parts[0].new_zeros(len(parts[0]), plane_columns(code.columns, count) - 2 * pairs - count)
    return torch.cat((*parts, padding), dim=1), torch.cat(extra).to(torch.int32)


def extra_columns(code: LatticeTensor) -> int:
    """Return X, the further columns that `plane_of` needs for a matrix's escapes."""
    _, column, value = _escaped(code)
    most = torch.zeros(2 * code.i.shape[1], dtype=value.dtype, device=value.device)
    beyond = torch.where(value < 0, (LOW - value + -LOW - 1) // -LOW, (value - HIGH + HIGH - 1) // HIGH).clamp(min=0)
    # If a column has coordinates of both signs, the longer excess counts.
    return int(most.scatter_reduce_(0, column, beyond, "amax").sum())


def _escaped(code: LatticeTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, column among whole pairs, coordinate), int64, of both coordinates of every escaped pair, on the
    planes' device: a reader of containers leaves escapes on the CPU."""
    pairs, escapes = code.i.shape[1], code.escapes.to(code.i.device)
    first, second = columns_of_pairs(escapes.pair % pairs, 2 * pairs)
    row = escapes.pair // pairs
    return torch.cat((row, row)), torch.cat((first, second)), torch.cat((escapes.i, escapes.j)).long()


def coordinates_of(plane_NW: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return (I, J), int8 [N, P], of a plane. Coordinates of escaped pairs are clamped to a byte."""
    return split(plane_NW[:, : 2 * pairs_per_row(columns)])


def quantise_tokens(x_MK: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations to int8 [M, W] with one float32 scale per token [M], to multiply with a plane with these
    `extra` columns.

    The weights' shear, x = (I + J/256) h, moves to the activations: b = (a_x, a_y + a_x/256). Then scale = max |b| /
    127 and q = round(b / scale), halves to even. A token with NaN or infinity gets a scale that is not finite.
    """
    tokens, columns = x_MK.shape
    width = 2 * pairs_per_row(columns)
    first, second = split(torch.nn.functional.pad(x_MK.to(torch.float32), (0, width - columns)))
    second = second.add_(first, alpha=1 / 256)
    greatest = torch.maximum(first.abs().amax(1), second.abs().amax(1)) if columns else x_MK.new_zeros(tokens)
    greatest = greatest.to(torch.float32).clamp(min=2.0**-100)
    inverse = torch.full_like(greatest, 127).div_(greatest)[:, None]  # 127 / greatest rounds twice in torch
    q = x_MK.new_zeros((tokens, plane_columns(columns, len(extra))), dtype=torch.int8)
    join(first.mul_(inverse).round_(), second.mul_(inverse).round_(), width, out=q[:, :width])
    q[:, width : width + len(extra)] = q[:, extra]
    return q, greatest / 127


def exact_product(q_MW: Tensor, plane_NW: Tensor) -> Tensor:
    """Return q w^T of int8 matrices: whole numbers below 2^53, exact in float64."""
    return q_MW.double() @ plane_NW.double().T


def int8_linear(
    x_MK: Tensor,
    plane_NW: Tensor,
    extra: Tensor,
    step: Tensor,
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor] = exact_product,
) -> Tensor:
    """Return x W^T + b, [M, N] in the dtype of x, for quantised tokens and `plane_of` the weight.

    `step` is float32 []. `multiply` computes the exact product [M, N] of int8 [M, W] and [N, W].
    """
    q, scale = quantise_tokens(x_MK, extra)
    y = multiply(q, plane_NW).float() * (scale * step)[:, None]
    return (y if bias is None else y + bias.float()).to(x_MK.dtype)
