"""HyperLinear on int8 tensor cores for many tokens on Hopper: a persistent, warp-specialised kernel in Gluon.

y[m, n] = (sum over k of q[m, k] w[n, k]) * scale[m] * step + bias[n], the sum exact in int32

One warp streams tiles of quantised tokens and of coordinates into a ring of shared memory with the copy engine. Two
warpgroups multiply them from there and write through shared memory. They either share a tile, or take tiles in turn, so
that one scales and writes while the other multiplies. Nothing is decoded: the coordinates are the operand. Worked
example, K = 2: q = (127, -3), w = (2, 5), scale 0.01, step 0.1 and bias 1 give 239 * 0.001 + 1 = 1.239.

Tiles that do not fill a last wave of multiprocessors are divided along K, as in `linear.hopper`. A second kernel adds
their parts.

Shapes: M = tokens, N = out features, K = columns of q and w (a multiple of 16); BM x BN = a tile of y.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from birkhoff.kernels.int8.triton import FEW, Product
from birkhoff.kernels.linear.hopper import Schedule, _item
from birkhoff.kernels.runtime.device import pdl, processors
from birkhoff.kernels.runtime.prepared import Form, Prepared
from birkhoff.kernels.runtime.triton_ops import after_the_last, let_next_come, rounded

BK = gl.constexpr(128)
"""Columns per block: the widest swizzled row of shared memory."""


@gluon.jit
def _load_partition(descriptors, rings, barriers, work, _pointers, _BIAS: gl.constexpr, DEPTH: gl.constexpr,
                    _WM: gl.constexpr, _WN: gl.constexpr, _HALVES: gl.constexpr):  # fmt: skip
    q_desc, w_desc, _y_desc = descriptors
    q_ring, w_ring, _y_stage = rings
    ready, empty, _go = barriers
    items, full, splits, tiles_n, blocks, _rows, _tokens = work
    BM: gl.constexpr = q_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    # Coordinates first. The previous kernel only quantises, and started this one once everything before it was done.
    tile, first, last, _part = _item(gl.program_id(0), full, splits, blocks)
    early = gl.minimum(last - first, DEPTH)
    for slot in range(early):
        mbarrier.expect(ready.index(slot), (BM + BN) * 128)
        tma.async_copy_global_to_shared(
            w_desc, [tile % tiles_n * BN, (first + slot) * 128], ready.index(slot), w_ring.index(slot)
        )
    gdc_wait()
    for slot in range(early):
        tma.async_copy_global_to_shared(
            q_desc, [tile // tiles_n * BM, (first + slot) * 128], ready.index(slot), q_ring.index(slot)
        )
    turn = early
    first += early
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        if item != gl.program_id(0):
            tile, first, last, _part = _item(item, full, splits, blocks)
        for block in range(first, last):
            slot = turn % DEPTH
            mbarrier.wait(empty.index(slot), (turn // DEPTH & 1) ^ 1)
            mbarrier.expect(ready.index(slot), (BM + BN) * 128)
            tma.async_copy_global_to_shared(
                q_desc, [tile // tiles_n * BM, block * 128], ready.index(slot), q_ring.index(slot)
            )
            tma.async_copy_global_to_shared(
                w_desc, [tile % tiles_n * BN, block * 128], ready.index(slot), w_ring.index(slot)
            )
            turn += 1


@gluon.jit
def _length(item, full, splits, blocks):
    """Return the number of blocks of an item."""
    _tile, first, last, _part = _item(item, full, splits, blocks)
    return last - first


@gluon.jit
def _multiply_partition(descriptors, rings, barriers, work, pointers, W: gl.constexpr, BIAS: gl.constexpr,
                        DEPTH: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    q_desc, w_desc, y_desc = descriptors
    q_ring, w_ring, y_stage = rings
    ready, empty, go = barriers
    items, full, splits, tiles_n, blocks, N, M = work
    scale_ptr, step_ptr, bias_ptr, partial_ptr = pointers
    DTYPE: gl.constexpr = y_desc.dtype
    BM: gl.constexpr = q_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    TM: gl.constexpr = BM // WM  # this warpgroup's part of a tile
    TN: gl.constexpr = BN // WN
    FROM_M: gl.constexpr = W * TM if WM == 2 else 0
    FROM_N: gl.constexpr = W * TN if WN == 2 else 0
    IN_TURN: gl.constexpr = WM * WN == 1
    PIECE: gl.constexpr = TN // HALVES
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(TN, 128), 32]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(PIECE, 128), 32]
    )
    gdc_wait()
    step = gl.load(step_ptr)
    row = FROM_M + gl.arange(0, TM, gl.SliceLayout(1, MMA))
    column = FROM_N + gl.arange(0, TN, gl.SliceLayout(0, MMA))
    turn, own, begin, stride = 0, 0, gl.program_id(0), gl.num_programs(0)
    if IN_TURN and W == 1:  # the first tile is the other warpgroup's
        turn = _length(begin, full, splits, blocks)
        begin += stride
    for item in range(begin, items, stride * (2 if IN_TURN else 1)):
        tile, first, last, part = _item(item, full, splits, blocks)
        m0, n0 = tile // tiles_n * BM, tile % tiles_n * BN
        scale = gl.load(scale_ptr + m0 + row, mask=m0 + row < M, other=0.0) * step
        acc = gl.zeros((TM, TN), gl.int32, MMA)
        continues = gl.to_tensor(False)
        if IN_TURN:  # wait for the other to take all its blocks: barriers tell only adjacent rounds of the ring apart
            mbarrier.wait(go.index(W), own & 1 ^ (W ^ 1))
            own += 1
        for block in range(first, last):
            slot = turn % DEPTH
            mbarrier.wait(ready.index(slot), turn // DEPTH & 1)
            q = q_ring.index(slot).slice(FROM_M, TM)
            w = w_ring.index(slot).slice(FROM_N, TN).permute((1, 0))
            acc = warpgroup_mma(q, w, acc, use_acc=continues, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The product before this one is done with its slot.
            mbarrier.arrive(empty.index((turn + DEPTH - 1) % DEPTH), pred=block > first)
            continues = gl.to_tensor(True)
            turn += 1
        if IN_TURN:
            mbarrier.arrive(go.index(W ^ 1))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((turn + DEPTH - 1) % DEPTH))
        if part < 0:
            y = acc.to(gl.float32) * scale[:, None]
            if BIAS:
                inside = n0 + column < N // 8 * 8  # N is a multiple of 8; written like this, two values are one load
                bias = gl.load(bias_ptr + n0 + column, mask=inside, other=0.0)
                y += bias.to(gl.float32)[None, :]
            out = y.to(DTYPE)
            if HALVES == 1:
                tma.store_wait(0)
                y_stage.index(W).store(out)
                fence_async_shared()
                tma.async_copy_shared_to_global(y_desc, [m0 + FROM_M, n0 + FROM_N], y_stage.index(W))
            else:
                left, right = out.reshape((TM, 2, PIECE)).permute((0, 2, 1)).split()
                tma.store_wait(0)
                y_stage.index(W).store(gl.convert_layout(left, OUT))
                fence_async_shared()
                tma.async_copy_shared_to_global(y_desc, [m0 + FROM_M, n0 + FROM_N], y_stage.index(W))
                tma.store_wait(0)
                y_stage.index(W).store(gl.convert_layout(right, OUT))
                fence_async_shared()
                tma.async_copy_shared_to_global(y_desc, [m0 + FROM_M, n0 + FROM_N + PIECE], y_stage.index(W))
        else:
            start = partial_ptr + part.to(gl.int64) * (BM * BN)
            gl.store(start + row[:, None] * BN + column[None, :], acc)
        if IN_TURN:  # skip the blocks of the other's next tile
            turn += _length(item + stride, full, splits, blocks)
    if W == 0:
        gdc_launch_dependents()
    tma.store_wait(0)


@gluon.jit
def _first(d, r, b, w, p, BIAS: gl.constexpr, DEPTH: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
           HALVES: gl.constexpr):  # fmt: skip
    _multiply_partition(d, r, b, w, p, 0, BIAS, DEPTH, WM, WN, HALVES)


@gluon.jit
def _second(d, r, b, w, p, BIAS: gl.constexpr, DEPTH: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
            HALVES: gl.constexpr):  # fmt: skip
    _multiply_partition(d, r, b, w, p, 1, BIAS, DEPTH, WM, WN, HALVES)


# One binary for all shapes: none of these numbers is compiled in.
@gluon.jit(do_not_specialize=["items", "full", "splits", "N", "M", "blocks"])
def _linear_kernel(
    q_desc,  # int8 [M, K], tiles [BM, 128]
    w_desc,  # int8 [N, K], tiles [BN, 128]
    y_desc,  # [M, N], tiles [TM, TN / HALVES]
    scale_ptr,  # float32 [M]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    partial_ptr,  # int32 [parts, BM, BN]
    items,  # whole tiles, then parts of tiles
    full,  # whole tiles
    splits,  # parts of a cut tile
    N,
    M,
    blocks,  # K / 128, rounded up
    BIAS: gl.constexpr,
    DEPTH: gl.constexpr,
    WM: gl.constexpr,  # warpgroups along the tokens of a tile,
    WN: gl.constexpr,  # and along its rows of W: one of the two is 2, or they take tiles in turn
    HALVES: gl.constexpr,  # steps in which a tile is written
    MULTIPLYING: gl.constexpr,  # registers of a thread that multiplies
    LOADING: gl.constexpr,  # and of one that loads
):
    BM: gl.constexpr = q_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    q_ring = gl.allocate_shared_memory(gl.int8, [DEPTH, BM, 128], q_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [DEPTH, BN, 128], w_desc.layout)
    y_stage = gl.allocate_shared_memory(y_desc.dtype, [2, BM // WM, BN // WN // HALVES], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for warpgroup in gl.static_range(2):
        mbarrier.init(go.index(warpgroup), count=1)
    for slot in gl.static_range(DEPTH):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=WM * WN)
    fence_async_shared()
    d, r, b = (q_desc, w_desc, y_desc), (q_ring, w_ring, y_stage), (ready, empty, go)
    w = (items, full, splits, gl.cdiv(N, BN), blocks, N, M)
    p = (scale_ptr, step_ptr, bias_ptr, partial_ptr)
    gl.warp_specialize(
        [
            (_first, (d, r, b, w, p, BIAS, DEPTH, WM, WN, HALVES)),
            (_second, (d, r, b, w, p, BIAS, DEPTH, WM, WN, HALVES)),
            (_load_partition, (d, r, b, w, p, BIAS, DEPTH, WM, WN, HALVES)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )


@triton.jit(do_not_specialize=["full", "splits", "M", "N"])
def _add_parts_kernel(
    partial_ptr,  # int32 [parts, BM, BN]
    y_ptr,  # [M, N]
    scale_ptr,
    step_ptr,
    bias_ptr,
    full,
    splits,
    M,
    N,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add up the parts of a divided tile, scale and add the bias, for ROWS rows."""
    after_the_last(True)
    pieces: tl.constexpr = BM // ROWS
    cut, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    tiles_n = tl.cdiv(N, BN)
    row, column = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, BN)
    source = partial_ptr + (cut * splits).to(tl.int64) * (BM * BN) + row[:, None] * BN + column[None, :]
    acc = tl.load(source)
    for part in range(1, splits):
        acc += tl.load(source + part * (BM * BN))
    let_next_come(True)
    m, n = (full + cut) // tiles_n * BM + row, (full + cut) % tiles_n * BN + column
    scale = tl.load(scale_ptr + m, mask=m < M, other=0) * tl.load(step_ptr)
    y = acc.to(tl.float32) * scale[:, None]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    place = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, rounded(y, y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Slots of the ring, warpgroups along tokens and along rows, steps to write a tile, programs per multiprocessor."""

    depth: int
    along_m: int
    along_n: int
    halves: int
    programs: int

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers per thread: on average, for multiplying threads, for loading threads."""
        return (168, 232, 40) if self.programs == 1 else (80, 104, 24)


def _shared(depth: int, along: tuple[int, int], halves: int = 1, programs: int = 1) -> Launch:
    return Launch(depth=depth, along_m=along[0], along_n=along[1], halves=halves, programs=programs)


def _in_turn(depth: int) -> Launch:
    return Launch(depth=depth, along_m=1, along_n=1, halves=1, programs=1)


LAUNCHES = {
    (256, 128, False): _shared(4, (2, 1), halves=2),
    (128, 256, False): _shared(4, (2, 1), halves=2),
    (128, 128, False): _shared(5, (2, 1)),
    (64, 256, False): _shared(4, (1, 2)),
    (128, 64, False): _shared(4, (2, 1), programs=2),
    (64, 128, False): _shared(4, (1, 2), programs=2),
    (128, 128, True): _in_turn(5),
    (64, 256, True): _in_turn(4),
    (128, 64, True): _in_turn(8),
    (64, 128, True): _in_turn(8),
    (64, 64, True): _in_turn(12),
}
"""By tokens and rows of W per tile, and whether the warpgroups take tiles in turn. Each fits the 227 KB and 65536
registers of a multiprocessor."""


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kinds = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kinds[dtype])


