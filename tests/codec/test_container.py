"""Headers that a forger, or a fuzzer, writes: refused before anything is allocated or guessed."""

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard

from birkhoff.codec import container as containers
from birkhoff.codec.container import head_size, parse, parse_head
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.errors import FormatError, VersionError
from birkhoff.codec.rest import decompress, unpack
from birkhoff.codec.tensor import decode_tensor

Header = dict[str, Any]


def compress(data: bytes) -> bytes:
    """A frame, as version 1 has them for streams."""
    return zstandard.ZstdCompressor(level=1).compress(data)


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
    "utf-16": (lambda: json.dumps(RAW).encode("utf-16-le"), "not JSON"),
    "byte order mark": (lambda: b"\xef\xbb\xbf" + json.dumps(RAW).encode(), "not JSON"),
    "lone surrogate": (lambda: json.dumps(renamed("a\ud800")).encode(), "not JSON"),
    "key twice": (lambda: json.dumps(RAW).replace('"w": "codec', '"w": "", "w": "codec').encode(), "appears twice"),
    "nested": (lambda: b"[" * 100_000, "not JSON"),
    "version 01": (lambda: json.dumps(RAW).replace('": "1"', '": "01"').encode(), "does not say its format version"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_are_not_the_pages(kind: str) -> None:
    make, message = HEADERS[kind]
    with pytest.raises(FormatError, match=message):
        parse(container(make(), b"ab"))


def test_version_zero_is_no_version_and_four_is_newer() -> None:
    for version, error in (("0", FormatError), ("4", VersionError)):
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
    "negative": (pair([-2, 0], [0, 2], b"ab"), r"'v': offsets \[-2, 0\] are not positions"),
    "backwards": (pair([2, 0], [2, 4]), r"'v': offsets \[2, 0\] are not positions"),
    "past the end": (pair([0, 2], [2, 4], b"abc"), r"has \d+ bytes, its header declares \d+"),
    "huge": (pair([0, 2], [2, 1 << 70]), r"'w': offsets \[2, 1180591620717411303424\] are not positions"),
    "no numbers": (pair([0, 2], [True, 4]), r"'w': offsets \[True, 4\] are not positions"),
    "longer than its parts": (pair([0, 2], [2, 5], b"abcde"), "'w': 3 bytes stored, its parts add up to 2"),
    "bytes of nobody": (pair([0, 2], [2, 4], b"abcde"), r"has \d+ bytes, its header declares \d+"),
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
        (40, compress(bytes(1 << 20)), "stream declares 1048576 bytes, expected 40"),
        (1 << 20, compress(bytes(40)), "stream declares 40 bytes, expected 1048576"),
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
    with pytest.raises(FormatError, match=message):
        decode_tensor(*parse(coded(entry, *parts)))


def test_the_streams_that_the_others_are_made_from_are_read() -> None:
    for entry, parts in (
        (LATTICE.format("F32", "1,4", 0), (b"", b"", b"", FRAME, FRAME, b"")),
        (PAPER.format("2,4", 1), (b"\0" * 4,)),
    ):
        (tensor,) = parse(coded(entry, *parts))
        assert decode_tensor(tensor).shape == tensor.shape


def two(index: bytes, streams: bytes = b"", begin: int = 0, **other: object) -> bytes:
    """A container of version 2 with this packed index."""
    end = begin + len(index)
    stored: Header = {
        "__metadata__": {"__birkhoff__": "2"},
        "index": {"dtype": "U8", "shape": [len(index)], "data_offsets": [begin, end]},
        "data": {"dtype": "U8", "shape": [len(streams)], "data_offsets": [end, end + len(streams)]},
        **other,
    }
    return container(json.dumps(stored).encode(), index + streams)


def packed(entries: object, *, declare: bool = True) -> bytes:
    text = json.dumps(entries).encode()
    return zstandard.ZstdCompressor(write_content_size=declare).compress(text)


ENTRY = {"w": "codec=raw dtype=U8 shape=2 parts=2"}
AB = packed(ENTRY)
BOMB = zstandard.ZstdCompressor(level=19).compress(b'{"w":"' + b" " * (32 << 20) + b'"}')

INDEXES = {
    "bomb": (two(BOMB), r"index declares 33554440 bytes in \d+; 2 to \d+ are allowed"),
    "no content size": (two(packed(ENTRY, declare=False), b"ab"), "index declares -1 bytes"),
    "empty": (two(b""), "index declares -1 bytes"),
    "more behind": (two(AB + b"!", b"ab"), "index is corrupt"),
    "truncated": (two(AB[:-1], b"ab"), "index is corrupt"),
    "no frame": (two(b"not zstd", b"ab"), "index is corrupt"),
    "no JSON": (two(zstandard.ZstdCompressor().compress(b"{]"), b"ab"), "index is not JSON"),
    "a list": (two(packed([1]), b"ab"), "not an object of strings"),
    "numbers": (two(packed({"w": 2}), b"ab"), "not an object of strings"),
    "lone surrogate": (two(packed({"\ud800": ENTRY["w"]}), b"ab"), "not JSON"),
    "begins late": (two(AB, b"ab", begin=1), "begin at bytes 1 and"),
    "too few streams' bytes": (two(AB, b"abc"), "holds 3 bytes of data, its tensors take 2"),
    "a third stored tensor": (two(AB, b"ab", x={}), "version 2 has 'index' and 'data' alone"),
    "data missing": (two(AB, b"ab", data=None), "offsets None are not positions"),
    "other metadata": (two(AB, b"ab", __metadata__={"__birkhoff__": "2", "x": "y"}), "alone"),
    "of another type": (
        two(AB, b"ab", data={"dtype": "I8", "shape": [2], "data_offsets": [len(AB), len(AB) + 2]}),
        "'data': stored as",
    ),
    "a true shape": (
        two(AB, b"a", data={"dtype": "U8", "shape": [True], "data_offsets": [len(AB), len(AB) + 1]}),
        "'data': stored as",
    ),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes_that_no_encoder_writes(kind: str) -> None:
    blob, message = INDEXES[kind]
    with pytest.raises(FormatError, match=message):
        parse(blob)


def test_the_index_that_the_others_are_made_from_is_read_from_the_containers_start_alone() -> None:
    blob = two(AB, b"ab")
    (tensor,) = parse(blob)
    assert decode_tensor(tensor).tolist() == [97, 98]
    size = head_size(blob[:8])
    assert head_size(blob[:size]) == len(blob) - 2
    head = parse_head(blob[:-2])
    assert (head.version, head.size, head.begins, head.parts) == (2, len(blob), (len(blob) - 2,), ((2,),))


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_is_not_parsed_again_unless_the_bytes_are_others(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [container(json.dumps(RAW).encode(), b"ab"), two(AB, b"ab")]
    blob, other = blobs if version == 1 else reversed(blobs)
    head, wanted = parse_head(blob), parse(blob)
    assert blob.startswith(head.text)
    parsed = []
    monkeypatch.setattr(containers, "parse_head", lambda start: parsed.append(start) or parse_head(start))
    assert parse(blob, head) == wanted
    assert not parsed
    assert parse(other, head) == parse(other)
    assert len(parsed) == 2
    with pytest.raises(FormatError, match="its header declares"):
        parse(blob + b"x", head)


def ans(table: str, *rest: bytes) -> bytes:
    return b"\x02" + bytes.fromhex(table) + b"".join(rest)


STATE = (1 << 16).to_bytes(4, "little")
EVEN = "00 00 01 08 01"
"""log2 N = 0, then the table of two equally frequent bytes 0 and 1."""

CODED = {
    "unknown kind": (b"\x03ab", "stream of kind 3"),
    "nothing": (b"", "stream is missing"),
    "raw, too long": (b"\x00" + bytes(9), "9 bytes stored raw, expected 8"),
    "no lanes": (b"\x02", "has no as log2"),
    "64 lanes": (b"\x02\x06" + bytes(300), "has 6 as log2"),
    "no table": (ans("00"), "truncated|damaged"),
    "values beyond 255": (ans("00 ff 01 08 01", STATE), "out of bounds|damaged"),
    "r of 5": (ans("00 00 01 0d 01", STATE), "out of bounds|damaged"),
    "k of 8": (ans("00 00 01 40 01", STATE), "out of bounds|damaged"),
    "endless ones": (ans("00 00 01 08", b"\xff" * 40), "damaged|out of bounds|truncated"),
    "a field below 0": (ans("00 00 01 00 01", STATE), "out of bounds|damaged"),
    "one value": (ans("00 00 00 08 01", STATE), "fewer than two|damaged"),
    "no value": (ans("00 00 01 00 00", STATE), "fewer than two|damaged"),
    "bits behind the table": (ans("00 00 01 08 41", STATE), "not filled|damaged"),
    "no states": (ans(EVEN), "truncated|damaged"),
    "a state below 2^16": (ans(EVEN, b"\0\0\0\0"), "below|damaged"),
    "half a word": (ans(EVEN, STATE, b"\0"), "truncated|damaged"),
    "words to spare": (ans(EVEN, STATE, b"\0" * 40), "should|damaged"),
    "another end": (ans(EVEN, b"\xff\xff\xff\xff"), "should|damaged"),
}


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("native", [True, False])
def test_streams_that_lie(kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(tables, "native", lambda: None)
        monkeypatch.setattr(rans, "native", lambda: None)
    stream, message = CODED[kind]
    with pytest.raises(FormatError, match=message):
        unpack(stream, 8)


def test_a_directory_of_blocks_that_lies_is_refused() -> None:
    data = np.tile(np.arange(2, dtype=np.uint8), 100_000)
    table = tables.reference_fit(np.bincount(data, minlength=256))
    assert table is not None
    (good,) = rans.encode(data, np.array([data.size]), table.frequency[None], np.array([4]))
    for words in (0, 1, (1 << 32) - 1, int.from_bytes(good[:4], "little") + 1):
        bad = words.to_bytes(4, "little") + good[4:]
        for decode in (rans.decode, rans.reference_decode):
            with pytest.raises(tables.DamagedError):
                decode(bad, len(data), table.frequency, 4)
