"""The artifact container: a safetensors file whose metadata says how each tensor is coded (see FORMAT.md).

Every tensor of the source has one entry in the file's metadata, in the source's order, and one stored tensor of the
same name: its coded streams as bytes (U8), or for `raw` the tensor itself, which any safetensors reader can open.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from birkhoff.codec.dtypes import dtype_from_code
from birkhoff.codec.errors import FormatError, VersionError

FORMAT_VERSION = 1
VERSION_KEY = "__birkhoff__"

MAX_HEADER_BYTES = 64 << 20
MAX_WEIGHTS = 1 << 36
"""Bound on the weights that one tensor may declare: checked before anything is allocated."""

MAX_EXPANSION = 1 << 16
"""Bound on the weights that a stored byte stands for, so that few bytes cannot ask for much memory; zstd makes at most
2^17 bytes of four."""

LOSSLESS_CODECS = ("raw", "planes")
"""Codecs that give every bit back."""

MAX_DIMENSIONS = 32
MAX_PARTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """One tensor as it is stored.

    `codec` names the coding, `dtype` is a safetensors code, `shape` the original one, `params` what the codec needs
    besides, as text without spaces, and `parts` its streams.
    """

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    params: Mapping[str, str]
    parts: tuple[bytes | memoryview, ...]

    @property
    def weights(self) -> int:
        """Number of weights of the original tensor."""
        return prod(self.shape)

    @property
    def lossless(self) -> bool:
        """Whether it decodes to the very bits of the original."""
        return self.codec in LOSSLESS_CODECS

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
            **self.params,
        }
        return " ".join(f"{key}={value}" for key, value in fields.items())


def serialise(tensors: list[CodedTensor]) -> bytes:
    """A container holding `tensors`, byte for byte a function of them.

    Raises:
        FormatError: two tensors share a name, or a name is reserved.
    """
    metadata = {VERSION_KEY: str(FORMAT_VERSION)}
    for tensor in tensors:
        if tensor.name in metadata or tensor.name in (VERSION_KEY, "__metadata__"):
            raise FormatError(f"tensor name {tensor.name!r} is reserved or appears twice")
        metadata[tensor.name] = tensor.entry()
    header: dict[str, object] = {"__metadata__": metadata}
    # Wide elements first, so that a raw tensor is aligned for readers that map the file.
    stored = sorted(tensors, key=lambda tensor: -_stored_width(tensor))
    offset = 0
    for tensor in stored:
        header[tensor.name] = {
            "dtype": tensor.dtype if tensor.codec == "raw" else "U8",
            "shape": list(tensor.shape) if tensor.codec == "raw" else [tensor.nbytes],
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *(part for tensor in stored for part in tensor.parts)))


def _stored_width(tensor: CodedTensor) -> int:
    return dtype_from_code(tensor.dtype).itemsize if tensor.codec == "raw" else 1


def header_size(start: bytes) -> int:
    """Bytes of the whole header (length field included) of a container, from its first 8 bytes. Raises FormatError."""
    if len(start) < 8:
        raise FormatError(f"container is truncated: {len(start)} bytes are no header")
    size = int(struct.unpack("<Q", start[:8])[0])
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise FormatError(f"container header declares {size} bytes; 2 to {MAX_HEADER_BYTES} are allowed")
    return 8 + size


def parse(blob: bytes | memoryview) -> list[CodedTensor]:
    """The tensors of a container, in the source's order; `parts` are views of `blob`, nothing is copied.

    Raises:
        FormatError: not a container of this format: truncated, mutated or forged.
        VersionError: written in a version that this code does not read.
    """
    view = memoryview(blob)
    data_start = header_size(bytes(view[:8]))
    header, metadata = parse_header(bytes(view[:data_start]))
    data = view[data_start:]
    tensors = [_read_entry(name, entry, header, data) for name, entry in metadata.items()]
    _check_coverage(header, len(data))
    return tensors


def parse_header(head: bytes) -> tuple[dict[str, object], dict[str, str]]:
    """(stored tensors by name, metadata by name without the version) of the first `header_size` bytes.

    Raises:
        FormatError: not a header of this format.
        VersionError: of a version that this code does not read.
    """
    if len(head) < header_size(head):
        raise FormatError(f"container is truncated: {len(head)} bytes of a header of {header_size(head)}")
    try:
        # Of bytes, the module would guess among encodings.
        header = json.loads(head[8:].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"container header is no JSON: {error}") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("container header has no metadata of strings: not a birkhoff container")
    version = metadata.pop(VERSION_KEY, None)
    if version is None or not (version.isascii() and version.isdigit() and len(version) < 10 and version[0] != "0"):
        raise FormatError(f"container does not say its format version: {VERSION_KEY} is {version!r}")
    if not 1 <= int(version) <= FORMAT_VERSION:
        raise VersionError(
            f"container has format version {version}; this code reads 1 to {FORMAT_VERSION}: "
            "upgrade birkhoff-compression to read it"
        )
    if header.keys() != metadata.keys():
        odd = sorted(header.keys() ^ metadata.keys())[:3]
        raise FormatError(f"container's tensors and its metadata disagree: {', '.join(map(repr, odd))}")
    return header, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    "".join(result).encode()  # JSON can name lone surrogates, which are no text
    return result


def _read_entry(name: str, entry: str, header: dict[str, object], data: memoryview) -> CodedTensor:
    params = parse_entry(name, entry)
    try:
        codec, dtype = params.pop("codec"), params.pop("dtype")
        shape, sizes = _numbers(params.pop("shape")), _numbers(params.pop("parts"))
    except (KeyError, ValueError) as error:
        raise FormatError(f"tensor {name!r}: metadata lacks or garbles {error}") from None
    dtype_from_code(dtype)
    _check_bounds(name, shape, sizes)
    stored = header[name]
    wanted = {
        "dtype": dtype if codec == "raw" else "U8",
        "shape": list(shape) if codec == "raw" else [sum(sizes)],
    }
    if not isinstance(stored, dict) or {key: stored.get(key) for key in wanted} != wanted or len(stored) != 3:
        raise FormatError(f"tensor {name!r}: stored as {stored!r}, its metadata wants {wanted!r}")
    begin, end = _offsets(name, stored.get("data_offsets"), len(data))
    if end - begin != sum(sizes):
        raise FormatError(f"tensor {name!r}: {end - begin} bytes stored, its parts add up to {sum(sizes)}")
    parts = []
    for size in sizes:
        parts.append(data[begin : begin + size])
        begin += size
    return CodedTensor(name=name, codec=codec, dtype=dtype, shape=shape, params=params, parts=tuple(parts))


def _check_bounds(name: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Nothing is declared that few bytes could not stand for, or that no real tensor needs."""
    weights, most = prod(shape), min(MAX_WEIGHTS, MAX_EXPANSION * sum(sizes))
    if weights > most:
        raise FormatError(f"tensor {name!r}: {sum(sizes)} bytes declare {weights} weights; at most {most} are allowed")
    if len(shape) > MAX_DIMENSIONS or len(sizes) > MAX_PARTS or max(shape, default=0) > MAX_WEIGHTS:
        raise FormatError(
            f"tensor {name!r}: {len(shape)} dimensions up to {max(shape, default=0)} in {len(sizes)} streams; at most "
            f"{MAX_DIMENSIONS} dimensions up to {MAX_WEIGHTS} in {MAX_PARTS} streams are allowed"
        )


