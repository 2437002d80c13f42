"""Checkpoints that must be rewritten once before ranges of them can be read.

A legacy pickle (`torch.save` before 1.6) becomes a safetensors file, and a zip that contains one checkpoint is
unpacked. Both go into a cache folder under the SHA-256 of the source, so a copy is never stale and never made twice.
Files appear there complete or not at all, and no name from inside an archive is used as a path.
"""

import hashlib
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, check_total, extent_bytes
from birkhoff.pipeline.checkpoint.pickle_vetting import (
    ELEMENT_BYTES,
    MAX_PICKLE_BYTES,
    Contents,
    StateDict,
    Table,
    find_state_dict,
    read_pickles,
    refuse_code,
)
from birkhoff.pipeline.checkpoint.safetensors import read_header
from birkhoff.pipeline.checkpoint.sniff import LEGACY_MAGIC
from birkhoff.pipeline.checkpoint.torch_zip import open_zip
from birkhoff.pipeline.errors import OutputError, SourceError
from birkhoff.pipeline.files import atomic_path, file_sha256, shortage
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.text import first_line, shown

if TYPE_CHECKING:
    import torch

# The pickles: magic number, protocol version, system facts, state dict, storage keys. The storages' bytes follow.
_LEGACY_PICKLES = 5
# Number of a storage's elements, before its bytes.
_COUNT = struct.Struct("<q")
_METADATA_KEY = "birkhoff.legacy"

_SUFFIXES = {".pt", ".pth"}
# macOS's resource forks repeat every file name of the archive.
_JUNK_FOLDER = "__MACOSX/"
# Trained weights deflate to 90 %; only filler reaches a hundredth.
_MAX_RATIO = 100
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Legacy:
    """The contents of a legacy file's pickles: what it holds, and the order of the storages behind them."""

    contents: Contents
    keys: tuple[str, ...]
    start: int
    """Bytes from the start of the file to the first storage."""


