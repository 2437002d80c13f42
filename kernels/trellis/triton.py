"""The Viterbi search of `birkhoff.codec.trellis` on a GPU: one thread per lane, with its eight metrics in registers.

For every step of a run and every subset c = n mod 4, d_c = ((u - c)/4 - round((u - c)/4))^2. With q = 0..3,

    ahead[2q]     = min(metric[q] + d_q,         metric[q + 4] + d_(q xor 2))
    ahead[2q + 1] = min(metric[q] + d_(q xor 2), metric[q + 4] + d_q)

and one bit per state says which was taken (the second only if less). The eight bits of a step are a byte of [T, L].
Going back from the least metric, state s = 2q + o came from q + 4*bit by the subset c = q xor 2*(o xor bit).

Toy: from state 0 (metric 0, others 1e9) with u = 0.9, d = (0.0506, 0.0006, 0.0756, 0.2256): ahead[0] = d_0 = 0.0506,
ahead[1] = d_2 = 0.0756, the others stay near 1e9.

The operations are those of the eager search, each with its own rounding, so the symbols are equal.

Shapes: T = steps of a run, L = lanes.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES_PER_BLOCK = 32
"""One warp: a plane has few lanes, and each is processed sequentially."""


@triton.jit
def _nearest(x):
    """Round x to a whole number, ties to even: adding 1.5 * 2^23 leaves no fraction bits."""
    shifted = (x + 12582912.0) - 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, shifted, tl.floor(x + 0.5))


@triton.jit
def _distance(u, c: tl.constexpr):
    r = (u - c) * 0.25
    e = r - _nearest(r)
    return e * e


@triton.jit
def _step(low, high, d, other):
    """Return (ahead[2q], ahead[2q + 1], the bits of both) for metrics of states q and q + 4."""
    a, b = low + d, high + other
    c, e = low + other, high + d
    bits = (b < a).to(tl.int32) + ((e < c).to(tl.int32) << 1)
    return tl.minimum(a, b), tl.minimum(c, e), bits


@triton.jit
def _ahead(u, m0, m1, m2, m3, m4, m5, m6, m7):
    """Return the metrics after one more symbol, and the bits of its eight decisions."""
    d0, d1, d2, d3 = _distance(u, 0), _distance(u, 1), _distance(u, 2), _distance(u, 3)
    a0, a1, b0 = _step(m0, m4, d0, d2)
    a2, a3, b1 = _step(m1, m5, d1, d3)
    a4, a5, b2 = _step(m2, m6, d2, d0)
    a6, a7, b3 = _step(m3, m7, d3, d1)
    bits = b0 + (b1 << 2) + (b2 << 4) + (b3 << 6)
    return a0, a1, a2, a3, a4, a5, a6, a7, bits.to(tl.uint8)


@triton.jit
def _back(state, bits, u):
    """Return the previous state, and the number that led from it, by the decisions of the step between."""
    bit = (bits.to(tl.int32) >> state) & 1
    q = state >> 1
    c = (q ^ (((state & 1) ^ bit) << 1)).to(tl.float32)
    return q + (bit << 2), _nearest((u - c) * 0.25) * 4.0 + c


@triton.jit
def _search_kernel(u_ptr, taken_ptr, n_ptr, steps, lanes, symbols, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    far = tl.full([BLOCK], 1e9, tl.float32)
    m0, m1, m2, m3, m4, m5, m6, m7 = tl.zeros([BLOCK], tl.float32), far, far, far, far, far, far, far
    at = lane.to(tl.int64)
    fours, rest = steps // 4, steps % 4
    # Values of four steps are loaded before the first of them, so memory latency is paid once in four steps.
    for _ in range(fours):
        u0 = tl.load(u_ptr + at, mask=inside & (at < symbols), other=0.0)
        u1 = tl.load(u_ptr + at + lanes, mask=inside & (at + lanes < symbols), other=0.0)
        u2 = tl.load(u_ptr + at + 2 * lanes, mask=inside & (at + 2 * lanes < symbols), other=0.0)
        u3 = tl.load(u_ptr + at + 3 * lanes, mask=inside & (at + 3 * lanes < symbols), other=0.0)
        m0, m1, m2, m3, m4, m5, m6, m7, t0 = _ahead(u0, m0, m1, m2, m3, m4, m5, m6, m7)
        m0, m1, m2, m3, m4, m5, m6, m7, t1 = _ahead(u1, m0, m1, m2, m3, m4, m5, m6, m7)
        m0, m1, m2, m3, m4, m5, m6, m7, t2 = _ahead(u2, m0, m1, m2, m3, m4, m5, m6, m7)
        m0, m1, m2, m3, m4, m5, m6, m7, t3 = _ahead(u3, m0, m1, m2, m3, m4, m5, m6, m7)
        tl.store(taken_ptr + at, t0, mask=inside)
        tl.store(taken_ptr + at + lanes, t1, mask=inside)
        tl.store(taken_ptr + at + 2 * lanes, t2, mask=inside)
        tl.store(taken_ptr + at + 3 * lanes, t3, mask=inside)
        at += 4 * lanes
    for _ in range(rest):
        u0 = tl.load(u_ptr + at, mask=inside & (at < symbols), other=0.0)
        m0, m1, m2, m3, m4, m5, m6, m7, t0 = _ahead(u0, m0, m1, m2, m3, m4, m5, m6, m7)
        tl.store(taken_ptr + at, t0, mask=inside)
        at += lanes
    best, state = m0, tl.zeros([BLOCK], tl.int32)
    best, state = tl.minimum(best, m1), tl.where(m1 < best, 1, state)
    best, state = tl.minimum(best, m2), tl.where(m2 < best, 2, state)
    best, state = tl.minimum(best, m3), tl.where(m3 < best, 3, state)
    best, state = tl.minimum(best, m4), tl.where(m4 < best, 4, state)
    best, state = tl.minimum(best, m5), tl.where(m5 < best, 5, state)
    best, state = tl.minimum(best, m6), tl.where(m6 < best, 6, state)
    best, state = tl.minimum(best, m7), tl.where(m7 < best, 7, state)
    for _ in range(rest):
        at -= lanes
        t0 = tl.load(taken_ptr + at, mask=inside, other=0)
        u0 = tl.load(u_ptr + at, mask=inside & (at < symbols), other=0.0)
        state, n0 = _back(state, t0, u0)
        tl.store(n_ptr + at, n0, mask=inside & (at < symbols))
    for _ in range(fours):
        at -= 4 * lanes
        t0 = tl.load(taken_ptr + at, mask=inside, other=0)
        t1 = tl.load(taken_ptr + at + lanes, mask=inside, other=0)
        t2 = tl.load(taken_ptr + at + 2 * lanes, mask=inside, other=0)
        t3 = tl.load(taken_ptr + at + 3 * lanes, mask=inside, other=0)
        u0 = tl.load(u_ptr + at, mask=inside & (at < symbols), other=0.0)
        u1 = tl.load(u_ptr + at + lanes, mask=inside & (at + lanes < symbols), other=0.0)
        u2 = tl.load(u_ptr + at + 2 * lanes, mask=inside & (at + 2 * lanes < symbols), other=0.0)
        u3 = tl.load(u_ptr + at + 3 * lanes, mask=inside & (at + 3 * lanes < symbols), other=0.0)
        state, n3 = _back(state, t3, u3)
        state, n2 = _back(state, t2, u2)
        state, n1 = _back(state, t1, u1)
        state, n0 = _back(state, t0, u0)
        tl.store(n_ptr + at, n0, mask=inside & (at < symbols))
        tl.store(n_ptr + at + lanes, n1, mask=inside & (at + lanes < symbols))
        tl.store(n_ptr + at + 2 * lanes, n2, mask=inside & (at + 2 * lanes < symbols))
        tl.store(n_ptr + at + 3 * lanes, n3, mask=inside & (at + 3 * lanes < symbols))


def search(u_TL: Tensor) -> Tensor:
    """Return the best path of every lane: float32 [T, L], contiguous, to float32 whole numbers [T, L]."""
    taken = torch.empty(u_TL.shape, dtype=torch.uint8, device=u_TL.device)
    n = torch.empty_like(u_TL)
    _search(u_TL, taken, n, u_TL.shape[1])
    return n


def search_column_(u: Tensor, taken: Tensor, lanes: int) -> None:
    """Replace a flat plane, float32 [S], by the best path of every lane. `taken` is scratch space, uint8 [T * L]."""
    _search(u, taken, u, lanes)


def _search(u: Tensor, taken: Tensor, n: Tensor, lanes: int) -> None:
    """Symbols missing in the last step of a lane count as zeros."""
    symbols = u.numel()
    # Fusing a product and a sum into one rounding would break ties differently than the eager search.
    _search_kernel[(triton.cdiv(lanes, _LANES_PER_BLOCK),)](
        u, taken, n, triton.cdiv(symbols, lanes), lanes, symbols,
        BLOCK=_LANES_PER_BLOCK, num_warps=_LANES_PER_BLOCK // 32, enable_fp_fusion=False,
    )  # fmt: skip