def tiles_of(
    block_m: int, block_n: int, launch: Launch, dtype: torch.dtype
) -> tuple[tuple[list[int], gl.NVMMASharedLayout], ...]:
    """Return (shape, layout in shared memory) for the tiles of q, of the plane, and of y as they are copied."""
    stage = block_m // launch.along_m, block_n // launch.along_n // launch.halves
    shapes = ((block_m, BK.value, torch.int8), (block_n, BK.value, torch.int8), (*stage, dtype))
    return tuple(([rows, columns], _layout(rows, columns, kind)) for rows, columns, kind in shapes)


def prepare(
    form: Form, width: int, tile: tuple[int, int, bool], *, split: bool, launch: Launch | None = None
) -> Product:
    """Return the launches for a form and planes of `width` columns. `tile` is a key of `LAUNCHES`.

    For Hopper, bfloat16 or float16, and N a multiple of 8. Measurements may pass another `launch` than the tile's.
    """
    shape, (block_m, block_n, _) = launch or LAUNCHES[tile], tile
    places = shape.programs * processors(form.device)
    tiles, blocks = -(-form.tokens // block_m) * -(-form.rows // block_n), -(-width // BK.value)
    plan = Schedule.of(tiles, places, blocks) if split else Schedule(full=tiles, cut=0, splits=1)
    items = plan.full + plan.cut * plan.splits
    average, multiplying, loading = shape.registers
    overlap = pdl(form.device)
    multiply = Prepared(
        _linear_kernel,
        (min(places, items),),
        (items, plan.full, plan.splits, form.rows, form.tokens, blocks),
        {
            "BIAS": form.bias is not None,
            "DEPTH": shape.depth,
            "WM": shape.along_m,
            "WN": shape.along_n,
            "HALVES": shape.halves,
            "MULTIPLYING": multiplying,
            "LOADING": loading,
        },
        {"num_warps": 4, "maxnreg": average, "launch_pdl": overlap},
        device=form.device,
        shared=form.tokens <= FEW,
        tiles=tiles_of(block_m, block_n, shape, form.dtype),
    )
    if not plan.cut:
        return partial(_run_whole, multiply)
    rows = min(block_m, 4096 // block_n)
    add = Prepared(
        _add_parts_kernel,
        (plan.cut * (block_m // rows),),
        (plan.full, plan.splits, form.tokens, form.rows),
        {"BIAS": form.bias is not None, "BM": block_m, "BN": block_n, "ROWS": rows},
        {"num_warps": 4, "launch_pdl": overlap},
        device=form.device,
        shared=form.tokens <= FEW,
    )
    return partial(_run_cut, multiply, add, (plan.cut * plan.splits, block_m, block_n))


def _run_whole(
    multiply: Prepared, q: Tensor, plane: Tensor, y: Tensor, scale: Tensor, step: Tensor, bias: Tensor
) -> None:
    multiply(q, plane, y, scale, step, bias, step)


def _run_cut(
    multiply: Prepared,
    add: Prepared,
    parts: tuple[int, int, int],
    q: Tensor,
    plane: Tensor,
    y: Tensor,
    scale: Tensor,
    step: Tensor,
    bias: Tensor,
) -> None:
    sums = torch.empty(parts, dtype=torch.int32, device=q.device)
    multiply(q, plane, y, scale, step, bias, sums)
    add(sums, y, scale, step, bias)
