"""Trellis-coded quantisation: 1.07 dB more for the same bits, by choosing a path of nodes instead of single nodes.

The values u (in units of the step h) become whole numbers n under a rule that the decoder can follow: each symbol may
take only even n or only odd n, depending on the symbols before. So a symbol costs the bits of a quantiser of step 2h,
while the encoder finds, over a run of symbols, the path with the least sum of (u - n)^2. The file stores k = n >> 1, a
byte plane like any other. With b_t = k_t & 1, and o_t = 0 for t < 0, the whole decoder is

    o_t = b_t xor o_(t-2) xor o_(t-3)          n_t = 2 k_t + o_(t-1)

This is Ungerboeck's 8-state code with the state s = 4 o_(t-3) + 2 o_(t-2) + o_(t-1). The encoder is the Viterbi
algorithm over these states. From state s, with q = s mod 4, the subset n mod 4 = c is q or q xor 2, and the next state
is 2q + o with o = [c != q] xor [s >= 4].

Worked example: k = (1, 1, -1, 2) has b = (1, 1, 1, 0), so o = (1, 1, 1 xor 1 = 0, 0 xor 1 xor 1 = 0) and n = (2+0, 2+1,
-2+1, 4+0) = (2, 3, -1, 4).

A plane of S symbols, flat, consists of L interleaved lanes: symbol t*L + l is step t of lane l. So every step is one
vector operation over the lanes, in encoding and decoding. With T(S) as the approximate number of steps in a run,

    path 1, through the rows:     L = ceil(S / T)
    path 2, down the columns:     L = P * ceil(R / T), for a plane [R, P]

Under path 2, lane l holds only rows l // P, l // P + L/P, ... of column l mod P, for any R. So a column can be
searched when all columns before it are known, as error feedback between columns requires.

Source: T. R. Fischer, M. Wang, "Entropy-constrained trellis-coded quantization", IEEE Trans. Inf. Theory 38 (1992).
H.266 and MPEG NNC use the idea with other tables, as dependent quantisation.

Shapes: S = symbols, T = steps of a run, B = steps of a block, L = lanes, 8 = states, 4 = subsets n mod 4.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.native.dispatch import Dispatched
from birkhoff.codec.native.library import native, pointer

MAX_STEPS = 256
MIN_STEPS = 64
_LANES = 1 << 12
"""Lanes searched together on a CPU: enough to outweigh the cost of each call, few enough for its cache."""

_LANES_GPU = 1 << 20

_BLOCK = 8
"""Steps whose distances are computed together, few enough for a core's cache."""


