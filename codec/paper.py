"""The published codec of Hyper-Compression (arXiv 2507.08765), as profile `paper`.

Two weights (x, y) become one integer: the step number theta of the nearest point of a trajectory that winds
around a square box of side l = 0.1 about the mean pair c. With U = n * n steps, n = 35 or 40,

    node(theta) = c - l/2 + (l * theta / U,  (l * theta / n) mod l),      theta = 0 .. U - 1,

a sheared lattice: theta = i * n + j is in row j at y = j * l/n, and in column i at x = (i + j/n) * l/n. A
pair outside the box belongs to a ring k = 1..K of outer radius r_k = l/2 + k * (|far - c| - l/2) / K, where
far is the pair farthest from c; it is shrunk towards c by (l/2) / r_k. Stored is theta + U * k.

Toy: n = 35, c = (0, 0), pair (0.012, -0.021). In steps of l/n from the corner u = 21.70, v = 10.15, so rows
10 and 11 are the candidates. The nodes of row 10 are at i + 10/35, of which i = 21 is nearest; row 11 is
farther away: theta = 21 * 35 + 10 = 745, which decodes to (0.010816, -0.021429).

U and K are the first of (1225, 1), (1225, 2), .. (1600, 3) with a mean absolute error of at most 0.001, else
the best K at U = 1600; K = 0 if no pair is outside. With an error above 0.006 the tensor stays raw.

The nearest node is found in closed form, but with the rounding of the published code, which compares float32
distances expanded about the origin: |p|^2 - 2 p.q + |q|^2. Around c = (1, 1) this changes about 3 % of the
choices that exact distances would make. Farther than about 5 from the origin, rounding exceeds the step of the
lattice, and the published code picks nodes beyond the four neighbours compared here.

Shapes: P = pairs, U = nodes, C = U * (K + 1) codes, 2 = the coordinates of a pair.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.errors import CodecError, FormatError, TensorError
from birkhoff.codec.metrics import fidelity, to_host
from birkhoff.codec.profiles import PUBLISHED_ERROR_LIMIT

BOX_SIDE = 0.1  # l, in the weights' own unit, whatever their scale
MAX_RINGS = 3
ERROR_GOAL = 0.001  # mean absolute error at which the search for U and K stops
MIN_ELEMENTS = 10  # smaller tensors stay raw
_FARTHEST = 2.0**60  # from here on squared distances leave float32's range

STEP = {
    1225: (8.163265738403425e-05, 0.002857143059372902),
    1600: (6.250001024454832e-05, 0.002500000176951289),
}
"""One step of the trajectory as the published code computes it in float32, through a unit vector. It differs from l/U
and l/n by an ulp or two. Over U steps and a ring 20 times the box that becomes 5e-6 of a weight."""

_BLOCK = {"cpu": 1 << 13, "cuda": 1 << 21}
"""Pairs coded together. On a CPU the four candidates of a block fit in cache, and below this size torch uses one
thread per operation, as many workers share the cores. Divisible by eight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCode:
    """One tensor as the published codec stores it.

    Attributes:
        index: int32 [P], theta + U * k of every pair; k = 0 inside the box.
        U: nodes of the trajectory, 1225 or 1600.
        K: rings beyond the box, 0..3.
        bits: bits of a pair in `packed`, the bit length of the greatest index, at least 1.
        centre: float32 [2], the mean pair.
        far: float32 [2], the pair farthest from the centre.
        shape: shape of the weight.
        per_row: pairs do not cross rows (weights of linear layers).
        padded: the count (`per_row`: of a row) is odd; the last pair holds one coordinate that is no weight.
        mean_abs_error: over all coordinates, padding included, in the weights' unit.
    """

    index: Tensor
    U: int
    K: int
    bits: int
    centre: Tensor
    far: Tensor
    shape: tuple[int, ...]
    per_row: bool
    padded: bool
    mean_abs_error: float

    def packed(self) -> bytes:
        """Return the indices as one big-endian bit string, with zero bits in front up to a whole byte."""
        return pack_bits(self.index.cpu().numpy(), self.bits)

    @classmethod
    def from_packed(
        cls,
        data: bytes,
        *,
        U: int,
        K: int,
        bits: int,
        centre: Tensor,
        far: Tensor,
        shape: tuple[int, ...],
        per_row: bool,
        mean_abs_error: float = math.nan,
    ) -> Self:
        """Read the output of `packed`, onto the CPU. Raises FormatError for bytes or parameters out of range."""
        if U not in STEP or not 0 <= K <= MAX_RINGS:
            raise FormatError(f"paper code: expected U of {[*STEP]} and K of 0..{MAX_RINGS}, got {U} and {K}")
        for name, point in (("centre", centre), ("far", far)):
            if point.shape != (2,) or point.dtype != torch.float32 or not point.isfinite().all():
                raise FormatError(f"paper code: {name} must be two finite float32, got {point}")
        count, padded = _pair_count(shape, per_row=per_row)
        index = torch.from_numpy(unpack_bits(data, count, bits).astype(np.int64))
        if count and int(index.max()) >= U * (K + 1):
            raise FormatError(f"paper code: expected indices below {U * (K + 1)}, got {int(index.max())}")
        return cls(
            index=index.int(),
            U=U,
            K=K,
            bits=bits,
            centre=centre,
            far=far,
            shape=tuple(shape),
            per_row=per_row,
            padded=padded,
            mean_abs_error=mean_abs_error,
        )


