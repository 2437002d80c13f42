"""Interleaved rANS: bytes coded by a static table, in blocks that decode independently.

Source: J. Duda, "Asymmetric numeral systems" (arXiv 1311.2540). The interleaving is that of F. Giesen, "Interleaved
entropy coders" (arXiv 1402.3392), as used by GPU coders.

A stream is cut into blocks of 131072 symbols, the last one shorter. Symbol i of a block belongs to lane i mod N, where
N is a power of two up to 32. Each lane has a state x, 2^16 <= x < 2^32, and the block has one sequence of 16-bit words.
Let F be a symbol's frequency and C the sum of the frequencies of all smaller symbols. Decoding goes through the symbols
in order, and takes for each

    slot = x mod 4096, the symbol with C <= slot < C + F, x = F * floor(x / 4096) + slot - C,
    and if x < 2^16: x = 65536 x + the next word

At a block's end every state must be 2^16 and every word read; otherwise the block is damaged. A GPU's warp, or four
vectors of AVX2, decode N symbols at a time, and the lanes with a small x take the next words in the order of the lanes.

A block has N states (uint32), then its words (uint16), little-endian. The number of words of each block but the last
(uint32) precedes all blocks; the last block takes the rest.

Worked example: the table of two equally frequent bytes a < b (F = 2048 each, C = 0 and 2048), one lane, the stream
"ab". Encoding runs backwards from x = 65536: b first, x = 4096 * floor(65536 / 2048) + 65536 mod 2048 + 2048 = 133120;
then a, x = 4096 * 65 = 266240. Decoding, 266240 mod 4096 = 0 is a, and x = 2048 * 65 = 133120; 133120 mod 4096 = 2048
is b, and x = 2048 * 32 + 0 = 65536, as at every end.

Shapes: B = blocks, N = lanes.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from birkhoff.codec.entropy.tables import BITS, SLOTS, DamagedError, Frequencies
from birkhoff.codec.native.library import native, pointer

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

BLOCK = 1 << 17
"""Symbols per block: so many that 32 states take 0.01 bits per symbol, so few that a GPU decodes one in 0.3 ms."""

MOST_LANES = 32
_LEAST_LANES = 4
_DEPTH = 8192
"""Approximate number of symbols per lane. A state costs 24 bits."""

_LEAST_STATE = 1 << 16

_TOGETHER = 64
"""Blocks that the references code together."""


def lanes(size: int) -> int:
    """Return N, as the encoder chooses it for a stream of so many symbols."""
    found = _LEAST_LANES
    while found < MOST_LANES and size >= found * _DEPTH:
        found *= 2
    return found


def lanes_of_all(sizes: Integers) -> Integers:
    """`lanes` of many streams."""
    found = np.full(sizes.shape, _LEAST_LANES, dtype=np.int64)
    while (more := (found < MOST_LANES) & (sizes >= found * _DEPTH)).any():
        found = np.where(more, 2 * found, found)
    return found


def encoded_bytes(size: int) -> int:
    """Return the bytes of a stream's states and of the sizes of its blocks."""
    blocks = -(-size // BLOCK)
    return 4 * (blocks - 1) + 4 * lanes(size) * blocks


def encode(symbols: Bytes, frequency: Frequencies, lanes: int) -> bytes:
    """Encode a stream of at least one symbol, all with a frequency above 0, as blocks."""
    library = native()
    if library is None:
        return reference_encode(symbols, frequency, lanes)
    out = np.empty((8 + 4 * lanes) * -(-symbols.size // BLOCK) + 2 * symbols.size, dtype=np.uint8)
    scratch = np.empty(8 + BLOCK, dtype=np.uint16)
    size = library.birkhoff_rans_encode(
        pointer(symbols), symbols.size, lanes, pointer(frequency), pointer(scratch), pointer(out)
    )
    return out[:size].tobytes()


def encode_all(flat: Bytes, sizes: Sequence[int], frequencies: Sequence[Frequencies | None]) -> list[bytes]:
    """The blocks of groups that follow each other in `flat`, as `encode` makes them; none of those without a table."""
    library = native()
    lanes_of = [0 if frequency is None else lanes(size) for size, frequency in zip(sizes, frequencies, strict=True)]
    if library is None:
        groups = zip(np.split(flat, np.cumsum(sizes)[:-1]), frequencies, lanes_of, strict=True)
        return [b"" if f is None else reference_encode(group, f, lanes) for group, f, lanes in groups]
    most = sum(
        (8 + 4 * lanes) * -(-size // BLOCK) + 2 * size for size, lanes in zip(sizes, lanes_of, strict=True) if lanes
    )
    used = np.array([np.zeros(256, np.uint16) if f is None else f for f in frequencies])
    out, ends, scratch = np.empty(most, np.uint8), np.empty(len(sizes), np.int64), np.empty(8 + BLOCK, np.uint16)
    arrays = np.array(sizes, np.int64), np.array(lanes_of, np.int32), used, scratch, out, ends
    library.birkhoff_group_codes(pointer(flat), len(sizes), *map(pointer, arrays))
    return [out[begin:end].tobytes() for begin, end in pairwise([0, *ends.tolist()])]


def decode(data: bytes | memoryview, size: int, frequency: Frequencies, lanes: int, out: Bytes | None = None) -> Bytes:
    """Decode the `size` symbols (at least one) of blocks, into `out` if given. Raises DamagedError."""
    out = np.empty(size, dtype=np.uint8) if out is None else out
    library = native()
    if library is None:
        out[:] = reference_decode(data, size, frequency, lanes)
        return out
    source = np.frombuffer(data, np.uint8)
    if library.birkhoff_rans_decode(pointer(source), len(data), size, lanes, pointer(frequency), pointer(out)):
        raise DamagedError("code by a table is damaged")
    return out


def reference_encode(symbols: Bytes, frequency: Frequencies, lanes: int) -> bytes:
    """`encode` in numpy, one step of all lanes of several blocks at a time."""
    coded: list[tuple[bytes, bytes]] = []
    for first in range(0, symbols.size, _TOGETHER * BLOCK):
        coded += _encode_some(symbols[first : first + _TOGETHER * BLOCK], frequency.astype(np.int64), lanes)
    counts = np.array([len(words) // 2 for _, words in coded[:-1]], dtype="<u4").tobytes()
    return counts + b"".join(states + words for states, words in coded)


def _encode_some(symbols: Bytes, frequency: npt.NDArray[np.int64], lanes: int) -> list[tuple[bytes, bytes]]:
    start = np.cumsum(frequency) - frequency
    blocks = -(-symbols.size // BLOCK)
    steps = -(-min(symbols.size, BLOCK) // lanes)
    padded = np.zeros(blocks * BLOCK, dtype=np.uint8)
    padded[: symbols.size] = symbols
    rows = padded.reshape(blocks, -1, lanes)
    there = (np.arange(blocks * BLOCK) < symbols.size).reshape(rows.shape)
    x_BN = np.full((blocks, lanes), _LEAST_STATE, dtype=np.int64)
    word = np.zeros((blocks, steps, lanes), dtype="<u2")
    written = np.zeros(word.shape, dtype=bool)
    for t in range(steps - 1, -1, -1):
        active, symbol = there[:, t], rows[:, t]
        f = np.where(active, frequency[symbol], 1)
        full = active & (x_BN >= f << 20)
        word[:, t], written[:, t] = x_BN, full
        x = np.where(full, x_BN >> 16, x_BN)
        x_BN = np.where(active, (x // f << BITS) + x % f + start[symbol], x_BN)
    states = x_BN.astype("<u4")
    return [(states[b].tobytes(), word[b][written[b]].tobytes()) for b in range(blocks)]


def reference_decode(data: bytes | memoryview, size: int, frequency: Frequencies, lanes: int) -> Bytes:
    """`decode` in numpy, one step of all lanes of several blocks at a time."""
    starts, words = directory(data, size, lanes)
    blocks = len(words)
    places = [range(first, min(first + _TOGETHER, blocks)) for first in range(0, blocks, _TOGETHER)]
    symbol = np.repeat(np.arange(256, dtype=np.uint8), frequency)
    return np.concatenate(
        [_decode_some(data, size, frequency.astype(np.int64), symbol, lanes, some, starts, words) for some in places]
    )


def directory(data: bytes | memoryview, size: int, lanes: int) -> tuple[Integers, Integers]:
    """Return the start of each block of a stream of `size` symbols, and its number of words, [B] each. Raises
    DamagedError."""
    blocks = -(-size // BLOCK)
    head = 4 * (blocks - 1)
    if len(data) < head:
        raise DamagedError("code is truncated")
    words = np.frombuffer(data[:head], "<u4").astype(np.int64)
    last = len(data) - head - 4 * lanes * blocks - 2 * int(words.sum())
    if last < 0 or last % 2:
        raise DamagedError("code is truncated")
    words = np.append(words, last // 2)
    return head + np.concatenate(([0], np.cumsum(4 * lanes + 2 * words)[:-1])), words


def _decode_some(
    data: bytes | memoryview,
    size: int,
    frequency: npt.NDArray[np.int64],
    symbol: Bytes,
    lanes: int,
    some: Sequence[int],
    starts: npt.NDArray[np.int64],
    words: npt.NDArray[np.int64],
) -> Bytes:
    f_slot = frequency[symbol]
    bias = np.arange(SLOTS) - (np.cumsum(frequency) - frequency)[symbol]
    counts = np.array([min(BLOCK, size - b * BLOCK) for b in some])
    x_BN = np.stack([np.frombuffer(data, "<u4", lanes, starts[b]) for b in some]).astype(np.int64)
    row = np.concatenate([*(np.frombuffer(data, "<u2", words[b], starts[b] + 4 * lanes) for b in some), [0]])
    ends = np.cumsum(words[list(some)])
    at = ends - words[list(some)]
    if (x_BN < _LEAST_STATE).any():
        raise DamagedError("code begins with a state below 2^16")
    steps = -(-int(counts.max()) // lanes)
    found = np.zeros((len(some), BLOCK // lanes, lanes), dtype=np.uint8)
    for t in range(steps):
        active = t * lanes + np.arange(lanes) < counts[:, None]
        slot = x_BN & (SLOTS - 1)
        found[:, t] = symbol[slot]
        x = f_slot[slot] * (x_BN >> BITS) + bias[slot]
        small = active & (x < _LEAST_STATE)
        place = at[:, None] + np.cumsum(small, axis=1) - small
        at = at + small.sum(axis=1)
        if (at > ends).any():
            raise DamagedError("code ends too early")
        x_BN = np.where(active, np.where(small, x << 16 | row[np.minimum(place, len(row) - 1)], x), x_BN)
    if (at != ends).any() or (x_BN != _LEAST_STATE).any():
        raise DamagedError("code does not end where it should")
    flat = found.reshape(len(some), -1)
    return np.concatenate([flat[b, :count] for b, count in enumerate(counts)])
