"""Encode on the GPU: nearest node, coordinate planes, escapes and error statistics in one pass over the weights.

Bound by memory: 2 or 4 bytes read and 1 written per weight. The arithmetic is `trajectory.nearest`, operation by
operation, without fused multiply-adds, so indices equal the codec's on every device. The step stays in device memory
between search and encoding, so the host never waits.

Shapes: R = rows, K = columns, P = pairs per row, B = programs, C = candidate steps, E = escapes.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.pairs import HALF, pairs_per_row
from birkhoff.kernels.runtime.device import power_of_two
from birkhoff.kernels.runtime.prepared import Prepared
from birkhoff.kernels.runtime.triton_ops import INTERPRETED, local_columns, position, rounded

_THREADS = 128
"""Threads per program, if there is enough work. Each takes adjacent weights, 16 bytes at a time."""

_MOST_TURNS = 32
"""Most blocks per program, processed one after the other before the sums are added up."""

_LEAST_PROGRAMS = 1024
"""Least number of programs when blocks are gathered: about eight per multiprocessor."""

_STAGES = 4
"""Blocks of a program in flight: the next are loaded while one is coded."""

ESCAPE_CAPACITY = 4096
"""Capacity of the first list of escapes. If there are more, they are listed again."""

CANDIDATES = 8
_SPACING_DB = 1.5
_FIRST_DB = -1.5
"""Steps tried by the search: from 1.5 dB below the step of a uniform error upwards, 1.5 dB apart."""

_ENERGY_PROGRAMS = 1024
_SAMPLE_BLOCKS = 4096
"""Blocks of 64 weights that the search samples, spread evenly: 2^18 weights give the error to 0.01 dB."""

_SAMPLE_PER_PROGRAM = 64


_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds to a whole number, ties to even, whose low byte is the low byte of the sum."""


@triton.jit
def _round_even(t):
    """Round to the nearest whole number, ties to even, whatever its size."""
    low = tl.floor(t)
    rest = t - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), low + 1.0, low)


@triton.jit
def _floor(t):
    """Return the floor of a number below 2^22 in size."""
    if INTERPRETED:
        whole = tl.floor(t)
    else:  # add with rounding down, eight times as fast as the floor instruction
        whole = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 0f4B400000;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
        whole -= _MAGIC
    return whole


@triton.jit
def _nearest(x, y, inverse, EXACT: tl.constexpr):
    """`trajectory.nearest`: (I, J) as float32, not limited to the box.

    Without EXACT, results are right below 2^22 in size, and of about the right size beyond.
    """
    v = y * inverse
    row = tl.floor(v) if EXACT else _floor(v)
    below = v - row
    t0 = tl.fma(row, -0.00390625, x * inverse)  # the product is exact
    t1 = t0 - 0.00390625
    if EXACT:
        i0, i1 = _round_even(t0), _round_even(t1)
    else:
        i0, i1 = (t0 + _MAGIC) - _MAGIC, (t1 + _MAGIC) - _MAGIC
    e0 = t0 - i0
    e1 = t1 - i1
    upper = tl.fma(below, -2.0, e1 * e1 + 1.0) < e0 * e0  # the product is exact
    return tl.where(upper, i1, i0), tl.where(upper, row + 1.0, row)


@triton.jit
def _bits(whole):
    """Return the bits of a float32 whole number in the box, offset to 0..255, under those of _MAGIC. Others differ
    above them."""
    return (whole + (_MAGIC + 128.0)).to(tl.int32, bitcast=True)


@triton.jit
def _low_byte(bits):
    """Return the whole number of `_bits` as int8; outside the box, its low byte.

    Flipping the sign bit back also keeps ptxas from storing the float itself as a saturated byte.
    """
    return (bits ^ 0x80).to(tl.int8)


@triton.jit
def _beside(seen, bits):
    """Return `seen` plus the bits in which `_bits` differ from those of 0, in one instruction of three inputs."""
    if INTERPRETED:
        seen |= bits ^ 0x4B400000
    else:
        seen = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x4B400000, 0xF6;", "=r,r,r", [seen, bits], dtype=tl.int32, is_pure=True, pack=1
        )
    return seen


