"""Decode on the GPU: step numbers, or coordinate planes as stored at rest, to weights.

One pass, bound by memory: 1 byte read and 2 or 4 written per weight. Rows of whole 64-blocks (K % 64 == 0) are treated
as one long row, so every access is a run of 32 elements with an alignment known at compile time.

Shapes: N = rows, K = columns, P = pairs per row.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.pairs import HALF, pairs_per_row
from birkhoff.kernels.runtime.device import pdl, power_of_two
from birkhoff.kernels.runtime.prepared import Prepared
from birkhoff.kernels.runtime.triton_ops import (
    after_the_last,
    coordinates,
    let_next_come,
    local_columns,
    position,
    rounded,
)

_BLOCK = 1024
"""Pairs per program: 8 per thread, 16 bytes of step numbers. Half as many for float32, so that no data moves between
threads."""


@triton.jit(do_not_specialize=["rows"])
def _decode_kernel(
    theta_ptr,  # uint16 [N, P], or int8 plane I
    j_ptr,  # int8 plane J, unused for step numbers
    step_ptr,  # float32 []
    out_ptr,  # [N, K]
    rows,
    columns,
    TAIL: tl.constexpr,  # columns of the ragged last block of a row, 0 if none
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_last(PDL)
    pairs = columns // 2 if TAIL % 2 == 0 else (columns + 1) // 2
    pid = tl.program_id(0)
    if TAIL > 0:
        tiles = tl.cdiv(pairs, BLOCK_P)
        row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        start = (pid % tiles).to(tl.int64) * BLOCK_P  # a multiple of 32: a block boundary
    else:
        row = tl.zeros((1, 1), dtype=tl.int64)
        start = pid.to(tl.int64) * BLOCK_P
    local = tl.arange(0, BLOCK_P)[None, :]
    mask = (row < rows) & (start + local < pairs)

    source = row * pairs + start + local
    if PLANES:
        i = tl.load(theta_ptr + source, mask=mask, other=0).to(tl.float32)
        j = tl.load(j_ptr + source, mask=mask, other=0).to(tl.float32)
    else:
        i, j = coordinates(tl.load(theta_ptr + source, mask=mask, other=0))
    x, y = position(i, j, tl.load(step_ptr))
    let_next_come(PDL)

    first, second = local_columns(local)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    x, y = rounded(x, DTYPE), rounded(y, DTYPE)
    target = out_ptr + row * columns + 2 * start
    paired = mask
    if TAIL > 0:
        second = tl.where(start + local >= pairs - (TAIL + 1) // 2, first + (TAIL + 1) // 2, second)
        if TAIL % 2 == 1:
            paired = mask & (2 * start + second < columns)
    tl.store(target + first, x, mask=mask)
    tl.store(target + second, y, mask=paired)


def decode(theta_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weights [N, K] in float32, bfloat16 or float16 of contiguous step numbers, bit-identical to
    `reference.decode`."""
    return _launch(theta_NP, theta_NP, step, columns, dtype, planes=False)


def decode_planes(i_NP: Tensor, j_NP: Tensor, step: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the same from contiguous int8 coordinate planes."""
    return _launch(i_NP, j_NP, step, columns, dtype, planes=True)


def _launch(source: Tensor, other: Tensor, step: Tensor, columns: int, dtype: torch.dtype, *, planes: bool) -> Tensor:
    out = source.new_empty((source.shape[0], columns), dtype=dtype)
    if out.numel():
        prepare(source.shape[0], columns, dtype, source.device, planes=planes)(source, other, step, out)
    return out


@lru_cache(1 << 12)
def prepare(rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, planes: bool = False) -> Prepared:
    """Prepare the launch for (theta or plane I, theta or plane J, step, out [N, K] of `dtype`), contiguous and not
    empty."""
    tail = columns % (2 * HALF)
    if tail == 0:
        rows, columns = 1, rows * columns
    pairs = pairs_per_row(columns)
    block = _BLOCK if dtype.itemsize == 2 else _BLOCK // 2
    block_p = min(block, max(HALF, power_of_two(pairs)))
    block_r = 1 if tail == 0 else min(block // block_p, power_of_two(rows))
    overlap = pdl(device)
    return Prepared(
        _decode_kernel,
        (-(-rows // block_r) * -(-pairs // block_p),),
        (rows, columns),
        {"TAIL": tail, "PLANES": planes, "BLOCK_R": block_r, "BLOCK_P": block_p, "PDL": overlap},
        {"launch_pdl": overlap, "num_warps": 4},
        device=device,
    )
