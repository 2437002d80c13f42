"""Safetensors checkpoints: one file, or the shards of a `model.safetensors.index.json`.

The header is parsed here instead of by the library, because descriptors need byte offsets and every claim of an
untrusted file must be checked before use. Layout, from the format section of the safetensors README: 8 bytes
little-endian header length N, N bytes of JSON, then the data, in which tensors are without holes or overlaps.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from birkhoff.codec import strict_json
from birkhoff.codec.dtype_names import ITEM_BYTES, NAMES
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor, check_tensor, contiguous_stride
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import first_line, shown

# The library's own limit, so that every reader accepts the same files.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The checked header of one safetensors file."""

    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]


def open_safetensors(path: Path) -> Checkpoint:
    """Describe one safetensors file; reads its header only.

    Raises:
        SourceError: The file is truncated, or its header is invalid.
    """
    tensors = read_header(path).tensors
    if not tensors:
        raise SourceError(f"{path}: holds no tensors; save a state dict into it")
    return Checkpoint(path=path, files=(path,), nbytes=path.stat().st_size, format="safetensors", tensors=tensors)


def open_sharded(path: Path) -> Checkpoint:
    """Describe the shards that the index file `path` lists; reads headers only.

    Tensors are ordered by the names of their shards.

    Raises:
        SourceError: The index is malformed, a shard is missing or not a plain file name of the same folder, or the
            shards have other tensors than the index lists.
    """
    weight_map = _read_weight_map(path)
    shards = [path.parent / name for name in sorted(set(weight_map.values()))]
    if lost := [shard.name for shard in shards if not shard.is_file()]:
        raise SourceError(f"{path}: lists {shown(lost)}, which are not beside it; fetch every shard")
    tensors: list[StoredTensor] = []
    for shard in shards:
        listed = {name for name, file in weight_map.items() if file == shard.name}
        found = read_header(shard).tensors
        _check_listing(path, shard, listed, {tensor.name for tensor in found})
        tensors += found
    files = (path, *shards)
    return Checkpoint(
        path=path,
        files=files,
        nbytes=sum(file.stat().st_size for file in files),
        format="safetensors",
        tensors=tuple(tensors),
    )


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`.

    Raises:
        SourceError: The file is truncated, or its header is invalid.
    """
    with path.open("rb") as file:
        raw = _read_raw_header(path, file)
    header = _parse_object(path, raw)
    metadata = _check_metadata(path, header.pop(_METADATA_KEY, {}))
    start = _LENGTH_BYTES + len(raw)
    unordered = [_entry(path, start, name, entry) for name, entry in header.items()]
    tensors = tuple(sorted(unordered, key=lambda tensor: (tensor.offset, tensor.offset + tensor.nbytes)))
    _check_cover(path, start, tensors)
    return Header(tensors=tensors, metadata=metadata)


def _read_raw_header(path: Path, file: BinaryIO) -> bytes:
    """Return the JSON bytes of the header, after checking its claimed length."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path}: claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed;"
            " the file is corrupt or forged, download it again"
        )
    missing = _LENGTH_BYTES + length - size
    if missing > 0:
        raise SourceError(f"{path}: ends {missing} bytes inside its header; download it again")
    return file.read(length)


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    """Return a JSON object without duplicate keys."""
    try:
        parsed = strict_json.parse(raw)
    except strict_json.DuplicateKeyError as error:
        raise SourceError(f"{path}: header: a key occurs twice; the file is forged") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: header is not valid JSON ({first_line(error)}); download it again") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{path}: header is a JSON {type(parsed).__name__}, expected an object; save it again")
    return parsed


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{path}: {_METADATA_KEY} must map strings to strings; save the file again")
    return metadata


def _entry(path: Path, start: int, name: str, entry: Any) -> StoredTensor:
    """Return the descriptor of one header entry; the data begin `start` bytes into the file."""
    label = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise SourceError(f"{label} is {shown(entry)}, expected {sorted(_FIELDS)}; save the file again")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise SourceError(f"{label} has shape {shown(shape)}, expected sizes of at least 0; save the file again")
    if not _are_sizes(span) or len(span) != 2:
        raise SourceError(f"{label} lies at {shown(span)}, expected [begin, end]; save the file again")
    dtype = NAMES.get(str(entry["dtype"]), str(entry["dtype"]))
    stride = contiguous_stride(shape)
    check_tensor(path, name, shown(dtype) if dtype not in ITEM_BYTES else dtype, shape, stride)
    nbytes = ITEM_BYTES[dtype] * math.prod(shape)
    if span[1] - span[0] != nbytes:
        raise SourceError(
            f"{label} of {dtype}{shown(shape)} needs {nbytes} bytes, its offsets span {span[1] - span[0]};"
            " save the file again"
        )
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        stride=stride,
        offset=start + span[0],
        nbytes=nbytes,
        path=str(path),
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in value)


def _check_cover(path: Path, start: int, tensors: tuple[StoredTensor, ...]) -> None:
    """Check that the tensors cover the data from its start to the end of the file, each byte once."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the one before" if tensor.offset < end else "leaves a hole before it"
            raise SourceError(
                f"{path}: tensor {shown(tensor.name)} begins at byte {tensor.offset}, expected {end}:"
                f" it {fault}; save the file again"
            )
        end = tensor.offset + tensor.nbytes
    surplus = path.stat().st_size - end
    if surplus < 0:
        raise SourceError(f"{path}: truncated, {-surplus} of {end} bytes are missing; download it again")
    if surplus:
        raise SourceError(f"{path}: {surplus} bytes follow the last tensor; save the file again")


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return the shard's file name for each tensor name; every file name is plain."""
    size = path.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise SourceError(f"{path}: index of {size} bytes, at most {MAX_HEADER_BYTES} are allowed; save it again")
    weight_map = _parse_object(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: JSON without a weight_map, so no checkpoint index; name the weight file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise SourceError(
                f"{path}: weight_map sends {shown(name)} to {shown(file)}, expected a plain file name of"
                " the same folder; correct the index"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name not in {"", ".", ".."} and not any(sign in name for sign in "/\\\0:")


def _check_listing(path: Path, shard: Path, listed: set[str], found: set[str]) -> None:
    if absent := sorted(listed - found):
        raise SourceError(
            f"{path}: {shard.name} lacks {len(absent)} listed tensors, first {shown(absent[0])}; fetch it again"
        )
    if extra := sorted(found - listed):
        raise SourceError(
            f"{path}: {shard.name} holds {len(extra)} tensors that the index does not list there,"
            f" first {shown(extra[0])}; fetch index and shards from one place"
        )
