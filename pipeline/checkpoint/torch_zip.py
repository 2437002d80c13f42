"""PyTorch checkpoints in zip form (`torch.save` since 1.6), described from the headers alone.

The archive's directory is read and checked here, and its pickle interpreted by `pickle_vetting`. A tensor's storage has
a key that names the record with its bytes, and the directory locates the record. `torch.load` never sees the file, so
memory does not grow with it, nothing in it is trusted, and no offset is guessed.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor, check_total, extent_bytes
from birkhoff.pipeline.checkpoint.pickle_vetting import MAX_PICKLE_BYTES, TensorNote, find_state_dict, read_pickles
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import first_line, shown

_PICKLE = "data.pkl"
# Only TorchScript archives have this member; they also have a data.pkl.
_TORCHSCRIPT = "constants.pkl"
_MAX_NOTE_BYTES = 64
# APPNOTE.TXT 4.3.7: signature, 22 bytes that are not needed, name length, extra length.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 0x1
_UTF8_NAME = 0x800


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """One stored (uncompressed) member of the archive."""

    offset: int
    """Bytes from the start of the file to the member's data."""
    nbytes: int
    crc32: int | None
    """Checksum of the data; None if it was not written, which is an option of torch.save."""


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file; the library's errors for a broken directory become a SourceError."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OverflowError, struct.error) as error:
        raise SourceError(
            f"{path}: zip file of {path.stat().st_size} bytes without a readable directory at its end"
            f" ({first_line(error)}); it is cut short or corrupt, download it again"
        ) from error
    with archive:
        yield archive


def is_torch_zip(path: Path) -> bool:
    """Return whether `torch.save` (or `torch.jit.save`) wrote a zip file, judged by its pickle's name."""
    with open_zip(path) as archive:
        return any(name.count("/") == 1 and name.endswith(f"/{_PICKLE}") for name in archive.namelist())


def open_torch_zip(path: Path, under: str | None = None) -> Checkpoint:
    """Describe a `.pth` zip checkpoint; reads the directory, the pickle and each record's local header.

    `under` as in `find_state_dict`.

    Raises:
        UnsafeSourceError: The pickle names code to run.
        SourceError: The file is truncated, corrupt, compressed, big-endian or TorchScript, or holds no state dict.
    """
    with open_zip(path) as archive, path.open("rb") as file:
        records = _read_records(path, archive, file)
        if _TORCHSCRIPT in records:
            raise SourceError(f"{path}: a TorchScript program, expected a state dict; save module.state_dict()")
        pickled = _read_small(path, file, records, _PICKLE, MAX_PICKLE_BYTES)
        _read_small(path, file, records, "version", _MAX_NOTE_BYTES)
        if "byteorder" in records:
            order = _read_small(path, file, records, "byteorder", _MAX_NOTE_BYTES)
            if order != b"little":
                raise SourceError(f"{path}: byte order is {shown(order)}, expected b'little'; save it again")
    storages = {name: record for name, record in records.items() if _is_storage(name)}
    (contents,) = read_pickles(path, pickled)
    state = find_state_dict(path, contents, under)
    tensors = tuple(_descriptor(path, name, tensor, storages) for name, tensor in state.tensors.items())
    nbytes = path.stat().st_size
    check_total(path, (tensor.dense_bytes for tensor in tensors), nbytes)
    return Checkpoint(
        path=path,
        files=(path,),
        nbytes=nbytes,
        format="torch-zip",
        tensors=tensors,
        nesting=state.nesting,
        skipped=state.skipped,
    )


def _is_storage(name: str) -> bool:
    folder, _, key = name.partition("/")
    return folder == "data" and key.isascii() and key.isdigit()


def _read_records(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, _Record]:
    """Return the members by name below the archive's one root folder, each checked against its local header."""
    roots = {info.filename.partition("/")[0] for info in archive.infolist()}
    if len(roots) != 1:
        raise SourceError(f"{path}: has {len(roots)} root folders {shown(sorted(roots))}, expected 1; save it again")
    records: dict[str, _Record] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in records:
            raise SourceError(f"{path}: member {shown(name)} occurs twice; the file is forged")
        records[name] = _locate(path, info, file)
    limit = archive.start_dir
    for name, record in sorted(records.items(), key=lambda pair: pair[1].offset, reverse=True):
        if record.offset + record.nbytes > limit:
            raise SourceError(
                f"{path}: member {shown(name)} ends at byte {record.offset + record.nbytes}, expected {limit} at"
                " most; the file is corrupt or forged, download it again"
            )
        limit = record.offset
    return records


def _locate(path: Path, info: zipfile.ZipInfo, file: BinaryIO) -> _Record:
    """Return the location of one member's data, from its local header."""
    label = f"{path}: member {shown(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise SourceError(f"{label} is compressed, expected it stored; load and torch.save the checkpoint again")
    if info.flag_bits & _ENCRYPTED:
        raise SourceError(f"{label} is encrypted; decrypt the checkpoint first")
    file.seek(max(info.header_offset, 0))
    head = file.read(_LOCAL_HEADER.size)
    if info.header_offset < 0 or len(head) < _LOCAL_HEADER.size or head[:4] != _LOCAL_SIGNATURE:
        raise SourceError(f"{label} has no local header where the directory puts it; download it again")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
    encoding = "utf-8" if info.flag_bits & _UTF8_NAME else "cp437"
    if file.read(name_bytes) != info.orig_filename.encode(encoding):
        raise SourceError(f"{label} is called otherwise in its local header; the file is forged")
    offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    return _Record(offset=offset, nbytes=info.file_size, crc32=info.CRC or None)


def _read_small(path: Path, file: BinaryIO, records: dict[str, _Record], name: str, limit: int) -> bytes:
    """Return the data of a member that must be small. Its checksum is ignored, because torch may not have written
    it."""
    record = records.get(name)
    if record is None:
        raise SourceError(f"{path}: lacks the member {shown(name)} of a torch.save file; download it again")
    if record.nbytes > limit:
        raise SourceError(
            f"{path}: member {shown(name)} has {record.nbytes} bytes, at most {limit} are allowed;"
            " save the state dict alone"
        )
    file.seek(record.offset)
    return file.read(record.nbytes)


def _descriptor(path: Path, name: str, tensor: TensorNote, storages: dict[str, _Record]) -> StoredTensor:
    record = None if tensor.storage is None else storages.get(f"data/{tensor.storage.key}")
    if tensor.storage is None or record is None:
        raise SourceError(
            f"{path}: tensor {shown(name)} has no storage in the file"
            f" ({shown(f'data/{tensor.storage.key}' if tensor.storage else '')}); save it again"
        )
    itemsize = ITEM_BYTES[tensor.dtype]
    nbytes = extent_bytes(tensor.shape, tensor.stride, itemsize)
    start = (tensor.storage.start + tensor.start) * itemsize if nbytes else 0
    if start + nbytes > record.nbytes:
        raise SourceError(
            f"{path}: tensor {shown(name)} spans bytes {start} to {start + nbytes} of a storage of"
            f" {record.nbytes}; the file is corrupt, download it again"
        )
    return StoredTensor(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stride=tensor.stride,
        offset=record.offset + start,
        nbytes=nbytes,
        path=str(path),
        crc32=record.crc32 if nbytes == record.nbytes else None,
    )
