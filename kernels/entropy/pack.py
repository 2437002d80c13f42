"""Pack coordinates on a GPU to streams in host memory: `codec.planes.pack` of many matrices, byte for byte.

The GPU computes symbols, levels, groups and histograms, and encodes. The host decides on groups and tables, on one of
two groupings, and on streams that stay raw or go to zstd. It decides from whole numbers, which are the same everywhere.
A batch holds many matrices, so only small arrays go between host and GPU, a few times per batch. While one batch waits
for the GPU, the host works on another.

Shapes: T = matrices, S = streams, B = blocks, R = rows, P = pairs per row.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, planes, rest
from birkhoff.codec.contexts import Groupings
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.entropy.tables import Tables
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.native.threads import in_threads
from birkhoff.codec.planes import Item, Packed
from birkhoff.codec.trajectory import Escapes
from birkhoff.kernels.entropy import encoding

Integers = npt.NDArray[np.int64]

TOGETHER = 1 << 27
"""Approximate symbols of a batch: enough to occupy every multiprocessor, few enough that batches overlap."""

SIDE_BY_SIDE = 4
"""Batches in progress. Each needs four bytes per symbol on the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Matrices being packed. Their symbols [R, 2P] follow each other in memory, and the groups follow all symbols."""

    codes: tuple[LatticeTensor, ...]
    paths: tuple[int, ...]
    begins: Integers
    """Start of the symbols of each matrix, then the end of all, [T + 1]."""

    @classmethod
    def of(cls, items: Sequence[Item]) -> "_Batch":
        codes, paths = zip(*items, strict=True)
        begins = np.array(list(accumulate((2 * code.i.numel() for code in codes), initial=0)), dtype=np.int64)
        return cls(codes=codes, paths=paths, begins=begins)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shape (R, 2P) of each matrix."""
        return [(code.i.shape[0], 2 * code.i.shape[1]) for code in self.codes]

    @property
    def size(self) -> int:
        """Number of symbols."""
        return int(self.begins[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streams:
    """S streams, matrix by matrix. Their symbols start at `begins` of the memory."""

    begins: Integers
    sizes: Integers
    of: Integers
    """The matrix of each stream."""
    fits: Tables

    def __getitem__(self, which: Integers) -> "_Streams":
        """Return some of the streams."""
        return _Streams(begins=self.begins[which], sizes=self.sizes[which], of=self.of[which], fits=self.fits[which])

    def rows(self) -> Integers:
        """Return (place, symbols, stream, lanes, room in words before it) for every block, [B, 5]."""
        lanes, blocks = rans.lanes(self.sizes), -(-self.sizes // rans.BLOCK)
        of = np.repeat(np.arange(len(blocks)), blocks)
        first = (np.arange(len(of)) - (np.cumsum(blocks) - blocks)[of]) * rans.BLOCK
        size = np.minimum(self.sizes[of] - first, rans.BLOCK)
        room = size + 2 * lanes[of]
        return np.stack((self.begins[of] + first, size, of, lanes[of], np.cumsum(room) - room), axis=1)


Steps = Generator[None, None, list[Packed]]
"""A batch in progress. It yields instead of waiting for the GPU."""


def pack(items: Sequence[Item]) -> list[Packed]:
    """Run `planes.reference_pack` for at least one matrix on one GPU. Streams are views of pinned memory."""
    batches = [_Batch.of(batch) for batch in _batches(items)]
    found: list[list[Packed]] = [[] for _ in batches]
    left = iter(enumerate(batches))
    running = deque((number, _pack(batch)) for number, batch in islice(left, SIDE_BY_SIDE))
    while running:
        number, steps = running.popleft()
        try:
            next(steps)
            running.append((number, steps))
        except StopIteration as end:
            found[number] = end.value
            running.extend((number, _pack(batch)) for number, batch in islice(left, 1))
    return [packed for batch in found for packed in batch]


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += 2 * item[0].i.numel()
        if size >= TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pack(batch: _Batch) -> Steps:
    device = batch.codes[0].i.device
    memory = torch.empty(2 * batch.size, dtype=torch.uint8, device=device)
    found = yield from _group(batch, _Described(batch, device), memory)
    candidates = yield from _candidates(batch, found, memory)
    chosen, levels = _choose(batch, found, candidates)
    return (yield from _code(batch, chosen, levels, memory))


class _Described:
    """The numbers that describe a batch's matrices and programs to the kernels."""

    def __init__(self, batch: _Batch, device: torch.device) -> None:
        self._held = [(code.i.contiguous(), code.j.contiguous()) for code in batch.codes]
        shapes = np.array(batch.shapes, dtype=np.int64)
        height, width = encoding.TILE
        tiles = -(-shapes[:, 0] // height) * -(-shapes[:, 1] // width)
        ends = np.cumsum(shapes.sum(axis=1))
        self.table: Integers = np.zeros((len(shapes), encoding.PLANE), dtype=np.int64)
        self.table[:, 0:2], self.table[:, 2] = shapes, batch.begins[:-1]
        self.table[:, 3] = ends - shapes.sum(axis=1)
        self.table[:, 7] = -1
        self.table[:, 8:10] = [[i.data_ptr(), j.data_ptr()] for i, j in self._held]
        self.table[:, 10], self.table[:, 11] = batch.paths, np.cumsum(tiles) - tiles
        self.lines = int(ends[-1])
        """Number of rows and columns of all matrices."""
        self.of_program: Tensor = torch.repeat_interleave(
            torch.arange(len(tiles), dtype=torch.int32, device=device),
            _sent(tiles, device),
            output_size=int(tiles.sum()),
        )
        self.denominators: Tensor = torch.repeat_interleave(
            _sent(shapes[:, ::-1].reshape(-1).astype(np.float64), device),
            _sent(shapes.reshape(-1), device),
            output_size=self.lines,
        )
        """Symbols of each row and each column, in the layout of `contexts.Groupings.levels`."""


def _group(batch: _Batch, described: _Described, memory: Tensor) -> Generator[None, None, Groupings]:
    """Write the symbols, compute the levels of rows and columns, and write the groups behind the symbols."""
    device = memory.device
    table = _sent(described.table, device)
    encoding.symbols(memory, table, described.of_program)
    _put_escapes(batch, memory)
    sums = torch.zeros(described.lines, dtype=torch.int64, device=device)
    encoding.squares(memory, table, described.of_program, sums)
    bounds = _sent(contexts.level_bounds(), device)
    absolute = torch.bucketize(sums / described.denominators, bounds, right=True).to(torch.uint8)
    arriving = _Arriving(absolute)
    yield
    rules = [contexts.rule_2(contexts.USUAL_BITS)] * len(batch.shapes)
    found = contexts.groupings(batch.shapes, arriving.wait(), rules)
    grouped = found.groups > 1
    if grouped.any():
        places = described.table[:, 3]
        described.table[:, 4], described.table[:, 5] = places, places + described.table[:, 0]
        described.table[:, 6] = described.lines + found.tables.shape[1] * np.arange(len(grouped))
        described.table[:, 7] = np.where(grouped, batch.size + batch.begins[:-1], -1)
        numbers = np.concatenate((found.entries, found.tables.reshape(-1)))
        encoding.group(memory, _sent(numbers, device), _sent(described.table, device), described.of_program)
    return found


def _put_escapes(batch: _Batch, memory: Tensor) -> None:
    """Put the symbols of all matrices' escapes into their places, in one step."""
    for path in (0, 1):
        having = [
            number
            for number, code in enumerate(batch.codes)
            if bool(batch.paths[number]) == bool(path) and len(code.escapes)
        ]
        if not having:
            continue
        escapes = [batch.codes[number].escapes for number in having]
        counts = _sent(np.array(list(map(len, escapes))), memory.device)
        begin, pairs = (
            torch.repeat_interleave(_sent(np.array(each), memory.device), counts, output_size=sum(map(len, escapes)))
            for each in (batch.begins[having], [batch.codes[number].i.shape[1] for number in having])
        )
        pair = torch.cat([each.pair for each in escapes])
        place = begin + pair // pairs * (2 * pairs) + pair % pairs
        memory[place] = planes.escaped_symbols(torch.cat([each.i for each in escapes]), path=path)
        memory[place + pairs] = planes.escaped_symbols(torch.cat([each.j for each in escapes]), path=path)


def _candidates(batch: _Batch, found: Groupings, memory: Tensor) -> Generator[None, None, tuple[_Streams, _Streams]]:
    """Return each matrix as one stream, and as its groups. Both are the same if there is only one group."""
    inside = np.arange(found.sizes.shape[1]) < found.groups[:, None]
    sizes, of = found.sizes[inside], np.repeat(np.arange(len(found.groups)), found.groups)
    behind = np.where(found.groups > 1, batch.size, 0) + batch.begins[:-1]
    before = np.cumsum(sizes) - sizes  # the groups of all matrices together are as long as their symbols
    begins = behind[of] + before - batch.begins[of]
    every = torch.zeros(len(sizes), 256, dtype=torch.int64, device=memory.device)
    nothing = tables.fit(np.empty((0, 256), np.int64))
    grouped = _Streams(begins=begins, sizes=sizes, of=of, fits=nothing)
    encoding.count(memory, _sent(grouped.rows(), memory.device), every)
    arriving = _Arriving(every)
    yield
    counts: Integers = arriving.wait()
    firsts = np.cumsum(found.groups) - found.groups
    whole = np.add.reduceat(counts, firsts, axis=0)
    fits = tables.fit(np.concatenate((whole, counts)))
    matrices = np.arange(len(firsts))
    return (
        _Streams(begins=batch.begins[:-1], sizes=np.diff(batch.begins), of=matrices, fits=fits[matrices]),
        _Streams(begins=begins, sizes=sizes, of=of, fits=fits[np.arange(len(firsts), len(fits.length))]),
    )


def _choose(batch: _Batch, found: Groupings, candidates: tuple[_Streams, _Streams]) -> tuple[_Streams, list[bytes]]:
    """Choose for every matrix between one stream and its groups. Return the smaller streams, and the streams of
    levels."""
    whole, grouped = candidates
    alone = rest.estimates(whole.sizes, whole.fits)
    firsts = np.cumsum(found.groups) - found.groups
    together = np.add.reduceat(rest.estimates(grouped.sizes, grouped.fits), firsts)
    lines = np.cumsum([sum(shape) for shape in batch.shapes])
    levels = [b""] * len(alone)
    taken = np.zeros(len(alone), dtype=bool)
    # A stream of levels takes more than a byte, so some are refused without being made.
    tried = np.flatnonzero((found.groups > 1) & (alone > together + 1)).tolist()
    usual = np.full(1, contexts.USUAL_BITS, np.uint8)
    whole_levels = [np.concatenate((usual, found.levels[lines[n - 1] if n else 0 : lines[n]])) for n in tried]
    for number, packed in zip(tried, in_threads(rest.pack, whole_levels), strict=True):
        if alone[number] > len(packed) + together[number]:
            levels[number], taken[number] = packed, True
    both = _Streams(
        begins=np.concatenate((whole.begins, grouped.begins)),
        sizes=np.concatenate((whole.sizes, grouped.sizes)),
        of=np.concatenate((whole.of, grouped.of)),
        fits=Tables(
            *(
                np.concatenate((getattr(whole.fits, name), getattr(grouped.fits, name)))
                for name in ("data", "length", "frequency", "cost")
            )
        ),
    )
    kept = np.concatenate((np.flatnonzero(~taken), len(alone) + np.flatnonzero(taken[grouped.of])))
    return both[kept[np.argsort(both.of[kept], kind="stable")]], levels


def _code(batch: _Batch, streams: _Streams, levels: list[bytes], memory: Tensor) -> Steps:
    """Encode the streams and copy them to host memory."""
    device = memory.device
    sizes = np.minimum(streams.sizes, rest.PROBE)
    places = np.cumsum(sizes) - sizes
    probes = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    encoding.copy(memory, probes, _sent(np.stack((streams.begins, places, sizes), axis=1), device))
    heads_arriving = _Arriving(probes)
    paying = np.flatnonzero(rest.pays(streams.sizes, streams.fits))
    coded = streams[paying]
    rows = coded.rows()
    room = torch.empty(int((rows[:, 1] + 2 * rows[:, 3]).sum()), dtype=torch.uint16, device=device)
    words_B = torch.empty(len(rows), dtype=torch.int32, device=device)
    if len(rows):
        frequency = coded.fits.frequency.astype(np.uint32)
        code = frequency | (np.cumsum(frequency, axis=1, dtype=np.uint32) - frequency) << 16
        encoding.encode_blocks(memory, _sent(rows, device), _sent(code, device), room, words_B)
    words_arriving = _Arriving(words_B)
    yield
    heads = heads_arriving.wait()
    first = [heads[place : place + size] for place, size in zip(places.tolist(), sizes.tolist(), strict=True)]
    frames = np.array(rest.searched_bytes(first))  # while the GPU works
    words = words_arriving.wait().astype(np.int64)
    head, head_bytes = rest.heads(coded.sizes, coded.fits, words)
    body = 4 * rows[:, 3] + 2 * words
    length = np.full(len(streams.sizes), -1)
    firsts = np.searchsorted(rows[:, 2], np.arange(len(paying)))
    length[paying] = head_bytes + (np.add.reduceat(body, firsts) if len(rows) else 0)
    kinds = np.where((length >= 0) & (length <= streams.sizes), rest.ANS, rest.RAW)
    stored = np.where(kinds == rest.ANS, length, 1 + streams.sizes)
    zstd: dict[int, bytes] = {}
    for number in np.flatnonzero(frames * streams.sizes < stored * sizes).tolist():
        begin, size = int(streams.begins[number]), int(streams.sizes[number])
        by_table = int(length[number]) if length[number] >= 0 else None
        kind, frame = rest.smallest(size, by_table, first[number], partial(_fetched, memory[begin : begin + size]))
        if kind == rest.ZSTD:
            zstd[number], kinds[number], stored[number] = bytes([rest.ZSTD]) + frame, kind, 0
    ends = np.cumsum(stored)
    out = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
    starts = ends - stored
    raw, kept = np.flatnonzero(kinds == rest.RAW), kinds[paying] == rest.ANS
    to = np.cumsum(body) - body
    at = starts[paying] + head_bytes
    blocks = np.flatnonzero(kept[rows[:, 2]])
    of = rows[blocks, 2]
    encoding.copy(
        memory, out, _sent(np.stack((streams.begins[raw], starts[raw] + 1, streams.sizes[raw]), axis=1), device)
    )
    encoding.copy(
        room.view(torch.uint8),
        out,
        _sent(
            np.stack(
                (
                    2 * (rows[blocks, 4] + rows[blocks, 1] - words[blocks]),
                    at[of] + to[blocks] - to[firsts[of]],
                    body[blocks],
                ),
                axis=1,
            ),
            device,
        ),
    )
    before = np.cumsum(head_bytes) - head_bytes
    every_head = np.concatenate((head, np.array([rest.RAW], np.uint8)))
    pieces = np.concatenate(
        (
            np.stack((before[kept], starts[paying][kept], head_bytes[kept]), axis=1),
            np.stack((np.full(len(raw), len(head)), starts[raw], np.ones(len(raw), np.int64)), axis=1),
        )
    )
    encoding.copy(_sent(every_head, device), out, _sent(pieces, device))
    out_arriving = _Arriving(out)
    escapes = [
        planes.explicit(code.escapes.to("cpu"), path=path) if len(code.escapes) else Escapes.none()
        for code, path in zip(batch.codes, batch.paths, strict=True)
    ]
    yield
    held: memoryview = out_arriving.wait().data
    made: list[list[bytes | memoryview]] = [[own] for own in levels]
    for number, place in enumerate(zip(streams.of.tolist(), starts.tolist(), ends.tolist(), strict=True)):
        matrix, start, end = place
        made[matrix].append(zstd.get(number) or held[start:end])
    return [((*own, rest.pack_escapes(stored)), len(stored)) for own, stored in zip(made, escapes, strict=True)]


def _fetched(part: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = part.cpu().numpy()
    return found


def _sent(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream that copies bytes to host memory while later kernels run."""
    return torch.cuda.Stream(device)


class _Arriving:
    """A copy in progress to pinned host memory, while later kernels run."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._brought = source
        if source.device.type != "cuda":
            return
        self._brought = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        side = _side(source.device)
        side.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(side):
            self._brought.copy_(source, non_blocking=True)
            source.record_stream(side)
            self._event = side.record_event()

    def wait(self) -> npt.NDArray[Any]:
        """Return the array once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        found: npt.NDArray[Any] = self._brought.numpy()
        return found
