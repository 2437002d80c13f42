"""Reading published artifacts: pull, verify, inspect, dense tensors, and loading into a model.

Two places hold an artifact, a store and a folder that `pull` wrote; both hand out shards whose digest was checked after
the last copy.
"""

import contextlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from birkhoff.codec.container import CodedTensor, header_size, parse, parse_entry, parse_header
from birkhoff.codec.dtypes import dtype_from_code, dtype_name
from birkhoff.codec.errors import FormatError
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.artifact import ShardRecord, VersionManifest, blob_key, read_document, sha256
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError, OutputError
from birkhoff.pipeline.publish import Version, resolve
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.stores import open_default_store

MANIFEST_FILE = "manifest.json"
VERSION_FILE = "version.json"
_HEADER_GUESS = 256 << 10
"""Bytes of a container read at first to see its header."""


class Artifact(ABC):
    """One version, wherever it lies."""

    manifest: VersionManifest
    label: str
    """For messages: `demo-sam@v3`, or the folder."""

    @abstractmethod
    def read_blob(self, shard: ShardRecord) -> bytes:
        """The stored bytes of a shard, unchecked."""

    @abstractmethod
    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """The first `size` bytes of a shard, or fewer where it is shorter."""

    def blob(self, shard: ShardRecord) -> bytes:
        """The bytes of a shard, checked against its digest. Raises IntegrityError naming the blob."""
        body = self.read_blob(shard)
        if sha256(body) != shard.blob:
            raise IntegrityError(
                f"{self.label}: blob {shard.blob} is damaged: {len(body)} bytes with digest {sha256(body)}; "
                "compress again with a fresh store, or restore the object from a backup"
            )
        return body

    def coded(self) -> Iterator[CodedTensor]:
        """Every stored tensor in the checkpoint's order, one shard in memory at a time."""
        for shard in self.manifest.shards:
            try:
                yield from parse(self.blob(shard))
            except FormatError as error:
                raise IntegrityError(f"{self.label}: blob {shard.blob}: {error}") from None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, dense CPU tensor) in the checkpoint's order."""
        for coded in self.coded():
            yield coded.name, decode_tensor(coded)


class StoredArtifact(Artifact):
    """A version in a store."""

    def __init__(self, store: Store, version: Version) -> None:
        self._store = store
        self.version = version
        self.manifest = version.manifest
        self.label = f"{version.model}@{version.name or version.digest[:12]}"

    def read_blob(self, shard: ShardRecord) -> bytes:
        """Fetch a shard's bytes."""
        return self._get(shard, None)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Fetch the start of a shard."""
        return self._get(shard, size)

    def _get(self, shard: ShardRecord, length: int | None) -> bytes:
        try:
            return self._store.get(blob_key(shard.blob), length=length)
        except ObjectNotFoundError:
            raise IntegrityError(f"{self.label}: blob {shard.blob} is missing from {self._store.url}") from None


class PulledArtifact(Artifact):
    """A version in a folder that `pull` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.label = str(folder)
        manifest, version = (self._read(folder / name, None) for name in (MANIFEST_FILE, VERSION_FILE))
        try:
            digest = json.loads(version)["digest"]
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(f"{folder / VERSION_FILE} is damaged; pull again") from None
        if sha256(manifest) != digest:
            raise IntegrityError(f"{folder / MANIFEST_FILE} does not match its digest {digest}; pull again")
        self.manifest = read_document(VersionManifest, str(folder / MANIFEST_FILE), manifest)

    def read_blob(self, shard: ShardRecord) -> bytes:
        """Read a shard's file."""
        return self._read(self._folder / shard_file(self.manifest, shard), None)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Read the start of a shard's file."""
        return self._read(self._folder / shard_file(self.manifest, shard), size)

    def _read(self, path: Path, size: int | None) -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(-1 if size is None else size)
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; pull again") from None


@contextlib.contextmanager
def open_artifact(reference: str | os.PathLike[str], store: str | None = None) -> Iterator[Artifact]:
    """The artifact at a folder of `pull`, or at `MODEL[@REF]` in a store (`BIRKHOFF_STORE`, else embedded).

    Raises:
        ArtifactNotFoundError, IntegrityError, StoreError.
    """
    folder = Path(reference)
    if (folder / MANIFEST_FILE).is_file():
        yield PulledArtifact(folder)
        return
    if isinstance(reference, os.PathLike) or folder.is_dir():
        raise ArtifactNotFoundError(f"{folder} holds no {MANIFEST_FILE}: not a folder of `birkhoff pull`")
    with open_default_store(store) as opened:
        yield StoredArtifact(opened, resolve(opened, str(reference)))


