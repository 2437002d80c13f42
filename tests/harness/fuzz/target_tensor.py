"""Coded tensors with hostile parameters: what a forger who knows the format would put behind a good header.

Bytes of the input choose codec, shape, element type, parameters and the content of each stream, which is compressed
here, so that the search gets past zstd and into the planes, levels, trellis, escapes and bit strings.
"""

import json
import time
from collections.abc import Iterator

import numpy as np
import torch

from birkhoff.codec import contexts, planes, rest
from birkhoff.codec import tensor as codec
from birkhoff.codec.container import (
    DATA,
    DIFFERENCE_VERSION,
    INDEX,
    VERSION_KEY,
    CodedTensor,
    LatticeParams,
    is_difference,
    parse,
    serialise,
    with_bases,
)
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.lattice import of_coordinates
from birkhoff.codec.pairs import pairs_per_row
from tests.harness.fuzz.target_container import COMPARED, SECONDS, compare, put_together, refusal

INSTRUMENT = ()
TOKENS = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x3f\x80\x00\x00", b"\x7f\x80\x00\x00")

CODECS = ("lattice", "lattice", "planes", "paper", "raw")

DIFFERENCES = 192
"""First bytes from which an input is a difference: the others choose among `CODECS`."""

DTYPES = ("F32", "F16", "F64", "BF16", "U8", "I64", "BOOL", "F8_E4M3")
MOST_WEIGHTS = 1 << 17
"""Enough for planes of several groups."""


