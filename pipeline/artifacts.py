"""Reading published artifacts: verify, inspect, dense tensors, and loading into a model.

Three places hold an artifact: a store, the local cache in front of one, and a folder that `pull` wrote. All hand out
shards whose digest was checked after the last copy.
"""

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from birkhoff.codec.container import LOSSLESS_CODECS, CodedTensor, header_size, parse, parse_entry, parse_header
from birkhoff.codec.dtypes import dtype_from_code, dtype_name
from birkhoff.codec.errors import FormatError
from birkhoff.codec.profiles import Override, Profile
from birkhoff.codec.tensor import FALLBACKS, decode_tensor
from birkhoff.pipeline.artifact import (
    FLOOR_DB,
    MAX_DOCUMENT_BYTES,
    BlobRecord,
    ShardRecord,
    VersionManifest,
    blob_key,
    check_size,
    read_document,
    sha256,
)
from birkhoff.pipeline.blob_cache import BlobCache
from birkhoff.pipeline.blob_download import Blob
from birkhoff.pipeline.blob_fetch import fetch
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.publish import Version, resolve
from birkhoff.pipeline.pull import MANIFEST_FILE, ROUNDS, VERSION_FILE, blob_file, bring
from birkhoff.pipeline.references import Found, find, noted_signatures, recall
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.stores import open_default_store
from birkhoff.pipeline.trust import ANY, Trust, check_signatures, check_version

_HEADER_GUESS = 256 << 10
"""Bytes of a container read at first to see its header."""


class Artifact(ABC):
    """One version, wherever it lies."""

    manifest: VersionManifest
    label: str
    """For messages: `demo-sam@v3`, or the folder."""

    @abstractmethod
    def read_blob(self, record: BlobRecord) -> bytes:
        """The stored bytes of a blob, unchecked."""

    @abstractmethod
    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """The first `size` bytes of a shard, or fewer where it is shorter."""

    def blob(self, record: BlobRecord) -> bytes:
        """The bytes of a blob, checked against its digest. Raises IntegrityError naming the blob."""
        body = self.read_blob(record)
        if sha256(body) != record.blob:
            raise IntegrityError(
                f"{self.label}: blob {record.blob} is damaged: {len(body)} bytes with digest {sha256(body)}; "
                "compress again with a fresh store, or restore the object from a backup"
            )
        return body

    def file(self, name: str) -> bytes | None:
        """One of the files that go with the weights, its digest checked; None where there is none of that name."""
        record = next((record for record in self.manifest.files or () if record.name == name), None)
        return None if record is None else self.blob(record)

    def arriving(self) -> Iterator[ShardRecord]:
        """All shards, each once, as soon as its bytes can be read without waiting; in whatever order that is."""
        yield from self.manifest.shards

    def coded_of(self, shard: ShardRecord) -> list[CodedTensor]:
        """The stored tensors of a shard. May be called from any thread. Raises IntegrityError naming the blob."""
        try:
            return parse(self.blob(shard))
        except FormatError as error:
            raise IntegrityError(f"{self.label}: blob {shard.blob}: {error}") from None

    def coded(self) -> Iterator[CodedTensor]:
        """Every stored tensor in the checkpoint's order, one shard in memory at a time. Raises as `coded_of`."""
        for shard in self.manifest.shards:
            yield from self.coded_of(shard)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, dense CPU tensor) in the checkpoint's order. Raises IntegrityError, FormatError."""
        for coded in self.coded():
            yield coded.name, decode_tensor(coded)


