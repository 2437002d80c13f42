"""Decode the packed form on the GPU: bytes, high bits and scales of groups to weights.

One pass, bound by memory: 0.63 or 0.76 bytes read and 2 or 4 written per weight. Rows of whole pairs of blocks
(K % 128 == 0: groups end with them) are taken as one long row.

Shapes: N = rows, K = columns, P = pairs a row, H = bytes of high bits a row, G = groups a row.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.packed import GROUP, high_bytes
from birkhoff.codec.pairs import HALF, pairs_per_row
from birkhoff.kernels.runtime import pdl, power_of_two
from birkhoff.kernels.triton_ops import after_the_last, let_next_come, local_columns, rounded

_BLOCK = 1024
"""Pairs that a program decodes; half of it to float32."""


@triton.jit
def _steps(code, step):
    """The groups' s of scale bytes: exponent and mantissa put where a float32 has them, times the tensor's step."""
    return ((code.to(tl.int32) + 1792) << 19).to(tl.float32, bitcast=True) * step


@triton.jit(do_not_specialize=["rows"])
def _decode_kernel(
    low_ptr,  # uint8 [N, P]
    high_ptr,  # uint8 [N, H]
    scale_ptr,  # uint8 [N, G]
    step_ptr,  # float32 []
    out_ptr,  # [N, K]
    rows,
    columns,
    high_bytes,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    WIDTH: tl.constexpr = BITS - 8
    SHARE: tl.constexpr = 8 // WIDTH
    HALF_N: tl.constexpr = (1 << BITS // 2) // 2
    pairs = (columns + 1) // 2
    tiles = tl.cdiv(pairs, BLOCK_P)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    start = (pid % tiles).to(tl.int64) * BLOCK_P  # a multiple of 32: a block boundary
    local = tl.arange(0, BLOCK_P)[None, :]
    pair = start + local
    mask = (row < rows) & (pair < pairs)

    low = tl.load(low_ptr + row * pairs + pair, mask=mask, other=0).to(tl.int32)
    high = tl.load(high_ptr + row * high_bytes + pair // SHARE, mask=mask, other=0).to(tl.int32)
    code = tl.load(scale_ptr + row * tl.cdiv(pairs, 64) + pair // 64, mask=mask, other=0)
    theta = low | (((high >> (pair % SHARE).to(tl.int32) * WIDTH) & ((1 << WIDTH) - 1)) << 8)
    i = ((theta >> BITS // 2) - HALF_N).to(tl.float32)
    j = ((theta & (2 * HALF_N - 1)) - HALF_N).to(tl.float32)
    step = _steps(code, tl.load(step_ptr))
    x, y = tl.fma(j, 0.5 / HALF_N, i) * step, j * step
    let_next_come(PDL)

    first, second = local_columns(local)
    if TAIL > 0:
        second = tl.where(pair >= pairs - (TAIL + 1) // 2, first + (TAIL + 1) // 2, second)
    paired = mask
    if TAIL % 2 == 1:
        paired = mask & (2 * start + second < columns)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    target = out_ptr + row * columns + 2 * start
    tl.store(target + first, rounded(x, DTYPE), mask=mask)
    tl.store(target + second, rounded(y, DTYPE), mask=paired)


def decode(
    low_NP: Tensor, high_NH: Tensor, scale_NG: Tensor, step: Tensor, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Weights [N, K] in float32, bfloat16 or float16 of contiguous planes, the bits of `PackedTensor.decode`."""
    rows = low_NP.shape[0]
    out = low_NP.new_empty((rows, columns), dtype=dtype)
    if out.numel() == 0:
        return out
    if columns % (2 * GROUP) == 0:
        rows, columns = 1, rows * columns
    pairs = pairs_per_row(columns)
    block = _BLOCK if dtype.itemsize == 2 else _BLOCK // 2
    block_p = min(block, max(HALF, power_of_two(pairs)))
    block_r = min(block // block_p, power_of_two(rows))
    overlap = pdl(low_NP.device)
    _decode_kernel[(-(-rows // block_r) * -(-pairs // block_p),)](
        low_NP,
        high_NH,
        scale_NG,
        step,
        out,
        rows,
        columns,
        high_bytes(pairs, bits),
        TAIL=columns % (2 * HALF),
        BITS=bits,
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        PDL=overlap,
        launch_pdl=overlap,
        num_warps=4,
    )
    return out
