"""Read published artifacts: for verify, inspect, dense tensors, and loading into a model.

An artifact is in a store, in the local cache in front of one, or in a pulled folder. All three return shards whose
digest was checked after the last copy.
"""

import contextlib
import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from birkhoff.codec.container import LOSSLESS_CODECS, CodedTensor, Entry, Head, head_size, parse, parse_head, with_bases
from birkhoff.codec.dtype_names import name_of_code, width_of_code
from birkhoff.codec.errors import FormatError
from birkhoff.codec.profiles import FALLBACKS, Decision
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.blob import Blob
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.fetch import fetch
from birkhoff.pipeline.artifact.pull import MANIFEST_FILE, ROUNDS, VERSION_FILE, blob_files, blob_id, bring
from birkhoff.pipeline.artifact.references import Found, find, noted_signatures, recall
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, check_size, read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.files import fill_checked, read_at_most
from birkhoff.pipeline.registry.documents import FLOOR_DB, BlobRecord, ShardRecord, VersionManifest, blob_key, sha256
from birkhoff.pipeline.registry.labels import read_labels
from birkhoff.pipeline.registry.parallel import pool
from birkhoff.pipeline.registry.trust import ANY, Trust, check_signatures, check_version
from birkhoff.pipeline.registry.versions import Version, resolve
from birkhoff.pipeline.shard.decisions import decisions_of
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.default import borrowed_store
from birkhoff.pipeline.store.keys import NAME_PATTERN

if TYPE_CHECKING:
    from torch import Tensor

_HEADER_GUESS = 64 << 10
"""Bytes that are read first from a container, usually enough for its header."""

_HEADERS_AHEAD = 8
"""Headers read ahead."""

_BASES_HELD = 8
"""Base containers kept in memory: consecutive shards are usually differences to the same one."""


