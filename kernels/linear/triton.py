"""HyperLinear in one portable kernel: weights are decoded in registers, on their way into the tensor cores.

y^T = W x^T, with the decoded tile of W as the left operand, because only that may come from registers. Only I + J/256
and J are formed there; the step multiplies the accumulator. Any shape, ragged rows included, in float32 (exact or
TF32), bfloat16 or float16. `linear.hopper` and `linear.small_m` are faster where they apply.

Shapes: M = tokens, N = out features, K = in features, P = pairs per row, E = escaped weights.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache, partial

import triton
import triton.language as tl
from torch import Tensor

from birkhoff.kernels.runtime.device import pdl, power_of_two
from birkhoff.kernels.runtime.prepared import Form, Prepared, Run, run_one
from birkhoff.kernels.runtime.triton_ops import (
    DECODE_BF16,
    DECODE_F16,
    INTERPRETED,
    after_the_last,
    coordinates,
    dot,
    let_next_come,
    rounded,
    settled,
)


@triton.jit
def _weights(theta, DTYPE: tl.constexpr):
    """Return [.., 32] step numbers as [.., 64] weights over the step: I + J/256, rounded once to DTYPE, and J,
    exact."""
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        bf16: tl.constexpr = (tl.bfloat16, tl.bfloat16)
        first, second = tl.inline_asm_elementwise(DECODE_BF16, "=r,=r,r", [theta], dtype=bf16, is_pure=True, pack=2)
    elif tl.float16 == DTYPE and not INTERPRETED:
        f16: tl.constexpr = (tl.float16, tl.float16)
        first, second = tl.inline_asm_elementwise(DECODE_F16, "=r,=r,r", [theta], dtype=f16, is_pure=True, pack=2)
    else:
        i, j = coordinates(theta)
        first, second = rounded(i + j * 0.00390625, DTYPE), rounded(j, DTYPE)
    # Concatenated along K, like the columns of a block.
    return tl.join(first, second).permute((0, 2, 1)).reshape((theta.shape[0], 2 * theta.shape[1]))


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr,  # [M, K], rows stride_m apart
    theta_ptr,  # uint16 [N, P]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    M,
    N,
    K,
    stride_m,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks a turn; divides K / 64
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    pair, column = tl.arange(0, 32)[None, :], tl.arange(0, 64)[None, :]
    # Rows beyond the end repeat the last one and are not stored, so the loop needs no masks.
    P = K // 2 if TAIL % 2 == 0 else (K + 1) // 2
    theta_row = theta_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * P
    x_row = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_m

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(0, K // 64, UNROLL, num_stages=STAGES):
        weights = _weights(tl.load(theta_row + block * 32 + pair), DTYPE)
        x = tl.load(x_row + block * 64 + column)
        acc = dot(weights, x.T, acc, PRECISION)
        for following in tl.static_range(1, UNROLL):
            weights = _weights(tl.load(theta_row + (block + following) * 32 + pair), DTYPE)
            x = tl.load(x_row + (block + following) * 64 + column)
            acc = dot(weights, x.T, acc, PRECISION)
        acc = settled(acc)
    if TAIL > 0:
        HALF: tl.constexpr = (TAIL + 1) // 2
        theta = tl.load(theta_row + K // 64 * 32 + pair, mask=pair < HALF, other=0x8080)
        within = column % 32 + column // 32 * HALF
        inside = column % 32 < HALF
        if TAIL % 2 == 1:
            inside = inside & (within < TAIL)
        x = tl.load(x_row + K // 64 * 64 + within, mask=inside, other=0)
        acc = dot(_weights(theta, DTYPE), x.T, acc, PRECISION)

    let_next_come(PDL)
    acc *= tl.load(step_ptr)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    y = rounded(tl.trans(acc), DTYPE)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["M", "N", "K", "escapes"])
def _escape_kernel(
    x_ptr,  # [M, K], rows stride_m apart
    index_ptr,  # int64 [E], row*K + column, increasing
    value_ptr,  # float32 [E]
    y_ptr,  # [M, N]
    M,
    N,
    K,
    escapes,
    stride_m,
    BLOCK_M: tl.constexpr,
):
    """Add the escaped weights of one row times their inputs. The program of the row's first escape does it for all."""
    escape = tl.program_id(0)
    row = tl.load(index_ptr + escape) // K
    begins = escape == 0
    if not begins:
        begins = tl.load(index_ptr + escape - 1) // K != row
    if begins:
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        index = tl.load(index_ptr + escape)
        while index // K == row:
            x = tl.load(x_ptr + m.to(tl.int64) * stride_m + index % K, mask=m < M, other=0)
            total += x.to(tl.float32) * tl.load(value_ptr + escape)
            escape += 1
            index = tl.load(index_ptr + escape, mask=escape < escapes, other=(row + 1) * K)
        place = y_ptr + m.to(tl.int64) * N + row
        y = tl.load(place, mask=m < M, other=0).to(tl.float32)
        tl.store(place, rounded(y + total, y_ptr.dtype.element_ty), mask=m < M)


def prepare(form: Form, *, block_m: int, block_n: int, warps: int, stages: int, unroll: int) -> Run:
    """Prepare the launch for a form in float32 (exact unless `form.tf32`), bfloat16 or float16.

    `unroll`: blocks of 64 columns per loop iteration, if it divides the number of blocks.
    """
    overlap = pdl(form.device)
    launch = Prepared(
        _linear_kernel,
        (-(-form.tokens // block_m) * -(-form.rows // block_n),),
        (form.tokens, form.rows, form.columns, form.stride),
        {
            "TAIL": form.columns % 64,
            "BIAS": form.bias is not None,
            "PRECISION": "tf32" if form.tf32 else "ieee",
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "STAGES": stages,
            "UNROLL": 1 if form.columns // 64 % unroll else unroll,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": warps},
        device=form.device,
    )
    return partial(run_one, launch)


@lru_cache(1 << 12)
def _escapes_launch(form: Form, escapes: int) -> Prepared:
    block_m = min(256, max(16, power_of_two(form.tokens)))
    grid = escapes, -(-form.tokens // block_m)
    numbers = form.tokens, form.rows, form.columns, escapes, form.stride
    return Prepared(_escape_kernel, grid, numbers, {"BLOCK_M": block_m}, {}, device=form.device)


def add_escapes(y: Tensor, x: Tensor, form: Form, index: Tensor, value: Tensor) -> None:
    """Add the products of the escaped weights (flat indices and float32 values [E]) to `y`, in place."""
    _escapes_launch(form, index.numel())(x, index, value, y)
