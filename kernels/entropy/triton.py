"""Entropy decoding on a GPU: compressed bytes to int8 coordinate planes, all tensors of a shard at once.

There are four launches. The first expands a table's frequencies F to 4096 slots,

    slot s, where C <= s < C + F: symbol | F << 8 | (s - C) << 20

The second decodes each block with one warp, with a lane of the warp for each lane of the block. With e as the slot of
x mod 4096,

    x = F(e) * floor(x / 4096) + (e >> 20), and if x < 2^16: x = 65536 x + word

A step's words go to its lanes in order: the k-th lane that reads takes the k-th word. k is the number of bits below the
lane's own bit in the warp's vote. A raw block is copied.

Toy: four lanes after a step, x = (70000, 900, 80000, 17). Lanes 1 and 3 read, so the votes are 0b1010. No bit is set
below lane 1 and one is set below lane 3, so they take words 0 and 1, and the next step continues with word 2.

The third moves each symbol from its group to its place and follows the path of its lane (`codec.trellis`):

    o_t = (k_t mod 2) xor o_(t-2) xor o_(t-3),    n_t = 2 k_t + o_(t-1)

It lists coordinates outside int8; the fourth completes their pairs, and sets all escapes in the planes to 0.

Sources: `codec.entropy.rans`, `codec.contexts`, `codec.trellis`. The kernels never read outside the streams, whatever
these hold: `codec.rest.plan` has bounded every block, and no block reads words beyond its own.

Shapes: B = blocks, S = streams, R = rows, P = pairs per row, T = tensors.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.contexts import LEVELS
from birkhoff.codec.entropy.tables import SLOTS
from birkhoff.kernels.entropy.plan import DIRECT, EVEN
from birkhoff.kernels.runtime.triton_ops import INTERPRETED

ROW = 7
"""Numbers in a block's row, see `codec.rest.Plan`. The last is the block's tensor."""

PLACE = 11
"""Numbers that describe a tensor to `_place_kernel`."""

LANES_A_PROGRAM = 128
"""Lanes of paths that one program of `_place_kernel` follows."""

_SLOTS_A_PROGRAM = 512
_SLOTS_AT_ONCE = _SLOTS_A_PROGRAM if triton.knobs.runtime.interpret else 32
"""Slots that threads fill together. The interpreter's time depends on the number of calls."""

_RAW_AT_ONCE = 512

_CLEARED_AT_ONCE = 1 << 18 if triton.knobs.runtime.interpret else 1024

LAUNCHING = threading.Lock()
"""Held while kernels are launched, because otherwise each thread would compile them."""

_SLOTS, _ROW, _PLACE, _LEVELS = map(tl.constexpr, (SLOTS, ROW, PLACE, LEVELS))
_DIRECT, _EVEN = map(tl.constexpr, (DIRECT, EVEN))