class Artifact(ABC):
    """One version, from any of these places."""

    manifest: VersionManifest
    label: str
    """`demo-sam@v3`, or the folder, for messages."""

    @abstractmethod
    def read_blob(self, record: BlobRecord) -> bytes:
        """Return the stored bytes of a blob, not checked."""

    @abstractmethod
    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Return the first `size` bytes of a shard, or fewer if it is shorter."""

    def blob(self, record: BlobRecord) -> bytes:
        """Return the bytes of a blob, checked against its digest. Raises IntegrityError with the blob's name."""
        body = self.read_blob(record)
        if sha256(body) != record.blob:
            raise IntegrityError(
                f"{self.label}: blob {record.blob} is damaged: {len(body)} bytes with digest {sha256(body)}; "
                "compress again with a fresh store, or restore the object from a backup"
            )
        return body

    def read_into(self, record: BlobRecord, out: memoryview) -> None:
        """Put the bytes of a blob, checked as by `blob`, into `out`, which has as many as the manifest says.

        Raises:
            IntegrityError: As `blob`, or it has another number of bytes.
        """
        body = self.blob(record)
        self._check_length(record, len(body))
        out[:] = body

    def _check_length(self, record: BlobRecord, length: int) -> None:
        if length != record.bytes:
            raise IntegrityError(
                f"{self.label}: blob {record.blob} has {length} bytes, its manifest says {record.bytes}: one of "
                "them is forged; do not use it, and ask its publisher"
            )

    def is_here(self, shard: ShardRecord) -> bool:  # noqa: ARG002
        """Return whether the start of a shard is read from a file, which usually takes microseconds."""
        return False

    @property
    def fetched(self) -> int:
        """Bytes of its blobs fetched from a store so far; 0 for a copy on this machine."""
        return 0

    def labels(self) -> dict[str, str]:
        """Return the labels that the store has now; none for a local copy."""
        return {}

    def file(self, name: str) -> bytes | None:
        """Return a file that goes with the weights, its digest checked; None if there is none of that name."""
        record = next((record for record in self.manifest.files or () if record.name == name), None)
        return None if record is None else self.blob(record)

    def arriving(self) -> Iterator[ShardRecord]:
        """Yield every shard once, as soon as its bytes can be read without waiting, in any order.

        A local copy is looked at first: there is a file of the size that the manifest says, for which a reader may set
        memory aside.

        Raises:
            IntegrityError: There is none.
            Exception: As `coded_of`.
        """
        yield from self.manifest.shards

    def coded_of(self, shard: ShardRecord) -> list[CodedTensor]:
        """Return the stored tensors of a shard. Thread-safe. Raises IntegrityError with the blob's name."""
        return self.coded_in(shard, self.blob(shard))

    def coded_in(self, shard: ShardRecord, blob: bytes | memoryview, head: Head | None = None) -> list[CodedTensor]:
        """Return the stored tensors in a shard's bytes, which `coded_of` reads first. `head` is as in `heads`, if that
        was read. Raises as `coded_of`."""
        try:
            found = with_bases(parse(blob, head), partial(self._tensors_of, shard))
            dense = sum(coded.weights * width_of_code(coded.dtype) for coded in found)
        except FormatError as error:
            raise IntegrityError(f"{self.label}: blob {shard.blob}: {error}") from None
        if dense > shard.source_bytes:
            raise IntegrityError(
                f"{self.label}: blob {shard.blob} decodes to {dense} bytes, its manifest says {shard.source_bytes}: "
                "one of them is forged; do not use it, and ask its publisher"
            )
        return found

    def _tensors_of(self, shard: ShardRecord, digest: str) -> dict[str, CodedTensor]:
        """Return the tensors of a shard's base container, by name. Raises IntegrityError with the container's name."""
        base = next((base for base in shard.bases or () if base.blob == digest), None)
        if base is None:
            raise IntegrityError(
                f"{self.label}: blob {shard.blob} is a difference to blob {digest}, which its manifest does not name: "
                "one of them is forged; do not use it, and ask its publisher"
            )
        if (held := self._bases.get(digest)) is None:
            origin = self.manifest.base.label if self.manifest.base is not None else "its base"
            try:
                held = {coded.name: coded for coded in parse(self.blob(base))}
            except FormatError as error:
                raise IntegrityError(
                    f"{self.label}: blob {digest}: {error}; it is of {origin}, to which tensors of {self.label} are "
                    "differences"
                ) from None
            except (IntegrityError, ArtifactNotFoundError) as error:
                raise type(error)(
                    f"{error}; it is of {origin}, to which tensors of {self.label} are differences"
                ) from None
            self._bases.put(digest, held)
        return held

    @cached_property
    def _bases(self) -> "_Recent":
        return _Recent()

    def coded(self) -> Iterator[CodedTensor]:
        """Yield every stored tensor in the checkpoint's order, one shard in memory at a time. Raises as `coded_of`."""
        for shard in self.manifest.shards:
            yield from self.coded_of(shard)

    def tensors(self) -> "Iterator[tuple[str, Tensor]]":
        """Yield (name, dense CPU tensor) in the checkpoint's order. Raises IntegrityError, FormatError."""
        from birkhoff.codec.tensor import decode_tensor  # reading headers must not import torch

        for coded in self.coded():
            yield coded.name, decode_tensor(coded)