class Choices:
    """Takes numbers and stretches of bytes from the front of an input; zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\0")

    def number(self, width: int = 1) -> int:
        """The next big-endian number."""
        return int.from_bytes(self.bytes(width))

    def content(self, size: int) -> bytes:
        """`size` bytes (one more or fewer now and then) that repeat a short stretch of the input."""
        size += {1: 1, 2: -1}.get(self.number(), 0)
        stretch = self.bytes(min(max(size, 0), self.number(2) % 4096)) or b"\0"
        return (stretch * (max(size, 0) // len(stretch) + 1))[: max(size, 0)]

    def stream(self, size: int) -> bytes:
        """A stream of such content: packed, as one of its kinds, damaged, as bytes of the input, or nothing."""
        kind = self.number()
        if kind == 1:
            return b""
        if kind == 2:
            return self.content(size)
        content = np.frombuffer(self.content(size), np.uint8)
        if kind == 3:
            return bytes([rest.RAW]) + content.tobytes()
        if kind == 4:
            return bytes([rest.ZSTD]) + rest.zstandard.ZstdCompressor().compress(content.tobytes())
        if kind == 5:
            return bytes([rest.ANS]) + self.bytes(self.number(2) % 600)
        sizes = np.array([content.size])
        fits = tables.fit(tables.histograms(content, sizes))
        if kind >= 32 or not fits.length[0]:
            return rest.pack(content)
        table = fits.data[0, : fits.length[0]].tobytes()
        (blocks,) = rans.encode(content, sizes, fits.frequency, np.array([1 << kind % 6]))
        coded = bytearray(bytes([rest.ANS, kind % 8]) + table + blocks)
        if kind >= 16:
            coded[self.number(2) % len(coded)] ^= self.number()
        return bytes(coded)


def seeds() -> Iterator[bytes]:
    """One input for every codec, and random ones."""
    generator = torch.Generator().manual_seed(1)
    for kind in (*range(len(CODECS)), DIFFERENCES):
        yield bytes([kind, 0, 0, 9, 0, 67]) + bytes(range(200))
    for size in (40, 200, 1000):
        for _ in range(4):
            yield bytes(torch.randint(256, (size,), generator=generator).tolist())
        yield bytes([255, 0, 0, 8, 0, 70, 1, *torch.randint(256, (size,), generator=generator).tolist()])


def build(choice: Choices) -> bytes:
    """The container that an input stands for: whatever its one tensor's parameters say, the rest of it is whole."""
    first, dtype = choice.number(), DTYPES[choice.number() % len(DTYPES)]
    kind = "difference" if first >= DIFFERENCES else CODECS[first % len(CODECS)]
    rows, columns = choice.number(2) % 1024, choice.number(2) % 1024
    if rows * columns > MOST_WEIGHTS:
        rows %= 97
    shape = (rows, columns) if choice.number() % 4 else (rows, 1, columns)
    params: dict[str, str] = {}
    if kind == "lattice":
        params, parts = lattice(choice, rows, columns)
    elif kind == "difference":
        params, parts = lattice(choice, rows, columns)
        params |= {"base": BASE, "times": str(choice.number() % 16 or 2), "stride": str(choice.number() % 128 or 3)}
    elif kind == "paper":
        params, parts = paper(choice, shape)
    else:
        width = codec.dtype_from_code(dtype).itemsize
        size = rows * columns * width
        apart = choice.number() % 2
        planes = [size // width] * width if apart else [size]
        parts = tuple(map(choice.stream, planes)) if kind == "planes" else (choice.content(size),)
    for key in params:
        if choice.number() == 255:
            params[key] = choice.bytes(choice.number() % 20).hex()
    words = {
        "codec": kind,
        "dtype": dtype,
        "shape": ",".join(map(str, shape)),
        "parts": ",".join(str(len(part)) for part in parts),
        **params,
    }
    text = json.dumps({"w": " ".join(f"{k}={v}" for k, v in words.items())}).encode()
    index, size = rest.zstandard.ZstdCompressor().compress(text), sum(map(len, parts))
    places = {INDEX: (0, len(index)), DATA: (len(index), len(index) + size)}
    header = {
        "__metadata__": {VERSION_KEY: str(DIFFERENCE_VERSION)},
        **{key: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for key, (a, b) in places.items()},
    }
    return put_together(b"!" + json.dumps(header).encode() + b"\n" + index + b"".join(parts))


def lattice(choice: Choices, rows: int, columns: int) -> tuple[dict[str, str], tuple[bytes, ...]]:
    """Parameters and streams of a lattice tensor: those that its levels ask for, or one more or fewer."""
    pairs = pairs_per_row(columns)
    escapes = choice.number() % 8 if choice.number() % 2 else 0
    params = {
        "path": str(choice.number() % 3),
        "columns": str(columns if choice.number() != 1 else choice.number(2)),
        "step": choice.bytes(4).hex() if choice.number() == 1 else "3d000000",
        "escapes": str(escapes),
    }
    levels = bytearray(choice.content(1 + rows + 2 * pairs))
    if choice.number() != 1 and levels:
        levels[0] = 8 + levels[0] % 5
        levels[1:] = (level % 8 for level in levels[1:])
    packed = rest.pack(np.frombuffer(bytes(levels), np.uint8)) if choice.number() != 1 else b""
    parts = [packed, *map(choice.stream, _groups(packed, rows, pairs))]
    escaped = np.frombuffer(choice.bytes(12 * escapes), np.uint8)
    parts.append(rest.pack(escaped) if choice.number() != 1 else escaped.tobytes())
    if choice.number() == 255:
        parts = parts[: choice.number() % 8]
    return params, tuple(parts)


BASE = "ab" * 32


def base(coded: CodedTensor) -> bytes:
    """A container that a difference can be to, or can not: of a tensor of its shape, now and then of another."""
    last = len(coded.parts[-1]) if coded.parts else 1  # a forged difference may have no streams
    shape = coded.shape if last % 5 else coded.shape[::-1]
    columns = 7 if len(coded.parts) % 9 == 8 else max(1, shape[-1] if shape else 1)
    rows = max(1, coded.weights // columns)
    generator = torch.Generator().manual_seed(coded.nbytes)
    i, j = (torch.randint(-128, 128, (rows, pairs_per_row(columns)), generator=generator) for _ in range(2))
    i[:: 3 + coded.nbytes % 5, ::7] *= 1 << coded.nbytes % 26
    code = of_coordinates(i.float(), j.float(), 0.25, columns)
    streams, escapes = planes.pack(code, path=0)
    params = LatticeParams(path=0, columns=columns, step=0.25, escapes=escapes)
    held = CodedTensor(name="w", codec="lattice", dtype="F32", shape=shape, params=params, parts=streams)
    return serialise([held])


def _groups(levels: bytes, rows: int, pairs: int) -> list[int]:
    if not rows or not pairs:
        return [0]
    try:
        return contexts.group_sizes(*planes.unpack_levels((levels, b"", b""), (rows, pairs)))
    except BirkhoffError:
        return [2 * rows * pairs]


def paper(choice: Choices, shape: tuple[int, ...]) -> tuple[dict[str, str], tuple[bytes, ...]]:
    """Parameters and the bit string of a tensor under the published codec."""
    per_row, bits = choice.number() % 2, choice.number() % 40
    rows = shape[0] if per_row else 1
    count = rows * pairs_per_row(shape[0] * shape[-1] // rows if rows else 0)
    params = {
        "per_row": str(per_row),
        "U": str((1225, 1600, 40)[choice.number() % 3]),
        "K": str(choice.number() % 5),
        "bits": str(bits),
        "centre": choice.bytes(8).hex() if choice.number() == 1 else "3c00000000000000",
        "far": choice.bytes(8).hex() if choice.number() == 1 else "3f0000003e000000",
    }
    return params, (choice.content((count * bits + 7) // 8),)


def check(data: bytes) -> None:
    """Build a container of one coded tensor from the bytes, and decode it."""
    blob, other = build(Choices(data)), b""
    start = time.process_time()
    try:
        (coded,) = parse(blob)
        if is_difference(coded):
            other = base(coded)
            (coded,) = with_bases([coded], lambda _: {held.name: held for held in parse(other)})
        decoded = codec.decode_tensor(coded)
    except BirkhoffError as error:
        refusal(error, data)
        return
    finally:
        assert time.process_time() - start < SECONDS, "a hang"
    if coded.weights <= COMPARED:
        compare(blob, [coded], {coded.name: decoded}, {BASE: other})