def parse_entry(name: str, entry: str) -> dict[str, str]:
    """The `key=value` tokens of a metadata entry. Raises FormatError."""
    try:
        return _unique([tuple(token.split("=", 1)) for token in entry.split(" ")])  # type: ignore[misc,return-value]
    except ValueError:
        raise FormatError(f"tensor {name!r}: metadata {entry[:80]!r} is not a list of key=value") from None


def _numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",") if text else []
    if not all(number.isascii() and number.isdigit() and len(number) <= 18 for number in numbers):
        raise ValueError(repr(text[:80]))  # as a KeyError says it: the text is a stranger's
    return tuple(map(int, numbers))


def _offsets(name: str, offsets: object, size: int) -> tuple[int, int]:
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        begin, end = offsets
        if 0 <= begin <= end <= size:
            return begin, end
    raise FormatError(f"tensor {name!r}: offsets {offsets!r} do not lie inside {size} bytes of data")


def _check_coverage(header: dict[str, object], size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    spans = sorted(tuple(stored["data_offsets"]) for stored in header.values())  # type: ignore[index]
    position = 0
    for begin, end in spans:
        if begin != position:
            raise FormatError(f"container data has a hole or an overlap at byte {min(begin, position)}")
        position = end
    if position != size:
        raise FormatError(f"container holds {size} bytes of data, its tensors take {position}")