@triton.jit
def _as_stored(x, y, STORED: tl.constexpr):
    """Return float32 values rounded to STORED and back."""
    if tl.bfloat16 == STORED and not INTERPRETED:  # both at once, four times as fast
        both = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )
        x, y = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        x, y = rounded(x, STORED).to(tl.float32), rounded(y, STORED).to(tl.float32)
    return x, y


@triton.jit
def _load_pairs(
    weight_ptr,
    block,
    rows,
    columns,
    pairs,
    TAIL_HALF: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return (x, y, their position in a plane, mask of pairs, mask of those with a y) of a block. EVEN needs no
    masks."""
    local = tl.arange(0, BLOCK_P)[None, :]
    first, second = local_columns(local)
    if TAIL_HALF > 0:
        tiles = tl.cdiv(pairs, BLOCK_P)
        row = tl.cast(block // tiles, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        start = tl.cast(block % tiles, tl.int64) * BLOCK_P  # a multiple of 32: a block boundary
        mask = (row < rows) & (start + local < pairs)
        second = tl.where(start + local >= pairs - TAIL_HALF, first + TAIL_HALF, second)
        paired = mask & (2 * start + second < columns)
        source = weight_ptr + row * columns + 2 * start
        x, y = tl.load(source + first, mask=mask, other=0), tl.load(source + second, mask=paired, other=0)
        place = row * pairs + start + local
    else:
        start = tl.cast(block, tl.int64) * BLOCK_P
        place = start + local
        mask = place < pairs
        paired = mask
        source = weight_ptr + 2 * start
        if EVEN:
            x, y = tl.load(source + first), tl.load(source + second)
        else:
            x, y = tl.load(source + first, mask=mask, other=0), tl.load(source + second, mask=mask, other=0)
    return x, y, place, mask, paired


@triton.jit
def _add_errors(x, y, i, j, step, paired, squared, absolute, greatest, STORED: tl.constexpr, TAIL_HALF: tl.constexpr):
    """Add a block's errors at its nodes (I, J) to the sums of e^2 and |e| and to the greatest |e|."""
    near_x, near_y = position(i, j, step)
    near_x, near_y = _as_stored(near_x, near_y, STORED)
    error_x, error_y = tl.abs(x - near_x), tl.abs(y - near_y)
    if TAIL_HALF > 0:
        error_y = tl.where(paired, error_y, 0.0)
    squared = tl.fma(error_y, error_y, tl.fma(error_x, error_x, squared))
    return squared, absolute + (error_x + error_y), tl.maximum(greatest, tl.maximum(error_x, error_y))


@triton.jit(do_not_specialize=["rows", "blocks"])
def _encode_kernel(
    weight_ptr,  # [R, K]
    step_ptr,  # float32 []
    i_ptr,  # int8 [R, P]
    j_ptr,
    stats_ptr,  # float32 [5, B]: sum w^2, sum e^2, sum |e|, max |e|, 1 where some I or J is outside the box
    rows,
    columns,
    pairs,
    blocks,
    TAIL_HALF: tl.constexpr,  # pairs of the ragged last block of a row, 0 if none
    EVEN: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,  # blocks under way, the one being coded included
):
    STORED: tl.constexpr = weight_ptr.dtype.element_ty
    step = tl.load(step_ptr)
    inverse = tl.div_rn(1.0, step)
    pid = tl.program_id(0)
    energy = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
    squared, absolute, greatest = energy, energy, energy
    seen = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.int32)
    for block in tl.range(pid * TURNS, tl.minimum(pid * TURNS + TURNS, blocks), num_stages=STAGES):
        x, y, place, mask, paired = _load_pairs(
            weight_ptr, block, rows, columns, pairs, TAIL_HALF, EVEN, BLOCK_R, BLOCK_P
        )
        x, y = x.to(tl.float32), y.to(tl.float32)
        i, j = _nearest(x, y, inverse, False)
        i_bits, j_bits = _bits(i), _bits(j)
        seen = _beside(_beside(seen, i_bits), j_bits)
        if EVEN:
            tl.store(i_ptr + place, _low_byte(i_bits))
            tl.store(j_ptr + place, _low_byte(j_bits))
        else:
            tl.store(i_ptr + place, _low_byte(i_bits), mask=mask)
            tl.store(j_ptr + place, _low_byte(j_bits), mask=mask)
        energy = tl.fma(y, y, tl.fma(x, x, energy))
        squared, absolute, greatest = _add_errors(
            x, y, i, j, step, paired, squared, absolute, greatest, STORED, TAIL_HALF
        )

    stats = stats_ptr + pid
    programs = tl.num_programs(0)
    tl.store(stats, tl.sum(energy))
    tl.store(stats + programs, tl.sum(squared))
    tl.store(stats + 2 * programs, tl.sum(absolute))
    tl.store(stats + 3 * programs, tl.max(greatest))
    tl.store(stats + 4 * programs, tl.max((seen & -256 != 0).to(tl.float32)))


