"""HyperLinear on int8 tensor cores in one portable kernel that also quantises the tokens of its tile.

The arithmetic is that of `int8.triton`. A program reads its tokens twice: for their greatest activation, and to
multiply them. No quantised token goes to memory, and there is only one launch, which makes small layers faster.
Programs that share tokens all quantise them, which makes layers with many rows slower.

Shapes: M = tokens, N = out features, K = in features, P = pairs per row, X = further columns, W = columns of the plane.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from birkhoff.kernels.int8.triton import FEW, activations, greatest_of, repeated, scale_and_inverse, to_int8
from birkhoff.kernels.runtime.device import pdl
from birkhoff.kernels.runtime.prepared import Form, Prepared
from birkhoff.kernels.runtime.triton_ops import INTERPRETED, after_the_last, let_next_come, rounded


@triton.jit
def _settled(acc):
    """Do the same as `triton_ops.settled`, for whole numbers."""
    if not INTERPRETED:
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.int32, is_pure=False, pack=1)
    return acc


@triton.jit(do_not_specialize=["M", "extras"])
def _fused_kernel(
    x_ptr,  # [M, K], rows stride_m apart
    plane_ptr,  # int8 [N, W]
    y_ptr,  # [M, N]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    extra_ptr,  # int32 [X], the columns that are repeated
    M,
    extras,  # X
    N,
    K,
    W,
    stride_m,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    BIAS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.arange(0, BLOCK_P)[None, :]
    P = K // 2 if TAIL % 2 == 0 else (K + 1) // 2
    # Rows beyond the end repeat the last one and are not stored.
    x_row = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_m
    plane_row = plane_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * W

    greatest = tl.zeros((BLOCK_M,), tl.int32)
    for start in tl.range(0, P, BLOCK_P):
        x, y, _first, _second = activations(x_row, start + pair, K, start + pair < P, TAIL)
        greatest = tl.maximum(greatest, greatest_of(x, y))
    scale, inverse = scale_and_inverse(greatest)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        inside = start + pair < P
        x, y, first, second = activations(x_row, start + pair, K, inside, TAIL)
        of_first = tl.load(plane_row + first, mask=inside, other=0)
        of_second = tl.load(plane_row + second, mask=inside, other=0)
        acc = tl.dot(to_int8(x, inverse), of_first.T, acc, out_dtype=tl.int32)
        acc = tl.dot(to_int8(y, inverse), of_second.T, acc, out_dtype=tl.int32)
        acc = _settled(acc)
    if EXTRA:
        for start in range(0, extras, 32):
            place = start + tl.arange(0, 32)[None, :]
            column = tl.load(extra_ptr + place, mask=place < extras, other=0)
            b = repeated(x_row, column, K, place < extras, TAIL)
            of_extra = tl.load(plane_row + 2 * P + place, mask=place < extras, other=0)
            acc = tl.dot(to_int8(b, inverse), of_extra.T, acc, out_dtype=tl.int32)
            acc = _settled(acc)

    let_next_come(PDL)
    y = acc.to(tl.float32) * (scale * tl.load(step_ptr))[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    place = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, rounded(y, y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def prepare(
    form: Form, width: int, extras: int, *, block_m: int, block_n: int, block_p: int, warps: int, stages: int
) -> Prepared:
    """Return the launch for (x, plane [N, `width`], y, step, bias, extra). Any tensor may replace a missing bias."""
    overlap = pdl(form.device)
    return Prepared(
        _fused_kernel,
        (-(-form.tokens // block_m) * -(-form.rows // block_n),),
        (form.tokens, extras, form.rows, form.columns, width, form.stride),
        {
            "TAIL": form.columns % 64,
            "BIAS": form.bias is not None,
            "EXTRA": extras > 0,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "STAGES": stages,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": warps},
        device=form.device,
        shared=form.tokens <= FEW,
    )