class StoredArtifact(Artifact):
    """A version in a store."""

    def __init__(self, store: Store, version: Version) -> None:
        self._store = store
        self.version = version
        self.manifest = version.manifest
        self.label = f"{version.model}@{version.name or version.digest[:12]}"

    def read_blob(self, record: BlobRecord) -> bytes:
        """Fetch a blob's bytes, and of a longer object one byte more: its digest is then another."""
        return self._get(record, record.bytes + 1)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Fetch the start of a shard."""
        return self._get(shard, size)

    def _get(self, record: BlobRecord, length: int) -> bytes:
        try:
            return self._store.get(blob_key(record.blob), length=length)
        except ObjectNotFoundError:
            raise IntegrityError(f"{self.label}: blob {record.blob} is missing from {self._store.url}") from None


class CachedArtifact(Artifact):
    """A version read through the local cache: what is missing there is fetched from the store, if there is one."""

    def __init__(self, found: Found, store: Store | None, cache: BlobCache) -> None:
        self._found, self._store, self._cache = found, store, cache
        self.manifest = found.manifest
        self.label = found.label

    def arriving(self) -> Iterator[ShardRecord]:
        """All shards, those in the cache first, the others as they come."""
        if self._store is None:
            yield from self.manifest.shards
            return
        shards: dict[str, list[ShardRecord]] = {}
        for shard in self.manifest.shards:
            shards.setdefault(shard.blob, []).append(shard)
        blobs = (Blob(digest=shard.blob, size=shard.bytes) for shard in self.manifest.shards)
        for blob in fetch(self._store, blobs, self._cache, label=self.label):
            yield from shards[blob.digest]

    def blob(self, record: BlobRecord) -> bytes:
        """The bytes of a blob, checked; a damaged or missing file of the cache is fetched anew."""
        blob = Blob(digest=record.blob, size=record.bytes)
        for _ in range(ROUNDS):
            if (body := self._cache.read(record.blob)) is not None:
                return body
            bring([blob], self._found, self._store, self._cache, only={record.blob})
        return super().blob(record)

    def read_blob(self, record: BlobRecord) -> bytes:
        """Read a blob's file in the cache."""
        return self._read(record, -1)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Read the start of a shard's file in the cache, which is fetched if it is not there."""
        if self._cache.find(shard.blob, shard.bytes) is None:
            return self.blob(shard)[:size]
        return self._read(shard, size)

    def _read(self, record: BlobRecord, size: int) -> bytes:
        path = self._cache.path(record.blob)
        try:
            with path.open("rb") as file:
                return file.read(size)
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; load again") from None


class PulledArtifact(Artifact):
    """A version in a folder that `pull` wrote."""

    def __init__(self, folder: Path, trust: Trust = ANY) -> None:
        """Raises IntegrityError, and TrustError if the folder is not signed as `trust` demands."""
        self._folder = folder
        self.label = str(folder)
        manifest, version = (
            self._read(folder / name, MAX_DOCUMENT_BYTES + 1) for name in (MANIFEST_FILE, VERSION_FILE)
        )
        check_size(str(folder / MANIFEST_FILE), manifest)
        check_size(str(folder / VERSION_FILE), version)
        try:
            note = json.loads(version)
            digest, name = note["digest"], note["version"]
            signatures = noted_signatures(note)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IntegrityError):
            raise IntegrityError(f"{folder / VERSION_FILE} is damaged; pull again") from None
        if sha256(manifest) != digest:
            raise IntegrityError(f"{folder / MANIFEST_FILE} does not match its digest {digest}; pull again")
        self.manifest = read_document(VersionManifest, str(folder / MANIFEST_FILE), manifest)
        check_signatures(self.manifest.model, name, digest, signatures, trust, self.label)

    def read_blob(self, record: BlobRecord) -> bytes:
        """Read a blob's file."""
        return self._read(self._folder / blob_file(self.manifest, record), record.bytes + 1)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Read the start of a shard's file."""
        return self._read(self._folder / blob_file(self.manifest, shard), size)

    def _read(self, path: Path, size: int) -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(size)
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; pull again") from None


