"""The packed in-memory form: 10 or 12 bits per pair, and a scale for every 64 pairs of a row.

If memory matters more than fidelity, the uint16 step numbers (8 bits per weight) are coded again on a shorter
trajectory with n = 2^(bits/2) rows, so n = 32 or 64, and a scale byte c for each group of 64 pairs (128 weights):

    theta = n * (I + n/2) + (J + n/2),    s = step * (1 + (c mod 16)/16) * 2^(floor(c/16) - 15)
    x = s * (I + J/n),    y = s * J

This is the formula of `trajectory` with n for 256 and the group's s for h: 5.06 or 6.06 bits per weight. c is an
unsigned float with four exponent and four mantissa bits, so computing s takes one shift and one product. The loss adds
to that of the stored code: normally distributed weights keep 25.7 dB with 10 bits, 31.7 dB with 12. Escapes far above
the rest of their group stay escapes and stay exact. The group's scale codes the others.

Worked example, n = 32, step 1, c = 0xf8: s = 1 + 8/16 = 1.5. The pair (2.9, -4.6) has v = -3.07, so J = -3, and u -
J/32 = 1.933 + 0.094, so I = 2: theta = 32 * 18 + 13 = 589, decoded to (1.5 * (2 - 3/32), -4.5) = (2.859375, -4.5).

The low eight bits of a pair are a byte of one plane. Its 2 or 4 high bits share a byte of a second plane with those of
its neighbours, the first pair in the lowest bits, so no code straddles bytes.

Shapes: R = rows, K = columns, P = pairs per row, G = groups per row = ceil(P / 64), H = bytes of high bits per row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from birkhoff.codec.errors import CodecError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.pairs import join
from birkhoff.codec.trajectory import Escapes, position

Bits = Literal[10, 12]

GROUP = 64
"""Pairs that share a scale."""

_CHUNK = 1 << 16
"""Pairs coded together on a CPU. A GPU takes `_CHUNK_GPU`, which needs about 100 MB."""

_CHUNK_GPU = 1 << 20

_EXPONENT = 127 - 15
"""Offset from the exponent field of c to that of a float32."""

_CANDIDATES = (1, 0, -1, -2)
"""Scales tried, relative to the least one that clips nothing. Clipping a few weights makes the step smaller for all
others."""


_TOWERS = 4.0
"""An escape above this multiple of its group's greatest other weight stays an escape: coded, it would cost the
others 12 dB."""

_FEW = 4
"""Escapes that a group may keep. Each takes 24 bytes, the group 81 or 97."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A matrix [R, K], K = `columns`, at `bits` per pair.

    `low` is uint8 [R, P], `high` uint8 [R, H], `scale` uint8 [R, G], `step` a float in the unit of the weights. Values
    `escape_value` (float32 [E]) replace the decoded ones at `escape_index` (int64 [E], row*K + column, increasing).
    """

    bits: Bits
    low: Tensor
    high: Tensor
    scale: Tensor
    step: float
    columns: int
    escape_index: Tensor
    escape_value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.low, self.high, self.scale, self.escape_index, self.escape_value))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [R, K] in `dtype`, on the device of the planes."""
        rows, count = self.low.shape
        out = torch.empty(rows, self.columns, dtype=dtype, device=self.low.device)
        for row in _chunks(rows, count, self.low.device):
            i, j = _coordinates(_theta(self.low[row], self.high[row], self.bits), self.bits)
            step = scales(self.scale[row], self.step).repeat_interleave(GROUP, dim=1)[:, :count]
            join(*position(i, j, step, rows_of(self.bits)), self.columns, out=out[row])
        if self.escape_index.numel():
            out.view(-1)[self.escape_index] = self.escape_value.to(dtype)
        return out


def rows_of(bits: int) -> int:
    """Return n, the rows of the trajectory of 2^bits steps."""
    return 1 << bits // 2


def scales(code: Tensor, step: float | Tensor) -> Tensor:
    """Return s, float32, of scale bytes c of any shape."""
    s: Tensor = ((code.to(torch.int32) + (_EXPONENT << 4)) << 19).view(torch.float32) * step
    return s