def steps(symbols: int) -> int:
    """Return T, the steps of a run, by the number of symbols in its plane.

    The first symbols of a run are constrained, which loses about 3/T of the gain. Few lanes make short vectors.
    """
    return max(MIN_STEPS, min(MAX_STEPS, symbols // 2048))


def lanes_of(rows: int, pairs: int, path: int) -> int:
    """Return L, the lanes of a plane [R, P] for path 1 or 2."""
    run = steps(rows * pairs)
    return pairs * -(-rows // run) if path == 2 else -(-rows * pairs // run)


def search(u: Tensor, lanes: int | None = None) -> Tensor:
    """Return the path nearest to `u` in every lane: float32 [S] of any device to whole numbers in float32 [S], equal on
    all devices.

    `lanes` is L, by default that of path 1.
    """
    return search_(u.clone(), lanes)


def search_(u: Tensor, lanes: int | None = None) -> Tensor:
    """`search` in place of contiguous values. Needs extra memory only for some lanes."""
    if not u.numel():
        return u
    lanes = lanes or lanes_of(1, u.numel(), 1)
    run = -(-u.numel() // lanes)
    if u.device.type == "cpu" and (library := native()) is not None:
        scratch = np.empty(8 * run, dtype=np.int32)
        library.birkhoff_viterbi(u.data_ptr(), u.numel(), lanes, pointer(scratch))
        return u
    return reference_search_(u, lanes)


def reference_search_(u: Tensor, lanes: int) -> Tensor:
    """`search_` in torch, with the device's Viterbi search."""
    run = -(-u.numel() // lanes)
    whole = u.numel() // lanes  # steps of every lane; the first lanes have one more, padded
    u_TL, rest = u[: whole * lanes].view(whole, lanes), u[whole * lanes :]
    width = _LANES if u.device.type == "cpu" else _LANES_GPU
    for first in range(0, lanes, width):
        part, more = u_TL[:, first : first + width], rest[first : first + width]
        padded = part.new_zeros(run, part.shape[1])
        padded[:whole] = part
        padded[whole : whole + 1, : len(more)] = more
        found = viterbi(padded)
        part.copy_(found[:whole])
        more.copy_(found[whole : whole + 1, : len(more)].reshape(-1))
    return u


def eager_viterbi(u_TL: Tensor) -> Tensor:
    """Return the best path of every lane: float32 [T, L], contiguous, to float32 whole numbers [T, L]. The
    reference."""
    run, lanes = u_TL.shape
    metric, other = u_TL.new_full((2, 8, lanes), 1e9)
    metric[0] = 0
    low, high = both = u_TL.new_empty(2, 2, 4, lanes)
    distances = u_TL.new_empty(_BLOCK, 8, lanes)
    taken = torch.empty(_BLOCK, 8, lanes, dtype=torch.bool, device=u_TL.device)
    decisions = torch.empty(run, lanes, dtype=torch.uint8, device=u_TL.device)
    # There are many short calls, so every view is made once.
    turns = cycle([(now.view(2, 1, 4, lanes), _by_bit(then)) for now, then in ((metric, other), (other, metric))])
    less, plain = _COMPARE if u_TL.device.type == "cpu" else (torch.lt, _same)
    views = [(_facing(d), plain(_by_bit(t))) for d, t in zip(distances.unbind(), taken.unbind(), strict=True)]
    sides = plain(high), plain(low)
    for start in range(0, run, _BLOCK):
        part = u_TL[start : start + _BLOCK]
        _square_distances(part, out=distances[: len(part)])
        for (facing, choice), (now, ahead) in zip(views[: len(part)], turns, strict=False):
            torch.add(now, facing, out=both)
            less(*sides, out=choice)
            torch.minimum(low, high, out=ahead)
        _pack_bits(taken[: len(part)], out=decisions[start : start + _BLOCK])
    last = other if run % 2 else metric
    return _trace_back(u_TL, decisions, last.argmin(0).to(torch.uint8))


viterbi: Dispatched[[Tensor], Tensor] = Dispatched(eager_viterbi)
"""`eager_viterbi`, or the kernel that `birkhoff.kernels.trellis.op` registers for a device."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


_COMPARE: tuple[Callable[..., object], Callable[[Tensor], Any]] = (np.less, Tensor.numpy)
"""On a CPU numpy compares three times as fast as torch."""


def _by_bit(state_8L: Tensor) -> Tensor:
    """Return the data of states 2q + o as [o, q, L]."""
    by_bit: Tensor = state_8L.unflatten(0, (4, 2)).transpose(0, 1)
    return by_bit


def _facing(d_8L: Tensor) -> Tensor:
    """Return distances [h, o, q, L] of the branches from state q + 4h to state 2q + o."""
    # Rows of d are subsets 0 1 2 3 0 1 2 3. From q the bit o leads to subset q xor 2o, from q + 4 to q xor 2 xor 2o.
    size = d_8L.stride(0)
    return d_8L.as_strided((2, 2, 4, d_8L.shape[1]), (2 * size, 2 * size, size, 1), d_8L.storage_offset())


def _square_distances(u_BL: Tensor, out: Tensor) -> None:
    """Write squared distances to the subsets n mod 4 = 0 1 2 3 0 1 2 3, [B, 8, L], in quarters of u."""
    # Every operation rounds as on all devices, because equal metrics must be equal everywhere.
    d_B4L = (u_BL[:, None] - torch.arange(4.0, dtype=torch.float32, device=out.device)[:, None]).mul_(0.25)
    d_B4L.sub_(torch.round(d_B4L))
    torch.mul(d_B4L[:, None].expand(-1, 2, -1, -1), d_B4L[:, None], out=out.unflatten(1, (2, 4)))


def _pack_bits(taken_B8L: Tensor, out: Tensor) -> None:
    """Pack eight booleans into a byte [B, L], the first in its lowest bit."""
    bits = taken_B8L.view(torch.uint8)
    fours = torch.add(bits[:, :4], bits[:, 4:], alpha=16)
    pairs = torch.add(fours[:, :2], fours[:, 2:], alpha=4)
    torch.add(pairs[:, 0], pairs[:, 1], alpha=2, out=out)


def _trace_back(u_TL: Tensor, decisions: Tensor, last: Tensor) -> Tensor:
    """Return the path to the states `last`, uint8 [L]. Bit s of a decision, uint8 [T, L], says that state s came
    from q + 4."""
    states = torch.empty(len(u_TL) + 1, *last.shape, dtype=torch.uint8, device=u_TL.device)
    states[-1] = last
    one, high = torch.ones_like(last[:1]), torch.empty_like(last)
    row = states.unbind()
    for t, decision in reversed(list(enumerate(decisions.unbind()))):
        torch.bitwise_right_shift(decision, row[t + 1], out=high).bitwise_and_(one)
        torch.bitwise_right_shift(row[t + 1], one, out=row[t]).add_(high, alpha=4)
    subset = (states[1:] >> 1) ^ (((states[1:] ^ (states[:-1] >> 2)) & 1) << 1)
    c = subset.to(torch.float32)
    return (u_TL - c).mul_(0.25).round_().mul_(4).add_(c)


def symbols(n: Tensor) -> Tensor:
    """Return k = n >> 1 for whole numbers n, float32 [S] to float32 [S]."""
    return torch.floor(n * 0.5)


def numbers(k: Tensor, lanes: int | None = None) -> Tensor:
    """Return the whole numbers n, int16 [S], for symbols k (any integer type, [S]), by running the decoder.

    `lanes` is L, by default that of path 1.
    """
    if not k.numel():
        return k.to(torch.int16)
    lanes = lanes or lanes_of(1, k.numel(), 1)
    run = -(-k.numel() // lanes)
    k_TL = torch.nn.functional.pad(k, (0, run * lanes - k.numel())).view(run, lanes)
    o_TL = _parities((k_TL & 1).to(torch.uint8), doublings=1 if k.device.type == "cpu" else MAX_STEPS)
    n_TL = k_TL.to(torch.int16).mul_(2)
    n_TL[1:] += o_TL[:-1]
    return n_TL.reshape(-1)[: k.numel()]


def _parities(b_TL: Tensor, doublings: int) -> Tensor:
    """Return o_t = b_t xor o_(t-2) xor o_(t-3), by at most `doublings` passes, then block by block. May change b.

    With D the delay by a step, o = b / p(D), p = 1 + D^2 + D^3. In GF(2), p(D)^2 = p(D^2), so 1 / p(D) = p(D) p(D^2)
    ... p(D^(d/2)) / p(D^d). Each factor is a pass over everything and doubles d. Then 2d steps at once follow from
    those before them, o_t = b_t xor o_(t-2d) xor o_(t-3d). On a GPU each operation has a fixed cost, so passes continue
    until nothing is 2d steps back; on a CPU few steps at a time stay in a core's cache.
    """
    run, delay = len(b_TL), 1
    while doublings and 2 * delay < run:
        passed = b_TL.clone()
        passed[2 * delay :] ^= b_TL[: -2 * delay]
        passed[3 * delay :] ^= b_TL[: max(0, run - 3 * delay)]
        b_TL, delay, doublings = passed, 2 * delay, doublings - 1
    for start in range(2 * delay, run, 2 * delay):
        block = b_TL[start : start + 2 * delay]
        block.bitwise_xor_(b_TL[start - 2 * delay : start][: len(block)])
        first = max(start, 3 * delay)
        later = block[first - start :]
        later.bitwise_xor_(b_TL[first - 3 * delay :][: len(later)])
    return b_TL
