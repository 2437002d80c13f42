"""The trajectory: two weights become one step number theta, and back.

With n = 256 rows and step h, step theta = 256*i + j (0 <= i, j < 256) of the trajectory is the point

    x = h * (I + J / 256),    y = h * J,    where I = i - 128 and J = j - 128

which is Hyper-Compression's `x = l*theta/n^2`, `y = (l*theta/n) mod l` (arXiv 2507.08765) with the box side
l = 256*h and the box moved so that step 0x8080 is exactly the origin: a weight of zero stays zero. I and J are
bytes in two's complement, so decoding is two multiply-adds and no table. `I + J/256` is exact in float32 and one
rounding follows, so that every device decodes to the same bits.

Worked example, h = 0.5: the pair (1.2, -0.8) has v = y/h = -1.6, so J is -2 or -1. For J = -1, I = round(2.4 + 1/256)
= 2 and the squared distance in steps is 0.404^2 + 0.6^2 = 0.523; for J = -2, I = 2 and 0.408^2 + 0.4^2 = 0.326. The
second wins: theta = (2+128)*256 + (-2+128) = 33406, decoded to (0.5 * (2 - 2/256), 0.5 * -2) = (0.99609375, -1.0).

Coordinates outside -128..127 are *escapes*: the pair's theta is the origin and its coordinates are kept beside it.

Shapes: R = rows, P = pairs a row, E = escapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec.native.library import native

N = 256
"""Rows of the lattice, the paper's n."""

LOW, HIGH = -128, 127
"""Range of a coordinate that fits the trajectory. Other pairs are escapes."""


FARTHEST = 1 << 22
"""Steps up to which float32 distinguishes even nodes from odd ones. Paths can be searched up to here, and a sum can
round whole numbers."""


def nearest(x: Tensor, y: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the lattice node nearest to each pair, found exactly among two candidate rows.

    Args:
        x, y: float32 of one shape; first and second weight of each pair.
        step: h > 0, in the unit of the weights.

    Returns:
        (I, J), whole numbers as float32, in the shape of `x`, not limited to -128..127. Ties take the lower row.
    """
    # Multiply once by a float32 reciprocal, and use no multiply-add that a compiler might contract. Then CPU and GPU
    # resolve every tie alike.
    inverse = reciprocal(step)
    v = y * inverse
    row = torch.floor(v)
    below = v.sub_(row)  # distance from the lower row, 0..1
    t0 = x * inverse
    t0.sub_(row * (1 / N))
    t1 = t0 - 1 / N
    i0, i1 = torch.round(t0), torch.round(t1)
    e0, e1 = t0.sub_(i0), t1.sub_(i1)
    # e1^2 + (1 - below)^2 < e0^2 + below^2, each square rounded separately
    upper = e1.mul_(e1).add_(1).sub_(below.add_(below)) < e0.mul_(e0)
    # i0 and i1 differ by at most one, so this is exact. It is much faster than `torch.where`.
    return i0.add_(i1.sub_(i0).mul_(upper)), row.add_(upper)


def reciprocal(step: float) -> float:
    """Return 1 / step, rounded to float32, as every encoder uses it."""
    return float(torch.tensor(1.0, dtype=torch.float32) / torch.tensor(step, dtype=torch.float32))


def position(i: Tensor, j: Tensor, step: float | Tensor, n: int = N) -> tuple[Tensor, Tensor]:
    """Return the weights (x, y) of lattice coordinates: `h * (I + J/n)`, `h * J`, float32, bit-identical on every
    device.

    `step` is one h, or a float32 tensor with one per pair. n is a power of two.
    """
    i, j = i.to(torch.float32), j.to(torch.float32)
    return (i + j * (1 / n)).mul_(step), j * step


def theta_from_coordinates(i: Tensor, j: Tensor) -> Tensor:
    """Return the step numbers (uint16) of int8 coordinates of one shape."""
    library = native() if i.device.type == "cpu" and i.is_contiguous() and j.is_contiguous() else None
    if library is not None:
        theta = torch.empty(i.shape, dtype=torch.uint16)
        library.birkhoff_pack_thetas(i.data_ptr(), j.data_ptr(), i.numel(), theta.data_ptr())
        return theta
    return _stacked(i, j)


def _stacked(i: Tensor, j: Tensor) -> Tensor:
    # Little-endian uint16: low byte j, high byte i, each moved from -128..127 to 0..255.
    return torch.stack((j, i), dim=-1).bitwise_xor_(-128).view(torch.uint16).squeeze(-1)


def coordinates_from_theta(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 coordinates (I, J) of uint16 step numbers."""
    planes = theta.unsqueeze(-1).view(torch.int8).bitwise_xor(-128)
    return planes[..., 1], planes[..., 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Escapes:
    """Pairs whose node is outside the trajectory's box, with their coordinates.

    `pair` is int64 [E], the flat index r*P + p, strictly increasing; `i` and `j` are int32 [E]. `weights` is the result
    of `LatticeTensor.escaped_weights` if it is known, on the device of the matrix's coordinates.
    """

    pair: Tensor
    i: Tensor
    j: Tensor
    weights: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.pair.numel()

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> "Escapes":
        """Return no escapes."""
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return cls(pair=empty.to(torch.int64), i=empty, j=empty)

    def to(self, device: torch.device | str) -> "Escapes":
        """Return the same escapes on another device."""
        return Escapes(pair=self.pair.to(device), i=self.i.to(device), j=self.j.to(device))