@triton.jit
def _slot_kernel(frequency_ptr, slot_ptr, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """Fill slot [S, 4096] from frequency [S, 256]. A program fills COUNT slots of a table, CHUNK at a time."""
    table = tl.program_id(0).to(tl.int64)
    frequency = tl.load(frequency_ptr + table * 256 + tl.arange(0, 256)).to(tl.int32)
    end = tl.cumsum(frequency, 0)
    if tl.max(end) > 0:  # a raw stream has no table
        for first in range(tl.program_id(1) * COUNT, tl.program_id(1) * COUNT + COUNT, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            before = end[None, :] <= slot[:, None]
            symbol = tl.sum(before.to(tl.int32), axis=1)
            start = tl.max(tl.where(before, end[None, :], 0), axis=1)
            f = tl.load(frequency_ptr + table * 256 + symbol).to(tl.int32)
            entry = symbol | f << 8 | (slot - start) << 20
            tl.store(slot_ptr + table * _SLOTS + slot, entry.to(tl.uint32, bitcast=True))


@triton.jit
def ranks(chosen):
    """Return (number of chosen lanes below each, number of all) for a warp of 32, one lane per thread."""
    if INTERPRETED:
        one = chosen.to(tl.int32)
        below, both = tl.cumsum(one, 0) - one, tl.sum(one, 0) + tl.zeros_like(one)
    else:
        below, both = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 vote, under;
            setp.ne.b32 p, $2, 0;
            vote.sync.ballot.b32 vote, p, 0xffffffff;
            mov.u32 under, %lanemask_lt;
            and.b32 under, under, vote;
            popc.b32 $0, under;
            popc.b32 $1, vote;
            }""",
            "=r,=r,r",
            [chosen.to(tl.int32)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return below, both


@triton.jit
def _word(ptr, mask):
    """Read a little-endian 16-bit number at any address."""
    low = tl.load(ptr, mask=mask, other=0).to(tl.uint32)
    return low | tl.load(ptr + 1, mask=mask, other=0).to(tl.uint32) << 8


@triton.jit
def _decode_kernel(data_ptr, row_ptr, slot_ptr, out_ptr, bad_ptr, RAW: tl.constexpr):
    """Decode a block to its symbols. Set bad [tensor] to 1 if it is damaged."""
    row = row_ptr + tl.program_id(0).to(tl.int64) * _ROW
    source = data_ptr + tl.load(row)
    words = tl.load(row + 1).to(tl.int32)
    out = out_ptr + tl.load(row + 2)
    count = tl.load(row + 3).to(tl.int32)
    lanes = tl.load(row + 5).to(tl.int32)
    if lanes == 0:
        for first in range(0, count, RAW):
            place = first + tl.arange(0, RAW)
            tl.store(out + place, tl.load(source + place, mask=place < count), mask=place < count)
    else:
        lane = tl.arange(0, 32)
        slot = slot_ptr + tl.load(row + 4) * _SLOTS
        inside = lane < lanes
        x = _word(source + 4 * lane, inside) | _word(source + 4 * lane + 2, inside) << 16
        wrong = inside & (x < 65536)
        source += 4 * lanes
        taken = tl.zeros_like(lane)
        for first in range(0, count, lanes):
            active = inside & (first + lane < count)
            entry = tl.load(slot + (x & 4095).to(tl.int32))
            tl.store(out + first + lane, entry.to(tl.uint8), mask=active)
            y = ((entry >> 8) & 4095) * (x >> 12) + (entry >> 20)
            small = active & (y < 65536)
            below, both = ranks(small)
            place = taken + below
            word = _word(source + 2 * place, small & (place < words))
            x = tl.where(active, tl.where(small, y << 16 | word, y), x)
            taken += both
        wrong |= (inside & (x != 65536)) | (taken != words)
        if tl.max(wrong.to(tl.int32), 0) > 0:
            tl.store(bad_ptr + tl.load(row + 6), 1)


@triton.jit
def _symbol(symbol_ptr, row_ptr, column_ptr, base_ptr, width_ptr, row, column, mask, pairs, half, direct, even):
    """Return the symbol at a row and column of a plane, from its group. Planes are side by side if they are one
    group."""
    grouped = mask & (direct == 0)
    r = tl.load(row_ptr + row, mask=grouped & (even == 0), other=0)
    r = tl.where(even == 0, r, row * _LEVELS)
    c = tl.load(column_ptr + column, mask=grouped, other=0)
    level = c % _LEVELS
    at = tl.load(base_ptr + r % _LEVELS * _LEVELS + level, mask=grouped, other=0) + c // _LEVELS
    at += r // _LEVELS * tl.load(width_ptr + level, mask=grouped, other=0)
    at = tl.where(direct == 0, at, row * (2 * pairs) + half * pairs + column)
    return tl.load(symbol_ptr + at, mask=mask, other=128).to(tl.int32) - 128


@triton.jit
def _step(k, one, two, three, path):
    """Return (n, o) of a step, from o of the three steps before."""
    return tl.where(path > 0, 2 * k + one, k), (k & 1) ^ two ^ three


@triton.jit
def _keep(n, at, half, stride, mask, plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room):
    """Store coordinates in their plane, and list those that do not fit int8. `at` is the place of the pair's I."""
    tl.store(plane_ptr + at + half * stride, n.to(tl.int8), mask=mask)
    outside = mask & ((n < -128) | (n > 127))
    slot = tl.atomic_add(count_ptr + tl.zeros_like(n), 1, mask=outside).to(tl.int64)
    kept = outside & (slot >= 0) & (slot < room)  # with 2^31 of them the count is negative
    tl.store(key_ptr + slot, 2 * at + half, mask=kept)
    tl.store(second_ptr + slot, at + stride, mask=kept)
    tl.store(value_ptr + 2 * slot + half, n, mask=kept)


@triton.jit
def _place_kernel(
    symbol_ptr,  # uint8, groups of all tensors
    entry_ptr,  # int64: 64 * rank + level of columns, and of rows that have several levels
    plan_ptr,  # int64: numbers of the plan that the tensors' other numbers point to
    tensor_ptr,  # int64 [T, PLACE]
    program_ptr,  # int64 [programs, 3]: tensor, plane (0: I, 1: J), first lane
    plane_ptr,  # int8, both planes of all tensors
    count_ptr,  # int32 []: coordinates outside -128..127
    key_ptr,  # int64 [room]: 2 * place of the pair's I in plane_ptr, plus 1 if J is outside
    second_ptr,  # int64 [room]: place of the pair's J
    value_ptr,  # int32 [room, 2]: I and J, of which the one that is outside is written
    room,
    BLOCK: tl.constexpr,
):
    program = program_ptr + tl.program_id(0).to(tl.int64) * 3
    half, lane = tl.load(program + 1), tl.load(program + 2) + tl.arange(0, BLOCK)
    tensor = tensor_ptr + tl.load(program) * _PLACE
    rows, pairs, lanes, path = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2), tl.load(tensor + 3)
    symbols = symbol_ptr + tl.load(tensor + 4)
    first, stride = tl.load(tensor + 5), tl.load(tensor + 6)
    direct = (tl.load(tensor + 7) == _DIRECT).to(tl.int32)
    even = (tl.load(tensor + 7) == _EVEN).to(tl.int32)
    of_row = entry_ptr + tl.load(tensor + 7)
    of_column = entry_ptr + tl.load(tensor + 8) + half * pairs
    base, width = plan_ptr + tl.load(tensor + 9), plan_ptr + tl.load(tensor + 10)
    size = rows * pairs
    down, along = lanes // pairs, lanes % pairs
    at = tl.where(lane < lanes, lane, size)
    row, column = at // pairs, at % pairs
    one = tl.zeros([BLOCK], tl.int32)
    two, three = one, one
    for _ in range(0, size, 4 * lanes):
        # Issue four loads before using the first. A store between them would delay the next load.
        m0 = at < size
        k0 = _symbol(symbols, of_row, of_column, base, width, row, column, m0, pairs, half, direct, even)
        at1, row, column = at + lanes, row + down, column + along
        row, column = tl.where(column < pairs, row, row + 1), tl.where(column < pairs, column, column - pairs)
        m1 = at1 < size
        k1 = _symbol(symbols, of_row, of_column, base, width, row, column, m1, pairs, half, direct, even)
        at2, row, column = at1 + lanes, row + down, column + along
        row, column = tl.where(column < pairs, row, row + 1), tl.where(column < pairs, column, column - pairs)
        m2 = at2 < size
        k2 = _symbol(symbols, of_row, of_column, base, width, row, column, m2, pairs, half, direct, even)
        at3, row, column = at2 + lanes, row + down, column + along
        row, column = tl.where(column < pairs, row, row + 1), tl.where(column < pairs, column, column - pairs)
        m3 = at3 < size
        k3 = _symbol(symbols, of_row, of_column, base, width, row, column, m3, pairs, half, direct, even)
        n0, o0 = _step(k0, one, two, three, path)
        n1, o1 = _step(k1, o0, one, two, path)
        n2, o2 = _step(k2, o1, o0, one, path)
        n3, o3 = _step(k3, o2, o1, o0, path)
        one, two, three = o3, o2, o1
        _keep(n0, first + at, half, stride, m0, plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room)
        _keep(n1, first + at1, half, stride, m1, plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room)
        _keep(n2, first + at2, half, stride, m2, plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room)
        _keep(n3, first + at3, half, stride, m3, plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room)
        at, row, column = at3 + lanes, row + down, column + along
        row, column = tl.where(column < pairs, row, row + 1), tl.where(column < pairs, column, column - pairs)


