"""Shipping a version from one place to another: everything it is made of, in the order in which it is published.

A version travels as its manifest, what lies beside the manifest (signatures, labels, ...), its name, the alias by which
it was asked for, and its blobs. Shard records are parts of the manifest. `install` writes them into a store as a run
does: under an open run, blobs first, then shard records, then `publish` (manifest, signatures, name, `latest`), then
labels and aliases. So the target never holds an incomplete version, whenever this process dies and whatever a
collection does meanwhile. The same command resumes where it stopped, because it leaves alone what is already there.

The name stays what it was: `v3` is `v3` there, which is what signatures say. It is refused if the target's `v3` is
another version. `latest` goes forward only, as it does for a publisher. Signatures of a version name the store that
they were made for, so readers of the target say which one that is (`--signed-for`), or the version is signed there too;
`Installed.signed_for` says so. Signatures of an alias do not travel: they are of its state in one store.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
from birkhoff.pipeline.registry.signing import Signer, audience_of
from birkhoff.pipeline.registry.versions import Version, missing_blobs, publish, said_figures
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import ALIAS_LATEST
from birkhoff.pipeline.text import short, size

MAX_BESIDE = 128
"""Objects beside a manifest: one for each key that signed it, its labels, and room for what comes."""

MAX_BESIDE_BYTES = 64 << 20
"""Of all of them together."""

BESIDE_PATH = re.compile(r"([a-z0-9][a-z0-9_-]{0,31}/)?[a-z0-9][a-z0-9_-]{0,71}\.json")
"""Where an object can lie below the folder of its version."""

MANIFEST_FILE = "manifest.json"
_SIGNATURES = re.compile(r"signatures/([0-9a-f]{64})\.json")
_THREADS = 4
"""Blobs under way: each is whole in memory for a moment."""

Report = Callable[[int], None]
Bring = Callable[[Sequence[BlobRecord]], None]
"""Puts the blobs of these records into the target, each checked against its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A version on its way, without its blobs."""

    origin: str
    """For messages: the store or the file that it comes from."""
    name: str
    alias: str | None
    """The alias by which it was asked for, other than `latest`."""
    manifest: VersionManifest
    beside: dict[str, bytes]
    """What lies beside the manifest, by path below the folder of the version, sorted."""

    @property
    def label(self) -> str:
        """For messages: `demo-sam@v3`."""
        return f"{self.manifest.model}@{self.name}"

    @property
    def blobs(self) -> list[BlobRecord]:
        """The record of every blob, each blob once, in the manifest's order."""
        return list({(record.blob, record.bytes): record for record in self.manifest.stored}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all blobs."""
        return sum(record.bytes for record in self.blobs)

    def signatures(self) -> list[VersionSignatures]:
        """What keys have said of it. Raises IntegrityError."""
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
        """Its labels. Raises IntegrityError."""
        body = self.beside.get(LABELS_FILE)
        return (
            {}
            if body is None
            else parse_bounded(LabelRecord, f"{self.origin}: {self.label}: {LABELS_FILE}", body).labels
        )

    def others(self) -> dict[str, bytes]:
        """What is neither: copied byte for byte."""
        return {
            path: body
            for path, body in self.beside.items()
            if path != LABELS_FILE and _SIGNATURES.fullmatch(path) is None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What is to become of a version in its target.

    rename: take the next free name instead of keeping its own.
    aliases: point these at it, made where they are not there.
    force: move them although they are protected.
    signer: signs the version and the aliases there.
    single_publisher: the target has no conditional writes.
    """

    rename: bool = False
    aliases: tuple[str, ...] = ()
    force: bool = False
    signer: Signer | None = None
    single_publisher: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What was done. `copied` counts blobs that the target lacked."""

    parcel: Parcel
    version: Version
    copied: int
    copied_bytes: int
    aliases: tuple[str, ...]
    labels: dict[str, str]
    signed_for: tuple[str, ...]
    """The other stores that its signatures name, by keys that have not signed it for the target too."""

    def facts(self) -> dict[str, object]:
        """Under the keys of `--json`."""
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
    """All of a stored version but its blobs.

    Raises:
        ArtifactNotFoundError: it has no name.
        IntegrityError: something lies beside its manifest that cannot.
        StoreError: the store failed.
    """
    if version.name is None:
        raise ArtifactNotFoundError(
            f"{store.url}: version {version.digest[:12]} of {version.model} has no name (any more), by which it could "
            f"be known elsewhere; name one that `{hint('list', version.model)}` shows"
        )
    folder = version_key(version.model, version.digest).removesuffix(MANIFEST_FILE)
    beside: dict[str, bytes] = {}
    for info in store.list(folder):
        path = info.key.removeprefix(folder)
        if path == MANIFEST_FILE:
            continue
        if not BESIDE_PATH.fullmatch(path):
            raise IntegrityError(
                f"{store.url}: {info.key[:300]!r} lies beside a manifest and cannot travel; expected a name such as "
                "labels.json or signatures/KEY.json: remove it"
            )
        beside[path] = _document(store, info.key)
        if len(beside) > MAX_BESIDE or sum(map(len, beside.values())) > MAX_BESIDE_BYTES:
            raise IntegrityError(
                f"{store.url}: {folder} holds more than {MAX_BESIDE} objects or {MAX_BESIDE_BYTES} bytes beside its "
                "manifest, which cannot travel; remove what is not of this program"
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
    """Bring a version from one store into another, only what is missing there.

    Args:
        source: where its blobs are.
        parcel: the version, by `pack`.
        target: where it goes.
        delivery: what is to become of it there.
        report: told of bytes as they are there.

    Raises:
        IntegrityError: a blob of the source is missing or damaged; nothing was named.
        PreconditionError: its name is another version's in the target.
        AliasError: an alias of the target is protected.
        StoreError: a store failed.
    """

    def bring(records: Sequence[BlobRecord]) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="copy") as pool:
            futures = [pool.submit(_bring_one, source, target, parcel, record) for record in records]
            try:
                for future in as_completed(futures):
                    report(future.result())
                    interrupt.check()
            finally:
                pool.shutdown(cancel_futures=True)

    return install(target, parcel, bring, delivery, report=report)


def install(
    target: Store, parcel: Parcel, bring: Bring, delivery: Delivery, *, report: Report = lambda _: None
) -> Installed:
    """Publish a version in a store, its missing blobs by `bring`. Raises as `copy`, and what `bring` raises."""
    manifest, model = parcel.manifest, parcel.manifest.model
    aliases = tuple(dict.fromkeys([*([parcel.alias] if parcel.alias else []), *delivery.aliases]))
    signatures, labels, others = parcel.signatures(), parcel.labels(), parcel.others()
    with open_run(target) as run:
        # What will be refused is refused before anything travels.
        if not delivery.rename:
            check_name(target, model, parcel.name, manifest.digest)
        for alias in aliases:
            check_movable(target, model, alias, to=parcel.name, force=delivery.force)
        missing = missing_blobs(target, parcel.blobs)
        report(parcel.nbytes - sum(record.bytes for record in missing))
        bring(missing)
        run.check()
        for shard in manifest.shards:
            with suppress(PreconditionError):  # the target has led to another blob: it stays what it is there
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
            with suppress(PreconditionError):  # its own stays
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
    """What readers of the target name as the store that a version was signed for; nothing where it is the target."""
    found: set[str] = set()
    for record in signatures:
        key = signatures_key(version.model, version.digest, record.key)
        held = fetch_document(target, VersionSignatures, key).names
        named = {entry.audience for entry in held if entry.version == version.name}
        if audience_of(target) not in named:
            found |= {audience for audience in named if audience is not None}
    return tuple(sorted(found))


def put_blob(target: Store, record: BlobRecord, body: bytes) -> None:
    """Store a blob whose digest was checked. What stands there otherwise is damaged: replaced."""
    keep_object(target, blob_key(record.blob), body)


def _bring_one(source: Store, target: Store, parcel: Parcel, record: BlobRecord) -> int:
    """Copy one blob; returns its size."""
    put_blob(target, record, read_blob(source, parcel, record))
    return record.bytes


def read_blob(source: Store, parcel: Parcel, record: BlobRecord) -> bytes:
    """A blob of the source, checked; a byte that changed on the way is fetched again, once.

    Raises:
        IntegrityError: it is missing or damaged.
        StoreError: the source failed.
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
