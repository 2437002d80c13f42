"""Code tables: how often each byte occurs in a stream, in as few bits as that is worth.

A table gives each byte a frequency F, the sum of which is 4096. Stored is not F but a small logarithm: a *field* q,
0 for a byte that does not occur, else the float of r mantissa bits

    v = (2^r + (q - 1) mod 2^r) * 2^floor((q - 1) / 2^r),    0 <= r <= 4

from which F = max(1, floor(4096 v / sum v)), and what is missing from 4096, or too much, goes to the greatest F (the
first of equals). Neighbouring bytes occur about equally often, so the fields' differences are small and Rice codes
hold them. A short stream is not worth exact frequencies: the encoder takes the r and the Rice parameter k of the fewest
bits, table and symbols together. Counts are whole numbers and logarithms fixed-point, so the choice is the same
everywhere.

A table's bytes: first byte value L; number of values less one; r + 8 k; then, lowest bit of each byte first, for each
value from L on the difference d of its field to the one before (the first: to 0), as z = 2d, or -2d - 1 if d < 0:
floor(z / 2^k) ones, a zero, and the low k bits of z, lowest first; zeros up to a whole byte.

Worked example: the counts 3 of byte 5 and 1 of byte 6. With r = 0 a count is rounded to a power of two, half up: 3 to
2^2, which is q = 3, and 1 to 2^0, q = 1. v = (4, 1), F = (3276, 819), and the one that is missing goes to the greatest:
(3277, 819). The differences are 3 and -2, so z = 6 and 3; with k = 2 they are 10 01 and 0 11, seven bits that make the
byte 01101001 from the highest: 05 01 10 69.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.threads import in_threads

Counts = npt.NDArray[np.int64]
Frequencies = npt.NDArray[np.uint16]

BITS = 12
SLOTS = 1 << BITS
"""The sum of a table's frequencies."""

MOST_FINE = 4
MOST_RICE = 7
OCTAVES = 16
"""Fields are at most OCTAVES * 2^r."""

_FITTED_TOGETHER = 4

_MOST_COUNT = 32767
_MOST_BYTES = 2048
"""Bytes reserved for a table, with room: 256 fields of at most 41 bits each are never the best."""


class DamagedError(ValueError):
    """The bytes are not a table, or not a code by that table."""


@dataclass(frozen=True, slots=True)
class Table:
    """`data` as stored, `frequency` uint16 [256], and `bits` of a stream of the fitted counts, including the table."""

    data: bytes
    frequency: Frequencies
    bits: float


def histogram(data: npt.NDArray[np.uint8]) -> Counts:
    """Return how often each byte value occurs, [256]."""
    library = native()
    if library is None:
        return np.bincount(data, minlength=256)
    counts = np.empty(256, dtype=np.int64)
    library.birkhoff_histogram(pointer(data), data.size, pointer(counts))
    return counts


