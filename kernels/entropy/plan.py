"""What the kernels are told of stored tensors: where their bytes are, and where each block and symbol belongs.

All of it is numbers in one array, `Plan.numbers`, which goes to the GPU in one piece; offsets in it are counted in
elements of its start. What is as long as rows and columns are, the places of their symbols, the GPU makes from their
levels. Streams are copied in runs: those that follow each other in host memory, as the streams of a
container do, are one copy.

Shapes: T = tensors, B = blocks, S = streams, R = rows, P = pairs a row, L = lanes of paths.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from birkhoff.codec import contexts, planes, rest, trellis
from birkhoff.codec.container import CodedTensor, Consecutive, LatticeParams
from birkhoff.codec.errors import FormatError
from birkhoff.codec.tensor import lattice_shape
from birkhoff.codec.trajectory import Escapes

_DIRECT = -1, 0, 0, 0, 0
"""What the kernel is told of a tensor whose symbols are one group: their places need no tables."""

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Stream = bytes | memoryview

ALIGNED = 128
"""Bytes that planes, and runs of streams, begin at a multiple of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of a plan: plane I begins at `begin` of all planes, plane J at `begin + stride`."""

    coded: CodedTensor
    params: LatticeParams
    shape: tuple[int, int]
    stored: Escapes
    begin: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Bytes of streams in host memory, and where they go."""

    address: int
    size: int
    to: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How some tensors are decoded; see the kernels' arguments for the shapes inside `numbers`."""

    tensors: tuple[Placed, ...]
    runs: tuple[Run, ...]
    bytes: int
    """Of all runs on the device."""
    symbols: int
    coordinates: int
    """Of all planes, with what lies between."""
    numbers: Integers
    frequencies: slice
    blocks: slice
    descriptions: slice
    programs: slice
    ends: slice
    """Of the parts of `levels`."""
    levels: Bytes
    """Of the rows, then the columns of each tensor that has groups."""
    held: list[Stream]
    """What the runs point into."""