def pack(code: LatticeTensor, bits: Bits) -> PackedTensor:
    """Return the packed form of a coded matrix, on its device. It is equal on all devices.

    Packing is lossy: compare `decode()` of both.

    Raises:
        CodecError: `bits` is neither 10 nor 12.
    """
    if bits not in (10, 12):
        raise CodecError(f"packed form of {bits} bits a pair: expected 10 or 12")
    rows, count = code.i.shape
    kept, placed = _sort_escapes(code)
    limit, n = max(_greatest(code), placed.greatest()), rows_of(bits)
    # The greatest scale is 31/16 of the step and must reach the greatest weight, half a step beyond a node.
    step = _float32(limit / (n / 2 - 0.5) * 16 / 31) if limit else code.step
    low = torch.empty(rows, count, dtype=torch.uint8, device=code.i.device)
    high = low.new_empty(rows, high_bytes(count, bits))
    scale = low.new_empty(rows, -(-count // GROUP))
    for row in _chunks(rows, count, low.device):
        planes = position(code.i[row], code.j[row], code.step)
        placed.put_into(planes, row)
        x, y = map(_grouped, planes)
        scale[row] = _best_scale(x, y, step, n)
        theta = _nearest(x, y, scales(scale[row], step)[..., None], n).flatten(1)[:, :count]
        low[row] = (theta & 255).to(torch.uint8)
        high[row] = _pack_high(theta >> 8, bits)
    index, value = replace(code, escapes=kept).escaped_weights()
    return PackedTensor(
        bits=bits,
        low=low,
        high=high,
        scale=scale,
        step=step,
        columns=code.columns,
        escape_index=index,
        escape_value=value,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """Escapes that are coded like other pairs: flat indices `pair` (increasing) and weights `x` and `y`."""

    pair: Tensor
    x: Tensor
    y: Tensor

    def greatest(self) -> float:
        return float(torch.stack((self.x, self.y)).abs().max()) if self.pair.numel() else 0.0

    def put_into(self, planes: tuple[Tensor, Tensor], row: slice) -> None:
        count = planes[0].shape[1]
        ends = self.pair.new_tensor([row.start * count, row.stop * count])
        first, last = torch.searchsorted(self.pair, ends).tolist()
        place = self.pair[first:last] - row.start * count
        for plane, values in zip(planes, (self.x, self.y), strict=True):
            plane.view(-1)[place] = values[first:last]


def _sort_escapes(code: LatticeTensor) -> tuple[Escapes, _Placed]:
    """Split escapes into those that stay escapes, because they are few and far above their group, and the rest."""
    escapes, count = code.escapes, code.i.shape[1]
    x, y = position(escapes.i, escapes.j, code.step)
    at = escapes.pair % count
    around = ((at // GROUP * GROUP)[:, None] + torch.arange(GROUP, device=at.device)).clamp_(max=count - 1)
    row = (escapes.pair // count)[:, None]
    others = torch.stack(position(code.i[row, around], code.j[row, around], code.step))
    inside = torch.maximum(x.abs(), y.abs()) <= _TOWERS * others.abs().amax((0, 2))
    group = escapes.pair // count * -(-count // GROUP) + at // GROUP
    _, member, towers = torch.unique(group[~inside], return_inverse=True, return_counts=True)
    inside[~inside] = (towers > _FEW)[member]
    pair, i, j = (column[~inside] for column in (escapes.pair, escapes.i, escapes.j))
    return Escapes(pair=pair, i=i, j=j), _Placed(pair=escapes.pair[inside], x=x[inside], y=y[inside])


def high_bytes(pairs: int, bits: int) -> int:
    """Return H, the bytes that hold the high bits of a row of pairs."""
    return -(-pairs * (bits - 8) // 8)


def _chunks(rows: int, pairs: int, device: torch.device) -> Iterator[slice]:
    height = max(1, (_CHUNK if device.type == "cpu" else _CHUNK_GPU) // max(1, pairs))
    return (slice(top, min(top + height, rows)) for top in range(0, rows, height))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _greatest(code: LatticeTensor) -> float:
    """Return an upper bound of the |weight| that the planes hold. No group's scale exceeds it."""
    if not code.i.numel():
        return 0.0
    low_i, high_i = (float(bound) for bound in torch.aminmax(code.i))
    low_j, high_j = (float(bound) for bound in torch.aminmax(code.j))
    shear = max(-low_j, high_j) / 256
    return code.step * max(max(-low_i, high_i) + shear, -low_j, high_j)


def _grouped(plane_RP: Tensor) -> Tensor:
    """Return the plane as [R, G, 64], padded with zeros."""
    grouped: Tensor = pad(plane_RP, (0, -plane_RP.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    return grouped


def _best_scale(x: Tensor, y: Tensor, step: float, n: int) -> Tensor:
    """Return the scale byte [R, G] with the least squared error among the candidates, ignoring the trajectory's
    shear."""
    greatest = torch.maximum(x.abs().amax(-1), y.abs().amax(-1))
    # Multiply, because a GPU divides by a number through its reciprocal, which rounds differently.
    wanted = (greatest.to(torch.float64) * (1 / ((n / 2 - 0.5) * step))).to(torch.float32)
    least = (wanted.view(torch.int32) >> 19) - (_EXPONENT << 4) + 1  # the float's bits down to c's last, plus one
    best = torch.zeros_like(least)
    smallest = torch.full_like(greatest, torch.inf, dtype=torch.float64)
    for offset in _CANDIDATES:
        candidate = (least + offset).clamp_(0, 255)
        s = scales(candidate, step)
        error = sum(_rounding(plane / s[..., None], n) for plane in (x, y)) * s.square()
        better = error < smallest
        best, smallest = torch.where(better, candidate, best), torch.where(better, error, smallest)
    return best.to(torch.uint8)


def _rounding(u: Tensor, n: int) -> Tensor:
    """Return the squared error of rounding to -n/2..n/2-1, summed over a group, independent of the order of
    additions."""
    return u.sub_(u.round().clamp_(-n // 2, n // 2 - 1)).square_().sum(-1, dtype=torch.float64)


def _nearest(x: Tensor, y: Tensor, s: Tensor, n: int) -> Tensor:
    """Return int32 step numbers of the nearest nodes inside the box, from two candidate rows."""
    low, high = -n // 2, n // 2 - 1
    u, v = x / s, y / s
    below = torch.floor(v)
    found = []
    for row in (below, below + 1):
        j = row.clamp(low, high)
        across = u - j / n
        i = across.round().clamp_(low, high)
        found.append((i, j, (across - i).square_().add_((v - j).square_())))
    (i0, j0, e0), (i1, j1, e1) = found
    upper = e1 < e0
    i, j = torch.where(upper, i1, i0), torch.where(upper, j1, j0)
    return ((i - low) * n + (j - low)).to(torch.int32)


def _pack_high(high_RP: Tensor, bits: int) -> Tensor:
    width = bits - 8
    share = 8 // width
    parts = pad(high_RP, (0, -high_RP.shape[1] % share)).unflatten(1, (-1, share))
    shift = torch.arange(0, 8, width, device=high_RP.device)
    packed: Tensor = (parts << shift).sum(-1).to(torch.uint8)
    return packed


def _theta(low_RP: Tensor, high_RH: Tensor, bits: int) -> Tensor:
    """Return int32 step numbers [R, P] from the two planes."""
    width = bits - 8
    shift = torch.arange(0, 8, width, device=high_RH.device)
    parts = (high_RH[..., None].to(torch.int32) >> shift) & ((1 << width) - 1)
    return (parts.flatten(1)[:, : low_RP.shape[1]] << 8) | low_RP


def _coordinates(theta: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    n = rows_of(bits)
    return (theta >> bits // 2) - n // 2, (theta & (n - 1)) - n // 2
