"""Checkpoints that must be rewritten once before ranges of them can be read.

A legacy pickle (`torch.save` before 1.6) becomes a safetensors file, and a zip that packs one checkpoint is
unpacked. Both go into a cache folder under the SHA-256 of the source, so a copy is never stale and never made
twice; files appear there complete or not at all, and no name from inside an archive is ever used as a path.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file

from birkhoff.pipeline.errors import OutputError, SourceError
from birkhoff.pipeline.files import SPARE_BYTES, file_sha256
from birkhoff.pipeline.source_content import LEGACY_MAGIC
from birkhoff.pipeline.source_pickle import MAX_PICKLE_BYTES, StateDict, find_state_dict, vet_pickle
from birkhoff.pipeline.source_safetensors import read_header
from birkhoff.pipeline.source_torch import open_zip
from birkhoff.pipeline.source_types import Checkpoint, first_line, shown

# Magic number, protocol version, system facts, state dict, storage keys; the storages' bytes follow.
_LEGACY_PICKLES = 5
_METADATA_KEY = "birkhoff.legacy"

_SUFFIXES = {".pt", ".pth"}
# Finder's resource forks repeat every file name of the archive.
_JUNK_FOLDER = "__MACOSX/"
# Trained weights deflate to 90 %; only filler reaches a hundredth.
_MAX_RATIO = 100
_CHUNK_BYTES = 1 << 20


def open_legacy(path: Path, cache: Path, under: str | None = None) -> Checkpoint:
    """Describe a legacy pickle by way of its safetensors copy in `cache`, written on first use.

    The first use loads the whole file into memory. The pickle must have passed `vet_legacy`.

    Raises:
        SourceError: the file is truncated or corrupt, holds no state dict, or the copy does not fit on the disk.
        OutputError: the cache cannot be written.
    """
    # One copy for each state dict that was asked for.
    part = "" if under is None else f".{hashlib.sha256(under.encode()).hexdigest()[:16]}"
    target = cache / f"{file_sha256(path)}{part}.legacy.safetensors"
    if not target.is_file():
        state = _load_legacy(path, under)
        with _appearing(path, target, sum(tensor.nbytes for tensor in state.tensors.values())) as partial:
            _write_copy(path, partial, state)
    return _open_copy(path, target)


def vet_legacy(path: Path) -> None:
    """Vet every pickle of a legacy file, or the one pickle of a file that `torch.save` did not write.

    Raises:
        UnsafeSourceError: a pickle would run code.
        SourceError: the file is truncated or corrupt, or is not a checkpoint.
    """
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if not head.getvalue().startswith(LEGACY_MAGIC):
        vet_pickle(path, head)
        raise SourceError(f"{path}: a plain pickle, expected a checkpoint; write it with torch.save")
    for _ in range(_LEGACY_PICKLES):
        vet_pickle(path, head)


def _load_legacy(path: Path, under: str | None) -> StateDict:
    try:
        return find_state_dict(path, torch.load(path, map_location=_bounded(path), weights_only=True), under)
    except SourceError:
        raise
    # A cut or forged file can make the unpickler fail in any way at all; none of them is more than a bad file.
    except Exception as error:
        raise SourceError(
            f"{path}: legacy checkpoint cannot be read ({first_line(error)}); download it again"
        ) from error


def _bounded(path: Path) -> Callable[[Any, str], Any]:
    """A `map_location` that keeps storages on the CPU and below the size of the file together.

    torch reserves each in the size that the pickle claims, and fills those alone that another list names. So they are
    counted before anything touches them, and zeroed: no forged file gets what the allocator left there taken for
    weights.
    """
    size, claimed = path.stat().st_size, 0

    def place(storage: Any, _: str) -> Any:  # an UntypedStorage; torch's own annotations say otherwise
        nonlocal claimed
        claimed += storage.nbytes()
        if claimed > size:
            raise SourceError(
                f"{path}: its tensors need {claimed} bytes or more, the file has {size}; it is cut short or forged,"
                " download it again"
            )
        return storage.fill_(0)

    return place


def _write_copy(path: Path, target: Path, state: StateDict) -> None:
    """Write tied weights once, and what safetensors cannot express into the metadata."""
    stored: dict[tuple[object, ...], str] = {}
    names: list[tuple[str, str]] = []
    for name, tensor in state.tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        names.append((name, stored.setdefault(place, name)))
    facts = {"nesting": state.nesting, "skipped": state.skipped, "names": names}
    copies = {name: _own(state.tensors[name]) for name in stored.values()}
    try:
        save_file(copies, target, metadata={_METADATA_KEY: json.dumps(facts)})
    # The library raises errors of several roots, OSError among them.
    except Exception as error:
        raise SourceError(
            f"{path}: cannot be rewritten as safetensors ({first_line(error)}); load and torch.save it again"
        ) from error


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a storage of its own, which safetensors asks for; a copy only where it is a view."""
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
    """The one `.pt` or `.pth` member of the zip file `path`, unpacked into `cache` on first use.

    Raises:
        SourceError: no or several such members, one that is encrypted, corrupt or inflates absurdly, or one that
            does not fit on the disk.
        OutputError: the cache cannot be written.
    """
    with open_zip(path) as archive:
        member = _only_member(path, archive)
        target = cache / f"{file_sha256(path)}.unpacked.pt"
        if target.is_file() and target.stat().st_size == member.file_size:
            return target
        with _appearing(path, target, member.file_size) as partial:
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
    """Stream the member out; the library reads no more than its declared size and checks its CRC."""
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
def _appearing(path: Path, target: Path, nbytes: int) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place when the block ends well, and else disappears."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    if nbytes + SPARE_BYTES > free:
        raise SourceError(
            f"{path}: needs {nbytes} bytes in the cache {target.parent} and {SPARE_BYTES} to spare, {free} are free;"
            " make room or use another cache folder"
        )
    # Not mkstemp, whose files only their owner can read: workers may run as someone else.
    partial = target.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        partial.touch()  # so that what fails from here on is the source's
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: {error.strerror}; point BIRKHOFF_HOME at a folder that can be written")