class _Recent:
    """The base containers used last; thread-safe."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, CodedTensor]] = {}
        self._lock = threading.Lock()

    def get(self, digest: str) -> dict[str, CodedTensor] | None:
        with self._lock:
            return self._held.get(digest)

    def put(self, digest: str, tensors: dict[str, CodedTensor]) -> None:
        with self._lock:
            self._held[digest] = tensors
            while len(self._held) > _BASES_HELD:
                del self._held[next(iter(self._held))]


class StoredArtifact(Artifact):
    """A version in a store."""

    def __init__(self, store: Store, version: Version) -> None:
        self._store = store
        self.version = version
        self._reads: list[int] = []  # threads append to it
        self.manifest: VersionManifest = version.manifest
        self.label: str = f"{version.model}@{version.name or version.digest[:12]}"

    @property
    def fetched(self) -> int:
        """Bytes of its blobs fetched from the store so far."""
        return sum(self._reads)

    def labels(self) -> dict[str, str]:
        """Return the labels of the version."""
        return read_labels(self._store, self.version.model, self.version.digest)

    def read_blob(self, record: BlobRecord) -> bytes:
        """Fetch a blob's bytes, and one byte more of a longer object, so that its digest differs."""
        return self._get(record, record.bytes + 1)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Fetch the start of a shard. A longer one is asked for a range: S3 would begin to send all of it."""
        if shard.bytes <= size:
            return self._get(shard, size)
        head = bytearray()
        with self._missing_told(shard):
            buffer = memoryview(bytearray(min(size, _HEADER_GUESS)))
            self._store.copy_range(blob_key(shard.blob), buffer, head.extend, start=0, length=size)
        self._reads.append(len(head))
        return bytes(head)

    def _get(self, record: BlobRecord, length: int) -> bytes:
        with self._missing_told(record):
            body = self._store.get(blob_key(record.blob), length=length)
        self._reads.append(len(body))
        return body

    @contextmanager
    def _missing_told(self, record: BlobRecord) -> Iterator[None]:
        try:
            yield
        except ObjectNotFoundError:
            raise IntegrityError(f"{self.label}: blob {record.blob} is missing from {self._store.url}") from None


class CachedArtifact(Artifact):
    """A version read through the local cache; missing blobs are fetched from the store, if there is one."""

    def __init__(self, found: Found, store: Store | None, cache: BlobCache) -> None:
        self._found, self._store, self._cache = found, store, cache
        self.manifest: VersionManifest = found.manifest
        self.label: str = found.label

    def arriving(self) -> Iterator[ShardRecord]:
        """Yield all shards, cached ones first, the others as they arrive. Raises as the method of `Artifact`."""
        if self._store is None:
            for shard in self.manifest.shards:
                if self._cache.find(shard.blob, shard.bytes) is None:
                    self._check_length(shard, len(self.blob(shard)))
            yield from self.manifest.shards
            return
        records: tuple[BlobRecord, ...] = (*self.manifest.shards, *self.manifest.bases)
        blobs = (Blob(digest=record.blob, size=record.bytes) for record in records)
        waiting: dict[str, list[tuple[ShardRecord, set[str]]]] = defaultdict(list)
        for shard in self.manifest.shards:
            lacks = set(shard.needs)
            for digest in tuple(lacks):
                waiting[digest].append((shard, lacks))
        for blob in fetch(self._store, blobs, self._cache, label=self.label):
            for shard, lacks in waiting.pop(blob.digest, ()):
                lacks.discard(blob.digest)
                if not lacks:
                    yield shard

    def is_here(self, shard: ShardRecord) -> bool:
        """Return whether the cache has the shard."""
        return self._cache.find(shard.blob, shard.bytes) is not None

    def blob(self, record: BlobRecord) -> bytes:
        """Return the bytes of a blob, checked; a damaged or missing file of the cache is fetched again."""
        blob = Blob(digest=record.blob, size=record.bytes)
        for _ in range(ROUNDS):
            if (body := self._cache.read(record.blob)) is not None:
                return body
            bring([blob], self._found, self._store, self._cache, only={record.blob})
        return super().blob(record)

    def read_into(self, record: BlobRecord, out: memoryview) -> None:
        """Read a blob's file in the cache; a damaged or missing one is fetched again."""
        if not fill_checked(out, self._cache.path(record.blob), record.blob):
            super().read_into(record, out)

    def read_blob(self, record: BlobRecord) -> bytes:
        """Read a blob's file in the cache."""
        return self._read(record, None)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Read the start of a shard's file in the cache, fetching it if needed."""
        return self._read(shard, size) if self.is_here(shard) else self.blob(shard)[:size]

    def _read(self, record: BlobRecord, size: int | None) -> bytes:
        path = self._cache.path(record.blob)
        try:
            with path.open("rb") as file:
                return read_at_most(file, size)
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; load again") from None


