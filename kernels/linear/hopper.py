"""HyperLinear for many tokens on Hopper: a persistent, warp-specialised kernel in Gluon.

One warp streams tiles of x and of step numbers into a ring in shared memory with the copy engine. Two warpgroups each
own 64 rows of W. They load their step numbers from the ring, decode them in registers while the tensor cores process
the previous block, and multiply with the decoded rows as the register operand. So a decoded weight never touches
memory, and shared memory carries half the traffic of two shared operands. Only I + J/256 and J are formed; the step
multiplies the accumulator.

Tiles that do not fill a last wave of multiprocessors are split along K over all multiprocessors; a second, small kernel
adds the parts.

Shapes: M = tokens, N = out features, K = in features (whole blocks of 64), P = K/2; BM = tokens per tile, 128 rows of
W.
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

from birkhoff.kernels.runtime.device import pdl, processors
from birkhoff.kernels.runtime.gluon_ops import decoded
from birkhoff.kernels.runtime.prepared import Form, Prepared, Run
from birkhoff.kernels.runtime.triton_ops import after_the_last, let_next_come, rounded

ROWS = gl.constexpr(128)
"""Rows of W per tile."""


@gluon.jit
def _item(item, full, splits, blocks):
    """Return (tile, first block, last block, part) of a work item; part < 0 means the whole of K."""
    part = item - full
    whole = part < 0
    tile = gl.where(whole, item, full + part // splits)
    slice_ = part % splits
    first = gl.where(whole, 0, slice_ * blocks // splits)
    last = gl.where(whole, blocks, (slice_ + 1) * blocks // splits)
    return tile, first, last, part


@gluon.jit
def _decoded_slot(
    theta_ring, ready, turn, W: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, DEPTH: gl.constexpr
):
    """Wait for the tiles of a turn, and return this warpgroup's [64, 64] weights over the step: I + J/256 next to J."""
    slot = turn % DEPTH
    mbarrier.wait(ready.index(slot), turn // DEPTH & 1)
    first, second = decoded(theta_ring.index(slot).slice(W * 64, 64).load(LAYOUT), DTYPE)
    # Concatenated along K, which only renames registers.
    return gl.convert_layout(gl.join(first, second).permute((0, 2, 1)).reshape((64, 64)), LAYOUT)


@gluon.jit
def _load_partition(descriptors, rings, barriers, work, _pointers, _BIAS: gl.constexpr, DEPTH: gl.constexpr):
    x_desc, theta_desc, _y_desc = descriptors
    x_ring, theta_ring, _y_stage = rings
    ready, empty = barriers
    items, full, splits, tiles_n, blocks, _rows = work
    BM: gl.constexpr = x_desc.block_type.shape[0]
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, first, last, _part = _item(item, full, splits, blocks)
        for block in range(first, last):
            slot = turn % DEPTH
            mbarrier.wait(empty.index(slot), (turn // DEPTH & 1) ^ 1)
            mbarrier.expect(ready.index(slot), BM * 128 + ROWS * 64)
            tma.async_copy_global_to_shared(
                x_desc, [tile // tiles_n * BM, block * 64], ready.index(slot), x_ring.index(slot)
            )
            tma.async_copy_global_to_shared(
                theta_desc, [tile % tiles_n * ROWS, block * 32], ready.index(slot), theta_ring.index(slot)
            )
            turn += 1


@gluon.jit
def _multiply_partition(
    descriptors, rings, barriers, work, pointers, W: gl.constexpr, BIAS: gl.constexpr, DEPTH: gl.constexpr
):
    x_desc, _theta_desc, y_desc = descriptors
    x_ring, theta_ring, y_stage = rings
    ready, empty = barriers
    items, full, splits, tiles_n, blocks, N = work
    step_ptr, bias_ptr, partial_ptr = pointers
    DTYPE: gl.constexpr = x_desc.dtype
    BM: gl.constexpr = x_desc.block_type.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    step = gl.load(step_ptr)
    row = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, first, last, part = _item(item, full, splits, blocks)
        n = tile % tiles_n * ROWS + row
        if BIAS:  # loads while the tensor cores work
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
        weights = _decoded_slot(theta_ring, ready, turn, W, LEFT, DTYPE, DEPTH)
        acc = gl.zeros((64, BM), gl.float32, MMA)
        continues = gl.to_tensor(False)  # whether the product adds to the accumulator
        for _block in range(first + 1, last):
            slot = turn % DEPTH
            running = warpgroup_mma(weights, x_ring.index(slot).permute((1, 0)), acc, use_acc=continues, is_async=True)
            decoded_next = _decoded_slot(theta_ring, ready, turn + 1, W, LEFT, DTYPE, DEPTH)
            # Naming the weights as a dependency keeps their registers until the tensor cores have read them.
            acc, weights = warpgroup_mma_wait(0, deps=(running, weights))
            mbarrier.arrive(empty.index(slot))
            weights = decoded_next
            continues = gl.to_tensor(True)
            turn += 1
        slot = turn % DEPTH
        running = warpgroup_mma(weights, x_ring.index(slot).permute((1, 0)), acc, use_acc=continues, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(running, weights))
        mbarrier.arrive(empty.index(slot))
        turn += 1

        if part < 0:
            y = acc * step
            if BIAS:
                y += bias.to(gl.float32)[:, None]
            tma.store_wait(0)
            y_stage.index(W).permute((1, 0)).store(y.to(DTYPE))
            fence_async_shared()
            tma.async_copy_shared_to_global(
                y_desc, [tile // tiles_n * BM, tile % tiles_n * ROWS + W * 64], y_stage.index(W)
            )
        else:
            m = gl.arange(0, BM, gl.SliceLayout(0, MMA))
            start = partial_ptr + part.to(gl.int64) * (ROWS * BM)
            gl.store(start + row[:, None] * BM + m[None, :], acc)
    if W == 0:
        gdc_launch_dependents()
    tma.store_wait(0)


@gluon.jit
def _first_rows(d, r, b, w, p, BIAS: gl.constexpr, DEPTH: gl.constexpr):
    _multiply_partition(d, r, b, w, p, 0, BIAS, DEPTH)


@gluon.jit
def _second_rows(d, r, b, w, p, BIAS: gl.constexpr, DEPTH: gl.constexpr):
    _multiply_partition(d, r, b, w, p, 1, BIAS, DEPTH)


# One binary for every shape: the numbers below are not compiled in.
@gluon.jit(do_not_specialize=["items", "full", "splits", "N", "blocks"])
def _linear_kernel(
    x_desc,  # [M, K], tiles [BM, 64]
    theta_desc,  # uint16 [N, P], tiles [128, 32]
    y_desc,  # [M, N], tiles [BM, 64]
    step_ptr,  # float32 []
    bias_ptr,  # [N]
    partial_ptr,  # float32 [parts, 128, BM]
    items,  # whole tiles, then parts of tiles
    full,  # whole tiles
    splits,  # parts of a cut tile
    N,
    blocks,  # K / 64
    BIAS: gl.constexpr,
    DEPTH: gl.constexpr,
    MULTIPLYING: gl.constexpr,  # registers of a thread that multiplies
    LOADING: gl.constexpr,  # and of one that loads
):
    BM: gl.constexpr = x_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [DEPTH, BM, 64], x_desc.layout)
    theta_ring = gl.allocate_shared_memory(gl.uint16, [DEPTH, ROWS, 32], theta_desc.layout)
    y_stage = gl.allocate_shared_memory(y_desc.dtype, [2, BM, 64], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(DEPTH):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gdc_wait()
    d, r, b = (x_desc, theta_desc, y_desc), (x_ring, theta_ring, y_stage), (ready, empty)
    w = (items, full, splits, gl.cdiv(N, ROWS), blocks, N)
    p = (step_ptr, bias_ptr, partial_ptr)
    gl.warp_specialize(
        [
            (_first_rows, (d, r, b, w, p, BIAS, DEPTH)),
            (_second_rows, (d, r, b, w, p, BIAS, DEPTH)),
            (_load_partition, (d, r, b, w, p, BIAS, DEPTH)),
        ],
        [4, 1],
        [MULTIPLYING, LOADING],
    )


@triton.jit(do_not_specialize=["full", "splits", "M"])
def _add_parts_kernel(
    partial_ptr,  # float32 [parts, 128, BM]
    step_ptr,
    bias_ptr,
    y_ptr,  # [M, N]
    full,
    splits,
    M,
    N,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a [64, BLOCK] piece of a split tile: the sum of its parts, scaled, biased and transposed."""
    after_the_last(True)
    ROWS: tl.constexpr = 128
    pieces: tl.constexpr = 2 * (BM // BLOCK)
    cut = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    tiles_n = tl.cdiv(N, ROWS)
    row = piece % 2 * 64 + tl.arange(0, 64)
    column = piece // 2 * BLOCK + tl.arange(0, BLOCK)
    source = partial_ptr + (cut * splits).to(tl.int64) * (ROWS * BM) + row[:, None] * BM + column[None, :]
    acc = tl.load(source)
    for part in range(1, splits):
        acc += tl.load(source + part * (ROWS * BM))
    let_next_come(True)
    n = (full + cut) % tiles_n * ROWS + row
    m = (full + cut) // tiles_n * BM + column
    y = acc * tl.load(step_ptr)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    place = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, rounded(tl.trans(y), y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Slots of the ring, programs per multiprocessor, and registers per thread: average, multiplying, loading."""

    depth: int
    programs: int
    average: int
    multiplying: int
    loading: int


def _launch(depth: int, programs: int) -> Launch:
    average, multiplying, loading = (168, 232, 40) if programs == 1 else (80, 104, 24)
    return Launch(depth=depth, programs=programs, average=average, multiplying=multiplying, loading=loading)


LAUNCHES = {256: _launch(4, 1), 128: _launch(6, 1), 64: _launch(5, 2), 32: _launch(6, 2), 16: _launch(8, 2)}
"""By tokens per tile: what fits the 227 KB and 65536 registers of a multiprocessor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How tiles are distributed: `full` whole ones, then `cut` tiles in `splits` parts each."""

    full: int
    cut: int
    splits: int

    @classmethod
    def of(cls, tiles: int, places: int, blocks: int) -> "Schedule":
        """Split the tiles that would not fill a last wave of `places` into parts that do, of at least 4 blocks each."""
        rest = tiles % places
        splits = min(places // rest, blocks // 4) if rest else 1
        if splits < 2:
            return cls(full=tiles, cut=0, splits=1)
        return cls(full=tiles - rest, cut=rest, splits=splits)


@cache
def _layouts(block_m: int, dtype: torch.dtype) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """Return shared-memory layouts of tiles of x or y, and of step numbers."""
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    wide = gl.NVMMASharedLayout.get_default_for([block_m, 64], kind)
    return wide, gl.NVMMASharedLayout.get_default_for([ROWS.value, 32], gl.uint16)


def prepare(form: Form, *, block_m: int, split: bool = True) -> Run:
    """Prepare the launches for a form. `block_m` is a key of `LAUNCHES`.

    For Hopper, bfloat16 or float16, K a multiple of 64, N of 8, and rows of x that begin at multiples of 16 bytes.
    """
    shape = LAUNCHES[block_m]
    places = shape.programs * processors(form.device)
    tiles, blocks = -(-form.tokens // block_m) * -(-form.rows // ROWS.value), form.columns // 64
    plan = Schedule.of(tiles, places, blocks) if split else Schedule(full=tiles, cut=0, splits=1)
    items = plan.full + plan.cut * plan.splits
    wide, narrow = _layouts(block_m, form.dtype)
    overlap = pdl(form.device)
    multiply = Prepared(
        _linear_kernel,
        (min(places, items),),
        (items, plan.full, plan.splits, form.rows, blocks),
        {
            "BIAS": form.bias is not None,
            "DEPTH": shape.depth,
            "MULTIPLYING": shape.multiplying,
            "LOADING": shape.loading,
        },
        {"num_warps": 4, "maxnreg": shape.average, "launch_pdl": overlap},
        device=form.device,
        tiles=(([block_m, 64], wide), ([ROWS.value, 32], narrow), ([block_m, 64], wide)),
    )
    if not plan.cut:
        return partial(_run_whole, multiply)
    block = min(64, block_m)
    add = Prepared(
        _add_parts_kernel,
        (plan.cut * 2 * (block_m // block),),
        (plan.full, plan.splits, form.tokens, form.rows),
        {"BIAS": form.bias is not None, "BM": block_m, "BLOCK": block},
        {"num_warps": 4, "launch_pdl": overlap},
        device=form.device,
    )
    return partial(_run_cut, multiply, add, (plan.cut * plan.splits, ROWS.value, block_m))


def _run_whole(multiply: Prepared, x: Tensor, theta: Tensor, step: Tensor, bias: Tensor | None, y: Tensor) -> None:
    multiply(x, theta, y, step, step if bias is None else bias, step)


def _run_cut(
    multiply: Prepared,
    add: Prepared,
    parts: tuple[int, int, int],
    x: Tensor,
    theta: Tensor,
    step: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    partial_sums = step.new_empty(parts)
    bias = step if bias is None else bias
    multiply(x, theta, y, step, bias, partial_sums)
    add(partial_sums, step, bias, y)
