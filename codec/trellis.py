"""Trellis-coded quantisation: 1.07 dB for the same bits, by choosing a path of nodes instead of one node at a time.

The values u (in units of the step h) become whole numbers n under a rule that a decoder can follow: each symbol may
take even n or odd n only, and which of them depends on the symbols before. A symbol so costs the bits of a quantiser of
step 2h, while the encoder finds, over a run of symbols, the path with the least sum of (u - n)^2. Stored is k = n >> 1,
a byte plane like any other. With b_t = k_t & 1, and o_t = 0 for t < 0,

    o_t = b_t xor o_(t-2) xor o_(t-3)          n_t = 2 k_t + o_(t-1)

is the whole decoder: Ungerboeck's 8-state code, its state s = 4 o_(t-3) + 2 o_(t-2) + o_(t-1). The encoder is the
Viterbi algorithm over these states. From state s, with q = s mod 4, the subset n mod 4 = c is q or q xor 2, and the
next state is 2q + o with o = [c != q] xor [s >= 4].

Worked example: k = (1, 1, -1, 2) has b = (1, 1, 1, 0), so o = (1, 1, 1 xor 1 = 0, 0 xor 1 xor 1 = 0) and
n = (2+0, 2+1, -2+1, 4+0) = (2, 3, -1, 4).

A plane of S symbols, flat, is T runs side by side: with L = ceil(S / T) lanes, symbol t*L + l is step t of lane l.
Every step is then one vector operation over the lanes, when encoding as when decoding.

Source: T. R. Fischer, M. Wang, "Entropy-constrained trellis-coded quantization", IEEE Trans. Inf. Theory 38 (1992);
H.266 and MPEG NNC use the idea with other tables under the name of dependent quantisation.

Shapes: S = symbols, T = steps of a run, L = lanes, 4 = subsets n mod 4.
"""

import torch
from torch import Tensor

MAX_STEPS = 256
MIN_STEPS = 64
_LANES = 1 << 13
"""Lanes searched together on a CPU: enough to outweigh the cost of each call, few enough for its cache."""

_LANES_GPU = 1 << 20


def steps(symbols: int) -> int:
    """T, the steps of a run for a plane of so many symbols.

    The first symbols of a run are less free, about 3/T of the gain; few lanes make short vectors.
    """
    return max(MIN_STEPS, min(MAX_STEPS, symbols // 2048))


def search(u: Tensor) -> Tensor:
    """The path nearest to `u`: float32 [S] of any device to float32 whole numbers [S], the same on every device."""
    run = steps(u.numel())
    lanes = -(-u.numel() // run)
    u_TL = torch.nn.functional.pad(u, (0, run * lanes - u.numel())).view(run, lanes)
    width = _LANES if u.device.type == "cpu" else _LANES_GPU
    n_TL = torch.cat([viterbi(part.contiguous()) for part in u_TL.split(width, dim=1)], dim=1)
    return n_TL.reshape(-1)[: u.numel()]


def eager_viterbi(u_TL: Tensor) -> Tensor:
    """The best path of every lane: float32 [T, L], contiguous, to float32 whole numbers [T, L]; the reference."""
    run, lanes = u_TL.shape
    subset_4 = torch.arange(4.0, device=u_TL.device)[:, None]
    metric = u_TL.new_full((8, lanes), 1e9)
    metric[0] = 0
    other = torch.empty_like(metric)
    # d[c] is the squared distance to subset c, in quarters; rows 4 and 5 repeat 0 and 1, so that d[2:] is d turned by 2
    d = u_TL.new_empty(6, lanes)
    scratch, low, high = (u_TL.new_empty(4, lanes) for _ in range(3))
    taken = torch.empty(run, 4, 2, lanes, dtype=torch.bool, device=u_TL.device)
    for t in range(run):
        near, turned = d[:4], d[2:]
        torch.sub(u_TL[t], subset_4, out=near)
        near.mul_(0.25)
        near.sub_(torch.round(near, out=scratch))
        near.mul_(near)
        d[4:] = d[:2]
        ahead = other.view(4, 2, lanes)
        for odd, (first, second) in enumerate(((near, turned), (turned, near))):
            torch.add(metric[:4], first, out=low)
            torch.add(metric[4:], second, out=high)
            torch.lt(high, low, out=taken[t, :, odd])
            torch.minimum(low, high, out=ahead[:, odd])
        metric, other = other, metric
    return _trace_back(u_TL, taken.view(run, 8, lanes), metric.argmin(0, keepdim=True))


viterbi = torch.library.custom_op("birkhoff::viterbi", eager_viterbi, mutates_args=())
"""`eager_viterbi` as an operator, so that `birkhoff.kernels.trellis` can register a faster kernel for a device."""


def _trace_back(u_TL: Tensor, taken: Tensor, state: Tensor) -> Tensor:
    subset = torch.empty(u_TL.shape, dtype=torch.uint8, device=u_TL.device)
    for t in range(len(u_TL) - 1, -1, -1):
        high = taken[t].gather(0, state).to(torch.int64)
        q = state >> 1
        subset[t] = (q ^ (((state & 1) ^ high) << 1))[0]
        state = q + (high << 2)
    c = subset.to(torch.float32)
    return (u_TL - c).mul_(0.25).round_().mul_(4).add_(c)


def symbols(n: Tensor) -> Tensor:
    """k = n >> 1 of whole numbers, float32 [S] to float32 [S]."""
    return torch.floor(n * 0.5)


def numbers(k: Tensor) -> Tensor:
    """The whole numbers int16 [S] of a plane of symbols k (any integer type, [S]), following the automaton."""
    run = steps(k.numel())
    lanes = -(-k.numel() // run)
    k_TL = torch.nn.functional.pad(k, (0, run * lanes - k.numel())).view(run, lanes)
    o = torch.zeros(run + 3, lanes, dtype=torch.uint8, device=k.device)  # o_t is row t + 3
    o[3:] = k_TL & 1
    for t in range(3, run + 3):
        o[t].bitwise_xor_(o[t - 2]).bitwise_xor_(o[t - 3])
    return (k_TL.to(torch.int16) * 2 + o[2:-1]).reshape(-1)[: k.numel()]
