"""The artifact container: a safetensors file whose index says how each tensor is coded (see FORMAT.md).

Every tensor of the source has one entry in the index, in the source's order. Version 2 stores the index as one zstd
frame, followed by all streams in the same order. Version 1, which is no longer written but always readable, has the
entries in the file's metadata and a stored tensor for each. Version 3 is version 2 plus differences to tensors of other
containers; only containers with differences use it.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import prod

import zstandard

from birkhoff.codec import strict_json
from birkhoff.codec.dtype_names import width_of_code
from birkhoff.codec.errors import BaseError, FormatError, VersionError

FORMAT_VERSION = 2
"""Version of containers without differences, and of the streams in all containers."""

DIFFERENCE_VERSION = 3
"""Version of containers with differences, which readers of version 2 must refuse. We read every version up to this
one."""

VERSION_KEY = "__birkhoff__"

MAX_HEADER_BYTES = 64 << 20
"""Largest text of the entries in bytes, as stored (version 1) or unpacked (version 2)."""

MAX_INDEX_EXPANSION = 1 << 10
"""Most bytes of entries per byte of a packed index."""

INDEX, DATA = "index", "data"
"""Names of version 2's stored tensors."""

_INDEX_LEVEL = 19

MAX_WEIGHTS = 1 << 36
"""Most weights that one tensor may declare, checked before any allocation."""

MAX_EXPANSION = 1 << 16
"""Most weights per stored byte, which keeps few bytes from requiring much memory. zstd makes at most 2^17 bytes from
four."""

LOSSLESS_CODECS = ("raw", "planes")
"""Lossless codecs."""

MAX_DIMENSIONS = 32
MAX_PARTS = 128