@triton.jit(do_not_specialize=["tolds"])
def _clear_kernel(
    plane_ptr, count_ptr, key_ptr, second_ptr, value_ptr, room, told_ptr, tolds, BLOCK: tl.constexpr
):  # fmt: skip
    """Complete the pairs that are listed with their other coordinate. Set them in the planes to 0, and places told."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    listed = entry < tl.minimum(tl.load(count_ptr), room)
    key = tl.load(key_ptr + entry, mask=listed, other=0)
    first, second, half = key // 2, tl.load(second_ptr + entry, mask=listed, other=0), key % 2
    other = tl.load(plane_ptr + tl.where(half == 0, second, first), mask=listed, other=0)
    tl.store(value_ptr + 2 * entry + 1 - half, other.to(tl.int32), mask=listed)
    # A pair that is listed twice has each coordinate from one entry; here the other entry may have cleared it.
    zero = tl.zeros([BLOCK], tl.int8)
    tl.store(plane_ptr + first, zero, mask=listed)
    tl.store(plane_ptr + second, zero, mask=listed)
    told = entry < tolds
    tl.store(plane_ptr + tl.load(told_ptr + entry, mask=told, other=0), zero, mask=told)


def decode_blocks(data: Tensor, frequency_S256: Tensor, row_B7: Tensor, out: Tensor, bad_T: Tensor) -> None:
    """Decode every block of `codec.rest.plan` into `out` (uint8). Set `bad_T` (int32, zeros) to 1 for damaged tensors.

    `frequency_S256` is int16 or uint16. The seventh number of a row is its tensor's.
    """
    slots = torch.empty(len(frequency_S256), SLOTS, dtype=torch.uint32, device=data.device)
    parts = SLOTS // _SLOTS_A_PROGRAM
    _slot_kernel[(len(slots), parts)](frequency_S256, slots, COUNT=_SLOTS_A_PROGRAM, CHUNK=_SLOTS_AT_ONCE, num_warps=4)
    _decode_kernel[(len(row_B7),)](data, row_B7, slots, out, bad_T, RAW=_RAW_AT_ONCE, num_warps=1)


def place_symbols(
    symbols: Tensor,
    entries: Tensor,
    plan: Tensor,
    tensor_T11: Tensor,
    program_N3: Tensor,
    planes: Tensor,
    told: Tensor,
    count: Tensor,
    key: Tensor,
    value: Tensor,
) -> None:
    """Move symbols from groups to coordinates in `planes` (int8), and set pairs outside int8 and those `told` to 0.

    Args:
        symbols, entries, plan, tensor_T11, program_N3: As in `_place_kernel`.
        planes: Where the coordinates of all tensors go.
        told: Places in the planes, of both coordinates of pairs, int64.
        count: The number of coordinates outside int8, int32 [1], zero before.
        key: 2 * place of I of the pair, plus 1 if J is the coordinate outside; int64 [room]. As far as there is room.
        value: I and J of that pair, int32 [room, 2]. If both are outside, only the one that the key names is right.
    """
    second = torch.empty_like(key)
    with LAUNCHING:
        _place_kernel[(len(program_N3),)](
            symbols,
            entries,
            plan,
            tensor_T11,
            program_N3,
            planes,
            count,
            key,
            second,
            value,
            len(key),
            BLOCK=LANES_A_PROGRAM,
            num_warps=LANES_A_PROGRAM // 32,
        )
        grid = (-(-max(len(key), len(told)) // _CLEARED_AT_ONCE),)
        _clear_kernel[grid](
            planes, count, key, second, value, len(key), told, len(told), BLOCK=_CLEARED_AT_ONCE, num_warps=4
        )