@contextlib.contextmanager
def open_artifact(
    reference: str | os.PathLike[str],
    store: str | None = None,
    *,
    cached: bool = False,
    offline: bool = False,
    trust: Trust = ANY,
) -> Iterator[Artifact]:
    """The artifact at a folder of `pull`, or at `MODEL[@REF]` in a store (`BIRKHOFF_STORE`, else embedded).

    A folder of that name wins over a model. With `cached`, blobs of a store are read through the local cache; with
    `offline` besides, the store is not asked for anything.

    Raises:
        ArtifactNotFoundError, IntegrityError, StoreError.
        TrustError: it is not what `trust` demands.
    """
    folder = Path(reference)
    if (folder / MANIFEST_FILE).is_file():
        yield PulledArtifact(folder, trust)
        return
    if isinstance(reference, os.PathLike) or folder.is_dir():
        raise ArtifactNotFoundError(_no_folder(folder))
    if "/" in reference.partition("@")[0] or reference.startswith((".", "~")):  # no model is called so
        raise ArtifactNotFoundError(_no_folder(folder))
    reference = str(reference)
    if offline:
        cache = BlobCache()
        with _nor_a_folder(reference):
            found = recall(store, reference, cache, trust)
        yield CachedArtifact(found, None, cache)
        return
    with open_default_store(store) as opened:
        if cached:
            cache = BlobCache()
            with _nor_a_folder(reference):
                found = find(opened, reference, cache, trust)
            yield CachedArtifact(found, opened, cache)
        else:
            with _nor_a_folder(reference):
                version = resolve(opened, reference)
            check_version(opened, version, trust)
            yield StoredArtifact(opened, version)


@contextlib.contextmanager
def _nor_a_folder(reference: str) -> Iterator[None]:
    """Says of a model that is not there that it is no folder either, where it might have been meant as one."""
    try:
        yield
    except ArtifactNotFoundError as error:
        if "@" in reference:
            raise
        raise ArtifactNotFoundError(f"{error}; nor is there a folder {reference!r} here") from None


def _no_folder(folder: Path) -> str:
    if folder.is_dir():
        return f"{folder} holds no {MANIFEST_FILE}: not a folder of `birkhoff pull`; pull into it, or name MODEL[@REF]"
    what = "is no folder" if folder.exists() else "no such folder"
    return f"{folder}: {what}; name one that `birkhoff pull` wrote, or a model: MODEL[@REF]"


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
    """The SQNR it was coded for."""
    reason: str | None = None
    """Why it is lossless although it was to be coded: a key of `codec.tensor.FALLBACKS`."""
    why: str = ""
    """What made it lossless, or gave it a target of its own; empty where it was coded as the profile says."""

    @property
    def lossless(self) -> bool:
        """Whether it decodes to the very bits of the original."""
        return self.action in LOSSLESS_CODECS


def inspect(artifact: Artifact) -> list[TensorRow]:
    """All tensors of an artifact, from the headers of its shards alone. Raises FormatError, StoreError."""
    return [row for shard in artifact.manifest.shards for row in inspect_shard(artifact, shard)]


def inspect_shard(artifact: Artifact, shard: ShardRecord) -> list[TensorRow]:
    """The tensors of one shard, in its order, from its header alone."""
    head = artifact.read_head(shard, _HEADER_GUESS)
    if len(head) < header_size(head):
        head = artifact.read_head(shard, header_size(head))
    stored, metadata = parse_header(head[: header_size(head)])
    profile = Profile.of_recipe(artifact.manifest.profile, artifact.manifest.recipe)
    overrides = artifact.manifest.overrides or {}
    rows = (_row(name, entry, stored[name]) for name, entry in metadata.items())
    return [_explained(row, profile, overrides.get(row.name)) for row in rows]


def _explained(row: TensorRow, profile: Profile, override: Override | None) -> TensorRow:
    """The row with what recipe and override say of its tensor."""
    own = profile.of_tensor(row.shape, override)
    if row.lossless:
        why = own.action(row.shape, row.dtype)[1]
        return replace(row, why=why if row.reason is None else FALLBACKS.get(row.reason, row.reason))
    target = own.target_db if row.target_db is None else row.target_db
    return replace(row, target_db=target, why="" if override is None else "by override")


def _row(name: str, entry: str, stored: object) -> TensorRow:
    fields = parse_entry(name, entry)
    try:
        shape = tuple(int(size) for size in fields["shape"].split(",") if size)
        begin, end = stored["data_offsets"]  # type: ignore[index]
        dtype = dtype_name(dtype_from_code(fields["dtype"]))
        sqnr = max(float(fields["sqnr_db"]), FLOOR_DB) if "sqnr_db" in fields else None
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
        reason=fields.get("reason"),
    )


def row_json(row: TensorRow) -> dict[str, object]:
    """A row as `--json` prints it."""
    return asdict(row)
