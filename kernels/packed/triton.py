"""Decode the packed form on the GPU: low bytes, high bits and scales to weights.

One pass, bound by memory: 0.63 or 0.76 bytes read and 2 or 4 written per weight. Rows that end with a group (K % 128 ==
0) are treated as one long row. A byte of high bits, and a scale, is loaded once for all pairs that share it: a thread's
eight pairs take three loads, of 8, 2 or 4, and 1 byte.

Shapes: N = rows, K = columns, P = pairs per row, H = bytes of high bits per row, G = groups per row.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.packed import GROUP, high_bytes
from birkhoff.codec.pairs import HALF, pairs_per_row
from birkhoff.kernels.runtime.device import pdl, power_of_two
from birkhoff.kernels.runtime.prepared import Prepared
from birkhoff.kernels.runtime.triton_ops import after_the_last, let_next_come, local_columns, rounded

_BLOCK = 1024
"""Pairs per program: 8 per thread. Half as many for float32, so that no data moves between threads."""

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _steps(code, step):
    """Return the groups' s for scale bytes: exponent and mantissa moved to a float32's positions, times the tensor's
    step."""
    return ((code.to(tl.int32) + 1792) << 19).to(tl.float32, bitcast=True) * step


@triton.jit
def _spread(x, TIMES: tl.constexpr):
    """[R, S] to [R, S * TIMES], each element repeated TIMES times: [[a, b]] becomes [[a, a, b, b]]."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], TIMES))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * TIMES))


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
    ONE_ROW: tl.constexpr,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a multiple of 64: blocks begin with groups
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    SHARE: tl.constexpr = 8 // (BITS - 8)
    N: tl.constexpr = 1 << BITS // 2
    pairs = columns // 2 if TAIL % 2 == 0 else (columns + 1) // 2
    groups = tl.cdiv(pairs, _GROUP)
    pid = tl.program_id(0)
    if ONE_ROW:
        row = tl.zeros((1, 1), dtype=tl.int64)
        start = pid.to(tl.int64) * BLOCK_P
    else:
        tiles = tl.cdiv(pairs, BLOCK_P)
        row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        start = (pid % tiles).to(tl.int64) * BLOCK_P
    there = row < rows
    local = tl.arange(0, BLOCK_P)[None, :]
    byte = tl.arange(0, BLOCK_P // SHARE)[None, :]
    group = tl.arange(0, BLOCK_P // _GROUP)[None, :]
    mask = there & (local < _left(pairs, start, BLOCK_P))

    low = tl.load(low_ptr + (row * pairs + start) + local, mask=mask, other=0).to(tl.int32)
    within = there & (byte < _left(high_bytes, start // SHARE, BLOCK_P // SHARE))
    high = tl.load(high_ptr + (row * high_bytes + start // SHARE) + byte, mask=within, other=0)
    within = there & (group < _left(groups, start // _GROUP, BLOCK_P // _GROUP))
    code = tl.load(scale_ptr + (row * groups + start // _GROUP) + group, mask=within, other=0)
    step = _spread(_steps(code, tl.load(step_ptr)), _GROUP)
    above = _spread(high.to(tl.int32), SHARE) >> local % SHARE * (BITS - 8)
    theta = low | (above << 8 & (1 << BITS) - 256)
    i = ((theta >> BITS // 2) - N // 2).to(tl.float32)
    j = ((theta & (N - 1)) - N // 2).to(tl.float32)
    x, y = tl.fma(j, 1.0 / N, i) * step, j * step
    let_next_come(PDL)

    first, second = local_columns(local)
    paired = mask
    if TAIL > 0:
        second = tl.where(start + local >= pairs - (TAIL + 1) // 2, first + (TAIL + 1) // 2, second)
        if TAIL % 2 == 1:
            paired = mask & (2 * start + second < columns)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    target = out_ptr + (row * columns + 2 * start)
    tl.store(target + first, rounded(x, DTYPE), mask=mask)
    tl.store(target + second, rounded(y, DTYPE), mask=paired)


@triton.jit
def _left(count, start, BLOCK: tl.constexpr):
    """Return how many of a block's elements exist, int32."""
    return tl.minimum(count - start, BLOCK).to(tl.int32)


def decode(
    low_NP: Tensor, high_NH: Tensor, scale_NG: Tensor, step: Tensor, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights [N, K] in float32, bfloat16 or float16 of contiguous planes, bit-identical to
    `PackedTensor.decode`."""
    rows = low_NP.shape[0]
    out = low_NP.new_empty((rows, columns), dtype=dtype)
    if out.numel():
        _prepare(rows, columns, bits, dtype, low_NP.device)(low_NP, high_NH, scale_NG, step, out)
    return out


@lru_cache(1 << 12)
def _prepare(rows: int, columns: int, bits: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Prepare the launch for (low, high, scale, step, out [N, K] of `dtype`), contiguous and not empty."""
    one_row = columns % (2 * GROUP) == 0
    if one_row:
        rows, columns = 1, rows * columns
    pairs = pairs_per_row(columns)
    block = _BLOCK if dtype.itemsize == 2 else _BLOCK // 2
    block_p = min(block, max(GROUP, power_of_two(pairs)))
    block_r = min(block // block_p, power_of_two(rows))
    overlap = pdl(device)
    return Prepared(
        _decode_kernel,
        (-(-rows // block_r) * -(-pairs // block_p),),
        (rows, columns, high_bytes(pairs, bits)),
        {
            "ONE_ROW": one_row,
            "TAIL": columns % (2 * HALF),
            "BITS": bits,
            "BLOCK_R": block_r,
            "BLOCK_P": block_p,
            "PDL": overlap,
        },
        {"launch_pdl": overlap, "num_warps": 4},
        device=device,
    )