def encode(weight: Tensor, *, per_row: bool) -> PaperCode | None:
    """Code a weight of any floating dtype, in float32 on its own device. Returns None if it stays raw.

    `per_row` pairs weights within the rows of a matrix, as the published codec does for linear layers; otherwise pairs
    are consecutive elements in row-major order. An odd count is filled with the mean second coordinate of the whole
    pairs. (Per row, the published code intends the same, but raises a TypeError.) Raw stay: tensors of fewer than 10
    elements, those with a mean error above 0.006, `per_row` matrices of one column, which have no such mean, and
    weights from 2**60, at which nodes and rings exceed float32.

    Raises TensorError for NaN or Inf, CodecError for an unsupported dtype or rank.
    """
    if not weight.is_floating_point():
        raise CodecError(f"paper codec: expected a floating-point weight, got {weight.dtype}; keep it raw")
    shape = list(weight.shape)
    if per_row and weight.dim() != 2:
        raise CodecError(f"paper codec: per_row expects a matrix, got {shape}; use per_row=False")
    if weight.numel() < MIN_ELEMENTS or (per_row and weight.shape[1] == 1):
        return None
    if not weight.isfinite().all():
        raise TensorError(f"paper codec: weight {shape} holds NaN or Inf; repair the checkpoint")
    if max(map(abs, to_host(*torch.aminmax(weight)))) >= _FARTHEST:
        return None
    pair_P2 = _pairs(weight.detach().float(), per_row=per_row)
    box = _Box.around(pair_P2)
    trial = _search(pair_P2, box)
    if trial.error > PUBLISHED_ERROR_LIMIT:
        return None
    return PaperCode(
        index=trial.index,
        U=trial.U,
        K=trial.K,
        bits=max(1, int(trial.index.max()).bit_length()),
        centre=box.centre,
        far=box.far,
        shape=tuple(weight.shape),
        per_row=per_row,
        padded=pair_P2.numel() != weight.numel(),
        mean_abs_error=trial.error,
    )


def decode(code: PaperCode) -> Tensor:
    """Return the float32 weight of a code, in its own shape, on the device of its indices."""
    device = code.index.device
    centre, far = code.centre.to(device), code.far.to(device)
    codebook_C2 = _codebook(trajectory(code.U, centre), centre, _radii(centre, far, code.K))
    flat = codebook_C2.index_select(0, code.index).flatten()
    if not code.padded:
        return flat.view(code.shape)
    if code.per_row:
        rows, columns = code.shape
        return flat.view(rows, columns + 1)[:, :-1].contiguous()
    return flat[:-1].view(code.shape)


