"""Coordinates on a GPU to streams in host memory: `codec.planes.pack` of many matrices, byte for byte.

The GPU finds sums, groups and histograms, and codes; the host decides, from whole numbers that are the same everywhere:
levels, tables, which of two groupings, and which streams stay raw or go to zstd. Small arrays go between them three
times, and at the end the bytes.

Shapes: T = matrices, S = streams, B = blocks, R = rows, P = pairs a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, planes, rest
from birkhoff.codec.contexts import Addresses
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.entropy.tables import Table
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.planes import Item, Packed
from birkhoff.codec.trajectory import Escapes
from birkhoff.kernels.entropy import encoding
from birkhoff.kernels.entropy.plan import Numbers

Integers = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class _Matrix:
    """A matrix on its way: its symbols [R, 2P] lie at `begin` of the memory, its groups at `behind`."""

    code: LatticeTensor
    path: int
    begin: int
    behind: int
    levels: bytes = b""
    addresses: Addresses | None = None
    """Of its groups; None where there is but one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(R, 2P)."""
        return self.code.i.shape[0], 2 * self.code.i.shape[1]

    @property
    def size(self) -> int:
        """Symbols."""
        return 2 * self.code.i.numel()


@dataclass(slots=True, kw_only=True)
class _Stream:
    """A stream of `size` symbols that lie at `begin` of the memory; its table, and what came of it."""

    begin: int
    size: int
    table: Table | None = None
    words: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    kind: int = rest.RAW
    frame: bytes = b""

    @property
    def coded(self) -> bool:
        """Whether it is coded by its table, if only to see how long that is."""
        return self.table is not None and rest.pays(self.size, self.table)

    @property
    def blocks(self) -> int:
        return -(-self.size // rans.BLOCK)

    def head(self) -> bytes:
        """What stands before its blocks, or its bytes."""
        if self.kind == rest.RAW:
            return bytes([rest.RAW])
        assert self.table is not None
        lanes = rans.lanes(self.size).bit_length() - 1
        return bytes([rest.ANS, lanes]) + self.table.data + self.words[:-1].astype("<u4").tobytes()

    def body(self) -> int:
        """Bytes of its blocks, or symbols."""
        if self.kind == rest.RAW:
            return self.size
        return int(4 * rans.lanes(self.size) * self.blocks + 2 * self.words.sum())


def pack(items: Sequence[Item]) -> list[Packed]:
    """`planes.reference_pack` of coordinates on one GPU, at least one matrix; streams are views of pinned memory."""
    device = items[0][0].i.device
    ends = list(accumulate((2 * code.i.numel() for code, _ in items), initial=0))
    matrices = [
        _Matrix(code=code, path=path, begin=begin, behind=ends[-1] + begin)
        for (code, path), begin in zip(items, ends, strict=False)
    ]
    memory = torch.empty(2 * ends[-1], dtype=torch.uint8, device=device)
    for matrix in matrices:
        _write_symbols(matrix, memory)
    _group(matrices, memory)
    streams = _decide(matrices, memory)
    whole = _bring([stream for own in streams for stream in own], memory)
    packed: list[Packed] = []
    for matrix, own in zip(matrices, streams, strict=True):
        escapes = matrix.code.escapes
        stored = planes.explicit(escapes.to("cpu"), path=matrix.path) if len(escapes) else Escapes.none()
        packed.append(((matrix.levels, *(next(whole) for _ in own), rest.pack_escapes(stored)), len(stored)))
    return packed


def _write_symbols(matrix: _Matrix, memory: Tensor) -> None:
    code, escapes = matrix.code, matrix.code.escapes
    pairs = code.i.shape[1]
    both = memory[matrix.begin : matrix.begin + matrix.size].view(matrix.shape)
    for half, (plane, true) in enumerate(((code.i, escapes.i), (code.j, escapes.j))):
        symbols = (plane >> 1 if matrix.path else plane).view(torch.uint8)
        torch.bitwise_xor(symbols, 128, out=both[:, half * pairs : (half + 1) * pairs])
        if len(escapes):
            place = escapes.pair // pairs * (2 * pairs) + escapes.pair % pairs + half * pairs
            both.view(-1)[place] = planes.escaped_symbols(true, path=matrix.path)


def _group(matrices: Sequence[_Matrix], memory: Tensor) -> None:
    """Find the levels of rows and columns, and write the groups that they make behind the planes."""
    programs = _programs(matrices)
    places = list(accumulate((sum(matrix.shape) for matrix in matrices), initial=0))
    plane_T8 = np.zeros((len(matrices), encoding.PLANE), dtype=np.int64)
    for row, matrix, place in zip(plane_T8, matrices, places, strict=False):
        row[:4] = *matrix.shape, matrix.begin, place
    sums = torch.zeros(places[-1], dtype=torch.int64, device=memory.device)
    encoding.squares(memory, _sent(plane_T8, memory), _sent(programs, memory), sums)
    squares: Integers = sums.cpu().numpy()
    numbers = Numbers()
    for row, matrix, place in zip(plane_T8, matrices, places, strict=False):
        rows, columns = matrix.shape
        middle = place + rows
        row_level = contexts.levels(squares[place:middle] / columns)
        column_level = contexts.levels(squares[middle : middle + columns] / rows)
        found = contexts.addresses(row_level, column_level, contexts.rule_2(contexts.USUAL_BITS))
        if len(found.sizes) == 1:
            continue
        matrix.addresses = found
        matrix.levels = rest.pack(np.concatenate(([contexts.USUAL_BITS], row_level, column_level)).astype(np.uint8))
        of_row, of_column, base, _ = map(numbers.add, (found.row, found.column, found.base, found.width))
        row[4:] = of_row, of_column, base, matrix.behind
    grouped = np.array([matrix.addresses is not None for matrix in matrices])[programs[:, 0]]
    if grouped.any():
        encoding.group(memory, _sent(numbers.all(), memory), _sent(plane_T8, memory), _sent(programs[grouped], memory))


def _programs(matrices: Sequence[_Matrix]) -> Integers:
    """(matrix, first row, first column) of every tile, [N, 3]."""
    found = []
    for number, matrix in enumerate(matrices):
        rows, columns = (np.arange(0, end, step) for end, step in zip(matrix.shape, encoding.TILE, strict=True))
        tiles = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        found.append(np.concatenate((np.full((len(tiles), 1), number), tiles), axis=1))
    return np.concatenate(found).astype(np.int64)


def _decide(matrices: Sequence[_Matrix], memory: Tensor) -> list[list[_Stream]]:
    """The streams of every matrix, with their tables: its groups, or all of it as one, whichever takes less."""
    grouped: list[list[_Stream]] = []
    for matrix in matrices:
        sizes, begin = [matrix.size], matrix.begin
        if matrix.addresses is not None:
            sizes, begin = matrix.addresses.sizes.tolist(), matrix.behind
        starts = accumulate(sizes[:-1], initial=begin)
        grouped.append([_Stream(begin=start, size=size) for start, size in zip(starts, sizes, strict=True)])
    every = [stream for own in grouped for stream in own]
    count = torch.zeros(len(every), 256, dtype=torch.int64, device=memory.device)
    encoding.count(memory, _sent(_rows(every), memory), count)
    counts: list[tables.Counts] = list(count.cpu().numpy())
    for stream, own_counts in zip(every, counts, strict=True):
        stream.table = tables.fit(own_counts)
    streams: list[list[_Stream]] = []
    taken = iter(counts)
    for matrix, own in zip(matrices, grouped, strict=True):
        own_counts = np.sum([next(taken) for _ in own], axis=0)
        if matrix.addresses is not None:
            table = tables.fit(own_counts)
            parts = sum(rest.estimate(stream.size, stream.table) for stream in own)
            if rest.estimate(matrix.size, table) <= len(matrix.levels) + parts:
                matrix.levels, own = b"", [_Stream(begin=matrix.begin, size=matrix.size, table=table)]
        streams.append(own)
    return streams


def _rows(streams: Sequence[_Stream]) -> Integers:
    """(place, symbols, stream, lanes, room in words before it) of every block, [B, 5]."""
    rows: list[Integers] = [np.empty((0, 5), dtype=np.int64)]
    room = 0
    for number, stream in enumerate(streams):
        lanes = rans.lanes(stream.size)
        first = np.arange(0, stream.size, rans.BLOCK)
        size = np.minimum(stream.size - first, rans.BLOCK)
        before = room + first + 2 * lanes * np.arange(len(first))
        same = np.full(len(first), number), np.full(len(first), lanes)
        rows.append(np.stack((stream.begin + first, size, *same, before), axis=1))
        room += stream.size + 2 * lanes * len(first)
    return np.concatenate(rows).astype(np.int64)


def _code(streams: Sequence[_Stream], memory: Tensor) -> tuple[Tensor, Integers]:
    """Code the streams whose table pays, and choose the kind of every stream; returns all blocks' room and rows."""
    coded = [stream for stream in streams if stream.coded]
    rows = _rows(coded)
    room = torch.empty(int((rows[:, 1] + 2 * rows[:, 3]).sum()), dtype=torch.uint16, device=memory.device)
    words = torch.empty(len(rows), dtype=torch.int32, device=memory.device)
    if coded:
        frequency = np.array([stream.table.frequency for stream in coded if stream.table], dtype=np.uint32)
        code = frequency | (np.cumsum(frequency, axis=1, dtype=np.uint32) - frequency) << 16
        encoding.encode_blocks(memory, _sent(rows, memory), _sent(code, memory), room, words)
    sizes = [min(stream.size, rest.PROBE) for stream in streams]
    places = list(accumulate(sizes, initial=0))
    heads = torch.empty(places[-1], dtype=torch.uint8, device=memory.device)
    pieces = np.array([(s.begin, place, size) for s, place, size in zip(streams, places, sizes, strict=False)])
    encoding.copy(memory, heads, _sent(pieces, memory))
    first, each = heads.cpu().numpy(), np.split(words.cpu().numpy().astype(np.int64), _ends(coded))
    for stream, own in zip(coded, each, strict=False):
        stream.words, stream.kind = own, rest.ANS
    for stream, place, size in zip(streams, places, sizes, strict=False):
        length = len(stream.head()) + stream.body() if stream.coded else None
        whole = partial(_fetched, memory[stream.begin : stream.begin + stream.size])
        stream.kind, stream.frame = rest.smallest(stream.size, length, first[place : place + size], whole)
    return room, rows


