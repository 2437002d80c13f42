"""HyperLinear on int8 tensor cores in two portable kernels: tokens to int8, then the product with the coordinates.

A pair of coordinates (I, J) holds the weights x = (I + J/256) h and y = J h. The shear moves to the activations, where
it costs one addition per token and is exact: a_x x + a_y y = h (a_x I + (a_y + a_x/256) J). So the planes I and J, side
by side in the order of the columns, multiply b = (a_x, a_y + a_x/256) unchanged, and only b is rounded:

    scale[m] = max_k |b[m, k]| / 127        q[m, k] = round(b[m, k] / scale[m])
    y[m, n] = (sum over k of q[m, k] w[n, k]) * scale[m] * h + bias[n], the sum exact in int32

Worked example: the pair (a_x, a_y) = (2.56, -1.28) is b = (2.56, -1.27), scale 2.56/127, q = (127, -63). With
(I, J) = (3, 1) and h = 0.1 the sum is 318 and y = 0.641; exact is 2.56 * 0.300390625 - 1.28 * 0.1 = 0.641.
Quantisation: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2 (row-wise absmax).

Coordinates beyond a byte (escapes) take further columns of the plane, which repeat a column of b. So they need neither
another path nor another rounding.

Shapes: M = tokens, N = out features, K = in features, P = pairs per row, X = further columns, W = columns of the plane
(2P + X, padded to a multiple of 16).
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Callable
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.pairs import pairs_per_row
from birkhoff.codec.reference import plane_columns
from birkhoff.kernels.runtime.device import pdl, power_of_two
from birkhoff.kernels.runtime.prepared import Form, Prepared
from birkhoff.kernels.runtime.triton_ops import INTERPRETED, after_the_last, let_next_come, rounded

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Writes y from (q [M, W], plane [N, W], y [M, N], scale [M], step [], bias [N]). Without a bias, any tensor takes its
place."""

FEW = 1024
"""Tokens up to which a layer takes little longer than its two launches, so that kernels should overlap (`carveout`)."""

_MOST_PAIRS = 8192
"""Pairs of a row that a program holds in registers. Longer rows are read twice."""

_LEAST_BITS = tl.constexpr(0x0D800000)
"""2^-100 as float32, the least value for a token's greatest activation, so that its inverse is finite."""


@triton.jit
def activations(x_row, pair, K, inside, TAIL: tl.constexpr):
    """Return b of pairs as float32, first and second halves, and their columns."""
    first = pair // 32 * 64 + pair % 32
    second = first + 32
    if TAIL > 0:
        second = tl.where(pair >= K // 64 * 32, first + (TAIL + 1) // 2, second)
    paired = inside
    if TAIL % 2 == 1:
        paired = inside & (second < K)
    x = tl.load(x_row + first, mask=inside, other=0).to(tl.float32)
    y = tl.load(x_row + second, mask=paired, other=0).to(tl.float32)
    return x, tl.fma(x, 0.00390625, y), first, second


@triton.jit
def greatest_of(x, y):
    """Return the greatest |x| or |y| of each row, as the bits of its float32. NaN is the greatest of these."""
    x, y = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.maximum(x, y), axis=1)


# Round four products to float32, then to bytes: adding 1.5 * 2^23 puts whole numbers, halves to even, in the low bits.
# Conversions (cvt) run at a fraction of the rate of additions, and the compiler would fuse separate operations.
_FOUR_BYTES = tl.constexpr("""{
.reg .f32 a, b, c, d;
.reg .b32 i, j, k, l;
mul.rn.f32 a, $1, $5;
mul.rn.f32 b, $2, $6;
mul.rn.f32 c, $3, $7;
mul.rn.f32 d, $4, $8;
add.rn.f32 a, a, 0f4B400000;
add.rn.f32 b, b, 0f4B400000;
add.rn.f32 c, c, 0f4B400000;
add.rn.f32 d, d, 0f4B400000;
mov.b32 i, a;
mov.b32 j, b;
mov.b32 k, c;
mov.b32 l, d;
prmt.b32 i, i, j, 0x0040;
prmt.b32 k, k, l, 0x0040;
prmt.b32 $0, i, k, 0x5410;
}""")