def plan(coded: Sequence[CodedTensor], lanes_a_program: int) -> Plan:
    """The plan of `lattice` tensors of version 2, at least one. Raises FormatError, naming the tensor."""
    numbers, runs = Numbers(), _Runs()
    levels: list[Bytes] = []
    ends = [0]
    tensors: list[Placed] = []
    descriptions: list[list[int]] = []
    coded_by: list[rest.Plan] = []
    streams = symbols = coordinates = 0
    for number, one in enumerate(coded):
        try:
            params, shape = lattice_shape(one)
            found = _levels(one, shape)
            sizes, tables = [2 * math.prod(shape)], None
            if found is not None:
                *tables, of_groups = contexts.address_tables(*found)
                sizes = of_groups.tolist()
            planes.check_count(one.parts, len(sizes))
            groups, sources = runs.add_groups(one.parts, sizes)
            blocks = rest.plan(groups, sizes, sources, list(accumulate(sizes[:-1], initial=symbols)))
            stored = planes.unpack_escapes(one.parts, shape, params.escapes, path=params.path)
        except FormatError as error:
            raise FormatError(f"tensor {one.name!r}: {error}") from None
        blocks.rows[:, 4] += streams
        blocks.rows[:, 6] = number
        coded_by.append(blocks)
        streams += len(groups)
        stride = -(-math.prod(shape) // ALIGNED) * ALIGNED
        tensors.append(Placed(coded=one, params=params, shape=shape, stored=stored, begin=coordinates, stride=stride))
        lanes = trellis.lanes_of(*shape, params.path)
        places: tuple[int, ...] = _DIRECT
        if found is not None and tables is not None:
            places = ends[-1], ends[-1] + shape[0], *map(numbers.add, tables), len(tables[1])
            levels += found[:2]
            ends += [ends[-1] + shape[0], ends[-1] + shape[0] + 2 * shape[1]]
        descriptions.append([*shape, lanes, params.path, symbols, coordinates, stride, *places])
        symbols += 2 * math.prod(shape)
        coordinates += 2 * stride
    frequency = np.concatenate([blocks.frequency for blocks in coded_by])
    return Plan(
        tensors=tuple(tensors),
        runs=runs.all(),
        bytes=runs.size,
        symbols=symbols,
        coordinates=coordinates,
        frequencies=numbers.place(frequency.view(np.int64)),
        blocks=numbers.place(np.concatenate([blocks.rows for blocks in coded_by])),
        descriptions=numbers.place(np.array(descriptions, dtype=np.int64)),
        programs=numbers.place(_programs(descriptions, lanes_a_program)),
        ends=numbers.place(np.array(ends[1:], dtype=np.int64)),
        levels=np.concatenate(levels) if levels else np.empty(0, np.uint8),
        numbers=numbers.all(),
        held=runs.held,
    )


def _levels(coded: CodedTensor, shape: tuple[int, int]) -> tuple[Bytes, Bytes, contexts.Rule] | None:
    """Levels of rows and columns, and their rule; None where there are none, and symbols lie as in the planes.

    Raises FormatError.
    """
    if len(coded.parts) > 2 and not len(coded.parts[0]):
        return None
    return planes.unpack_levels(coded.parts, shape)


class Numbers:
    """Arrays one after the other."""

    def __init__(self) -> None:
        self._parts: list[Integers] = []
        self._size = 0

    def add(self, part: Integers) -> int:
        """Append an array; returns where it begins."""
        begin = self._size
        self._parts.append(part.reshape(-1))
        self._size += part.size
        return begin

    def place(self, part: Integers) -> slice:
        """Append an array; returns where it lies."""
        begin = self.add(part)
        return slice(begin, begin + part.size)

    def all(self) -> Integers:
        """All of them."""
        return np.concatenate(self._parts)


class _Runs:
    """Streams in host memory, those that follow each other there taken together."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._begin = self._end = self._to = 0
        self.held: list[Stream] = []

    @property
    def size(self) -> int:
        """Bytes of all runs on the device."""
        return self._to + self._end - self._begin

    def add(self, stream: Stream) -> int:
        """Where the stream goes."""
        if not len(stream):
            return self._to
        self.held.append(stream)
        address = int(np.frombuffer(stream, np.uint8).__array_interface__["data"][0])
        if address != self._end:
            self._end_run()
            self._begin = self._end = address
        place = self._to + self._end - self._begin
        self._end += len(stream)
        return place

    def add_groups(self, parts: Sequence[Stream], sizes: Sequence[int]) -> tuple[Sequence[Stream], Sequence[int]]:
        """The streams of a tensor's groups, none of them zstd's, and where they go."""
        if isinstance(parts, Consecutive) and not any(len(part) and part[0] == rest.ZSTD for part in parts[1:-1]):
            inner = list(map(len, parts[1:-1]))
            begin = len(parts[0])
            groups = Consecutive.cut(parts.whole[begin : begin + sum(inner)], inner)
            return groups, list(accumulate(inner[:-1], initial=self.add(parts.whole) + begin))
        inflated = list(map(rest.inflated, parts[1:-1], sizes))
        _, *sources, _ = map(self.add, (parts[0], *inflated, parts[-1]))
        return inflated, sources

    def _end_run(self) -> None:
        size = self._end - self._begin
        if size:
            self._runs.append(Run(address=self._begin, size=size, to=self._to))
        self._to += -(-size // ALIGNED) * ALIGNED
        self._begin = self._end = 0

    def all(self) -> tuple[Run, ...]:
        self._end_run()
        return tuple(self._runs)


def _programs(descriptions: Sequence[Sequence[int]], lanes_a_program: int) -> Integers:
    """(tensor, plane, first lane) of every program, [N, 3]."""
    lanes = np.array([described[2] for described in descriptions])
    count = (-(-lanes // lanes_a_program)).repeat(2)
    of = np.arange(len(count)).repeat(count)
    first = (np.arange(len(of)) - (np.cumsum(count) - count)[of]) * lanes_a_program
    return np.stack((of // 2, of % 2, first), axis=1)


def bytes_of(run: Run) -> npt.NDArray[np.uint8]:
    """The bytes of a run, not copied."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * run.size).from_address(run.address)), np.uint8)
