"""Bits a weight from 6 to 36 dB, ours and those of the nearest published methods, beside Shannon's bound.

*Retention* is Shannon's bits over the bits used. The bound is that of weights which are independent of each other given
the levels of their rows and columns (see `codec.contexts`): with h_g the differential entropy of each group's histogram
and D the mean squared error, the mean over the weights of max(0, h_g - log2(2 pi e D) / 2), which no code can go below
(C. Shannon, "Coding theorems for a discrete source with a fidelity criterion", 1959). Of Gaussian weights: dB / 6.02.

EntQuant is P. Putzky et al., "Float8@2bits" (arXiv 2601.22787): each row's scale is the one of least relative L1 error
plus lambda times the mean |symbol|; symbols are int8, coded at their entropy by an ideal ANS coder whose table costs
nothing; lambda is what reaches the target. "Dynamics as Code" orders the cells of a square by Hilbert's curve and
gives each pair of weights the number of its cell, of fixed length: odd lengths are the first bits of the next even one.

Shapes: R = rows, K = columns, S = scales tried.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import budget
from birkhoff.codec.container import serialise
from birkhoff.codec.metrics import bulk, fidelity
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor
from tests.codec.by_profile import encode_tensor
from tests.harness.benchmarks import common
from tests.harness.benchmarks.measure import WrongResultError

TARGETS_DB = (6.0, 12.0, 15.0, 18.0, 24.0, 30.0, 36.0)
MOST_CELL_BITS = 20
"""Of a pair's number in Hilbert's order."""

_SCALES = 2.0 ** (torch.arange(0, 65) / 8)
"""Scales that EntQuant's search tries for a row, over the one at which its greatest weight is 127."""

Ints = npt.NDArray[np.int64]


