"""At rest: planes of bytes under zstd level 1, which for such planes is a Huffman coder.

The two symbol planes of a lattice tensor, or the byte planes of a lossless one, are streams of independent symbols, so
an entropy coder is all there is to gain; higher zstd levels look for repeats that are not there. Interleaved (theta as
uint16), the same bytes cost over a bit a weight more.
"""

import numpy as np
import torch
import zstandard

from birkhoff.codec.errors import FormatError
from birkhoff.codec.trajectory import HIGH, LOW, Escapes

_LEVEL = 1


def compress(data: bytes | memoryview) -> bytes:
    """One zstd frame that carries its content size; no bytes for no bytes."""
    if not len(data):
        return b""
    frame: bytes = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)
    return frame


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """The content of a frame that must hold exactly `size` bytes.

    Raises:
        FormatError: the frame declares another size, is truncated or corrupt, or is followed by other bytes.
    """
    try:
        if not size:
            return _nothing(frame)
        declared = zstandard.frame_content_size(frame)
        if declared != size:
            raise FormatError(f"compressed stream declares {declared} bytes where {size} were expected")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"compressed stream is corrupt: {error}") from None
    if len(content) != size:
        raise FormatError(f"compressed stream gave {len(content)} bytes where {size} were expected")
    return content


def _nothing(frame: bytes | memoryview) -> bytes:
    if len(frame):
        raise FormatError(f"{len(frame)} bytes where an empty stream was expected")
    return b""


def pack_bytes(data: bytes, width: int) -> bytes:
    """Elements of `width` bytes, their bytes regrouped into `width` planes (all first bytes, ...), compressed."""
    if not data:
        return b""
    planes = np.frombuffer(data, dtype=np.uint8).reshape(-1, width).T
    return compress(np.ascontiguousarray(planes).data)


def unpack_bytes(frame: bytes | memoryview, size: int, width: int) -> bytes:
    """The `size` bytes of `pack_bytes`. Raises FormatError."""
    if not size:
        return _nothing(frame)
    if size % width:
        raise FormatError(f"{size} bytes are not whole elements of {width}")
    planes = np.frombuffer(decompress(frame, size), dtype=np.uint8).reshape(width, -1)
    return planes.T.tobytes()


def pack_escapes(escapes: Escapes) -> bytes:
    """Escapes as int32 [3, E]: gaps between pair indices (the first from 0), then I, then J; byte planes of 4.

    Raises:
        FormatError: a gap that no int32 holds.
    """
    if not len(escapes):
        return b""
    pair = escapes.pair.cpu().numpy()
    gaps = np.diff(pair, prepend=0)
    if gaps.max() > np.iinfo(np.int32).max:
        raise FormatError("escapes lie more than 2^31 pairs apart")
    rows = np.stack((gaps.astype(np.int32), escapes.i.cpu().numpy(), escapes.j.cpu().numpy()))
    return pack_bytes(rows.astype("<i4").tobytes(), 4)


def unpack_escapes(frame: bytes | memoryview, count: int, pairs: int) -> Escapes:
    """The `count` escapes of a tensor of `pairs` pairs.

    Raises:
        FormatError: indices not increasing or outside the tensor, or a coordinate that needed no escape.
    """
    if not count:
        _nothing(frame)
        return Escapes.none()
    rows = np.frombuffer(unpack_bytes(frame, 12 * count, 4), dtype="<i4").reshape(3, count)
    pair = np.cumsum(rows[0], dtype=np.int64)
    inside = (rows[1:] >= LOW) & (rows[1:] <= HIGH)
    if rows[0, 0] < 0 or (rows[0, 1:] <= 0).any() or pair[-1] >= pairs or inside.all(axis=0).any():
        raise FormatError(f"escapes are not {count} increasing indices below {pairs} with outlying coordinates")
    return Escapes(
        pair=torch.from_numpy(pair),
        i=torch.from_numpy(rows[1].astype(np.int32)),
        j=torch.from_numpy(rows[2].astype(np.int32)),
    )
