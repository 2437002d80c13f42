"""Headers that a forger, or a fuzzer, writes: refused before anything is allocated or guessed."""

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from birkhoff.codec.container import parse
from birkhoff.codec.errors import FormatError, VersionError
from birkhoff.codec.rest import compress, decompress
from birkhoff.codec.tensor import decode_tensor

Header = dict[str, Any]


def container(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def header(entry: str, size: int, dtype: str = "U8", shape: list[int] | None = None) -> Header:
    stored = {"dtype": dtype, "shape": [size] if shape is None else shape, "data_offsets": [0, size]}
    return {"__metadata__": {"__birkhoff__": "1", "w": entry}, "w": stored}


def coded(entry: str, *parts: bytes) -> bytes:
    sizes = ",".join(str(len(part)) for part in parts)
    text = json.dumps(header(f"{entry} parts={sizes}", sum(map(len, parts)))).encode()
    return container(text, b"".join(parts))


RAW = header("codec=raw dtype=U8 shape=2 parts=2", 2)


def test_the_header_that_the_others_are_made_from_is_read() -> None:
    (tensor,) = parse(container(json.dumps(RAW).encode(), b"ab"))
    assert decode_tensor(tensor).tolist() == [97, 98]


def renamed(name: str) -> Header:
    return {"__metadata__": {"__birkhoff__": "1", name: RAW["__metadata__"]["w"]}, name: RAW["w"]}


HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "utf-16": (lambda: json.dumps(RAW).encode("utf-16-le"), "no JSON"),
    "byte order mark": (lambda: b"\xef\xbb\xbf" + json.dumps(RAW).encode(), "no JSON"),
    "lone surrogate": (lambda: json.dumps(renamed("a\ud800")).encode(), "no JSON"),
    "key twice": (lambda: json.dumps(RAW).replace('"w": "codec', '"w": "", "w": "codec').encode(), "appears twice"),
    "nested": (lambda: b"[" * 100_000, "no JSON"),
    "version 01": (lambda: json.dumps(RAW).replace('": "1"', '": "01"').encode(), "does not say its format version"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_are_not_the_pages(kind: str) -> None:
    make, message = HEADERS[kind]
    with pytest.raises(FormatError, match=message):
        parse(container(make(), b"ab"))


def test_version_zero_is_no_version_and_two_is_newer() -> None:
    for version, error in (("0", FormatError), ("2", VersionError)):
        with pytest.raises(error):
            parse(container(json.dumps(RAW).replace('": "1"', f'": "{version}"').encode(), b"ab"))


ENTRIES = {
    "few bytes for many weights": ("codec=planes dtype=F32 shape=99999,99999", 1, "1000 bytes declare 9999800001"),
    "no bytes for many weights": ("codec=lattice dtype=F32 shape=9", 0, "0 bytes declare 9 weights"),
    "long side": (f"codec=raw dtype=F32 shape=0,{10**17}", 0, "dimensions up to 1"),
    "many sides": ("codec=planes dtype=F32 shape=" + ",".join("1" * 33), 1, "33 dimensions"),
    "many streams": ("codec=lattice dtype=F32 shape=4", 129, "in 129 streams"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_declarations_out_of_bounds(kind: str) -> None:
    entry, streams, message = ENTRIES[kind]
    with pytest.raises(FormatError, match=message):
        parse(coded(entry, *[b"\0" * 1000] * streams))


def pair(first: object, second: object, data: bytes = b"abcd") -> bytes:
    """Two raw tensors of two bytes that lie where these offsets say."""
    entry = "codec=raw dtype=U8 shape=2 parts=2"
    stored = {
        name: {"dtype": "U8", "shape": [2], "data_offsets": place} for name, place in (("v", first), ("w", second))
    }
    text = json.dumps({"__metadata__": {"__birkhoff__": "1", "v": entry, "w": entry}, **stored})
    return container(text.encode(), data)


OFFSETS = {
    "overlap": (pair([0, 2], [1, 3]), "a hole or an overlap at byte 1"),
    "hole": (pair([0, 2], [3, 5], b"abcde"), "a hole or an overlap at byte 2"),
    "both in one place": (pair([0, 2], [0, 2], b"ab"), "a hole or an overlap at byte 0"),
    "negative": (pair([-2, 0], [0, 2], b"ab"), r"'v': offsets \[-2, 0\] do not lie inside 2 bytes"),
    "backwards": (pair([2, 0], [2, 4]), r"'v': offsets \[2, 0\] do not lie inside 4 bytes"),
    "past the end": (pair([0, 2], [2, 4], b"abc"), r"'w': offsets \[2, 4\] do not lie inside 3 bytes"),
    "huge": (pair([0, 2], [2, 1 << 70]), r"'w': offsets \[2, 1180591620717411303424\] do not lie inside"),
    "no numbers": (pair([0, 2], [True, 4]), r"'w': offsets \[True, 4\] do not lie"),
    "longer than its parts": (pair([0, 2], [2, 5], b"abcde"), "'w': 3 bytes stored, its parts add up to 2"),
    "bytes of nobody": (pair([0, 2], [2, 4], b"abcde"), "holds 5 bytes of data, its tensors take 4"),
}


@pytest.mark.parametrize("kind", OFFSETS)
def test_places_that_lie(kind: str) -> None:
    blob, message = OFFSETS[kind]
    with pytest.raises(FormatError, match=message):
        parse(blob)


def test_two_tensors_that_lie_where_they_should_are_read() -> None:
    assert [decode_tensor(tensor).tolist() for tensor in parse(pair([2, 4], [0, 2]))] == [[99, 100], [97, 98]]


def test_what_a_forger_wrote_is_quoted_in_one_line() -> None:
    with pytest.raises(FormatError) as caught:
        parse(container(json.dumps(header("codec=raw dtype=U8 shape=\r9\n parts=2", 2)).encode(), b"ab"))
    assert str(caught.value) == r"tensor 'w': metadata lacks or garbles '\r9\n'"


@pytest.mark.parametrize(
    ("size", "frame", "message"),
    [
        (40, compress(bytes(1 << 20)), "stream declares 1048576 bytes where 40 were expected"),
        (1 << 20, compress(bytes(40)), "stream declares 40 bytes where 1048576 were expected"),
        # A frame that does not say what it holds: a megabyte of zeros in some fifty bytes.
        (40, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20)), "declares -1 bytes"),
        (40, compress(bytes(40)) + b"more", "corrupt"),
        (40, compress(bytes(range(40)))[:-1], "corrupt"),
    ],
)
def test_ratios_that_lie(size: int, frame: bytes, message: str) -> None:
    """What a frame declares is compared with what the shape needs before anything is unpacked."""
    with pytest.raises(FormatError, match=message):
        decompress(frame, size)


LATTICE = "codec=lattice dtype={} shape={} path={} columns=4 step=3d000000 escapes=0"
PAPER = "codec=paper dtype=F32 shape={} per_row={} U=1225 K=0 bits=8 centre=3c0000003c000000 far=3c0000003c000000"
FRAME = compress(bytes(2))

TENSORS = {
    "lattice of no rows": (LATTICE.format("F32", "0,4", 0), (b"",) * 6, "not whole rows"),
    "lattice of whole numbers": (LATTICE.format("I64", "1,4", 0), (b"", b"", b"", FRAME, FRAME, b""), "holds no int64"),
    "path neither 0 nor 1": (LATTICE.format("F32", "1,4", "01"), (b"", b"", b"", FRAME, FRAME, b""), "not 0 or 1"),
    "paper without weights": (PAPER.format("0,4", 1), (b"",), "no tensor without weights"),
    "paper of rows of 2": (PAPER.format("2,4", 2), (b"\0" * 4,), "not 0 or 1"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_streams_that_no_encoder_writes(kind: str) -> None:
    entry, parts, message = TENSORS[kind]
    (tensor,) = parse(coded(entry, *parts))
    with pytest.raises(FormatError, match=message):
        decode_tensor(tensor)


def test_the_streams_that_the_others_are_made_from_are_read() -> None:
    for entry, parts in (
        (LATTICE.format("F32", "1,4", 0), (b"", b"", b"", FRAME, FRAME, b"")),
        (PAPER.format("2,4", 1), (b"\0" * 4,)),
    ):
        (tensor,) = parse(coded(entry, *parts))
        assert decode_tensor(tensor).shape == tensor.shape
