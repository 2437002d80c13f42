"""Entropy coding on a GPU: sums of squares, groups, histograms and rANS blocks of planes of symbols.

One warp encodes a block, with a lane of the warp for each lane of the block, from the last step to the first. Let F and
C belong to a lane's symbol and x be its state. In each step,

    if x >= 2^20 F: write the word x mod 2^16, x = floor(x / 2^16);    x = 4096 floor(x / F) + x mod F + C

The kernel writes words from the end of the block's room towards its start, those of a step in the order of their lanes.
The states then go before the first word, as they are stored.

Toy: room for six words, four lanes, lanes 1 and 3 write in the last step. Lane 1's word goes to place 4 and lane 3's to
place 5; the next step's go to place 3 and before.

Source: `codec.entropy.rans`, `codec.contexts`. All numbers are whole, so the bytes are the same.

Shapes: R = rows, C = columns of a plane, both coordinates' side by side, B = blocks, S = streams, T = planes, N =
programs.
"""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from birkhoff.codec.contexts import LEVELS
from birkhoff.kernels.entropy.triton import LAUNCHING, ranks

TILE = 32, 128
"""Rows and columns of a plane that one program of a plane's kernels processes."""

PLANE = 12
"""Numbers that describe a plane to these kernels: its rows and columns; the places of its symbols and of its sums; the
places, among the numbers, of its rows' entries, its columns' entries and its tables; the place of its groups (-1 for
none); the addresses of both coordinate planes; whether these are paths; its first program."""

_COUNTED = 2048
_COPIED = 1024

_PLANE, _LEVELS, _ROWS, _COLUMNS = map(tl.constexpr, (PLANE, LEVELS, *TILE))


@triton.jit
def _tile(plane_ptr, of_ptr):
    """Return (row [R, 1], column [1, C], mask, columns of the plane, its description) for a program."""
    plane = plane_ptr + tl.load(of_ptr + tl.program_id(0)).to(tl.int64) * _PLANE
    columns = tl.load(plane + 1)
    tile = tl.program_id(0) - tl.load(plane + 11)
    across = tl.cdiv(columns, _COLUMNS)
    row = tile // across * _ROWS + tl.arange(0, _ROWS)[:, None]
    column = tile % across * _COLUMNS + tl.arange(0, _COLUMNS)[None, :]
    return row, column, (row < tl.load(plane)) & (column < columns), columns, plane


@triton.jit
def _symbol_kernel(memory_ptr, plane_ptr, of_ptr):
    """Write both coordinate planes, side by side, as symbols + 128."""
    row, column, mask, columns, plane = _tile(plane_ptr, of_ptr)
    pairs = columns // 2
    i_ptr = tl.load(plane + 8).to(tl.pointer_type(tl.int8))
    j_ptr = tl.load(plane + 9).to(tl.pointer_type(tl.int8))
    place = row * pairs + column
    i = tl.load(i_ptr + place, mask=mask & (column < pairs), other=0).to(tl.int32)
    j = tl.load(j_ptr + place - pairs, mask=mask & (column >= pairs), other=0).to(tl.int32)
    symbol = tl.where(column < pairs, i, j)
    symbol = tl.where(tl.load(plane + 10) > 0, symbol >> 1, symbol) + 128
    tl.store(memory_ptr + tl.load(plane + 2) + row * columns + column, symbol.to(tl.uint8), mask=mask)


@triton.jit
def _squares_kernel(memory_ptr, plane_ptr, of_ptr, sum_ptr):
    """Add up (symbol - 128)^2 by row and by column."""
    row, column, mask, columns, plane = _tile(plane_ptr, of_ptr)
    symbol = tl.load(memory_ptr + tl.load(plane + 2) + row * columns + column, mask=mask, other=128).to(tl.int32) - 128
    square = symbol * symbol
    sums = sum_ptr + tl.load(plane + 3)
    rows = tl.load(plane)
    by_row, by_column = tl.sum(square, axis=1).to(tl.int64), tl.sum(square, axis=0).to(tl.int64)
    tile = tl.program_id(0) - tl.load(plane + 11)
    across = tl.cdiv(columns, _COLUMNS)
    r = tile // across * _ROWS + tl.arange(0, _ROWS)
    c = tile % across * _COLUMNS + tl.arange(0, _COLUMNS)
    tl.atomic_add(sums + r, by_row, mask=r < rows)
    tl.atomic_add(sums + rows + c, by_column, mask=c < columns)


@triton.jit
def _group_kernel(memory_ptr, number_ptr, plane_ptr, of_ptr):
    """Write the symbols of planes that have groups into their groups."""
    row, column, mask, columns, plane = _tile(plane_ptr, of_ptr)
    behind = tl.load(plane + 7)
    if behind >= 0:
        symbol = tl.load(memory_ptr + tl.load(plane + 2) + row * columns + column, mask=mask, other=0)
        r = tl.load(number_ptr + tl.load(plane + 4) + row, mask=row < tl.load(plane), other=0)
        c = tl.load(number_ptr + tl.load(plane + 5) + column, mask=column < columns, other=0)
        base = number_ptr + tl.load(plane + 6)
        at = tl.load(base + r % _LEVELS * _LEVELS + c % _LEVELS, mask=mask, other=0) + c // _LEVELS
        at += r // _LEVELS * tl.load(base + _LEVELS * _LEVELS + c % _LEVELS, mask=column < columns, other=0)
        tl.store(memory_ptr + behind + at, symbol, mask=mask)


