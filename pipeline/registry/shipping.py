"""Copy a version from one place to another: all its parts, in the order of publishing.

A version travels as its manifest, the objects beside the manifest (signatures, labels, ...), its name, the alias it was
asked for by, and its blobs. Shard records are parts of the manifest. `install` writes them into a store as a run does:
under an open run, blobs first, then shard records, then `publish` (manifest, signatures, name, `latest`), then labels
and aliases. So the target never holds an incomplete version, whenever this process dies and whatever a collection does
meanwhile. What is already there is left alone, so the same command resumes.

The name stays the same, because signatures cover it: `v3` is `v3` there, or refused if the target's `v3` is another
version. `latest` only moves forward, as for a publisher. A version's signatures name the store that they were made for:
either readers of the target name that store (`--signed-for`), or the version is signed there too; see
`Installed.signed_for`. Signatures of an alias do not travel, because they are about its state in one store.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, check_size, parse_bounded
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError, PreconditionError
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.notebook import facts_html
from birkhoff.pipeline.registry.aliases import check_movable, promote
from birkhoff.pipeline.registry.documents import (
    BlobRecord,
    VersionManifest,
    VersionSignatures,
    blob_key,
    fetch_document,
    keep_object,
    sha256,
    shard_key,
    signatures_key,
    version_key,
)
from birkhoff.pipeline.registry.labels import LABELS_FILE, LabelRecord, change_labels
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.names import check_name
from birkhoff.pipeline.registry.parallel import pool
from birkhoff.pipeline.registry.signing import Signer, audience_of
from birkhoff.pipeline.registry.versions import Version, missing_blobs, publish, said_figures
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import ALIAS_LATEST
from birkhoff.pipeline.text import short, size

MAX_BESIDE = 128
"""Most objects beside a manifest: one for each key that signed it, its labels, and room for later kinds."""

MAX_BESIDE_BYTES = 64 << 20
"""Most bytes of all of them together."""

BESIDE_PATH = re.compile(r"([a-z0-9][a-z0-9_-]{0,31}/)?[a-z0-9][a-z0-9_-]{0,71}\.json")
"""Paths that an object can have below its version's folder."""

MANIFEST_FILE = "manifest.json"
_SIGNATURES = re.compile(r"signatures/([0-9a-f]{64})\.json")
_THREADS = 4
"""Blobs copied at a time. Each is whole in memory for a moment."""