def fit(counts: Counts) -> Table | None:
    """Return the table with the fewest bits for a stream of these counts [256]; None if fewer than two values occur."""
    library = native()
    if library is None:
        return reference_fit(counts)
    data, frequency, cost = np.empty(_MOST_BYTES, np.uint8), np.empty(256, np.uint16), np.empty(1, np.int64)
    counts = np.ascontiguousarray(counts)
    size = library.birkhoff_table_fit(*map(pointer, (counts, data, frequency, cost)))
    return Table(data[:size].tobytes(), frequency, int(cost[0]) / 65536) if size else None


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of S streams: `data` uint8 [S, 2048], of which `length` bytes [S] are stored (0 where there is no table),
    `frequency` uint16 [S, 256], and `cost` [S] in units of 2^-16 bits, table included."""

    data: npt.NDArray[np.uint8]
    length: Counts
    frequency: Frequencies
    cost: Counts

    def __getitem__(self, which: npt.NDArray[np.int64]) -> "Tables":
        """Those of some streams."""
        return Tables(self.data[which], self.length[which], self.frequency[which], self.cost[which])


def fit_all(counts: Counts) -> Tables:
    """`fit` of the counts [S, 256] of some streams."""
    streams = len(counts)
    found = Tables(
        np.zeros((streams, _MOST_BYTES), np.uint8),
        np.zeros(streams, np.int64),
        np.zeros((streams, 256), np.uint16),
        np.zeros(streams, np.int64),
    )
    library = native()
    if library is not None:
        arrays = np.ascontiguousarray(counts), found.data, found.length, found.frequency, found.cost
        parts = [slice(first, first + _FITTED_TOGETHER) for first in range(0, streams, _FITTED_TOGETHER)]

        def fit_some(part: slice) -> None:
            own = [array[part] for array in arrays]
            library.birkhoff_table_fits(len(own[0]), *map(pointer, own))

        in_threads(fit_some, parts)
        return found
    for number, table in enumerate(map(reference_fit, counts)):
        if table is not None:
            found.data[number, : len(table.data)] = np.frombuffer(table.data, np.uint8)
            found.length[number], found.cost[number] = len(table.data), round(table.bits * 65536)
            found.frequency[number] = table.frequency
    return found


def fit_groups(flat: npt.NDArray[np.uint8], sizes: Sequence[int]) -> tuple[Counts, list[Table | None]]:
    """The histograms [G, 256] of groups that follow each other in `flat`, and their tables as `fit` makes them."""
    groups, library = len(sizes), native()
    if library is None:
        counts = np.stack([np.bincount(group, minlength=256) for group in np.split(flat, np.cumsum(sizes)[:-1])])
        return counts, list(map(reference_fit, counts))
    counts, frequency = np.empty((groups, 256), np.int64), np.empty((groups, 256), np.uint16)
    data, used, cost = np.empty((groups, _MOST_BYTES), np.uint8), np.empty(groups, np.int32), np.empty(groups, np.int64)
    arrays = np.array(sizes, dtype=np.int64), counts, data, used, frequency, cost
    library.birkhoff_group_tables(pointer(flat), groups, *map(pointer, arrays))
    each = zip(data, used.tolist(), frequency, cost.tolist(), strict=True)
    return counts, [Table(row[:size].tobytes(), f, bits / 65536) if size else None for row, size, f, bits in each]


def parse(data: bytes | memoryview) -> tuple[Frequencies, int]:
    """Return (frequencies [256], bytes of the table) from data that starts with a table. Raises DamagedError."""
    library = native()
    if library is None:
        return reference_parse(data)
    frequency = np.empty(256, dtype=np.uint16)
    size = library.birkhoff_table_parse(pointer(np.frombuffer(data, np.uint8)), len(data), pointer(frequency))
    if size < 0:
        raise DamagedError("code table is damaged")
    return frequency, size


def log2_fixed(value: int) -> int:
    """Return log2 of 1..2^31 in units of 2^-16, rounded down: the same integers on every machine."""
    whole = value.bit_length() - 1
    y, fraction = value << (31 - whole), 0
    for bit in range(15, -1, -1):
        y = y * y >> 31
        if y >> 32:
            fraction |= 1 << bit
            y >>= 1
    return whole << 16 | fraction


_COST = np.array([0, *((BITS << 16) - log2_fixed(f) for f in range(1, SLOTS + 1))], dtype=np.int64)
"""Bits of a symbol by its frequency, in units of 2^-16."""


def frequencies_of(fields: list[int], fine: int) -> list[int] | None:
    """Return the frequencies of fields; None if they make no valid table."""
    values = [((1 << fine) + (q - 1) % (1 << fine)) << ((q - 1) >> fine) if q else 0 for q in fields]
    if sum(value > 0 for value in values) < 2:
        return None
    total = sum(values)
    found = [max(1, value * SLOTS // total) if value else 0 for value in values]
    largest = found.index(max(found))
    found[largest] += SLOTS - sum(found)
    return found if found[largest] >= 1 else None


def fields_of(counts: list[int], fine: int) -> list[int]:
    """Return the nearest fields of counts."""
    found = []
    for count in counts:
        octave = count.bit_length() - 1
        shift = octave - fine
        mantissa = (count + (1 << shift - 1)) >> shift if shift > 0 else count << max(-shift, 0)
        found.append((octave - 1) * (1 << fine) + mantissa + 1 if count else 0)
    return found


def reference_fit(counts: Counts) -> Table | None:
    """`fit` in Python."""
    used = np.flatnonzero(counts)
    if len(used) < 2:
        return None
    low, high = int(used[0]), int(used[-1])
    inner = [int(count) for count in counts[low : high + 1]]
    total = sum(inner)
    scaled = (
        [max(1, (c * _MOST_COUNT + total // 2) // total) if c else 0 for c in inner] if total > _MOST_COUNT else inner
    )
    best: tuple[int, int, int, list[int]] | None = None
    for fine in range(MOST_FINE + 1):
        fields = fields_of(scaled, fine)
        found = frequencies_of(fields, fine)
        if found is None:
            continue
        data = sum(count * int(_COST[f]) for count, f in zip(inner, found, strict=True))
        codes = _signed(fields)
        for rice in range(MOST_RICE + 1):
            cost = data + (sum((z >> rice) + 1 + rice for z in codes) << 16)
            if best is None or cost < best[0]:
                best = cost, fine, rice, found
    if best is None:
        return None
    cost, fine, rice, found = best
    fields = fields_of(scaled, fine)
    frequency = np.zeros(256, dtype=np.uint16)
    frequency[low : high + 1] = found
    bits = "".join("1" * (z >> rice) + "0" + format(z, f"0{rice + 20}b")[::-1][:rice] for z in _signed(fields))
    packed = np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"), bitorder="little")
    header = bytes([low, high - low, fine | rice << 3])
    return Table(header + packed.tobytes(), frequency, (cost + (24 << 16)) / 65536)


def _signed(fields: list[int]) -> list[int]:
    """Return z for the differences of fields."""
    steps = [q - last for q, last in zip(fields, [0, *fields], strict=False)]
    return [2 * d if d >= 0 else -2 * d - 1 for d in steps]


def reference_parse(data: bytes | memoryview) -> tuple[Frequencies, int]:
    """`parse` in Python."""
    if len(data) < 3:
        raise DamagedError("code table is truncated")
    low, symbols, fine, rice = data[0], data[1] + 1, data[2] & 7, data[2] >> 3
    most = OCTAVES << fine
    if low + symbols > 256 or fine > MOST_FINE or rice > MOST_RICE:
        raise DamagedError("code table is out of bounds")
    longest = 3 + -(-symbols * (2 * most + 1 + rice) // 8)
    bits = np.unpackbits(np.frombuffer(data[3:longest], np.uint8), bitorder="little")
    zeros, at, field, fields = np.flatnonzero(bits == 0), 0, 0, []
    for _ in range(symbols):
        place = int(np.searchsorted(zeros, at))
        if place == len(zeros):
            raise DamagedError("code table is truncated")
        ones = int(zeros[place]) - at
        at = int(zeros[place]) + 1 + rice
        if at > len(bits):
            raise DamagedError("code table is truncated")
        z = ones << rice | sum(int(bit) << k for k, bit in enumerate(bits[at - rice : at]))
        field += -(z >> 1) - 1 if z & 1 else z >> 1
        if ones > 2 * most or not 0 <= field <= most:
            raise DamagedError("code table is out of bounds")
        fields.append(field)
    if bits[at : at + -at % 8].any():
        raise DamagedError("code table is not filled with zeros")
    found = frequencies_of(fields, fine)
    if found is None:
        raise DamagedError("code table has fewer than two values, or too many")
    frequency = np.zeros(256, dtype=np.uint16)
    frequency[low : low + symbols] = found
    return frequency, 3 + (at + 7) // 8