@triton.jit
def to_int8(x, inverse):
    """Return x times its row's inverse, rounded, then rounded to the nearest integer, halves to even."""
    if INTERPRETED:
        return (((x * inverse[:, None]) + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8)
    return tl.inline_asm_elementwise(
        _FOUR_BYTES, "=r,f,f,f,f,f,f,f,f", [x, inverse[:, None]], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def repeated(x_row, column, K, inside, TAIL: tl.constexpr):
    """Return b at these columns, counted among whole pairs, as float32."""
    half = tl.full(column.shape, 32, tl.int32)
    if TAIL > 0:
        half = tl.where(column >= K // 64 * 64, (TAIL + 1) // 2, half)
    b = tl.load(x_row + column, mask=inside & (column < K), other=0).to(tl.float32)
    before = tl.load(x_row + column - half, mask=inside & (column % 64 >= half), other=0).to(tl.float32)
    return tl.fma(before, 0.00390625, b)


@triton.jit
def scale_and_inverse(bits):
    """Return a token's scale and the factor for its activations, from the result of `greatest_of`."""
    greatest = tl.maximum(bits, _LEAST_BITS).to(tl.float32, bitcast=True)
    return tl.div_rn(greatest, tl.full(greatest.shape, 127.0, tl.float32)), tl.div_rn(
        tl.full(greatest.shape, 127.0, tl.float32), greatest
    )


@triton.jit(do_not_specialize=["M", "extras"])
def _quantise_kernel(
    x_ptr,  # [M, K], rows stride_m apart
    q_ptr,  # int8 [M, W]
    scale_ptr,  # float32 [M]
    extra_ptr,  # int32 [X], the columns that are repeated
    M,
    extras,  # X
    K,
    W,
    stride_m,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    PARTS: tl.constexpr,  # of a row, each of BLOCK_P pairs
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,  # further columns at a time, 0 if there are none
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    let_next_come(PDL)  # the product takes whole multiprocessors, so it displaces no program of this kernel
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = m.to(tl.int64)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    P = K // 2 if TAIL % 2 == 0 else (K + 1) // 2
    x_row, q_row, there = x_ptr + row * stride_m, q_ptr + row * W, m[:, None] < M
    if PARTS == 1:
        inside = there & (pair < P)
        x, y, first, second = activations(x_row, pair, K, inside, TAIL)
        scale, inverse = scale_and_inverse(greatest_of(x, y))
        tl.store(q_row + first, to_int8(x, inverse), mask=inside)
        tl.store(q_row + second, to_int8(y, inverse), mask=inside)
    else:
        greatest = tl.zeros((ROWS,), tl.int32)
        for part in range(PARTS):
            start = part * BLOCK_P + pair
            x, y, first, second = activations(x_row, start, K, there & (start < P), TAIL)
            greatest = tl.maximum(greatest, greatest_of(x, y))
        scale, inverse = scale_and_inverse(greatest)
        for part in range(PARTS):
            start = part * BLOCK_P + pair
            inside = there & (start < P)
            x, y, first, second = activations(x_row, start, K, inside, TAIL)
            tl.store(q_row + first, to_int8(x, inverse), mask=inside)
            tl.store(q_row + second, to_int8(y, inverse), mask=inside)
    tl.store(scale_ptr + m, scale, mask=m < M)
    if BLOCK_X > 0:
        for start in range(0, extras, BLOCK_X):
            place = start + tl.arange(0, BLOCK_X)[None, :]
            column = tl.load(extra_ptr + place, mask=place < extras, other=0)
            b = repeated(x_row, column, K, there & (place < extras), TAIL)
            tl.store(q_row + 2 * P + place, to_int8(b, inverse), mask=there & (place < extras))


@lru_cache(1 << 12)
def prepare_quantise(form: Form, extras: int) -> Prepared:
    """Return the launch for (x [M, K], q int8 [M, W], scale float32 [M], extra int32 [X])."""
    pairs = pairs_per_row(form.columns)
    block_p = min(_MOST_PAIRS, max(32, power_of_two(pairs)))
    if form.tokens >= FEW:  # each thread has many loads in flight
        rows = max(1, 2048 // block_p)
        warps = max(2, rows * block_p // 2048)
    else:  # each thread has few loads, to finish sooner
        rows = min(max(1, 1024 // block_p), power_of_two(form.tokens))
        warps = max(1, min(16, rows * block_p // 256))
    overlap = pdl(form.device)
    return Prepared(
        _quantise_kernel,
        (-(-form.tokens // rows),),
        (form.tokens, extras, form.columns, plane_columns(form.columns, extras), form.stride),
        {
            "TAIL": form.columns % 64,
            "PARTS": -(-pairs // block_p),
            "ROWS": rows,
            "BLOCK_P": block_p,
            "BLOCK_X": min(256, max(16, power_of_two(extras))) if extras else 0,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": warps},
        device=form.device,
        shared=form.tokens < FEW,  # with more tokens, L1 holds the loads in flight
    )


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    q_ptr,  # int8 [M, W]
    plane_ptr,  # int8 [N, W]
    y_ptr,  # [M, N]
    scale_ptr,  # float32 [M]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    M,
    N,
    W,  # a multiple of 16
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_K divides W
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)[None, :]
    # Rows beyond the end repeat the last one and are not stored.
    q_row = q_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * W
    plane_row = plane_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * W
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in tl.range(0, W, BLOCK_K, num_stages=STAGES):
        if WHOLE:
            q = tl.load(q_row + start + column)
            plane = tl.load(plane_row + start + column)
        else:
            inside = start + column < W
            q = tl.load(q_row + start + column, mask=inside, other=0)
            plane = tl.load(plane_row + start + column, mask=inside, other=0)
        acc = tl.dot(q, plane.T, acc, out_dtype=tl.int32)
    let_next_come(PDL)
    scale = tl.load(scale_ptr + m, mask=m < M, other=0) * tl.load(step_ptr)
    y = acc.to(tl.float32) * scale[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    place = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, rounded(y, y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def prepare(form: Form, width: int, *, block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Prepared:
    """Return the launch for (q, plane [N, `width`], y, scale, step, bias). Any tensor may replace a missing bias."""
    overlap = pdl(form.device)
    return Prepared(
        _linear_kernel,
        (-(-form.tokens // block_m) * -(-form.rows // block_n),),
        (form.tokens, form.rows, width),
        {
            "BIAS": form.bias is not None,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "WHOLE": width % block_k == 0,
            "STAGES": stages,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": warps},
        device=form.device,
        shared=form.tokens <= FEW,
    )
