"""Interleaved rANS: code bytes by a static table, in blocks that decode independently.

Source: J. Duda, "Asymmetric numeral systems" (arXiv 1311.2540). The interleaving is that of F. Giesen, "Interleaved
entropy coders" (arXiv 1402.3392), which GPU coders use.

A stream consists of blocks of 131072 symbols; the last block may be shorter. Symbol i of a block belongs to lane
i mod N, where N is a power of two up to 32. Each lane has a state x, 2^16 <= x < 2^32. All lanes of a block share one
sequence of 16-bit words. Let F be a symbol's frequency and C the sum of the frequencies of all smaller symbols. The
decoder visits the symbols in order and computes for each

    slot = x mod 4096, the symbol with C <= slot < C + F, x = F * floor(x / 4096) + slot - C,
    and if x < 2^16: x = 65536 x + the next word

At a block's end every state must be 2^16 and every word read; otherwise the block is damaged. A GPU's warp, or four
vectors of AVX2, decode N symbols at a time. Lanes with a small x take the next words in the order of the lanes.

A block stores N states (uint32), then its words (uint16), little-endian. The number of words (uint32) of each block but
the last precedes all blocks; the last block takes the remaining words.

Worked example: the table has two equally frequent bytes a < b (F = 2048 each, C = 0 and 2048), the block has one lane,
and the stream is "ab". The encoder runs backwards from x = 65536. It encodes b, x = 4096 * floor(65536 / 2048) + 65536
mod 2048 + 2048 = 133120, then a, x = 4096 * 65 = 266240. The decoder finds 266240 mod 4096 = 0, which is a, and
x = 2048 * 65 = 133120; then 133120 mod 4096 = 2048, which is b, and x = 2048 * 32 + 0 = 65536, the state at every end.

Shapes: S = streams, B = blocks, N = lanes.
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
"""Symbols per block: enough that 32 states cost only 0.01 bits per symbol, few enough that a GPU decodes a block in
0.3 ms."""

_LEAST_LANES, _MOST_LANES = 4, 32
_DEPTH = 8192
"""Approximate number of symbols per lane. A state costs 24 bits."""

_DOUBLED_FROM = _DEPTH * np.array([4, 8, 16])
"""Sizes from which a stream has 8, 16 and 32 lanes."""

_LEAST_STATE = 1 << 16

_TOGETHER = 64
"""Blocks that the references code at a time."""


def lanes(sizes: Integers) -> Integers:
    """Return the number of lanes N that the encoder chooses for each stream, by its number of symbols."""
    found: Integers = _LEAST_LANES << _DOUBLED_FROM.searchsorted(sizes, side="right")
    return found


def encoded_bytes(sizes: Integers) -> Integers:
    """Return the bytes that the states and the numbers of words take in each stream."""
    blocks = -(-sizes // BLOCK)
    found: Integers = 4 * (blocks * (lanes(sizes) + 1) - 1)
    return found


def encode(flat: Bytes, sizes: Integers, frequencies: Frequencies, lanes: Integers) -> list[bytes]:
    """Encode streams that follow each other in `flat`.

    A stream with 0 lanes is skipped and gives no bytes. The others have at least one symbol, and all their symbols have
    a frequency above 0.

    Args:
        flat: The symbols of all streams.
        sizes: The number of symbols of each stream, [S].
        frequencies: The tables, uint16 [S, 256].
        lanes: N of each stream, int64 [S].
    """
    library = native()
    if library is None:
        streams = zip(np.split(flat, np.cumsum(sizes)[:-1]), frequencies, lanes.tolist(), strict=True)
        return [reference_encode(stream, frequency, n) if n else b"" for stream, frequency, n in streams]
    most_blocks = len(sizes) + flat.size // BLOCK
    out = np.empty((8 + 4 * _MOST_LANES) * most_blocks + 2 * flat.size, np.uint8)
    ends, scratch = np.empty(len(sizes), np.int64), np.empty(8 + BLOCK, np.uint16)
    arrays = sizes, lanes, np.ascontiguousarray(frequencies), scratch, out, ends
    library.birkhoff_rans_encode(pointer(flat), len(sizes), *map(pointer, arrays))
    return [out[begin:end].tobytes() for begin, end in pairwise([0, *ends.tolist()])]


def decode(data: bytes | memoryview, size: int, frequency: Frequencies, lanes: int, out: Bytes | None = None) -> Bytes:
    """Decode `size` symbols (at least one) from the blocks of a stream, into `out` if given. Raises DamagedError."""
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
    """`encode` of one stream in numpy: one step of all lanes, for several blocks at a time."""
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
    """`decode` in numpy: one step of all lanes, for several blocks at a time."""
    starts, words = directory(data, size, lanes)
    blocks = len(words)
    places = [range(first, min(first + _TOGETHER, blocks)) for first in range(0, blocks, _TOGETHER)]
    symbol = np.repeat(np.arange(256, dtype=np.uint8), frequency)
    return np.concatenate(
        [_decode_some(data, size, frequency.astype(np.int64), symbol, lanes, some, starts, words) for some in places]
    )


def directory(data: bytes | memoryview, size: int, lanes: int) -> tuple[Integers, Integers]:
    """Return the start of each block in a stream of `size` symbols, and its number of words: [B] each.

    Raises:
        DamagedError: The stream is too short.
    """
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