Report = Callable[[int], None]
Bring = Callable[[Sequence[BlobRecord]], None]
"""Puts the blobs of these records into the target, each checked against its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A version on its way, without its blobs."""

    origin: str
    """The store or file that it comes from, for messages."""
    name: str
    alias: str | None
    """The alias it was asked for by, unless that is `latest`."""
    manifest: VersionManifest
    beside: dict[str, bytes]
    """Objects beside the manifest, by path below the version's folder, sorted."""

    @property
    def label(self) -> str:
        """The version, for messages: `demo-sam@v3`."""
        return f"{self.manifest.model}@{self.name}"

    @property
    def blobs(self) -> list[BlobRecord]:
        """The records of its blobs, each blob once, in the manifest's order."""
        return list({(record.blob, record.bytes): record for record in self.manifest.stored}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs."""
        return sum(record.bytes for record in self.blobs)

    def signatures(self) -> list[VersionSignatures]:
        """Return its signatures, by key. Raises IntegrityError."""
        found = []
        for path, body in self.beside.items():
            if (key := _SIGNATURES.fullmatch(path)) is not None:
                record = parse_bounded(VersionSignatures, f"{self.origin}: {self.label}: {path}", body)
                if record.key != key[1]:
                    raise IntegrityError(
                        f"{self.origin}: {self.label}: {path} holds signatures of key {record.key}: misplaced"
                    )
                found.append(record)
        return found

    def labels(self) -> dict[str, str]:
        """Return its labels. Raises IntegrityError."""
        body = self.beside.get(LABELS_FILE)
        return (
            {}
            if body is None
            else parse_bounded(LabelRecord, f"{self.origin}: {self.label}: {LABELS_FILE}", body).labels
        )

    def others(self) -> dict[str, bytes]:
        """Return the other objects, which are copied byte for byte."""
        return {
            path: body
            for path, body in self.beside.items()
            if path != LABELS_FILE and _SIGNATURES.fullmatch(path) is None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a version is named, aliased and signed in its target.

    rename: Take the next free name instead of its own.
    aliases: Point these at it; missing ones are created.
    force: Move protected aliases too.
    signer: Signs the version and the aliases there.
    single_publisher: The target has no conditional writes.
    """

    rename: bool = False
    aliases: tuple[str, ...] = ()
    force: bool = False
    signer: Signer | None = None
    single_publisher: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The result of a copy. `copied` counts blobs that the target lacked."""

    parcel: Parcel
    version: Version
    copied: int
    copied_bytes: int
    aliases: tuple[str, ...]
    labels: dict[str, str]
    signed_for: tuple[str, ...]
    """Other stores named by its signatures, from keys that have not signed it for the target too."""

    def facts(self) -> dict[str, object]:
        """Return the result under the keys of `--json`."""
        return {
            "model": self.version.model,
            "version": self.version.name,
            "digest": self.version.digest,
            "renamed_from": None if self.version.name == self.parcel.name else self.parcel.name,
            "blobs": len(self.parcel.blobs),
            "copied_blobs": self.copied,
            "copied_bytes": self.copied_bytes,
            "aliases": list(self.aliases),
            "labels": self.labels,
            "signed_for": list(self.signed_for),
        }

    def _repr_html_(self) -> str:
        more = {"digest": short(self.version.digest), "copied": size(self.copied_bytes)}
        return facts_html(self.version.reference, {**said_figures(self.version.manifest), **more})


def pack(store: Store, version: Version) -> Parcel:
    """Return a stored version without its blobs.

    Raises:
        ArtifactNotFoundError: It has no name.
        IntegrityError: An object beside its manifest cannot travel.
        StoreError: The store failed.
    """
    if version.name is None:
        raise ArtifactNotFoundError(
            f"{store.url}: version {version.digest[:12]} of {version.model} has no name (any more), and is copied by "
            f"name; choose one that `{hint('list', version.model)}` shows"
        )
    folder = version_key(version.model, version.digest).removesuffix(MANIFEST_FILE)
    beside: dict[str, bytes] = {}
    for info in store.list(folder):
        path = info.key.removeprefix(folder)
        if path == MANIFEST_FILE:
            continue
        if not BESIDE_PATH.fullmatch(path):
            raise IntegrityError(
                f"{store.url}: {info.key[:300]!r} lies beside a manifest and cannot be copied; expected a name such as "
                "labels.json or signatures/KEY.json: remove it"
            )
        beside[path] = _document(store, info.key)
        if len(beside) > MAX_BESIDE or sum(map(len, beside.values())) > MAX_BESIDE_BYTES:
            raise IntegrityError(
                f"{store.url}: {folder} holds more than {MAX_BESIDE} objects or {MAX_BESIDE_BYTES} bytes beside its "
                "manifest, too many to copy; remove those that birkhoff did not write"
            )
    return Parcel(
        origin=store.url,
        name=version.name,
        alias=None if version.alias == ALIAS_LATEST else version.alias,
        manifest=version.manifest,
        beside=dict(sorted(beside.items())),
    )


def copy(
    source: Store, parcel: Parcel, target: Store, delivery: Delivery, *, report: Report = lambda _: None
) -> Installed:
    """Copy a version from one store to another, only what the target lacks.

    Args:
        source: The store with its blobs.
        parcel: The version, from `pack`.
        target: The store to copy to.
        delivery: How it is named, aliased and signed there.
        report: Called with numbers of bytes as they arrive.

    Raises:
        IntegrityError: A blob of the source is missing or damaged; nothing was named.
        PreconditionError: The target has another version under its name.
        AliasError: An alias in the target is protected.
        StoreError: A store failed.
    """

    def bring(records: Sequence[BlobRecord]) -> None:
        with pool(_THREADS, "copy") as threads:
            futures = [threads.submit(_bring_one, source, target, parcel, record) for record in records]
            for future in as_completed(futures):
                report(future.result())
                interrupt.check()

    return install(target, parcel, bring, delivery, report=report)


def install(
    target: Store, parcel: Parcel, bring: Bring, delivery: Delivery, *, report: Report = lambda _: None
) -> Installed:
    """Publish a version in a store; `bring` stores the missing blobs. Raises what `copy` and `bring` raise."""
    manifest, model = parcel.manifest, parcel.manifest.model
    aliases = tuple(dict.fromkeys([*([parcel.alias] if parcel.alias else []), *delivery.aliases]))
    signatures, labels, others = parcel.signatures(), parcel.labels(), parcel.others()
    with open_run(target) as run:
        # Refuse before anything is copied.
        if not delivery.rename:
            check_name(target, model, parcel.name, manifest.digest)
        for alias in aliases:
            check_movable(target, model, alias, to=parcel.name, force=delivery.force)
        missing = missing_blobs(target, parcel.blobs)
        report(parcel.nbytes - sum(record.bytes for record in missing))
        bring(missing)
        run.check()
        for shard in manifest.shards:
            with suppress(PreconditionError):  # the target has another blob for this key, and keeps it
                target.create(shard_key(shard.key), shard.to_bytes())
        version = publish(
            target,
            manifest,
            name=None if delivery.rename else parcel.name,
            signatures=signatures,
            single_publisher=delivery.single_publisher,
            signer=delivery.signer,
        )
        folder = version_key(model, version.digest).removesuffix(MANIFEST_FILE)
        for path, body in others.items():
            with suppress(PreconditionError):  # the target keeps its own
                target.create(f"{folder}{path}", body)
        labels = change_labels(target, model, version.digest, labels)
        for alias in aliases:
            promote(target, model, version.name or "", alias, force=delivery.force, signer=delivery.signer)
    return Installed(
        parcel=parcel,
        version=version,
        copied=len(missing),
        copied_bytes=sum(record.bytes for record in missing),
        aliases=aliases,
        labels=labels,
        signed_for=_signed_for(target, version, signatures),
    )


def _signed_for(target: Store, version: Version, signatures: Sequence[VersionSignatures]) -> tuple[str, ...]:
    """Return the stores that a version was signed for, to be named by readers of the target; empty if it is the
    target."""
    found: set[str] = set()
    for record in signatures:
        key = signatures_key(version.model, version.digest, record.key)
        held = fetch_document(target, VersionSignatures, key).names
        named = {entry.audience for entry in held if entry.version == version.name}
        if audience_of(target) not in named:
            found |= {audience for audience in named if audience is not None}
    return tuple(sorted(found))


def put_blob(target: Store, record: BlobRecord, body: bytes) -> None:
    """Store a blob whose digest was checked; a damaged object under its key is replaced."""
    keep_object(target, blob_key(record.blob), body)


def _bring_one(source: Store, target: Store, parcel: Parcel, record: BlobRecord) -> int:
    """Copy one blob; return its size in bytes."""
    put_blob(target, record, read_blob(source, parcel, record))
    return record.bytes


def read_blob(source: Store, parcel: Parcel, record: BlobRecord) -> bytes:
    """Return a blob of the source, checked. A damaged one is fetched once more, in case it changed on the way.

    Raises:
        IntegrityError: It is missing or damaged.
        StoreError: The source failed.
    """
    body = b""
    for _ in range(2):
        try:
            body = source.get(blob_key(record.blob), length=record.bytes + 1)
        except ObjectNotFoundError:
            raise IntegrityError(f"{parcel.label}: blob {record.blob} is missing from {source.url}") from None
        if len(body) == record.bytes and sha256(body) == record.blob:
            return body
    raise IntegrityError(
        f"{parcel.label}: blob {record.blob} is damaged in {source.url}: {len(body)} bytes with digest {sha256(body)}; "
        "compress again with a fresh store, or restore the object from a backup"
    )


def _document(store: Store, key: str) -> bytes:
    body = store.get(key, length=MAX_DOCUMENT_BYTES + 1)
    check_size(key, body)
    return body