def table(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """For each target: the bound, and bits and retention of each coder, all over all weights of the matrices."""
    weights = sum(tensor.numel() for tensor in tensors.values())
    rows = [dict.fromkeys(("shannon", "paths", "single", "entquant", "hilbert"), 0.0) for _ in TARGETS_DB]
    for name, tensor in tensors.items():
        costs = _entquant_costs(tensor)
        for target, found in zip(TARGETS_DB, rows, strict=True):
            found["shannon"] += shannon_bits(tensor, target)
            found["paths"] += ours(name, tensor, target, path=True)
            found["single"] += ours(name, tensor, target, path=False)
            found["entquant"] += entquant(tensor, target, costs)
            found["hilbert"] += hilbert(tensor, target)
    bits = [{key: value / weights for key, value in found.items()} for found in rows]
    return [{"target_db": target, **found} for target, found in zip(TARGETS_DB, bits, strict=True)]


def ours(name: str, tensor: Tensor, target_db: float, *, path: bool) -> float:
    """Bits of a container of the one tensor, which decodes to its target."""
    profile = replace(PROFILES["balanced"], target_db=target_db, path=path, allocation="uniform")
    stored = encode_tensor(name, tensor, profile).tensor
    reached = fidelity(tensor, decode_tensor(stored)).sqnr_db
    if not reached >= target_db:
        raise WrongResultError(f"{name}: {reached:.2f} dB, the target was {target_db:g}")
    return 8 * len(serialise([stored]))


def shannon_bits(weight_RK: Tensor, target_db: float) -> float:
    """Bits of a matrix at an SQNR that no code of independent weights can go below."""
    found = budget._histograms(weight_RK)
    error = found.rms**2 * 10 ** (-target_db / 10)
    total = 0.0
    for counts, size in zip(found.counts, found.sizes, strict=True):
        used = counts[counts > 0]
        share = used / used.sum()
        bits = -float(share @ np.log2(share)) + (len(used) - 1) / (2 * float(used.sum()) * math.log(2))
        entropy = bits + math.log2(found.step)
        total += size * max(0.0, entropy - 0.5 * math.log2(2 * math.pi * math.e * error))
    return total


def entquant(weight_RK: Tensor, target_db: float, costs: tuple[Tensor, Tensor] | None = None) -> float:
    """Bits of a matrix by EntQuant at an SQNR, scales of 16 bits a row included."""
    costs = costs or _entquant_costs(weight_RK)
    low, high = 0.0, 64.0  # lambda
    best = math.inf
    for _ in range(24):
        middle = math.sqrt(low * high) if low else high / 1e6
        db, bits = _entquant_at(weight_RK, costs, middle)
        if db >= target_db:
            low, best = middle, min(best, bits)
        else:
            high = middle
    return best


def _entquant_scales(weight_RK: Tensor) -> Tensor:
    """Scales [R, S] that are tried."""
    return weight_RK.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127 * _SCALES


def _entquant_costs(weight_RK: Tensor) -> tuple[Tensor, Tensor]:
    """(relative L1 error, mean |symbol|), [R, S] each."""
    scales, norm = _entquant_scales(weight_RK), weight_RK.abs().mean(1).clamp(min=1e-30)
    errors, sizes = [], []
    for scale in scales.T:
        q = torch.round(weight_RK / scale[:, None])
        errors.append((weight_RK - q * scale[:, None]).abs().mean(1) / norm)
        sizes.append(q.abs().mean(1))
    return torch.stack(errors, 1), torch.stack(sizes, 1)


def _entquant_at(weight_RK: Tensor, costs: tuple[Tensor, Tensor], strength: float) -> tuple[float, float]:
    """(SQNR in dB, bits) of the scales that one lambda chooses."""
    best = (costs[0] + strength * costs[1]).argmin(1, keepdim=True)
    scale = _entquant_scales(weight_RK).gather(1, best)
    symbols = torch.round(weight_RK / scale)
    db = fidelity(weight_RK, symbols * scale).sqnr_db
    _, counts = torch.unique(symbols, return_counts=True)
    share = counts.double() / symbols.numel()
    return db, symbols.numel() * float(-(share * share.log2()).sum()) + 16 * len(weight_RK)


def hilbert(weight_RK: Tensor, target_db: float) -> float:
    """Bits of a matrix by numbers of fixed length in Hilbert's order, the box (16 bits) included."""
    energy = float(weight_RK.square().sum())
    limit = bulk(weight_RK, energy).energy * 10 ** (-target_db / 10)
    for bits in range(1, MOST_CELL_BITS + 1):
        decoded = hilbert_decode(hilbert_encode(weight_RK, bits), bits, weight_RK.numel()).view(weight_RK.shape)
        if float((weight_RK - decoded).square().sum()) <= limit:
            return bits * -(-weight_RK.numel() // 2) + 16
    return 32.0 * weight_RK.numel()


def hilbert_encode(weight: Tensor, bits: int) -> tuple[bytes, float]:
    """(numbers of `bits` bits, side of the box) of consecutive pairs."""
    flat = weight.reshape(-1).double()
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    box = float(flat.abs().max()) or 1.0
    order = -(-bits // 2)
    cells = torch.floor((flat / box + 1) / 2 * (1 << order)).clamp(0, (1 << order) - 1).long().view(-1, 2).numpy()
    number = _hilbert_number(cells[:, 0], cells[:, 1], order) >> (2 * order - bits)
    return _pack(number, bits), box


def hilbert_decode(coded: tuple[bytes, float], bits: int, count: int) -> Tensor:
    """The weights of `hilbert_encode`: the centre of what the cells of one number cover."""
    data, box = coded
    number, order = _unpack(data, bits, -(-count // 2)), -(-bits // 2)
    dropped = 2 * order - bits
    points = [np.stack(_hilbert_place((number << dropped) + k, order), 1) for k in range(1 << dropped)]
    centre = (np.mean(points, axis=0) + 0.5) / (1 << order) * 2 - 1
    return torch.from_numpy(centre.reshape(-1)[:count] * box).float()


def _hilbert_number(x: Ints, y: Ints, order: int) -> Ints:
    """Numbers of the cells (x, y) of a square of 2^order cells a side along Hilbert's curve."""
    x, y, number = x.copy(), y.copy(), np.zeros_like(x)
    for level in range(order - 1, -1, -1):
        side = 1 << level
        right, upper = (x & side) > 0, (y & side) > 0
        number += side * side * np.where(right, np.where(upper, 2, 3), np.where(upper, 1, 0))
        x, y = _turn(x & (side - 1), y & (side - 1), side, right, upper)
    return number


def _hilbert_place(number: Ints, order: int) -> tuple[Ints, Ints]:
    """The cells of numbers."""
    x, y, left = np.zeros_like(number), np.zeros_like(number), number.copy()
    for level in range(order):
        side = 1 << level
        quarter, left = left & 3, left >> 2
        right, upper = quarter >= 2, (quarter == 1) | (quarter == 2)
        x, y = _turn(x, y, side, right, upper)
        x, y = x + side * right, y + side * upper
    return x, y


def _turn(x: Ints, y: Ints, side: int, right: npt.NDArray[np.bool_], upper: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """The lower quarters are mirrored at a diagonal."""
    flip = right & ~upper
    x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
    return np.where(upper, x, y), np.where(upper, y, x)


def _pack(number: Ints, bits: int) -> bytes:
    places = (number[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(places.astype(np.uint8).reshape(-1)).tobytes()


def _unpack(data: bytes, bits: int, count: int) -> Ints:
    places = np.unpackbits(np.frombuffer(data, np.uint8))[: bits * count].reshape(count, bits).astype(np.int64)
    return places @ (1 << np.arange(bits - 1, -1, -1))


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A table for one set of matrices."""
    names = {"paths": "ours, paths", "single": "ours, single", "entquant": "EntQuant", "hilbert": "Dynamics as Code"}
    head = ["dB", "Shannon", *(f"{name}{what}" for name in names.values() for what in (", bits", ", retention"))]
    cells = [
        [
            f"{row['target_db']:g}",
            f"{row['shannon']:.3f}",
            *(text for key in names for text in (f"{row[key]:.3f}", f"{row['shannon'] / row[key]:.3f}")),
        ]
        for row in rows
    ]
    return f"{title}\n\n{common.table(head, cells)}"
