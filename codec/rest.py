"""The form at rest: one stream of bytes, stored raw, by zstd or by a code table, whichever is smallest.

The symbols of a lattice tensor and the byte planes of a lossless one are nearly independent, so only entropy coding
helps: rANS with a code table for each stream (see `entropy`). A search for repeats mostly finds chance matches and
codes them at a loss, but real repeats (equal rows, runs of zeros) pay. The first byte of a stream gives its kind:

    0   the bytes as they are
    1   one zstd frame that declares its content size
    2   a byte log2 N, a code table (`entropy.tables`), blocks of N lanes (`entropy.rans`)

An empty input gives an empty stream. Version 1 has only zstd frames, without the first byte.

Shapes: S = streams, B = blocks.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import is_
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from birkhoff.codec.container import Consecutive
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.entropy.tables import DamagedError, Tables
from birkhoff.codec.errors import FormatError
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.threads import in_threads
from birkhoff.codec.trajectory import HIGH, LOW, Escapes

Bytes = npt.NDArray[np.uint8]

RAW, ZSTD, ANS = range(3)

_LEVEL = 1
PROBE = 1 << 13
"""Bytes that zstd tries first. It tries the rest only if it beats the table on these."""

_LEAST_TABLE = 32
"""Fewest bytes for which a table is tried."""


def pack(data: Bytes) -> bytes:
    """Return the smallest stream for these bytes."""
    if not data.size:
        return b""
    sizes = np.array([data.size])
    return pack_all(data, sizes, tables.fit(tables.histograms(data, sizes)))[0]


def pack_all(flat: Bytes, sizes: rans.Integers, fits: Tables) -> list[bytes]:
    """Return the smallest stream for each group. Groups follow each other in `flat`, and none is empty.

    `fits` holds their tables.
    """
    lanes = rans.lanes(sizes) * pays(sizes, fits)
    lanes_of: list[int] = lanes.tolist()
    coded = rans.encode(flat, sizes, fits.frequency, lanes) if any(lanes_of) else [b""] * len(lanes_of)
    streams, end = [], 0
    each = zip(sizes.tolist(), lanes_of, fits.data, fits.length.tolist(), coded, strict=True)
    for size, n, table, table_bytes, blocks in each:
        data, end = flat[end : end + size], end + size
        length = 2 + table_bytes + len(blocks) if n else None
        kind, frame = smallest(size, length, data[:PROBE], partial(_same, data))
        if kind == ZSTD:
            streams.append(bytes([ZSTD]) + frame)
        elif kind == ANS:
            streams.append(b"".join((bytes([ANS, n.bit_length() - 1]), table[:table_bytes].tobytes(), blocks)))
        else:
            streams.append(bytes([RAW]) + data.tobytes())
    return streams


def _same(data: Bytes) -> Bytes:
    return data


def pays(sizes: rans.Integers, fits: Tables) -> npt.NDArray[np.bool_]:
    """Return whether to try the table of each stream, by its number of bytes [S]."""
    return (fits.length > 0) & (sizes >= _LEAST_TABLE) & (fits.cost < 8 * 65536 * sizes)


def smallest(size: int, coded: int | None, head: Bytes, whole: Callable[[], Bytes]) -> tuple[int, bytes]:
    """Choose the smallest stream for `size` bytes. Return its kind, and zstd's frame if that is the kind.

    `coded` is the length of the stream by a table, or None. `head` is the first `PROBE` bytes. `whole` returns all
    bytes, and is called only if they are needed.
    """
    kind, found = (ANS, coded) if coded is not None and coded <= size else (RAW, 1 + size)
    frame = _searched(head)
    if len(frame) * size < found * head.size:
        frame = frame if head.size == size else _searched(whole())
        if 1 + len(frame) < found:
            return ZSTD, frame
    return kind, b""


def estimates(sizes: rans.Integers, fits: Tables) -> npt.NDArray[np.float64]:
    """Estimate the size in bytes of each packed stream, from its number of bytes [S] and its table."""
    around = fits.cost / (8 * 65536) + (2 + rans.encoded_bytes(sizes))
    found: npt.NDArray[np.float64] = np.minimum(sizes + 1, np.where(fits.length > 0, around, 32))
    return found


def heads(sizes: rans.Integers, fits: Tables, words: rans.Integers) -> tuple[Bytes, rans.Integers]:
    """Return the bytes that precede the blocks of streams by tables, one after the other, and their number [S].

    `words` are the numbers of words of all blocks, in order.
    """
    blocks, log2 = _blocks(sizes), np.log2(rans.lanes(sizes)).astype(np.int64)
    length = 2 + fits.length + 4 * (blocks - 1)
    library = native()
    if library is not None:
        out = np.empty(int(length.sum()), dtype=np.uint8)
        arrays = log2, fits.data, fits.length, blocks, words.astype(np.int64), out
        library.birkhoff_stream_heads(len(sizes), *map(pointer, arrays))
        return out, length
    begins = np.cumsum(blocks) - blocks
    found = [
        bytes([ANS, log2[s]])
        + fits.data[s, : fits.length[s]].tobytes()
        + words[begins[s] : begins[s] + blocks[s] - 1].astype("<u4").tobytes()
        for s in range(len(sizes))
    ]
    return np.frombuffer(b"".join(found), np.uint8), length


def _blocks(sizes: rans.Integers) -> rans.Integers:
    return -(-sizes // rans.BLOCK)


def unpack(stream: bytes | memoryview, size: int, out: Bytes | None = None) -> Bytes:
    """Return the `size` bytes of a stream, in `out` if given. Raises FormatError."""
    out = np.empty(size, dtype=np.uint8) if out is None else out
    if not size:
        _nothing(stream)
        return out
    kind = stream[0] if len(stream) else -1
    body = memoryview(stream)[1:]
    if kind == RAW:
        if len(body) != size:
            raise FormatError(f"{len(body)} bytes stored raw, expected {size}")
        out[:] = np.frombuffer(body, np.uint8)
    elif kind == ZSTD:
        out[:] = np.frombuffer(decompress(body, size), np.uint8)
    elif kind == ANS:
        _from_table(body, size, out)
    else:
        raise FormatError(f"stream of kind {kind}; known are 0, 1 and 2" if kind >= 0 else "stream is missing")
    return out


def _from_table(body: memoryview, size: int, out: Bytes) -> None:
    lanes = 1 << body[0] if len(body) and body[0] <= 5 else 0
    if not lanes:
        raise FormatError(
            f"coded stream has {body[0] if len(body) else 'no'} as log2 of its lanes; at most 5 is allowed"
        )
    try:
        frequency, used = tables.parse(body[1:])
        rans.decode(body[1 + used :], size, frequency, lanes, out)
    except DamagedError as error:
        raise FormatError(f"coded stream is corrupt: {error}") from None


def unpack_all(streams: Sequence[bytes | memoryview], sizes: Sequence[int], out: Bytes) -> None:
    """Unpack streams, each of a positive size, one after the other into `out`. Raises FormatError."""
    library = native()
    if library is None:
        end = 0
        for stream, size in zip(streams, sizes, strict=True):
            unpack(stream, size, out[end : end + size])
            end += size
        return
    whole = [inflated(stream, size) for stream, size in zip(streams, sizes, strict=True)]
    address, length, _held = _places(streams if all(map(is_, whole, streams)) else whole)
    arrays = address, length, np.array(sizes, dtype=np.int64), out
    found = library.birkhoff_group_symbols(len(streams), *map(pointer, arrays))
    if found < len(streams):
        _refuse(streams[found], sizes[found])


def _places(streams: Sequence[bytes | memoryview]) -> tuple[rans.Integers, rans.Integers, object]:
    """Return the addresses and lengths of streams, and an object that keeps their memory alive."""
    length = np.array(list(map(len, streams)), dtype=np.int64)
    if isinstance(streams, Consecutive):
        whole = np.frombuffer(streams.whole, np.uint8)
        return pointer(whole) + np.cumsum(length) - length, length, whole
    held = [np.frombuffer(stream, np.uint8) for stream in streams]
    return np.array(list(map(pointer, held)), dtype=np.int64), length, held


class Plan(NamedTuple):
    """Instructions for decoding many blocks at once.

    `frequency` is uint16 [S, 256], zeros for raw streams. `rows` is int64 [B, 7]: the positions of a block's states (of
    its bytes, if raw), of its words (in bytes) and of its symbols, its number of symbols, the number of its stream, its
    lanes (0: raw), and 0.
    """

    frequency: npt.NDArray[np.uint16]
    rows: rans.Integers


def plan(
    streams: Sequence[bytes | memoryview], sizes: Sequence[int], sources: Sequence[int], targets: Sequence[int]
) -> Plan:
    """Plan the decoding of streams that are raw or coded by a table. Return their blocks, in order.

    This checks everything that can be checked without decoding: each block lies inside its stream.

    Args:
        streams: Streams of any kind but zstd (see `inflated`).
        sizes: The number of symbols of each, positive.
        sources, targets: Positions at which the decoder will find each stream, and write its symbols.

    Raises:
        FormatError: As `unpack`.
    """
    library = native()
    if library is None:
        return reference_plan(streams, sizes, sources, targets)
    address, length, _held = _places(streams)
    size, source, target = (np.array(x, np.int64) for x in (sizes, sources, targets))
    frequency = np.empty((len(streams), 256), dtype=np.uint16)
    rows = np.empty((int((-(-size // rans.BLOCK)).sum()), 7), dtype=np.int64)
    arrays = address, length, size, source, target, frequency, rows
    found = library.birkhoff_rans_plan(len(streams), *map(pointer, arrays))
    if found < 0:
        _refuse(streams[-1 - found], sizes[-1 - found])
    return Plan(frequency, rows)


def reference_plan(
    streams: Sequence[bytes | memoryview], sizes: Sequence[int], sources: Sequence[int], targets: Sequence[int]
) -> Plan:
    """`plan` in numpy."""
    frequency = np.zeros((len(streams), 256), dtype=np.uint16)
    rows = []
    for number, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
        kind, lanes = (stream[0] if len(stream) else -1), 0
        first = np.arange(0, size, rans.BLOCK)
        symbols = np.minimum(size - first, rans.BLOCK)
        begins, words = 1 + first, symbols
        if kind == ANS and len(stream) > 1 and stream[1] <= 5:
            lanes = 1 << stream[1]
            try:
                frequency[number], used = tables.parse(stream[2:])
                begins, words = rans.directory(stream[2 + used :], size, lanes)
            except DamagedError:
                _refuse(stream, size)
            begins = begins + 2 + used
        if (kind != RAW if not lanes else (words > symbols).any()) or (not lanes and len(stream) != 1 + size):
            _refuse(stream, size)
        same = np.full(len(first), 1)
        columns = (
            sources[number] + begins,
            words,
            targets[number] + first,
            symbols,
            same * number,
            same * lanes,
            0 * same,
        )
        rows.append(np.stack(columns, axis=1))
    return Plan(frequency, np.concatenate(rows).astype(np.int64))


def _refuse(stream: bytes | memoryview, size: int) -> NoReturn:
    """Raise the error that `unpack` raises for a stream."""
    unpack(stream, size)
    raise FormatError("coded stream is corrupt")


def inflated(stream: bytes | memoryview, size: int) -> bytes | memoryview:
    """Return a zstd stream as a raw one, and any other unchanged. Raises FormatError."""
    if not len(stream) or stream[0] != ZSTD:
        return stream
    return bytes([RAW]) + decompress(memoryview(stream)[1:], size)


def searched_bytes(heads: Sequence[Bytes]) -> list[int]:
    """Return the size in bytes of each head's zstd frame, computed in threads.

    The frames are dropped: `smallest` compresses again the few heads that it takes.
    """
    return in_threads(lambda head: len(_searched(head)), heads)


_OWN = threading.local()
"""One compressor per thread, because creating one takes as long as searching a probe."""


def _searched(data: Bytes) -> bytes:
    if (compressor := getattr(_OWN, "compressor", None)) is None:
        compressor = _OWN.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
    frame: bytes = compressor.compress(data.data)
    return frame


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """Return the content of a zstd frame that must hold exactly `size` bytes.

    Raises:
        FormatError: The frame declares another size, is truncated or corrupt, or is followed by other bytes.
    """
    try:
        if not size:
            return _nothing(frame)
        declared = zstandard.frame_content_size(frame)
        if declared != size:
            raise FormatError(f"compressed stream declares {declared} bytes, expected {size}")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed stream is corrupt: {error}") from None
    if len(content) != size:
        raise FormatError(f"compressed stream gave {len(content)} bytes, expected {size}")
    return content


def _nothing(frame: bytes | memoryview) -> bytes:
    if len(frame):
        raise FormatError(f"{len(frame)} bytes stored, expected an empty stream")
    return b""


def pack_elements(data: bytes, width: int) -> tuple[bytes, ...]:
    """Pack elements of `width` bytes as planes (all first bytes, ...), in one stream or one per plane if smaller."""
    planes = np.ascontiguousarray(np.frombuffer(data, dtype=np.uint8).reshape(-1, width).T).reshape(-1)
    together = [pack(planes)]
    if width == 1 or not planes.size:
        return tuple(together)
    sizes = np.full(width, planes.size // width)
    fits = tables.fit(tables.histograms(planes, sizes))
    return tuple(min(together, pack_all(planes, sizes, fits), key=lambda streams: sum(map(len, streams))))


def unpack_elements(streams: Sequence[bytes | memoryview], size: int, width: int) -> bytes:
    """Return the `size` bytes packed by `pack_elements`. Raises FormatError."""
    return unpack_elements_all([streams], [size], [width])[0].tobytes()


def unpack_elements_all(
    streams: Sequence[Sequence[bytes | memoryview]], sizes: Sequence[int], widths: Sequence[int]
) -> list[Bytes]:
    """`unpack_elements` of many arrays at once: uint8 [elements, width] of each, in its own memory.

    Raises:
        FormatError: The streams of one are not its `size` bytes. The error does not say which.
    """
    every: list[bytes | memoryview] = []
    shares: list[int] = []
    for own, size, width in zip(streams, sizes, widths, strict=True):
        if len(own) not in (1, width) or size % width:
            raise FormatError(f"{len(own)} streams of {size} bytes stored, expected 1 or {width} of whole elements")
        if size:
            every += own
            shares += [size // len(own)] * len(own)
        else:
            list(map(_nothing, own))
    planes = np.empty(sum(sizes), dtype=np.uint8)
    unpack_all(streams[0] if len(streams) == 1 and every else every, shares, planes)
    ends = list(accumulate(sizes))
    return [
        planes[end - size : end].reshape(width, -1).T.copy()
        for end, size, width in zip(ends, sizes, widths, strict=True)
    ]


def unpack_elements_1(frame: bytes | memoryview, size: int, width: int) -> bytes:
    """Return the `size` bytes of planes that version 1 stored in one frame. Raises FormatError."""
    if not size:
        return _nothing(frame)
    if size % width:
        raise FormatError(f"{size} bytes are not whole elements of {width}")
    planes = np.frombuffer(decompress(frame, size), dtype=np.uint8).reshape(width, -1)
    return planes.T.tobytes()


def pack_escapes(escapes: Escapes) -> bytes:
    """Pack escapes as int32 [3, E] in 4 byte planes: gaps between pair indices (the first from 0), then I, then J.

    Raises:
        FormatError: A gap does not fit int32.
    """
    if not len(escapes):
        return b""
    pair = escapes.pair.cpu().numpy()
    gaps = np.diff(pair, prepend=0)
    if gaps.max() > np.iinfo(np.int32).max:
        raise FormatError("escapes lie more than 2^31 pairs apart")
    rows = np.stack((gaps.astype(np.int32), escapes.i.cpu().numpy(), escapes.j.cpu().numpy()))
    elements = np.frombuffer(rows.astype("<i4").tobytes(), np.uint8).reshape(-1, 4)
    return pack(np.ascontiguousarray(elements.T).reshape(-1))


def unpack_escapes(stream: bytes | memoryview, count: int, pairs: int, *, reach: int = 1, version: int = 2) -> Escapes:
    """Return the `count` escapes of a tensor of `pairs` pairs. Symbols range over `reach` times -128..127.

    Raises:
        FormatError: An index does not increase or lies outside the tensor, or a coordinate needs no escape.
    """
    if not count:
        _nothing(stream)
        return Escapes.none()
    size = 12 * count
    data = unpack_elements_1(stream, size, 4) if version == 1 else unpack_elements((stream,), size, 4)
    rows = np.frombuffer(data, dtype="<i4").reshape(3, count)
    pair = np.cumsum(rows[0], dtype=np.int64)
    inside = (rows[1:] >= reach * LOW) & (rows[1:] < reach * (HIGH + 1))
    if rows[0, 0] < 0 or (rows[0, 1:] <= 0).any() or pair[-1] >= pairs or inside.all(axis=0).any():
        raise FormatError(f"escapes are not {count} increasing indices below {pairs} with outlying coordinates")
    return Escapes(
        pair=torch.from_numpy(pair),
        i=torch.from_numpy(rows[1].astype(np.int32)),
        j=torch.from_numpy(rows[2].astype(np.int32)),
    )


class EscapesOfAll(NamedTuple):
    """The escapes of some tensors, one after the other: pair index in the tensor, I, J, and number of the tensor."""

    pair: rans.Integers
    i: npt.NDArray[np.int32]
    j: npt.NDArray[np.int32]
    tensor: rans.Integers


def unpack_escapes_all(
    streams: Sequence[bytes | memoryview], counts: Sequence[int], pairs: Sequence[int], reaches: Sequence[int]
) -> EscapesOfAll:
    """`unpack_escapes` of many tensors. Raises FormatError."""
    for stream, count in zip(streams, counts, strict=True):
        if not count:
            _nothing(stream)
    which = [number for number, count in enumerate(counts) if count]
    held = np.array([counts[number] for number in which], dtype=np.int64)
    planes = np.empty(12 * int(held.sum()), dtype=np.uint8)
    unpack_all([streams[number] for number in which], (12 * held).tolist(), planes)

    def refuse(number: int) -> NoReturn:
        """Raise a FormatError that says why a tensor's escapes are refused."""
        unpack_escapes(streams[number], counts[number], pairs[number], reach=reaches[number])
        raise AssertionError("escapes that are refused together are valid by themselves")

    if (library := native()) is not None:
        chosen = [np.array([numbers[number] for number in which], dtype=np.int64) for numbers in (pairs, reaches)]
        pair = np.empty(len(planes) // 12, dtype=np.int64)
        i, j = np.empty((2, len(pair)), dtype=np.int32)
        arrays = planes, held, *chosen, pair, i, j
        bad = library.birkhoff_unpack_escapes(len(which), *map(pointer, arrays))
        if bad < len(which):
            refuse(which[bad])
        return EscapesOfAll(pair, i, j, np.repeat(np.array(which, dtype=np.int64), held))
    # Four planes of 3 E bytes each for each tensor: byte b of element e is at begin + b * 3 E + e.
    of = np.repeat(np.arange(len(which)), 3 * held)
    begin = 3 * (np.cumsum(held) - held)
    place = 3 * begin[of] + np.arange(len(of))
    bytes_of = [planes[place + 3 * b * held[of]] for b in range(4)]
    values = np.stack(bytes_of, axis=1).view("<i4").reshape(-1)
    own = np.repeat(np.arange(len(which)), held)
    rank = np.arange(len(own)) - (begin // 3)[own]
    at = begin[own] + rank
    gap, i, j = (values[at + k * held[own]].astype(np.int64) for k in range(3))
    pair = np.cumsum(gap)
    pair -= (pair - gap)[(begin // 3)[own]]
    reach = np.array([reaches[number] for number in which], dtype=np.int64)[own]
    inside = (i >= reach * LOW) & (i < reach * (HIGH + 1)) & (j >= reach * LOW) & (j < reach * (HIGH + 1))
    most = np.array([pairs[number] for number in which], dtype=np.int64)[own]
    tensor = np.array(which, dtype=np.int64)[own]
    for number in tensor[(gap < np.minimum(rank, 1)) | (pair >= most) | inside][:1]:
        refuse(number)
    return EscapesOfAll(pair, i.astype(np.int32), j.astype(np.int32), tensor)
