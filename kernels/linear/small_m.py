"""HyperLinear for few tokens, in Gluon: every operand goes straight from memory into registers for the tensor cores.

Each warp takes other blocks of K for the same rows of W and the same tokens, and the warps' sums are added at the end.
The order of K inside a product is free as long as both operands share it. So each thread reads 8 adjacent pairs (16
bytes) of a row of W and the same 8 columns of a row of x, without shared memory or barriers before the sum.

Shapes: M = tokens (at most 64), N = out features, K = in features (whole blocks of 64), P = K/2; B = warps.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from birkhoff.kernels.runtime.device import pdl, power_of_two
from birkhoff.kernels.runtime.gluon_ops import decoded
from birkhoff.kernels.runtime.prepared import Form, Prepared, Run, run_one


@gluon.jit(do_not_specialize=["M", "N", "blocks"])
def _linear_kernel(
    x_ptr,  # [M, K], rows stride_m apart
    theta_ptr,  # uint16 [N, P]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    M,
    N,
    P,
    stride_m,
    blocks,  # K / 64
    BIAS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    UNROLL: gl.constexpr,  # blocks a warp takes at once
    WARPS: gl.constexpr,  # that share the K of 16 rows
    GROUPS: gl.constexpr,  # of WARPS warps; they read the same x, which the first brings into the L1 cache
    PDL: gl.constexpr,
):
    if PDL:
        gdc_wait()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, GROUPS, 1], instr_shape=[1, 16, 8]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=MMA, k_width=8)
    n = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    pair = gl.arange(0, 32 * UNROLL, gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    left_block = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None] * UNROLL + pair // 32
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    column = gl.arange(0, 32 * UNROLL, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    right_block = (
        gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None] * UNROLL + column // 32
    )
    theta_at = theta_ptr + n.to(gl.int64) * P + left_block * 32 + pair % 32
    x_at = x_ptr + m.to(gl.int64) * stride_m + right_block * 64 + column % 32

    acc = gl.zeros((WARPS, BN, BM), gl.float32, MMA)
    theta = gl.load(theta_at, mask=(n < N) & (left_block < blocks), other=0x8080)
    for block in range(0, blocks, WARPS * UNROLL):
        following = block + WARPS * UNROLL
        ahead = gl.load(theta_at + following * 32, mask=(n < N) & (following + left_block < blocks), other=0x8080)
        inside = (m < M) & (block + right_block < blocks)
        x_first = gl.load(x_at + block * 64, mask=inside, other=0.0)
        x_second = gl.load(x_at + block * 64 + 32, mask=inside, other=0.0)
        first, second = decoded(theta, DTYPE)
        acc = mma_v2(first, x_first, acc)
        acc = mma_v2(second, x_second, acc)
        theta = ahead

    if PDL:
        gdc_launch_dependents()
    y = gl.sum(acc, axis=0) * gl.load(step_ptr)
    OUT: gl.constexpr = y.type.layout
    n_out = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(1, OUT))
    m_out = gl.arange(0, BM, gl.SliceLayout(0, OUT))
    if BIAS:
        y += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    keep = (n_out < N)[:, None] & (m_out < M)[None, :]
    gl.store(y_ptr + m_out[None, :] * N + n_out[:, None], y.to(DTYPE), mask=keep)


def prepare(form: Form, *, block_n: int, warps: int, unroll: int) -> Run:
    """Prepare the launch for a form. `warps` share the K of 16 rows, and `block_n` / 16 groups share x.

    For bfloat16 or float16, at most 64 tokens, K a multiple of 64, and rows of x that begin at multiples of 16 bytes.
    """
    overlap = pdl(form.device)
    launch = Prepared(
        _linear_kernel,
        (-(-form.rows // block_n),),
        (form.tokens, form.rows, form.columns // 2, form.stride, form.columns // 64),
        {
            "BIAS": form.bias is not None,
            "BM": max(8, power_of_two(form.tokens)),
            "BN": block_n,
            "UNROLL": unroll,
            "WARPS": warps,
            "GROUPS": block_n // 16,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": warps * (block_n // 16)},
        device=form.device,
    )
    return partial(run_one, launch)