class PulledArtifact(Artifact):
    """A version in a folder that `pull` wrote."""

    def __init__(self, folder: Path, trust: Trust = ANY) -> None:
        """Read the folder. Raises IntegrityError, and TrustError if it is not signed as `trust` requires."""
        self._folder = folder
        self.label: str = str(folder)
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
        self.manifest: VersionManifest = read_document(VersionManifest, str(folder / MANIFEST_FILE), manifest)
        self._files = blob_files(self.manifest)
        check_signatures(self.manifest.model, name, digest, signatures, trust, self.label)

    def arriving(self) -> Iterator[ShardRecord]:
        """Yield all shards, after a look at the sizes of their files. Raises as the method of `Artifact`."""
        for shard in self.manifest.shards:
            path = self._folder / self._files[blob_id(shard)]
            with self._told(path):
                size = path.stat().st_size
            if size != shard.bytes:
                raise IntegrityError(f"{path} has {size} bytes, its manifest says {shard.bytes}; pull again")
        yield from self.manifest.shards

    def is_here(self, shard: ShardRecord) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def read_into(self, record: BlobRecord, out: memoryview) -> None:
        """Read a blob's file."""
        if not fill_checked(out, self._folder / self._files[blob_id(record)], record.blob):
            super().read_into(record, out)

    def read_blob(self, record: BlobRecord) -> bytes:
        """Read a blob's file."""
        return self._read(self._folder / self._files[blob_id(record)], record.bytes + 1)

    def read_head(self, shard: ShardRecord, size: int) -> bytes:
        """Read the start of a shard's file."""
        return self._read(self._folder / self._files[blob_id(shard)], size)

    def _read(self, path: Path, size: int) -> bytes:
        with self._told(path), path.open("rb") as file:
            return read_at_most(file, size)

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Convert an OSError to an IntegrityError with path and remedy."""
        try:
            yield
        except OSError as error:
            raise IntegrityError(f"{path}: {error.strerror}; pull again") from None


@contextlib.contextmanager
def open_artifact(
    reference: str | os.PathLike[str],
    store: str | Store | None = None,
    *,
    cached: bool = False,
    offline: bool = False,
    trust: Trust = ANY,
) -> Iterator[Artifact]:
    """Open the artifact in a pulled folder, or at `MODEL[@REF]` in a store (`BIRKHOFF_STORE`, else embedded).

    Unless a store is named, a folder of that name takes precedence over a model. A given store is left open. With
    `cached`, blobs are read through the local cache; with `offline` too, the store is not used.

    Raises:
        ArtifactNotFoundError, IntegrityError, StoreError: It cannot be found or read.
        TrustError: It does not meet the demands of `trust`.
    """
    folder = folder_meant(reference, store)
    if folder is not None and (folder / MANIFEST_FILE).is_file():
        yield PulledArtifact(folder, trust)
        return
    if folder is not None and (isinstance(reference, os.PathLike) or folder.is_dir()):
        raise ArtifactNotFoundError(_no_folder(folder))
    reference = str(reference)
    if "/" in reference.partition("@")[0] or reference.startswith((".", "~")):  # not a valid name of a model
        raise ArtifactNotFoundError(_no_folder(Path(reference)))
    if offline:
        cache = BlobCache()
        with _nor_a_folder(reference):
            found = recall(store, reference, cache, trust)
        yield CachedArtifact(found, None, cache)
        return
    with borrowed_store(store) as opened:
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


def folder_meant(reference: str | os.PathLike[str], store: str | Store | None) -> Path | None:
    """Return the folder that a reference may name; None if a store was named and the reference can be its model.

    Otherwise somebody could put a folder into the working directory to replace the store's model.
    """
    model, at, ref = str(reference).partition("@")
    named = NAME_PATTERN.fullmatch(model) and (not at or NAME_PATTERN.fullmatch(ref))
    return None if store is not None and isinstance(reference, str) and named else Path(reference)


@contextlib.contextmanager
def _nor_a_folder(reference: str) -> Iterator[None]:
    """Add to the error of a missing model that there is no such folder either, if one might have been meant."""
    try:
        yield
    except ArtifactNotFoundError as error:
        if (Path(reference) / MANIFEST_FILE).is_file():  # a store was named
            raise ArtifactNotFoundError(f"{error}; for the folder of that name write ./{reference}") from None
        if "@" in reference:
            raise
        raise ArtifactNotFoundError(f"{error}; nor is there a folder {reference!r} here") from None


def _no_folder(folder: Path) -> str:
    if folder.is_dir():
        return f"{folder} holds no {MANIFEST_FILE}: not a folder of `birkhoff pull`; pull into it, or name MODEL[@REF]"
    what = "not a folder" if folder.exists() else "no such folder"
    return f"{folder}: {what}; name one that `birkhoff pull` wrote, or a model: MODEL[@REF]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """A stored tensor as `inspect` shows it. `bits_per_weight` counts its streams, not its header entry."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    bits_per_weight: float
    sqnr_db: float | None
    max_abs_error: float
    target_db: float | None = None
    """The SQNR it was coded for. For a `nominal` one, the SQNR that its step would give with plain rounding."""
    nominal: bool = False
    """Whether no SQNR was promised, because its step follows from the sensitivity of the model's outputs."""
    reason: str | None = None
    """Why it is lossless although it should be coded: a key of `codec.profiles.FALLBACKS`."""
    why: str = ""
    """Why it is lossless or has its own target; empty if it was coded as the profile says."""

    @property
    def lossless(self) -> bool:
        """Whether it decodes to the original bit for bit."""
        return self.action in LOSSLESS_CODECS