def read_legacy(path: Path) -> Legacy:
    """Read all pickles of a legacy file, or the one pickle of a file that `torch.save` did not write.

    Raises:
        UnsafeSourceError: A pickle names code to run.
        SourceError: The file is truncated or corrupt, or is not a checkpoint.
    """
    with path.open("rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
    if not head.startswith(LEGACY_MAGIC):
        (contents,) = read_pickles(path, head)
        if isinstance(contents.root, Table):
            refuse_code(path, contents)
        raise SourceError(f"{path}: a plain pickle, expected a checkpoint; write it with torch.save")
    *_, contents, keys = read_pickles(path, head, _LEGACY_PICKLES)
    if keys.texts is None:
        raise SourceError(f"{path}: legacy checkpoint without a list of its storages; download it again")
    return Legacy(contents=contents, keys=keys.texts, start=keys.end)


def open_legacy(path: Path, legacy: Legacy, cache: Path, under: str | None = None) -> Checkpoint:
    """Describe a legacy file through its safetensors copy in `cache`, which is written on first use.

    The first use loads the weights into memory.

    Raises:
        UnsafeSourceError: It holds only objects that code would make.
        SourceError: It is truncated or corrupt, holds no state dict, or the copy does not fit on the disk.
        OutputError: The cache cannot be written.
    """
    # One copy for each state dict that was requested.
    part = "" if under is None else f".{hashlib.sha256(under.encode()).hexdigest()[:16]}"
    target = cache / f"{file_sha256(path)}{part}.legacy.safetensors"
    if not target.is_file():
        state = find_state_dict(path, legacy.contents, under)
        tensors = _load_legacy(path, legacy, state)
        with _new_copy(path, target, sum(tensor.nbytes for tensor in tensors.values())) as partial:
            _write_copy(path, partial, state, tensors)
    return _open_copy(path, target)


def _load_legacy(path: Path, legacy: Legacy, state: StateDict) -> "dict[str, torch.Tensor]":
    """Return the tensors of a state dict, on storages read from the file."""
    with LOADING:  # headers are read without torch
        from birkhoff.codec.dtypes import DTYPES

    size = path.stat().st_size
    claimed = sum(count * _itemsize(path, dtype) for dtype, count in legacy.contents.storages.values())
    if claimed > size:
        raise SourceError(
            f"{path}: its tensors need {claimed} bytes or more, the file has {size}; it is cut short or forged,"
            " download it again"
        )
    places = _places(path, legacy, size)
    storages: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, note in state.tensors.items():
        storage, itemsize = note.storage, ITEM_BYTES[note.dtype]
        if storage is None:  # a flaw, which was refused before
            raise SourceError(f"{path}: tensor {shown(name)} has no storage in the file; save it again")
        nbytes = legacy.contents.storages[storage.key][1] * _itemsize(path, storage.dtype)
        start = storage.start + note.start
        end = start * itemsize + extent_bytes(note.shape, note.stride, itemsize)
        if end > nbytes and 0 not in note.shape:
            raise SourceError(
                f"{path}: tensor {shown(name)} spans bytes {start * itemsize} to {end} of a storage of {nbytes}; the"
                " file is corrupt, download it again"
            )
        if storage.key not in storages:
            storages[storage.key] = _read_storage(path, places.get(storage.key), nbytes)
        whole = storages[storage.key].view(DTYPES[note.dtype])
        tensors[name] = whole.as_strided(note.shape, note.stride, start if end <= nbytes else 0)
    check_total(path, (tensor.nbytes for tensor in tensors.values()), size)
    return tensors


def _places(path: Path, legacy: Legacy, size: int) -> dict[str, int]:
    """Return where the bytes of each storage begin: after its number of elements, in the order of the file's list."""
    places: dict[str, int] = {}
    place = legacy.start
    with path.open("rb") as file:
        for key in legacy.keys:
            dtype, count = legacy.contents.storages.get(key, ("", -1))
            file.seek(place)
            head = file.read(_COUNT.size)
            if len(head) < _COUNT.size or _COUNT.unpack(head)[0] != count:
                raise SourceError(
                    f"{path}: legacy checkpoint cannot be read: storage {shown(key)} is not at byte {place}, where its"
                    " list of storages puts it; download it again"
                )
            places[key] = place + _COUNT.size
            place = places[key] + count * _itemsize(path, dtype)
            if place > size:
                raise SourceError(
                    f"{path}: legacy checkpoint cannot be read: storage {shown(key)} ends at byte {place} of {size};"
                    " download it again"
                )
    return places


def _read_storage(path: Path, place: int | None, nbytes: int) -> "torch.Tensor":
    """Return the bytes of a storage. A storage that the file does not list is zeros, never uninitialised memory."""
    import torch  # as `_load_legacy` has

    storage = torch.zeros(nbytes, dtype=torch.uint8)
    if place is not None and nbytes:
        with path.open("rb") as file:
            file.seek(place)
            file.readinto(storage.numpy().data)
    return storage


def _itemsize(path: Path, dtype: str) -> int:
    """Return the bytes of an element of a storage."""
    if dtype in ELEMENT_BYTES:
        return ELEMENT_BYTES[dtype]
    raise SourceError(f"{path}: a legacy checkpoint with storages of {shown(dtype)}; load it and torch.save it again")


def _write_copy(path: Path, target: Path, state: StateDict, tensors: "dict[str, torch.Tensor]") -> None:
    """Write tied weights once, and put into the metadata what safetensors cannot express."""
    with LOADING:
        from safetensors.torch import save_file

    stored: dict[tuple[object, ...], str] = {}
    names: list[tuple[str, str]] = []
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        names.append((name, stored.setdefault(place, name)))
    facts = {"nesting": state.nesting, "skipped": state.skipped, "names": names}
    copies = {name: _own(tensors[name]) for name in stored.values()}
    try:
        save_file(copies, target, metadata={_METADATA_KEY: json.dumps(facts)})
    # The library raises several kinds of errors, OSError among them.
    except Exception as error:
        raise SourceError(
            f"{path}: cannot be rewritten as safetensors ({first_line(error)}); load and torch.save it again"
        ) from error


def _own(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the tensor on its own storage, as safetensors requires; a view is copied."""
    dense = tensor.detach().contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


def _open_copy(path: Path, target: Path) -> Checkpoint:
    header = read_header(target)
    try:
        facts = json.loads(header.metadata[_METADATA_KEY])
        stored = {tensor.name: tensor for tensor in header.tensors}
        tensors = tuple(replace(stored[source], name=name) for name, source in facts["names"])
        nesting = tuple(facts["nesting"])
        skipped = tuple((key, kind) for key, kind in facts["skipped"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{target}: damaged cached copy ({first_line(error)}); delete it") from error
    return Checkpoint(
        path=path,
        files=(path,),
        nbytes=path.stat().st_size,
        format="torch-legacy",
        tensors=tensors,
        nesting=nesting,
        skipped=skipped,
    )


def unpack_checkpoint(path: Path, cache: Path) -> Path:
    """Return the one `.pt` or `.pth` member of the zip file `path`, unpacked into `cache` on first use.

    Raises:
        SourceError: There is no such member or several, or it is encrypted, corrupt, inflates absurdly, or does not fit
            on the disk.
        OutputError: The cache cannot be written.
    """
    with open_zip(path) as archive:
        member = _only_member(path, archive)
        target = cache / f"{file_sha256(path)}.unpacked.pt"
        if target.is_file() and target.stat().st_size == member.file_size:
            return target
        with _new_copy(path, target, member.file_size) as partial:
            _inflate(path, archive, member, partial)
    return target


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    label = f"{path}: packed"
    members = [info for info in archive.infolist() if not info.filename.endswith("/")]
    members = [info for info in members if not info.filename.startswith(_JUNK_FOLDER)]
    found = [info for info in members if PurePosixPath(info.filename).suffix.lower() in _SUFFIXES]
    if len(found) != 1:
        names = shown([info.filename for info in members])
        raise SourceError(f"{label} zip holds {len(found)} .pt or .pth files among {names}, expected 1; unpack it")
    member = found[0]
    parts = member.filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise SourceError(f"{label} member {shown(member.filename)} points out of the archive; the file is forged")
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise SourceError(f"{label} member is compressed by method {member.compress_type}; unpack it by hand")
    if member.file_size > _MAX_RATIO * member.compress_size:
        raise SourceError(
            f"{label} member inflates {member.compress_size} bytes to {member.file_size}, at most {_MAX_RATIO} times"
            " are allowed; if you trust it, unpack it by hand"
        )
    return member


def _inflate(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Stream the member to a file. The library reads no more than its declared size, and checks its CRC."""
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        written = target.stat().st_size
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{path}: packed member cannot be unpacked ({first_line(error)}); download it again"
        ) from error
    if written != member.file_size:
        raise SourceError(f"{path}: packed member has {written} bytes, expected {member.file_size}; download it again")


@contextmanager
def _new_copy(path: Path, target: Path, nbytes: int) -> Iterator[Path]:
    """Yield a temporary file that replaces `target` if the block succeeds, and is removed otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lack = shortage(target.parent, nbytes)
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    if lack:
        raise SourceError(f"{path}: {lack}; make room or point BIRKHOFF_HOME at a larger disk")
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_path(target))
        except OSError as error:
            raise _unwritable(target.parent, error) from error
        yield partial  # from here on, errors are the source's


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: {error.strerror}; point BIRKHOFF_HOME at a folder that can be written")
