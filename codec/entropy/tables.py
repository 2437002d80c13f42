"""Code tables: the frequency of each byte in a stream, stored in as few bits as pay off.

A table gives each byte a frequency F; all F add up to 4096. It stores not F but a small logarithm, the *field* q: 0 for
a byte that does not occur, else a float with r mantissa bits,

    v = (2^r + (q - 1) mod 2^r) * 2^floor((q - 1) / 2^r),    0 <= r <= 4

Then F = max(1, floor(4096 v / sum v)), and the greatest F (the first of equals) absorbs the difference to 4096.
Neighbouring bytes occur about equally often, so the differences of their fields are small and fit Rice codes. Exact
frequencies do not pay in a short stream: the encoder chooses the r and the Rice parameter k that give the fewest bits
for table and symbols together. Counts are whole numbers and logarithms are fixed-point, so every machine chooses alike.

A table's bytes: first byte value L; number of values less one; r + 8 k. Then follow, from the lowest bit of each byte,
the differences d between the field of each value from L on and the field before it (0 before the first). With z = 2d,
or -2d - 1 if d < 0, each is floor(z / 2^k) ones, a zero, and the low k bits of z, lowest first. Zeros fill the last
byte.

Worked example: byte 5 occurs 3 times and byte 6 once. With r = 0 a count is rounded to a power of two, half up: 3 to
2^2, so q = 3, and 1 to 2^0, so q = 1. Then v = (4, 1) and F = (3276, 819). Their sum lacks one, which the greatest
takes: (3277, 819). The differences are 3 and -2, so z = 6 and 3. With k = 2 they are 10 01 and 0 11, seven bits that
make the byte 01101001 from the highest: 05 01 10 69.

Shapes: S = streams.
"""

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

_FITTED_TOGETHER = 16
"""Streams whose tables one thread fits in turn. A matrix has at most 64 groups, too few to share between threads."""

_MOST_COUNT = 32767
_MOST_BYTES = 2048
"""Bytes reserved for a table. The best table never needs more: 256 fields of at most 41 bits each never win."""


class DamagedError(ValueError):
    """The bytes are not a valid table, or not a valid code for it."""


def histograms(flat: npt.NDArray[np.uint8], sizes: Counts) -> Counts:
    """Return how often each byte value occurs in each stream, [S, 256]. The streams follow each other in `flat`."""
    library = native()
    if library is None:
        return np.stack([np.bincount(part, minlength=256) for part in np.split(flat, np.cumsum(sizes)[:-1])])
    counts = np.empty((len(sizes), 256), dtype=np.int64)
    library.birkhoff_histograms(pointer(flat), len(sizes), pointer(sizes), pointer(counts))
    return counts


@dataclass(frozen=True, slots=True)
class Tables:
    """The code tables of S streams.

    `data` is uint8 [S, 2048]; each row stores `length` bytes [S], 0 for a stream without a table. `frequency` is uint16
    [S, 256]. `cost` [S] is the size of the stream and its table in units of 2^-16 bits.
    """

    data: npt.NDArray[np.uint8]
    length: Counts
    frequency: Frequencies
    cost: Counts

    def __getitem__(self, which: npt.NDArray[np.int64]) -> "Tables":
        """Return the tables of some streams."""
        return Tables(self.data[which], self.length[which], self.frequency[which], self.cost[which])


def fit(counts: Counts) -> Tables:
    """Return the table with the fewest bits for each of S streams with the counts [S, 256].

    A stream of fewer than two values gets no table.
    """
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
        if streams <= _FITTED_TOGETHER:
            library.birkhoff_table_fits(streams, *map(pointer, arrays))
            return found
        rows = [(pointer(array), array.strides[0]) for array in arrays]

        def fit_some(first: int) -> None:
            some = min(_FITTED_TOGETHER, streams - first)
            library.birkhoff_table_fits(some, *(start + first * width for start, width in rows))

        in_threads(fit_some, range(0, streams, _FITTED_TOGETHER))
        return found
    for number, table in enumerate(map(reference_fit, counts)):
        if table is not None:
            found.data[number, : len(table.data)] = np.frombuffer(table.data, np.uint8)
            found.length[number], found.cost[number] = len(table.data), table.cost
            found.frequency[number] = table.frequency
    return found


def parse(data: bytes | memoryview) -> tuple[Frequencies, int]:
    """Read a table from the start of `data`. Return (frequencies [256], bytes of the table). Raises DamagedError."""
    library = native()
    if library is None:
        return reference_parse(data)
    frequency = np.empty(256, dtype=np.uint16)
    size = library.birkhoff_table_parse(pointer(np.frombuffer(data, np.uint8)), len(data), pointer(frequency))
    if size < 0:
        raise DamagedError("code table is damaged")
    return frequency, size


def log2_fixed(value: int) -> int:
    """Return log2 of 1..2^31 in units of 2^-16, rounded down. The integers are the same on every machine."""
    whole = value.bit_length() - 1
    y, fraction = value << (31 - whole), 0
    for bit in range(15, -1, -1):
        y = y * y >> 31
        if y >> 32:
            fraction |= 1 << bit
            y >>= 1
    return whole << 16 | fraction


_COST = np.array([0, *((BITS << 16) - log2_fixed(f) for f in range(1, SLOTS + 1))], dtype=np.int64)
"""Bits of a symbol, by its frequency, in units of 2^-16."""


def frequencies_of(fields: list[int], fine: int) -> list[int] | None:
    """Return the frequencies that fields stand for; None if the fields make no valid table."""
    values = [((1 << fine) + (q - 1) % (1 << fine)) << ((q - 1) >> fine) if q else 0 for q in fields]
    if sum(value > 0 for value in values) < 2:
        return None
    total = sum(values)
    found = [max(1, value * SLOTS // total) if value else 0 for value in values]
    largest = found.index(max(found))
    found[largest] += SLOTS - sum(found)
    return found if found[largest] >= 1 else None


def fields_of(counts: list[int], fine: int) -> list[int]:
    """Return the fields nearest to counts."""
    found = []
    for count in counts:
        octave = count.bit_length() - 1
        shift = octave - fine
        mantissa = (count + (1 << shift - 1)) >> shift if shift > 0 else count << max(-shift, 0)
        found.append((octave - 1) * (1 << fine) + mantissa + 1 if count else 0)
    return found


@dataclass(frozen=True, slots=True)
class Table:
    """One row of `Tables`, with `data` cut to the stored bytes."""

    data: bytes
    frequency: Frequencies
    cost: int


def reference_fit(counts: Counts) -> Table | None:
    """`fit` of one stream with the counts [256], in Python; None for no table."""
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
    return Table(header + packed.tobytes(), frequency, cost + (24 << 16))


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