@triton.jit(do_not_specialize=["capacity", "rows", "blocks"])
def _escape_kernel(
    weight_ptr,
    step_ptr,
    i_ptr,
    j_ptr,
    stats_ptr,
    count_ptr,  # int32 [], escapes so far
    escape_pair_ptr,  # int64 [capacity], in no order
    escape_i_ptr,  # int32 [capacity]
    escape_j_ptr,
    capacity,
    rows,
    columns,
    pairs,
    blocks,
    TAIL_HALF: tl.constexpr,
    EVEN: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Code again, exactly, the blocks in which `_encode_kernel` found coordinates outside the box, and list these."""
    STORED: tl.constexpr = weight_ptr.dtype.element_ty
    pid = tl.program_id(0)
    stats = stats_ptr + pid
    programs = tl.num_programs(0)
    if tl.load(stats + 4 * programs) > 0:
        step = tl.load(step_ptr)
        inverse = tl.div_rn(1.0, step)
        squared = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
        absolute, greatest = squared, squared
        for block in range(pid * TURNS, tl.minimum(pid * TURNS + TURNS, blocks)):
            x, y, place, mask, paired = _load_pairs(
                weight_ptr, block, rows, columns, pairs, TAIL_HALF, EVEN, BLOCK_R, BLOCK_P
            )
            x, y = x.to(tl.float32), y.to(tl.float32)
            i, j = _nearest(x, y, inverse, True)
            squared, absolute, greatest = _add_errors(
                x, y, i, j, step, paired, squared, absolute, greatest, STORED, TAIL_HALF
            )
            outside = mask & (tl.maximum(tl.abs(i + 0.5), tl.abs(j + 0.5)) > 127.5)  # -128..127 is inside
            tl.store(i_ptr + place, tl.zeros_like(i).to(tl.int8), mask=outside)
            tl.store(j_ptr + place, tl.zeros_like(i).to(tl.int8), mask=outside)
            slot = tl.atomic_add(count_ptr + tl.zeros_like(place).to(tl.int32), 1, mask=outside)
            kept = outside & (slot < capacity)
            tl.store(escape_pair_ptr + slot, place, mask=kept)
            tl.store(escape_i_ptr + slot, i.to(tl.int32), mask=kept)
            tl.store(escape_j_ptr + slot, j.to(tl.int32), mask=kept)
        tl.store(stats + programs, tl.sum(squared))
        tl.store(stats + 2 * programs, tl.sum(absolute))
        tl.store(stats + 3 * programs, tl.max(greatest))


@triton.jit
def _energy_kernel(weight_ptr, partial_ptr, count, BLOCK: tl.constexpr):
    """Write each program's share of sum w^2 to partial [B]."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        place = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + place, mask=place < count, other=0).to(tl.float32)
        total = tl.fma(w, w, total)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _guess(energy_ptr, programs, count, target_db, BLOCK: tl.constexpr):
    """Return (energy, step of a uniform error at the target)."""
    place = tl.arange(0, BLOCK)
    energy = tl.sum(tl.load(energy_ptr + place, mask=place < programs, other=0))
    return energy, tl.sqrt(12.0 * energy / count) * tl.exp2(target_db * -0.16609640474436813)  # log2(10) / 20


@triton.jit(do_not_specialize=["energies", "count", "stride", "samples"])
def _search_kernel(
    weight_ptr,
    energy_ptr,
    errors_ptr,  # float32 [C, B]: each program's share of the sample's sum e^2
    energies,
    count,
    stride,  # blocks from one sampled block to the next
    samples,  # blocks sampled
    target_db,
    first_db,
    spacing_db,
    CANDIDATES: tl.constexpr,
    ENERGY_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    _, guess = _guess(energy_ptr, energies, count, target_db, ENERGY_BLOCK)
    sample = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    place = sample.to(tl.int64) * stride * 64 + tl.arange(0, 32)[None, :]
    x = tl.load(weight_ptr + place, mask=(sample < samples) & (place < count), other=0)
    y = tl.load(weight_ptr + place + 32, mask=(sample < samples) & (place + 32 < count), other=0)
    STORED: tl.constexpr = weight_ptr.dtype.element_ty
    x, y = x.to(tl.float32), y.to(tl.float32)
    for candidate in range(CANDIDATES):
        step = guess * tl.exp2((first_db + candidate * spacing_db) * 0.16609640474436813)
        i, j = _nearest(x, y, tl.div_rn(1.0, step), False)
        near_x, near_y = position(i, j, step)
        near_x, near_y = _as_stored(near_x, near_y, STORED)
        error_x, error_y = x - near_x, y - near_y
        share = tl.sum(tl.fma(error_x, error_x, error_y * error_y))
        tl.store(errors_ptr + candidate * tl.num_programs(0) + tl.program_id(0), share)


@triton.jit(do_not_specialize=["energies", "programs", "count", "sampled"])
def _pick_kernel(
    energy_ptr,
    errors_ptr,
    step_ptr,
    energies,
    programs,
    count,
    sampled,  # weights sampled
    target_db,
    first_db,
    spacing_db,
    CANDIDATES: tl.constexpr,
    ENERGY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the step at which log E, linear in log h between candidates, meets the target."""
    energy, guess = _guess(energy_ptr, energies, count, target_db, ENERGY_BLOCK)
    candidate = tl.arange(0, CANDIDATES)
    place = tl.arange(0, BLOCK)[None, :]
    shares = tl.load(errors_ptr + candidate[:, None] * programs + place, mask=place < programs, other=0)
    error = tl.maximum(tl.sum(shares, axis=1) * (count / sampled), 1e-38)
    excess = 3.0102999566398120 * (tl.log2(energy) - tl.log2(error)) - target_db
    met = tl.sum((excess >= 0).to(tl.int32))  # larger candidates have a smaller excess
    low = tl.minimum(tl.maximum(met - 1, 0), CANDIDATES - 2)
    at_low = tl.sum(tl.where(candidate == low, excess, 0.0))
    at_high = tl.sum(tl.where(candidate == low + 1, excess, 0.0))
    slope = tl.minimum(tl.maximum(at_low - at_high, 0.1), 100.0)
    # Beyond the first or last candidate, E ~ h^2 is assumed.
    along = tl.where(met == 0, at_low, tl.where(met == CANDIDATES, spacing_db + at_high, at_low / slope * spacing_db))
    tl.store(step_ptr, guess * tl.exp2((first_db + low * spacing_db + along) * 0.16609640474436813))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The results of a pass in device memory (see `_encode_kernel`), and its launch parameters."""

    step: Tensor
    i: Tensor
    j: Tensor
    stats: Tensor
    numbers: tuple[int, ...]
    constants: dict[str, int | bool]


@triton.jit
def _gather_kernel(row_ptr, out_ptr, BLOCK: tl.constexpr):
    """out [T, 6] float64 of passes (addresses of stats and step, programs): sums, maxima and the step of each."""
    row = row_ptr + tl.program_id(0) * 3
    stats_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    step_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    programs = tl.load(row + 2)
    out = out_ptr + tl.program_id(0) * 6
    for k in tl.static_range(5):
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, programs, BLOCK):
            place = first + tl.arange(0, BLOCK)
            value = tl.load(stats_ptr + k * programs + place, mask=place < programs, other=0).to(tl.float64)
            total = total + value if k < 3 else tl.maximum(total, value)
        tl.store(out + k, tl.sum(total) if k < 3 else tl.max(total))
    tl.store(out + 5, tl.load(step_ptr).to(tl.float64))


_GATHERED = 1024


def gather(passes: Sequence[Pass]) -> Tensor:
    """[sum w^2, sum e^2, sum |e|, max |e|, 1 if there are escapes, step] of passes on one device, float64 [T, 6]."""
    device = passes[0].step.device
    rows = [(one.stats.data_ptr(), one.step.data_ptr(), one.stats.shape[1]) for one in passes]
    out = torch.empty(len(passes), 6, dtype=torch.float64, device=device)
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    _gather_kernel[(len(passes),)](table, out, BLOCK=_GATHERED)
    return out


def encode_passes(weights: Sequence[Tensor], target_db: float) -> list[Pass]:
    """`search` and `encode_pass` of contiguous matrices on one device; what only a search needs is shared by all."""
    device = weights[0].device
    searches = [_prepare_search(weight.numel(), weight.dtype, device, target_db) for weight in weights]
    energy = torch.empty(max(made.energies for made in searches), dtype=torch.float32, device=device)
    errors = torch.empty(CANDIDATES * max(made.programs for made in searches), dtype=torch.float32, device=device)
    steps = torch.empty(len(weights), 4, dtype=torch.float32, device=device)[
        :, 0
    ].unbind()  # a launch wants addresses of 16 bytes each
    found = []
    for weight, step, made in zip(weights, steps, searches, strict=True):
        made.energy(weight, energy)
        made.search(weight, energy, errors)
        made.pick(energy, errors, step)
        found.append(encode_pass(weight, step))
    return found


def encode_pass(weight_RK: Tensor, step: Tensor) -> Pass:
    """Code contiguous float32, bfloat16 or float16 weights for the float32 scalar `step`, without waiting.

    Escapes hold arbitrary low bytes: if any of stats[4] is not 0, `take_escapes` must follow.
    """
    rows, columns = weight_RK.shape
    device = weight_RK.device
    launch, programs, numbers, constants = _prepare_pass(rows, columns, weight_RK.dtype, device)
    planes = torch.empty(2, rows, pairs_per_row(columns), dtype=torch.int8, device=device)
    coded = Pass(
        step=step,
        i=planes[0],
        j=planes[1],
        stats=torch.empty(5, programs, dtype=torch.float32, device=device),
        numbers=numbers,
        constants=constants,
    )
    launch(weight_RK, step, coded.i, coded.j, coded.stats)
    return coded


@lru_cache(1 << 10)
def _prepare_pass(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Prepared, int, tuple[int, ...], dict[str, int | bool]]:
    """Return the launch of a pass, its number of programs, and the kernel's numbers and constants."""
    tail_half = pairs_per_row(columns % (2 * HALF))
    if tail_half == 0:
        rows, columns = 1, rows * columns
    pairs = pairs_per_row(columns)
    per_thread = 16 // dtype.itemsize
    block = _THREADS * per_thread
    block_p = min(block, max(HALF, power_of_two(pairs)))
    block_r = 1 if tail_half == 0 else min(block // block_p, power_of_two(rows))
    blocks = -(-rows // block_r) * -(-pairs // block_p)
    turns = 1
    while turns < _MOST_TURNS and blocks >= 2 * turns * _LEAST_PROGRAMS:
        turns *= 2
    programs = -(-blocks // turns)
    numbers = rows, columns, pairs, blocks
    settled: dict[str, int | bool] = {
        "TAIL_HALF": tail_half,
        "EVEN": tail_half == 0 and pairs % block_p == 0,
        "TURNS": turns,
        "BLOCK_R": block_r,
        "BLOCK_P": block_p,
    }
    options = {"num_warps": max(1, block_r * block_p // (32 * per_thread)), "enable_fp_fusion": False}
    launch = Prepared(_encode_kernel, (programs,), numbers, {**settled, "STAGES": _STAGES}, options, device=device)
    return launch, programs, numbers, {**settled, **options}


def take_escapes(weight_RK: Tensor, coded: Pass, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """List the escapes of a pass, (pair int64, I, J int32) [E] by pair, and replace them by the origin.

    Corrects the statistics in `coded.stats`. Waits for the device.
    """
    capacity = ESCAPE_CAPACITY if capacity is None else capacity
    device = weight_RK.device
    count = torch.zeros((), dtype=torch.int32, device=device)
    pair = torch.empty(capacity, dtype=torch.int64, device=device)
    i, j = torch.empty(2, capacity, dtype=torch.int32, device=device)
    _escape_kernel[(coded.stats.shape[1],)](
        weight_RK,
        coded.step,
        coded.i,
        coded.j,
        coded.stats,
        count,
        pair,
        i,
        j,
        capacity,
        *coded.numbers,
        **coded.constants,
    )
    escapes = int(count)
    if escapes > capacity:
        return take_escapes(weight_RK, coded, capacity=escapes)
    pair, order = pair[:escapes].sort()
    return pair, i[:escapes][order], j[:escapes][order]


def search(weight_RK: Tensor, target_db: float) -> Tensor:
    """Return a step (float32 scalar on the device) whose SQNR on a sample of contiguous weights meets the target."""
    device = weight_RK.device
    made = _prepare_search(weight_RK.numel(), weight_RK.dtype, device, target_db)
    energy, errors = (
        torch.empty(made.energies, dtype=torch.float32, device=device),
        torch.empty(CANDIDATES, made.programs, dtype=torch.float32, device=device),
    )
    step = torch.empty((), dtype=torch.float32, device=device)
    made.energy(weight_RK, energy)
    made.search(weight_RK, energy, errors)
    made.pick(energy, errors, step)
    return step


class _Search(NamedTuple):
    """The launches of a search, and the number of programs for its energy and its sample."""

    energies: int
    programs: int
    energy: Prepared
    search: Prepared
    pick: Prepared


@lru_cache(1 << 10)
def _prepare_search(count: int, dtype: torch.dtype, device: torch.device, target_db: float) -> _Search:  # noqa: ARG001
    """Prepare the launches for weights of a dtype."""
    energies = min(_ENERGY_PROGRAMS, -(-count // 4096))
    blocks = -(-count // (2 * HALF))
    stride = max(1, blocks // _SAMPLE_BLOCKS)
    samples = -(-blocks // stride)
    programs = -(-samples // _SAMPLE_PER_PROGRAM)
    where = target_db, _FIRST_DB, _SPACING_DB
    settled = {"CANDIDATES": CANDIDATES, "ENERGY_BLOCK": power_of_two(energies)}
    return _Search(
        energies=energies,
        programs=programs,
        energy=Prepared(_energy_kernel, (energies,), (count,), {"BLOCK": 4096}, {"num_warps": 8}, device=device),
        search=Prepared(
            _search_kernel,
            (programs,),
            (energies, count, stride, samples, *where),
            {**settled, "BLOCKS": _SAMPLE_PER_PROGRAM},
            {"enable_fp_fusion": False},
            device=device,
        ),
        pick=Prepared(
            _pick_kernel,
            (1,),
            (energies, programs, count, min(samples * 2 * HALF, count), *where),
            {**settled, "BLOCK": power_of_two(programs)},
            {},
            device=device,
        ),
    )