def _fetched(part: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = part.cpu().numpy()
    return found


def _ends(streams: Sequence[_Stream]) -> list[int]:
    """Where the blocks of streams end among those of all."""
    return list(accumulate(stream.blocks for stream in streams))


def _bring(streams: Sequence[_Stream], memory: Tensor) -> Iterator[bytes | memoryview]:
    """Code streams, and bring them to host memory."""
    room, rows = _code(streams, memory)
    blocks = iter(rows.tolist())
    raw: list[tuple[int, int, int]] = []
    coded: list[tuple[int, int, int]] = []
    heads: list[tuple[int, bytes]] = []
    places = [0]
    for stream in streams:
        own = [next(blocks) for _ in range(stream.blocks)] if stream.coded else []
        to = places[-1]
        if stream.kind != rest.ZSTD:
            heads.append((to, stream.head()))
            to += len(stream.head())
        if stream.kind == rest.RAW:
            raw.append((stream.begin, to, stream.size))
            to += stream.size
        elif stream.kind == rest.ANS:
            for (_, size, _, lanes, before), words in zip(own, stream.words.tolist(), strict=True):
                coded.append((2 * (before + size - words), to, 4 * lanes + 2 * words))
                to += 4 * lanes + 2 * words
        places.append(to)
    out = torch.empty(places[-1], dtype=torch.uint8, device=memory.device)
    for source, pieces in ((memory, raw), (room.view(torch.uint8), coded)):
        if pieces:
            encoding.copy(source, out, _sent(np.array(pieces), memory))
    brought = torch.empty(places[-1], dtype=torch.uint8, pin_memory=memory.device.type == "cuda")
    brought.copy_(out)
    held: memoryview = brought.numpy().data
    for to, head in heads:
        held[to : to + len(head)] = head
    for stream, begin, end in zip(streams, places, places[1:], strict=False):
        yield bytes([rest.ZSTD]) + stream.frame if stream.kind == rest.ZSTD else held[begin:end]


def _sent(array: npt.NDArray[Any], memory: Tensor) -> Tensor:
    """An array on the device of the memory."""
    return torch.from_numpy(array).to(memory.device, non_blocking=True)