def published_error(weight: Tensor, *, per_row: bool) -> float | None:
    """Return the SQNR in dB, 10*log10(sum w^2 / sum (w - w')^2), of the published codec; None if the tensor stays raw.

    It is -inf for a weight of zeros, since no node is at the centre. Raises as `encode`.
    """
    code = encode(weight, per_row=per_row)
    return None if code is None else fidelity(weight.detach(), decode(code)).sqnr_db


def trajectory(U: int, centre: Tensor) -> Tensor:
    """Return all nodes about a centre, float32 [U, 2], bit for bit those of the published code. U is 1225 or 1600."""
    theta_U = torch.arange(U, dtype=torch.float32, device=centre.device)
    x_U, y_U = (theta_U * step % _side(centre) for step in STEP[U])
    return torch.stack([x_U, y_U], dim=1) + (centre - _side(centre) / 2)


def nearest_node(point_P2: Tensor, node_U2: Tensor) -> Tensor:
    """Return the nearest of the n * n nodes of a `trajectory`, int32 [P], at a cost independent of n.

    With v as the height above the lowest row in steps, the candidates are rows floor(v) and floor(v) + 1, and in each
    row the two nodes beside the point. Points outside the box get the nearest node of its edge, ties the lowest step.
    """
    n = math.isqrt(len(node_U2))
    beside = torch.arange(2, device=point_P2.device)
    u_P, v_P = ((point_P2 - node_U2[0]) * (n / BOX_SIDE)).unbind(1)
    row_2P = (v_P.floor() + beside[:, None]).clamp_(0, n - 1)
    column_22P = ((u_P - row_2P / n).floor() + beside[:, None, None]).clamp_(0, n - 1)
    theta_4P = column_22P.mul_(n).add_(row_2P).flatten(0, 1).int()
    distance_4P = _expanded_distance(point_P2, node_U2, theta_4P)
    return theta_4P.masked_fill_(distance_4P > distance_4P.amin(0), len(node_U2)).amin(0)