MAX_TIMES, MAX_STRIDE = 15, 127
"""Largest factors of a difference. With these, sums of products with bytes fit in 16 bits."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_NUMBERS = re.compile(r"[0-9]{1,18}+(?:,[0-9]{1,18}+)*+")
"""Without a way back, for which `re` would need 50 bytes for each number of a hostile list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeParams:
    """Parameters of codec `lattice` besides shape and dtype."""

    path: int
    """Whether the symbols are steps of trellis paths: 0 no, 1 through the rows, 2 down the columns (since version
    2)."""
    columns: int
    """Columns of the matrix that the weights fill row by row."""
    step: float
    """Step of the lattice, in the unit of the weights; a float32."""
    escapes: int
    """Number of pairs whose coordinates are stored in the escape stream."""

    @classmethod
    def parse(cls, tokens: Mapping[str, str], version: int = FORMAT_VERSION) -> "LatticeParams":
        """Parse the tokens of an entry. Raises FormatError."""
        (step,) = _floats(tokens, "step", 1)
        if step <= 0:
            raise FormatError(f"parameter step is {step}, not a positive number")
        return cls(
            path=_one_of(tokens, "path", ("0", "1") if version == 1 else ("0", "1", "2")),
            columns=_number(tokens, "columns"),
            step=step,
            escapes=_number(tokens, "escapes"),
        )

    def tokens(self) -> dict[str, str]:
        """Return the tokens of an entry."""
        return {
            "path": str(int(self.path)),
            "columns": str(self.columns),
            "step": _hex(self.step),
            "escapes": str(self.escapes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceParams(LatticeParams):
    """Parameters of codec `difference`: coordinates are `times` * the base's + `stride` * those of the streams."""

    base: str
    """SHA-256 of the container that holds the base, a `lattice` tensor of the same name and shape."""
    times: int
    stride: int

    @classmethod
    def parse(cls, tokens: Mapping[str, str], version: int = FORMAT_VERSION) -> "DifferenceParams":
        """Parse the tokens of an entry. Raises FormatError."""
        own = LatticeParams.parse(tokens, version)
        base, times, stride = tokens.get("base", ""), _number(tokens, "times"), _number(tokens, "stride")
        if not _SHA256.fullmatch(base):
            raise FormatError(f"parameter base is {base[:80]!r}, not a sha256 in hex")
        if not (1 <= times <= MAX_TIMES and 1 <= stride <= MAX_STRIDE):
            raise FormatError(
                f"parameters times and stride are {times} and {stride}; 1 to {MAX_TIMES} and 1 to {MAX_STRIDE} are "
                "allowed"
            )
        return cls(
            path=own.path,
            columns=own.columns,
            step=own.step,
            escapes=own.escapes,
            base=base,
            times=times,
            stride=stride,
        )

    def tokens(self) -> dict[str, str]:
        """Return the tokens of an entry."""
        own = LatticeParams.tokens(self)
        return {**own, "base": self.base, "times": str(self.times), "stride": str(self.stride)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperParams:
    """Parameters of codec `paper`, named as in the published code; points are float32."""

    per_row: bool
    """Whether pairs do not cross rows."""
    U: int
    K: int
    bits: int
    """Bits per code."""
    centre: tuple[float, float]
    far: tuple[float, float]

    @classmethod
    def parse(cls, tokens: Mapping[str, str], version: int = FORMAT_VERSION) -> "PaperParams":  # noqa: ARG003
        """Parse the tokens of an entry. Raises FormatError."""
        (x, y), (far_x, far_y) = (_floats(tokens, key, 2) for key in ("centre", "far"))
        return cls(
            per_row=bool(_one_of(tokens, "per_row", ("0", "1"))),
            U=_number(tokens, "U"),
            K=_number(tokens, "K"),
            bits=_number(tokens, "bits"),
            centre=(x, y),
            far=(far_x, far_y),
        )

    def tokens(self) -> dict[str, str]:
        """Return the tokens of an entry."""
        return {
            "per_row": str(int(self.per_row)),
            "U": str(self.U),
            "K": str(self.K),
            "bits": str(self.bits),
            "centre": _hex(*self.centre),
            "far": _hex(*self.far),
        }


Params = LatticeParams | PaperParams | None
"""A codec's parameters besides shape and dtype; None for codecs without parameters."""

_PARAMS: dict[str, Callable[[Mapping[str, str], int], Params]] = {
    "lattice": LatticeParams.parse,
    "difference": DifferenceParams.parse,
    "raw": lambda _tokens, _version: None,
    "planes": lambda _tokens, _version: None,
    "paper": PaperParams.parse,
}
"""Every codec, and the parser of its parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The encoder's claims about a tensor. Decoding ignores them. A claim that is not a number becomes NaN, which
    checks refuse."""

    sqnr_db: float | None = None
    max_abs: float | None = None
    """Greatest error of a weight."""
    mean_abs: float | None = None
    """Mean error of a weight."""
    target_db: float | None = None
    """The SQNR that was required, if the profile alone does not determine it."""
    reason: str | None = None
    """Why it is lossless although its header allows coding: a key of `profiles.FALLBACKS`."""

    @classmethod
    def parse(cls, tokens: Mapping[str, str]) -> "Claims":
        """Parse the tokens of an entry."""
        return cls(**{key: _claim(tokens, key) for key in _CLAIM_FORMATS}, reason=tokens.get("reason"))

    def tokens(self) -> dict[str, str]:
        """Return the tokens of an entry, rounded, without missing claims."""
        numbers = {key: getattr(self, key) for key in _CLAIM_FORMATS}
        said = {key: format(value, _CLAIM_FORMATS[key]) for key, value in numbers.items() if value is not None}
        return said if self.reason is None else {**said, "reason": self.reason}

    def rounded(self) -> "Claims":
        """Return the claims as they will be read back."""
        return Claims.parse(self.tokens())


_CLAIM_FORMATS = {"sqnr_db": ".3f", "max_abs": ".4g", "mean_abs": ".4g", "target_db": ".3f"}
"""Numeric claims with their formats, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The metadata of one tensor, except for the lengths of its streams.

    `codec` names the coding, `dtype` is a safetensors code, `shape` is the original one.
    """

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    params: Params = None
    claims: Claims = field(default_factory=Claims)
    version: int = FORMAT_VERSION
    """The format version of its streams."""

    @property
    def weights(self) -> int:
        """Number of weights of the original tensor."""
        return prod(self.shape)

    @property
    def lossless(self) -> bool:
        """Whether it decodes to exactly the original bits."""
        return self.codec in LOSSLESS_CODECS


class Consecutive(tuple[memoryview, ...]):
    """Streams that are adjacent in one piece of memory, `whole`."""

    whole: memoryview

    @classmethod
    def cut(cls, whole: memoryview, sizes: Iterable[int]) -> "Consecutive":
        """Cut a piece of memory into streams of these sizes, whose sum is its length."""
        ends = list(accumulate(sizes, initial=0))
        found = cls(whole[begin:end] for begin, end in pairwise(ends))
        found.whole = whole
        return found

    def inner(self) -> "Consecutive":
        """Return all streams but the first and the last."""
        sizes = list(map(len, self))
        return Consecutive.cut(self.whole[sizes[0] : len(self.whole) - sizes[-1]], sizes[1:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor(Entry):
    """One stored tensor: its entry, and its streams as `parts`."""

    parts: tuple[bytes | memoryview, ...]
    base: "CodedTensor | None" = field(default=None, compare=False, repr=False)
    """For a difference, the base tensor, once `with_bases` has found it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the streams, without the entry in the header."""
        return sum(len(part) for part in self.parts)

    def entry(self) -> str:
        """The metadata value: `key=value` tokens separated by single spaces."""
        fields = {
            "codec": self.codec,
            "dtype": self.dtype,
            "shape": ",".join(map(str, self.shape)),
            "parts": ",".join(str(len(part)) for part in self.parts),
            **(self.params.tokens() if self.params else {}),
            **self.claims.tokens(),
        }
        return " ".join(f"{key}={value}" for key, value in fields.items())


def serialise(tensors: list[CodedTensor]) -> bytes:
    """Return a container of `tensors`. Equal tensors give equal bytes.

    Raises:
        FormatError: Two tensors share a name, or one's streams are of an older version (see `tensor.recode`).
    """
    entries: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in entries:
            raise FormatError(f"tensor name {tensor.name!r} appears twice")
        if tensor.version != FORMAT_VERSION:
            raise FormatError(f"tensor {tensor.name!r} is of format version {tensor.version}: recode it first")
        entries[tensor.name] = tensor.entry()
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    index = zstandard.ZstdCompressor(level=_INDEX_LEVEL, write_content_size=True).compress(text)
    end = len(index) + sum(tensor.nbytes for tensor in tensors)
    header = {
        "__metadata__": {VERSION_KEY: str(DIFFERENCE_VERSION if any(map(is_difference, tensors)) else FORMAT_VERSION)},
        INDEX: _stored_bytes(0, len(index)),
        DATA: _stored_bytes(len(index), end),
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    streams = (part for tensor in tensors for part in tensor.parts)
    return b"".join((struct.pack("<Q", len(head)), head, index, *streams))


def is_difference(entry: Entry) -> bool:
    """Return whether a tensor is a difference to one of another container."""
    return isinstance(entry.params, DifferenceParams)


def bases_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the SHA-256 of the containers that differences among the entries refer to, sorted, without repeats."""
    params = (entry.params for entry in entries)
    return tuple(sorted({held.base for held in params if isinstance(held, DifferenceParams)}))


def with_bases(
    tensors: Iterable[CodedTensor], tensors_of: Callable[[str], Mapping[str, CodedTensor]]
) -> list[CodedTensor]:
    """Return the tensors of a container with their bases, ready to decode.

    Args:
        tensors: As `parse` returns them.
        tensors_of: Returns the tensors, by name, of the container with a SHA-256. It must check that digest.

    Raises:
        BaseError: A base is not a `lattice` tensor of that name, shape and rows.
        Exception: Whatever `tensors_of` raises.
    """
    return [_with_base(tensor, tensors_of) if is_difference(tensor) else tensor for tensor in tensors]


def _with_base(tensor: CodedTensor, tensors_of: Callable[[str], Mapping[str, CodedTensor]]) -> CodedTensor:
    params = tensor.params
    assert isinstance(params, DifferenceParams)
    base = tensors_of(params.base).get(tensor.name)
    if base is None:
        raise BaseError(f"tensor {tensor.name!r}: its base, container {params.base}, holds no tensor of that name")
    if not fits(base, tensor.shape, params.columns):
        raise BaseError(
            f"tensor {tensor.name!r}: its base in container {params.base} is {base.codec} {list(base.shape)}, expected "
            f"lattice {list(tensor.shape)} in rows of {params.columns}"
        )
    return replace(tensor, base=base)


def fits(base: Entry, shape: tuple[int, ...], columns: int) -> bool:
    """Return whether a stored tensor can be the base of one with this shape and columns. A difference cannot."""
    params = base.params
    return type(params) is LatticeParams and (base.shape, params.columns) == (shape, columns)


def _stored_bytes(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What precedes a container's streams: its tensors in the source's order, with the lengths of their streams.

    `begins` are the offsets of the tensors' streams from the start of the file, `size` is the size of the container.
    `text` are the bytes that it was parsed from.
    """

    version: int
    entries: tuple[Entry, ...]
    parts: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    size: int
    text: bytes

    def tensor(self, number: int, blob: memoryview) -> CodedTensor:
        """Return a stored tensor. Its streams are views of the container `blob`."""
        entry, at, sizes = self.entries[number], self.begins[number], self.parts[number]
        return CodedTensor(
            name=entry.name,
            codec=entry.codec,
            dtype=entry.dtype,
            shape=entry.shape,
            params=entry.params,
            claims=entry.claims,
            version=entry.version,
            parts=Consecutive.cut(blob[at : at + sum(sizes)], sizes),
        )


def parse(blob: bytes | memoryview, head: Head | None = None) -> list[CodedTensor]:
    """Return the tensors of a container, in the source's order. `parts` are views of `blob`, without copies.

    `head`, if the blob begins with its bytes, is not parsed again.

    Raises:
        FormatError: Not a container of this format: truncated, mutated or forged.
        VersionError: Written in a version that this code does not read.
    """
    view = memoryview(blob)
    if head is None or view[: len(head.text)] != head.text:
        head = parse_head(view)
    if head.size != len(view):
        raise FormatError(f"container has {len(view)} bytes, its header declares {head.size}")
    return [head.tensor(number, view) for number in range(len(head.entries))]


def _json_end(start: bytes | memoryview) -> int:
    """Return the bytes of the length field and the JSON after it. Raises FormatError."""
    if len(start) < 8:
        raise FormatError(f"container is truncated: {len(start)} bytes are too few for a header")
    size = int(struct.unpack("<Q", start[:8])[0])
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise FormatError(f"container header declares {size} bytes; 2 to {MAX_HEADER_BYTES} are allowed")
    return 8 + size


def head_size(start: bytes) -> int:
    """Return how many leading bytes `parse_head` needs, as far as the given ones (at least 8) tell.

    If the result is more than given, call again with that many bytes: version 2 stores the number in its header.

    Raises:
        FormatError: Not the start of a container.
    """
    size = _json_end(start)
    if len(start) < size:
        return size
    header, version = _parse_json(start[:size])
    return size if version == 1 else size + _extent(header, INDEX)[1]


def parse_head(head: bytes | memoryview) -> Head:
    """Parse what precedes the streams, from at least the first `head_size` bytes.

    Raises:
        FormatError: Not a header of this format.
        VersionError: Written in a version that this code does not read.
    """
    size = _json_end(head)
    if len(head) < size:
        raise FormatError(f"container is truncated: {len(head)} bytes of a header of {size}")
    header, version = _parse_json(bytes(head[:size]))
    return _head_1(header, head[:size]) if version == 1 else _head_2(header, head, size, version)


def _parse_json(text: bytes) -> tuple[dict[str, object], int]:
    """Parse (header, version) from a length field and the JSON after it."""
    try:
        header = strict_json.parse(text[8:])
        "".join(header if isinstance(header, dict) else ()).encode()  # refuses lone surrogates, which JSON allows
    except (ValueError, RecursionError) as error:
        raise FormatError(f"container header is not JSON: {error}") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("container header has no metadata of strings: not a birkhoff container")
    version = metadata.get(VERSION_KEY)
    if version is None or not (version.isascii() and version.isdigit() and len(version) < 10 and version[0] != "0"):
        raise FormatError(f"container does not say its format version: {VERSION_KEY} is {version!r}")
    if not 1 <= int(version) <= DIFFERENCE_VERSION:
        raise VersionError(
            f"container has format version {version}; this code reads 1 to {DIFFERENCE_VERSION}: "
            "upgrade birkhoff-compression to read it"
        )
    return header, int(version)


def _head_2(header: dict[str, object], head: bytes | memoryview, start: int, version: int) -> Head:
    """Parse versions 2 and 3: an index and the streams as two stored tensors. The JSON ends at byte `start`."""
    metadata = header.pop("__metadata__")
    if header.keys() != {INDEX, DATA} or metadata != {VERSION_KEY: str(version)}:
        raise FormatError(f"container holds {sorted(header)[:3]!r}, version {version} has {INDEX!r} and {DATA!r} alone")
    (begin, end), (data, last) = _extent(header, INDEX), _extent(header, DATA)
    if begin != 0 or data != end:
        raise FormatError(f"container's index and data begin at bytes {begin} and {data}, expected 0 and {end}")
    text = bytes(head[: start + end])
    texts = _unpack_index(text[start:])
    read = [parse_entry(name, text, version=version) for name, text in texts.items()]
    ends = list(accumulate((sum(parts) for _, parts in read), initial=start + data))
    if ends[-1] != start + last:
        raise FormatError(f"container holds {last - data} bytes of data, its tensors take {ends[-1] - start - data}")
    return Head(
        version=version,
        entries=tuple(entry for entry, _ in read),
        parts=tuple(parts for _, parts in read),
        begins=tuple(ends[:-1]),
        size=start + last,
        text=text,
    )


def _extent(header: dict[str, object], key: str) -> tuple[int, int]:
    """Return the range of one of version 2's stored tensors. Raises FormatError."""
    stored = header.get(key)
    offsets = stored.get("data_offsets") if isinstance(stored, dict) else None
    begin, end = _offsets(key, offsets, _MAX_FILE_BYTES)
    if stored != _stored_bytes(begin, end) or any(type(size) is not int for size in stored["shape"]):
        raise FormatError(f"tensor {key!r}: stored as {stored!r}, expected {_stored_bytes(begin, end)!r}")
    return begin, end


_MAX_FILE_BYTES = 1 << 62


def _unpack_index(frame: bytes) -> dict[str, str]:
    try:
        size = zstandard.frame_content_size(frame) if len(frame) else -1
        most = min(MAX_HEADER_BYTES, MAX_INDEX_EXPANSION * len(frame))
        if not 2 <= size <= most:
            raise FormatError(f"container's index declares {size} bytes in {len(frame)}; 2 to {most} are allowed")
        text: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        if len(text) != size:
            raise FormatError(f"container's index has {len(text)} bytes, but declares {size}")
        entries = strict_json.parse(text)
        "".join(entries if isinstance(entries, dict) else ()).encode()
    except zstandard.ZstdError as error:
        raise FormatError(f"container's index is corrupt: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"container's index is not JSON: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise FormatError("container's index is not an object of strings")
    return entries


def _head_1(header: dict[str, object], head: bytes | memoryview) -> Head:
    """Parse version 1: an entry of the metadata and a stored tensor for each tensor."""
    start = len(head)
    metadata: dict[str, str] = header.pop("__metadata__")  # type: ignore[assignment]
    del metadata[VERSION_KEY]
    if header.keys() != metadata.keys():
        odd = sorted(header.keys() ^ metadata.keys())[:3]
        raise FormatError(f"container's tensors and its metadata disagree: {', '.join(map(repr, odd))}")
    read = [(*parse_entry(name, text, version=1), header[name]) for name, text in metadata.items()]
    spans = [_span_1(entry, sizes, stored) for entry, sizes, stored in read]
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise FormatError(f"container data has a hole or an overlap at byte {min(begin, position)}")
        position = end
    return Head(
        version=1,
        entries=tuple(entry for entry, _, _ in read),
        parts=tuple(sizes for _, sizes, _ in read),
        begins=tuple(start + begin for begin, _ in spans),
        size=start + position,
        text=bytes(head),
    )


def _span_1(entry: Entry, sizes: tuple[int, ...], stored: object) -> tuple[int, int]:
    wanted = {
        "dtype": entry.dtype if entry.codec == "raw" else "U8",
        "shape": list(entry.shape) if entry.codec == "raw" else [sum(sizes)],
    }
    if not isinstance(stored, dict) or {key: stored.get(key) for key in wanted} != wanted or len(stored) != 3:
        raise FormatError(f"tensor {entry.name!r}: stored as {stored!r}, expected {wanted!r} by its metadata")
    begin, end = _offsets(entry.name, stored.get("data_offsets"), _MAX_FILE_BYTES)
    if end - begin != sum(sizes):
        raise FormatError(f"tensor {entry.name!r}: {end - begin} bytes stored, its parts add up to {sum(sizes)}")
    return begin, end


def _check_bounds(name: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Raise FormatError for more weights than the bytes can hold, and for shapes that no real tensor has."""
    weights, most = prod(shape), min(MAX_WEIGHTS, MAX_EXPANSION * sum(sizes))
    if weights > most:
        raise FormatError(f"tensor {name!r}: {sum(sizes)} bytes declare {weights} weights; at most {most} are allowed")
    if len(shape) > MAX_DIMENSIONS or len(sizes) > MAX_PARTS or max(shape, default=0) > MAX_WEIGHTS:
        raise FormatError(
            f"tensor {name!r}: {len(shape)} dimensions up to {max(shape, default=0)} in {len(sizes)} streams; at most "
            f"{MAX_DIMENSIONS} dimensions up to {MAX_WEIGHTS} in {MAX_PARTS} streams are allowed"
        )


def parse_entry(name: str, text: str, *, version: int = DIFFERENCE_VERSION) -> tuple[Entry, tuple[int, ...]]:
    """Parse an entry of the index, and the byte lengths of its streams. Raises FormatError."""
    try:
        tokens = strict_json.unique_keys([token.split("=", 1) for token in text.split(" ")])
    except ValueError:
        raise FormatError(f"tensor {name!r}: metadata {text[:80]!r} is not a list of key=value") from None
    try:
        codec, dtype = tokens["codec"], tokens["dtype"]
        shape, sizes = _numbers(tokens["shape"]), _numbers(tokens["parts"])
    except (KeyError, ValueError) as error:
        raise FormatError(f"tensor {name!r}: metadata lacks or garbles {error}") from None
    width_of_code(dtype)
    _check_bounds(name, shape, sizes)
    if codec not in _PARAMS or (codec == "difference" and version < DIFFERENCE_VERSION):
        known = [key for key in _PARAMS if key != "difference" or version >= DIFFERENCE_VERSION]
        raise FormatError(f"tensor {name!r}: unknown codec {codec!r}; known: {', '.join(known)}")
    try:
        params = _PARAMS[codec](tokens, version)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from None
    return Entry(
        name=name,
        codec=codec,
        dtype=dtype,
        shape=shape,
        params=params,
        claims=Claims.parse(tokens),
        version=min(version, FORMAT_VERSION),
    ), sizes


def _numbers(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    if not _NUMBERS.fullmatch(text):
        raise ValueError(repr(text[:80]))  # quoted, as the text is untrusted
    return tuple(map(int, text.split(",")))


def _offsets(name: str, offsets: object, size: int) -> tuple[int, int]:
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        begin, end = offsets
        if 0 <= begin <= end <= size:
            return begin, end
    raise FormatError(f"tensor {name!r}: offsets {offsets!r} are not positions in a file")


def _number(tokens: Mapping[str, str], key: str) -> int:
    text = tokens.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise FormatError(f"parameter {key} is {text!r}, not a number")
    return int(text)


def _one_of(tokens: Mapping[str, str], key: str, allowed: tuple[str, ...]) -> int:
    text = tokens.get(key, "")
    if text not in allowed:
        raise FormatError(f"parameter {key} is {text!r}, not {', '.join(allowed[:-1])} or {allowed[-1]}")
    return int(text)


def _hex(*values: float) -> str:
    return struct.pack(f">{len(values)}f", *values).hex()


def _floats(tokens: Mapping[str, str], key: str, count: int) -> tuple[float, ...]:
    try:
        values: tuple[float, ...] = struct.unpack(f">{count}f", bytes.fromhex(tokens.get(key, "")))
    except (ValueError, struct.error):
        raise FormatError(f"parameter {key} is {tokens.get(key)!r}, not {count} float32 in hex") from None
    if not all(map(math.isfinite, values)):
        raise FormatError(f"parameter {key} is {values}, not finite")
    return values


def _claim(tokens: Mapping[str, str], key: str) -> float | None:
    try:
        return float(tokens[key]) if key in tokens else None
    except ValueError:
        return math.nan
