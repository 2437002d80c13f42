"""Plan the decoding of stored tensors: where their bytes are, and where each block and symbol belongs.

The plan consists of numbers in one array, `Plan.numbers`, which is put together on the GPU. Offsets into it count
elements from its start. Streams are on the GPU already, with the container that holds them (see `staging.Upload`), or
they are copied in runs: those that are adjacent in host memory are one copy.

A few calls read the streams of all tensors. A call for each tensor would take longer than the decoding.

Shapes: T = tensors, B = blocks, S = streams, R = rows, P = pairs per row, L = lanes of paths.
"""

import ctypes
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from birkhoff.codec import contexts, planes, rest, trellis
from birkhoff.codec.container import CodedTensor, Consecutive, LatticeParams
from birkhoff.codec.contexts import LEVELS
from birkhoff.codec.errors import FormatError
from birkhoff.codec.tensor import lattice_shape

DIRECT = -1
"""In place of the rows' entries if a tensor's symbols are one group, whose places need no tables."""

EVEN = -2
"""In place of the rows' entries if all rows have one level: the entry of row r is 64 * r. Tensors in fixed point have a
row for each weight, and their entries would be the largest part of a plan."""

Integers = npt.NDArray[np.int64]
Stream = bytes | memoryview

ALIGNED = 128
"""Alignment in bytes of planes and of runs of streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of a plan. Plane I begins at `begin` in the array of all planes, plane J at `begin + stride`."""

    coded: CodedTensor
    params: LatticeParams
    shape: tuple[int, int]
    begin: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Bytes in host memory, and where they go or already are on the device."""

    address: int
    size: int
    to: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decoding of some tensors. The kernels' arguments document the shapes inside `numbers`."""

    tensors: tuple[Placed, ...]
    stored: rest.EscapesOfAll
    """Its pairs are places of I in the planes."""
    runs: tuple[Run, ...]
    """Bytes that are not on the device yet."""
    bytes: int
    """Bytes of all streams on the device, including those that are there already."""
    symbols: int
    coordinates: int
    """Coordinates of all planes, including the padding between them."""
    numbers: "Numbers"
    frequencies: slice
    blocks: slice
    descriptions: slice
    programs: slice
    entries: slice
    """64 * rank + level of the rows, unless they have one level, then of the columns, for each tensor with groups:
    `contexts.Addresses`."""
    told: slice
    """Places in the planes of both coordinates of the stored escapes."""
    held: list[Stream]
    """Keeps the memory of the runs alive."""


def plan(coded: Sequence[CodedTensor], lanes_a_program: int, sent: Sequence[Run] = (), size: int = 0) -> Plan:
    """Plan the decoding of at least one `lattice` tensor of version 2.

    Args:
        coded: The tensors.
        lanes_a_program: Lanes of paths that a program of the kernel follows.
        sent: Host memory whose bytes are on the device, in `size` bytes there.
        size: Bytes there; runs come after them.

    Raises:
        FormatError: The streams of a tensor do not match its entry. The error names the tensor.
    """
    try:
        return _plan(coded, lanes_a_program, sent, size)
    except FormatError:
        for one in coded:  # which of them is it?
            try:
                _plan([one], lanes_a_program, sent, size)
            except FormatError as error:
                raise FormatError(f"tensor {one.name!r}: {error}") from None
        raise