def pack_bits(index: np.ndarray[Any, Any], bits: int) -> bytes:
    """Pack integers [P] below 2**bits, bits = 1..32, as one big-endian bit string with zero bits in front.

    Toy: 1, 2, 3 in 3 bits are 001 010 011; with 7 bits in front, the bytes 00 53. Raises CodecError for integers that
    do not fit.
    """
    if not 1 <= bits <= 32:
        raise CodecError(f"pack_bits: expected 1..32 bits, got {bits}")
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < 1 << bits:
        raise CodecError(f"pack_bits: {index.min()}..{index.max()} do not fit {bits} bits; pass more bits")
    # Eight integers end on a byte: fill up to a multiple of eight in front, then drop the surplus zero bytes.
    fill = -len(index) % 8
    full = np.concatenate([np.zeros(fill, np.uint32), index.astype(np.uint32)])
    blocks = (full[start : start + _BLOCK["cpu"]] for start in range(0, len(full), _BLOCK["cpu"]))
    planes = (np.unpackbits(block.astype(">u4").view(np.uint8)).reshape(-1, 32) for block in blocks)
    return b"".join(np.packbits(plane[:, -bits:]).tobytes() for plane in planes)[fill * bits // 8 :]


def unpack_bits(data: bytes, count: int, bits: int) -> np.ndarray[Any, Any]:
    """Read the `count` integers of `bits` = 1..32 bits that `pack_bits` wrote, uint32 [count].

    Raises FormatError if the length is wrong or a bit in front of them is set.
    """
    if not 1 <= bits <= 32:
        raise FormatError(f"packed index: expected 1..32 bits, got {bits}")
    size = (count * bits + 7) // 8
    if len(data) != size:
        raise FormatError(f"packed index: {count} x {bits} bits take {size} bytes, got {len(data)}")
    fill = -count % 8
    stream = np.frombuffer(bytes(fill * bits // 8) + data, np.uint8)
    full = np.empty(fill + count, np.uint32)
    for start in range(0, len(full), _BLOCK["cpu"]):
        part = full[start : start + _BLOCK["cpu"]]
        plane = np.zeros((len(part), 32), np.uint8)
        first = start // 8 * bits
        plane[:, -bits:] = np.unpackbits(stream[first : first + len(part) // 8 * bits]).reshape(-1, bits)
        part[:] = np.packbits(plane).view(">u4")
    if full[:fill].any():
        raise FormatError("packed index: expected zero bits in front, got a set one; the data is damaged")
    return full[fill:]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """The pairs' mean and farthest pair, float32 [2] each, and which pairs are outside the box, bool [P]."""

    centre: Tensor
    far: Tensor
    outside: Tensor

    @classmethod
    def around(cls, pair_P2: Tensor) -> Self:
        # Sums in float64, so that every device rounds to the same centre and writes the same bytes.
        total = torch.stack([part.sum(0, dtype=torch.float64) for part in _blocks(pair_P2)]).sum(0)
        centre = (total / len(pair_P2)).float()
        low, high = centre - _side(centre) / 2, centre + _side(centre) / 2
        distance_P = _norm(pair_P2 - centre)
        return cls(
            centre=centre,
            far=pair_P2[distance_P.argmax()].clone(),
            outside=((pair_P2 < low) | (pair_P2 > high)).any(dim=1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """The indices, int32 [P], under one U and K, and their mean absolute error."""

    U: int
    K: int
    index: Tensor
    error: float


def _search(pair_P2: Tensor, box: _Box) -> _Trial:
    """Return the trial of the first U that meets the goal, or of the last U."""
    for U in STEP:
        trial = _best_rings(pair_P2, box, U) if box.outside.any() else _without_rings(pair_P2, box, U)
        if trial.error <= ERROR_GOAL:
            break
    return trial


def _without_rings(pair_P2: Tensor, box: _Box, U: int) -> _Trial:
    index, error = _code(pair_P2, box, U, 0, outside=False)
    return _Trial(U=U, K=0, index=index, error=error / pair_P2.numel())


def _best_rings(pair_P2: Tensor, box: _Box, U: int) -> _Trial:
    """Try increasing K until the goal is met, else return the best. Pairs inside the box are coded only once."""
    inner_P2, outer_P2 = pair_P2[~box.outside], pair_P2[box.outside]
    inner, inner_error = _code(inner_P2, box, U, 1, outside=False)
    trials: list[tuple[float, int, Tensor]] = []
    for K in range(1, MAX_RINGS + 1):
        outer, outer_error = _code(outer_P2, box, U, K, outside=True)
        trials.append(((inner_error + outer_error) / pair_P2.numel(), K, outer))
        if trials[-1][0] <= ERROR_GOAL:
            break
    error, K, outer = min(trials, key=lambda trial: (trial[0], -trial[1]))
    index = box.outside.new_empty(len(pair_P2), dtype=torch.int32)
    index[~box.outside], index[box.outside] = inner, outer
    return _Trial(U=U, K=K, index=index, error=error)


def _code(pair_P2: Tensor, box: _Box, U: int, K: int, *, outside: bool) -> tuple[Tensor, float]:
    """Code pairs that are all outside, or all inside, the box. Returns indices int32 [P] and the sum of absolute
    errors."""
    radii, node_U2 = _radii(box.centre, box.far, K), trajectory(U, box.centre)
    codebook_C2 = _codebook(node_U2, box.centre, radii)
    index_P = pair_P2.new_empty(len(pair_P2), dtype=torch.int32)
    error = pair_P2.new_zeros((), dtype=torch.float64)
    for pair, index in zip(_blocks(pair_P2), _blocks(index_P), strict=True):
        if outside:
            offset = pair - box.centre
            ring = torch.bucketize(_norm(offset), radii)
            point = offset * (radii[0] / radii)[ring, None] + box.centre
            index.copy_(nearest_node(point, node_U2) + U * ring)
        else:
            # With rings, the published code goes to the centre and back, which rounds.
            index.copy_(nearest_node(pair if K == 0 else pair - box.centre + box.centre, node_U2))
        error += (codebook_C2.index_select(0, index) - pair).abs_().sum(dtype=torch.float64)
    return index_P, float(error)


def _expanded_distance(point_P2: Tensor, node_U2: Tensor, theta_4P: Tensor) -> Tensor:
    """Return distances [4, P] from points to candidate nodes, rounded as those of a float32 matrix product.

    That is sqrt(fma(-2 py, qy, -2 px qx) + |p|^2 + |q|^2). The root is needed: it merges neighbouring values into ties.
    """
    px, py = (-2 * point_P2).unbind(1)
    candidate = theta_4P.flatten()
    planes = torch.stack([*node_U2.unbind(1), node_U2.square().sum(1)])
    qx, qy, q_square = (plane.index_select(0, candidate).view(theta_4P.shape) for plane in planes)
    # In float64 the product is exact, so this rounds once.
    cross_4P = torch.addcmul((px * qx).double(), py.double(), qy.double()).float()
    return cross_4P.add_(point_P2.square().sum(1)).add_(q_square).clamp_(min=0).sqrt_()


def _norm(pair_P2: Tensor) -> Tensor:
    """Return the length of every pair, float32 [P]. Each operation rounds separately, so all devices agree."""
    x, y = pair_P2.square().unbind(1)
    return (x + y).sqrt_()


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return views of up to a block of pairs each."""
    parts: tuple[Tensor, ...] = tensor.split(_BLOCK["cpu" if tensor.device.type == "cpu" else "cuda"])
    return parts


def _side(like: Tensor) -> Tensor:
    """Return the side of the box, a float32 scalar on the device of `like`. Halve it in float32: a float64 half
    differs."""
    return like.new_tensor(BOX_SIDE, dtype=torch.float32)


def _radii(centre: Tensor, far: Tensor, K: int) -> Tensor:
    """Return the radius of the box's own circle and of the K rings, float32 [K + 1]."""
    half = _side(centre) / 2
    farthest = _norm((far - centre)[None])
    if K == 0:
        return half[None]
    # Divide by a tensor: CUDA multiplies by the reciprocal of a plain number, which rounds otherwise.
    width = (farthest - half) / torch.full_like(farthest, K)
    inner = torch.arange(K, device=centre.device) * width + half
    return torch.cat([inner, farthest])


def _codebook(node_U2: Tensor, centre: Tensor, radii: Tensor) -> Tensor:
    """Return every pair that an index can decode to, float32 [C, 2]."""
    if len(radii) == 1:
        return node_U2
    shrink = (radii[0] / radii)[:, None, None]
    return ((node_U2 - centre) / shrink + centre).flatten(0, 1)


def _pair_count(shape: tuple[int, ...], *, per_row: bool) -> tuple[int, bool]:
    """Return the number of pairs of a shape, and whether they hold padding.

    Raises:
        FormatError: Pairs are per row, but the shape is not a matrix.
    """
    if per_row and len(shape) != 2:
        raise FormatError(f"paper code: expected a matrix for per_row, got shape {list(shape)}")
    rows = shape[0] if per_row else 1
    row = shape[1] if per_row else math.prod(shape)
    return rows * ((row + 1) // 2), row % 2 == 1


def _pairs(weight: Tensor, *, per_row: bool) -> Tensor:
    """Pair up a float32 weight, [P, 2], filling odd counts with the mean of the second coordinates."""
    rows = weight if per_row else weight.reshape(1, -1)
    if rows.shape[1] % 2:
        fill = rows[:, 1::2].mean(dtype=torch.float64).float()
        rows = torch.cat([rows, fill.expand(len(rows), 1)], dim=1)
    return rows.reshape(-1, 2)