def inspect(artifact: Artifact) -> Iterator[TensorRow]:
    """Yield all tensors of an artifact in the checkpoint's order, from the headers of its shards alone.

    A few headers are in memory at a time, however many tensors there are. Raises FormatError, StoreError.
    """
    for head in heads(artifact):
        yield from _rows(artifact, head)


def heads(artifact: Artifact) -> Iterator[Head]:
    """Yield the headers of an artifact's containers, in the order of its shards. Raises as `inspect`."""
    with pool(_HEADERS_AHEAD, "inspect") as threads:
        waiting: deque[Callable[[], bytes]] = deque()
        left = iter(artifact.manifest.shards)
        for _ in artifact.manifest.shards:
            for shard in islice(left, _HEADERS_AHEAD - len(waiting)):
                # Threads that read files would wait for the interpreter's lock twice as long as they read.
                here = artifact.is_here(shard)
                read = partial(_read_header, artifact, shard)
                waiting.append(read if here else threads.submit(read).result)
            yield parse_head(waiting.popleft()())
            interrupt.check()


def inspect_shard(artifact: Artifact, shard: ShardRecord) -> list[TensorRow]:
    """Return the tensors of one shard, in order, from its header alone."""
    return _rows(artifact, parse_head(_read_header(artifact, shard)))


def _read_header(artifact: Artifact, shard: ShardRecord) -> bytes:
    head = artifact.read_head(shard, _HEADER_GUESS)
    while len(head) < (size := head_size(head)):  # version 2 states its size in two steps
        longer = artifact.read_head(shard, size)
        if len(longer) <= len(head):
            break  # the shard is shorter than it claims, which `parse_head` refuses
        head = longer
    return head


def _rows(artifact: Artifact, head: Head) -> list[TensorRow]:
    decisions = decisions_of(artifact.manifest, head.entries)
    return [
        _row(entry, sum(parts), decisions[entry.name]) for entry, parts in zip(head.entries, head.parts, strict=True)
    ]


def _row(entry: Entry, size: int, decision: Decision) -> TensorRow:
    """Return the row of an entry with `size` stored bytes and its tensor's decision."""
    claims, target, why = entry.claims, entry.claims.target_db, ""
    if any(math.isnan(claim or 0) for claim in (claims.sqnr_db, claims.max_abs, target)):
        raise FormatError(f"tensor {entry.name!r}: a claim of its entry is not a number")
    if not entry.lossless:
        target = decision.target_db if target is None else target
        why = "by output sensitivity" if decision.nominal else "" if decision.override is None else "by override"
    elif claims.reason is not None:
        why = FALLBACKS.get(claims.reason, claims.reason)
    elif decision.action == "lossless":
        why = decision.reason
    return TensorRow(
        name=entry.name,
        shape=entry.shape,
        dtype=name_of_code(entry.dtype),
        action=entry.codec,
        bits_per_weight=round(8 * size / max(1, entry.weights), 3),
        sqnr_db=None if claims.sqnr_db is None else max(claims.sqnr_db, FLOOR_DB),
        max_abs_error=claims.max_abs or 0.0,
        target_db=target,
        nominal=decision.nominal and not entry.lossless,
        reason=claims.reason,
        why=why,
    )


def row_json(row: TensorRow) -> dict[str, object]:
    """Return a row as `--json` prints it."""
    return asdict(row)