@triton.jit
def _count_kernel(memory_ptr, row_ptr, count_ptr, BLOCK: tl.constexpr):
    """Count the bytes of blocks (place, symbols, stream, ...) in count [S, 256]."""
    row = row_ptr + tl.program_id(0).to(tl.int64) * 5
    source, size = memory_ptr + tl.load(row), tl.load(row + 1)
    count = tl.zeros([256], tl.int32)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        symbol = tl.load(source + place, mask=place < size, other=0).to(tl.int32)
        count += tl.histogram(symbol, 256, mask=place < size)
    tl.atomic_add(count_ptr + tl.load(row + 2) * 256 + tl.arange(0, 256), count.to(tl.int64), mask=count > 0)


@triton.jit
def _encode_kernel(memory_ptr, row_ptr, code_ptr, room_ptr, words_ptr):
    """Encode a block (place, symbols, stream, lanes, room in words) to states and words at the end of its room."""
    row = row_ptr + tl.program_id(0).to(tl.int64) * 5
    source, size = memory_ptr + tl.load(row), tl.load(row + 1).to(tl.int32)
    code = code_ptr + tl.load(row + 2) * 256
    lanes = tl.load(row + 3).to(tl.int32)
    room = room_ptr + tl.load(row + 4)
    lane = tl.arange(0, 32)
    x = tl.full([32], 65536, tl.uint32)
    at = tl.zeros_like(lane) + size
    for last in range(0, size, lanes):
        first = (size - 1) // lanes * lanes - last
        active = (lane < lanes) & (first + lane < size)
        symbol = tl.load(source + first + lane, mask=active, other=0)
        entry = tl.load(code + symbol.to(tl.int32), mask=active, other=1)
        f = entry & 0xFFFF
        full = active & (x >= f << 20)
        below, both = ranks(full)
        at -= both
        tl.store(room + 2 * lanes + at + below, x.to(tl.uint16), mask=full)
        y = tl.where(full, x >> 16, x)
        whole = y // f
        x = tl.where(active, (whole << 12) + (y - whole * f) + (entry >> 16), x)
    tl.store(room + at + 2 * lane, x.to(tl.uint16), mask=lane < lanes)
    tl.store(room + at + 2 * lane + 1, (x >> 16).to(tl.uint16), mask=lane < lanes)
    tl.store(words_ptr + tl.program_id(0) + lane, size - at, mask=lane == 0)


@triton.jit
def _copy_kernel(source_ptr, out_ptr, row_ptr, BLOCK: tl.constexpr):
    """Copy the bytes of every row (from, to, how many)."""
    row = row_ptr + tl.program_id(0).to(tl.int64) * 3
    source, out, size = source_ptr + tl.load(row), out_ptr + tl.load(row + 1), tl.load(row + 2)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(out + place, tl.load(source + place, mask=place < size), mask=place < size)


def symbols(memory: Tensor, plane_T12: Tensor, of_N: Tensor) -> None:
    """Write the symbols of all planes. `of_N` (int32) is the plane of each program."""
    with LAUNCHING:
        _symbol_kernel[(len(of_N),)](memory, plane_T12, of_N, num_warps=4)


def squares(memory: Tensor, plane_T12: Tensor, of_N: Tensor, sums: Tensor) -> None:
    """Add the squares of all planes' rows and columns to `sums` (int64, zeros)."""
    with LAUNCHING:
        _squares_kernel[(len(of_N),)](memory, plane_T12, of_N, sums, num_warps=4)


def group(memory: Tensor, numbers: Tensor, plane_T12: Tensor, of_N: Tensor) -> None:
    """Write the groups of all planes that have any. They go behind the planes."""
    with LAUNCHING:
        _group_kernel[(len(of_N),)](memory, numbers, plane_T12, of_N, num_warps=4)


def count(memory: Tensor, row_B5: Tensor, count_S256: Tensor) -> None:
    """Count how often each byte occurs in each stream, in `count_S256` (int64, zeros)."""
    with LAUNCHING:
        _count_kernel[(len(row_B5),)](memory, row_B5, count_S256, BLOCK=_COUNTED, num_warps=4)


def encode_blocks(memory: Tensor, row_B5: Tensor, code_S256: Tensor, room: Tensor, words_B: Tensor) -> None:
    """Encode every block into its part of `room` (uint16), and its number of words into `words_B` (int32).

    `code_S256` is uint32, F + 65536 C of each byte.
    """
    with LAUNCHING:
        _encode_kernel[(len(row_B5),)](memory, row_B5, code_S256, room, words_B, num_warps=1)


def copy(source: Tensor, out: Tensor, row_N3: Tensor) -> None:
    """Copy pieces of bytes, (from, to, how many) each."""
    if len(row_N3):
        with LAUNCHING:
            _copy_kernel[(len(row_N3),)](source, out, row_N3, BLOCK=_COPIED, num_warps=4)