def _plan(coded: Sequence[CodedTensor], lanes_a_program: int, sent: Sequence[Run], size: int) -> Plan:
    shaped = [lattice_shape(one) for one in coded]
    shapes = [shape for _, shape in shaped]
    levels = planes.unpack_levels_all([one.parts for one in coded], shapes)
    grouped = [found for found in levels if found is not None]
    even = [bool(rows.min() == rows.max()) for rows, _, _ in grouped]
    parts = [part for own, same in zip(grouped, even, strict=True) for part in own[same:2]]
    lines = [(len(rows), len(columns)) for rows, columns, _ in grouped]
    rules = [rule for _, _, rule in grouped]
    tables = contexts.groupings(lines, np.concatenate([np.empty(0, np.uint8), *parts]), rules, even)
    numbers, runs = Numbers(), _Runs(sent, size)
    base = numbers.add(tables.tables)
    streams: list[Stream] = []
    sources: list[int] = []
    sizes: list[int] = []
    counts: list[int] = []
    tensors: list[Placed] = []
    descriptions: list[tuple[int, ...]] = []
    line = 0
    symbols = coordinates = group = 0
    for one, (params, shape), found in zip(coded, shaped, levels, strict=True):
        pairs = math.prod(shape)
        own = [2 * pairs]
        places: tuple[int, ...] = (DIRECT, 0, 0, 0)
        if found is not None:
            own = tables.sizes[group, : tables.groups[group]].tolist()
            own_lines = 0 if even[group] else shape[0]
            places = (line if own_lines else EVEN), line + own_lines, base, base + LEVELS * LEVELS
            base += tables.tables.shape[1]
            line += own_lines + 2 * shape[1]
            group += 1
        planes.check_count(one.parts, len(own))
        groups, at = runs.add_groups(one.parts, own)
        streams += groups
        sources += at
        sizes += own
        counts.append(len(own))
        stride = -(-pairs // ALIGNED) * ALIGNED
        tensors.append(Placed(coded=one, params=params, shape=shape, begin=coordinates, stride=stride))
        lanes = trellis.lanes_of(*shape, params.path)
        descriptions.append((*shape, lanes, params.path, symbols, coordinates, stride, *places))
        symbols += 2 * pairs
        coordinates += 2 * stride
    blocks = rest.plan(streams, sizes, sources, list(accumulate(sizes[:-1], initial=0)))
    blocks.rows[:, 6] = np.repeat(np.arange(len(coded)), counts)[blocks.rows[:, 4]]
    stored = rest.unpack_escapes_all(
        [one.parts[-1] for one in coded],
        [params.escapes for params, _ in shaped],
        [math.prod(shape) for shape in shapes],
        [2 if params.path else 1 for params, _ in shaped],
    )
    begins, strides = np.array([(tensor.begin, tensor.stride) for tensor in tensors], dtype=np.int64).T
    place = stored.pair + begins[stored.tensor]
    return Plan(
        tensors=tuple(tensors),
        stored=stored._replace(pair=place),
        runs=runs.all(),
        bytes=runs.size,
        symbols=symbols,
        coordinates=coordinates,
        frequencies=numbers.place(blocks.frequency.view(np.int64)),
        blocks=numbers.place(blocks.rows),
        descriptions=numbers.place(np.array(descriptions, dtype=np.int64)),
        programs=numbers.place(_programs(descriptions, lanes_a_program)),
        entries=numbers.place(tables.entries if line else np.zeros(1, np.int64)),  # a launch wants an address
        told=numbers.place(np.concatenate((place, place + strides[stored.tensor]))),
        numbers=numbers,
        held=runs.held,
    )


class Numbers:
    """Parts of one array, each at a multiple of 16 bytes. For other alignments Triton would compile the kernels
    again."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Integers]] = []
        """Starts, and the numbers from there on. What lies between is never read."""
        self.size: int = 0

    def add(self, part: Integers) -> int:
        """Append an array and return its start."""
        begin = self.size + self.size % 2
        self.parts.append((begin, part.reshape(-1)))
        self.size = begin + part.size
        return begin

    def place(self, part: Integers) -> slice:
        """Append an array and return its place."""
        begin = self.add(part)
        return slice(begin, begin + part.size)


class _Runs:
    """Streams in host memory that go to a device. Adjacent ones are joined to runs.

    Streams inside `sent` are there already; runs go after the first `size` bytes.
    """

    def __init__(self, sent: Sequence[Run], size: int) -> None:
        self._runs: list[Run] = []
        self._sent = sorted(sent, key=lambda run: run.address)
        self._addresses = [run.address for run in self._sent]
        self._begin = self._end = 0
        self._to = -(-size // ALIGNED) * ALIGNED
        self.held: list[Stream] = []

    @property
    def size(self) -> int:
        """Bytes of all runs on the device, with what was there before."""
        return self._to + self._end - self._begin

    def add(self, stream: Stream) -> int:
        """Add a stream and return where it goes or is."""
        if not len(stream):
            return self._to
        address = int(np.frombuffer(stream, np.uint8).__array_interface__["data"][0])
        number = bisect_right(self._addresses, address) - 1
        if number >= 0:
            run = self._sent[number]
            if address + len(stream) <= run.address + run.size:
                return run.to + address - run.address
        self.held.append(stream)
        if address != self._end:
            self._end_run()
            self._begin = self._end = address
        place = self._to + self._end - self._begin
        self._end += len(stream)
        return place

    def add_groups(self, parts: Sequence[Stream], sizes: Sequence[int]) -> tuple[Sequence[Stream], Sequence[int]]:
        """Add the streams of a tensor's groups, none of them zstd's. Return them and where they go or are."""
        groups = parts[1:-1]
        if isinstance(parts, Consecutive) and not any(len(part) and part[0] == rest.ZSTD for part in groups):
            begin = len(parts[0])
            inner = list(map(len, groups))
            return groups, list(accumulate(inner[:-1], initial=self.add(parts.whole) + begin))
        inflated = list(map(rest.inflated, groups, sizes))
        _, *sources, _ = map(self.add, (parts[0], *inflated, parts[-1]))
        return inflated, sources

    def _end_run(self) -> None:
        size = self._end - self._begin
        if size:
            self._runs.append(Run(address=self._begin, size=size, to=self._to))
        self._to += -(-size // ALIGNED) * ALIGNED
        self._begin = self._end = 0

    def all(self) -> tuple[Run, ...]:
        """The runs."""
        self._end_run()
        return tuple(self._runs)


def _programs(descriptions: Sequence[Sequence[int]], lanes_a_program: int) -> Integers:
    """Return (tensor, plane, first lane) for every program, [N, 3]."""
    lanes = np.array([described[2] for described in descriptions])
    count = (-(-lanes // lanes_a_program)).repeat(2)
    of = np.arange(len(count)).repeat(count)
    first = (np.arange(len(of)) - (np.cumsum(count) - count)[of]) * lanes_a_program
    return np.stack((of // 2, of % 2, first), axis=1)


def bytes_of(run: Run) -> npt.NDArray[np.uint8]:
    """Return the bytes of a run, without a copy."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * run.size).from_address(run.address)), np.uint8)