def shard_file(manifest: VersionManifest, shard: ShardRecord) -> str:
    """Name of a shard's file in a pulled folder."""
    return f"shard-{manifest.shards.index(shard) + 1:05}-of-{len(manifest.shards):05}.safetensors"


def pull(artifact: StoredArtifact, folder: Path) -> int:
    """Bring a version into a folder, every digest checked; returns the bytes fetched.

    Shards that are there already and whole are kept. The manifest comes last, so a folder with a manifest is whole.

    Raises:
        IntegrityError: a stored blob does not match its digest.
        OutputError: the folder cannot be written, or holds files that are not of `pull`.
        StoreError: the store failed.
    """
    manifest, fetched = artifact.manifest, 0
    _claim(folder)
    keep = {shard_file(manifest, shard) for shard in manifest.shards}
    for stale in [folder / MANIFEST_FILE, *(p for p in folder.glob("shard-*.safetensors") if p.name not in keep)]:
        stale.unlink(missing_ok=True)
    version = artifact.version
    pointer = {"model": version.model, "version": version.name, "digest": version.digest}
    write_whole(folder / VERSION_FILE, json.dumps(pointer).encode())
    for shard in manifest.shards:
        path = folder / shard_file(manifest, shard)
        if not (path.is_file() and path.stat().st_size == shard.bytes and sha256(path.read_bytes()) == shard.blob):
            write_whole(path, artifact.blob(shard))
            fetched += shard.bytes
    write_whole(folder / MANIFEST_FILE, manifest.to_bytes())
    return fetched


def _claim(folder: Path) -> None:
    """Make the folder, or find it empty or left by an earlier `pull`: what else lies there is not ours to remove."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".part-"))
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    if held and not (folder / VERSION_FILE).is_file():
        raise OutputError(f"{folder} holds {held[0]} and was not made by `pull`; name an empty or new folder")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name whole, once the block ends well, or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; name a place that can be written") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, body: bytes) -> None:
    """Write a file so that it appears under its name whole or not at all. Raises OutputError."""
    with whole_file(path) as file:
        file.write(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """A stored tensor, as `inspect` shows it. `bits_per_weight` counts its streams, not its entry in the header."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    bits_per_weight: float
    sqnr_db: float | None
    max_abs_error: float
    target_db: float | None = None
    """The SQNR it was coded for, where that is its own and not the profile's."""


def inspect(artifact: Artifact) -> list[TensorRow]:
    """All tensors of an artifact, from the headers of its shards alone."""
    return [row for shard in artifact.manifest.shards for row in inspect_shard(artifact, shard)]


def inspect_shard(artifact: Artifact, shard: ShardRecord) -> list[TensorRow]:
    """The tensors of one shard, in its order, from its header alone."""
    head = artifact.read_head(shard, _HEADER_GUESS)
    if len(head) < header_size(head):
        head = artifact.read_head(shard, header_size(head))
    stored, metadata = parse_header(head[: header_size(head)])
    return [_row(name, entry, stored[name]) for name, entry in metadata.items()]


def _row(name: str, entry: str, stored: object) -> TensorRow:
    fields = parse_entry(name, entry)
    try:
        shape = tuple(int(size) for size in fields["shape"].split(",") if size)
        begin, end = stored["data_offsets"]  # type: ignore[index]
        dtype = dtype_name(dtype_from_code(fields["dtype"]))
        sqnr = float(fields["sqnr_db"]) if "sqnr_db" in fields else None
        error = float(fields.get("max_abs", 0))
        target = float(fields["target_db"]) if "target_db" in fields else None
    except (KeyError, ValueError, TypeError):
        raise FormatError(f"tensor {name!r}: metadata {entry[:80]!r} is not an entry of this format") from None
    weights = max(1, torch.Size(shape).numel())
    return TensorRow(
        name=name,
        shape=shape,
        dtype=dtype,
        action=fields.get("codec", "?"),
        bits_per_weight=round(8 * (end - begin) / weights, 3),
        sqnr_db=sqnr,
        max_abs_error=error,
        target_db=target,
    )


def row_json(row: TensorRow) -> dict[str, object]:
    """A row as `--json` prints it."""
    return asdict(row)
