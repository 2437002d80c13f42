"""Publishing a version, and finding one: names are created, aliases are swapped, readers follow digests.

Order of writes: blobs and shard records (by the workers), then the version's manifest, then its name, then the alias
`latest`. A crash between two of them leaves objects that nothing refers to yet, and the next run goes on from there.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from birkhoff.pipeline.aliases import advance, aliases
from birkhoff.pipeline.aliases import sign as sign_alias
from birkhoff.pipeline.artifact import (
    MAX_DOCUMENT_BYTES,
    AliasRecord,
    BlobRecord,
    VersionManifest,
    alias_key,
    blob_key,
    check_size,
    fetch_document,
    read_document,
    sha256,
    version_key,
)
from birkhoff.pipeline.errors import (
    ArtifactNotFoundError,
    IntegrityError,
    ObjectNotFoundError,
    StoreError,
    printable,
    some,
    suggestion,
)
from birkhoff.pipeline.leases import open_run
from birkhoff.pipeline.names import VERSION_NAME, names, read_name, take_name
from birkhoff.pipeline.signing import Signer, alias_signed_by, read_signatures, sign_version, signed_names
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.store_keys import ALIAS_LATEST, DIGEST, NAME_PATTERN


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version as found in a store."""

    model: str
    name: str | None
    """Human name, such as `v3`; None when it was asked for by digest and no name was looked up."""
    digest: str
    manifest: VersionManifest
    alias: str | None = None
    """The alias by which it was asked for, if it was."""
    pointer: AliasRecord | None = None
    """The state of that alias."""
    same_as: str | None = None
    """The newest of its older names, where it was just published under one more."""

    @property
    def stored_bytes(self) -> int:
        """As `VersionManifest.stored_bytes`: the same whenever and however it is asked for."""
        return self.manifest.stored_bytes


def publish(
    store: Store, manifest: VersionManifest, *, single_publisher: bool = False, signer: Signer | None = None
) -> Version:
    """Make a version whose blobs are all stored visible: manifest, signature, name, alias `latest`.

    The newest version, published again, keeps its name. Looks at the blobs under an open run of its own: whatever was
    collected before, none of them goes from there on.

    Raises:
        StoreError: a blob is missing, or the store failed.
    """
    model, digest, publisher = manifest.model, manifest.digest, uuid.uuid4().hex

    def sign(name: str, lost: str | None) -> None:
        if signer is not None:
            sign_version(store, signer, model, name, digest, withdraw=lost)

    with open_run(store) as run:
        if not is_whole(store, manifest):
            raise StoreError(f"{store.url}: a blob of {manifest.model} has gone since it was stored; run again")
        store.create(version_key(model, digest), manifest.to_bytes())
        run.check()
        # Names tell what was published when: content that was there before and comes back gets a new one.
        # `latest` goes forward only, so it could not go back to an old name.
        held = [(name, record.digest == digest) for name, record in names(store, model)]
        older = next((name for name, same in reversed(held) if same), None)
        if older is not None and held[-1][0] == older:
            name, older = older, None
            sign(name, None)
        else:
            name = take_name(store, model, digest, publisher, single_publisher=single_publisher, announce=sign)
        run.check()
        advance(store, model, name, digest, publisher, signer=signer)
        return Version(model=model, name=name, digest=digest, manifest=manifest, same_as=older)


def sign_published(store: Store, reference: str, signer: Signer) -> Version:
    """Sign a version that is there, under its name, or all its names where it was asked for by digest; and the alias.

    Nothing else changes: no name is given, no alias moved. May be called twice.

    Raises:
        ArtifactNotFoundError: no such version, or one without a name, which is what a signature is about.
        PreconditionError: the alias moved meanwhile.
        StoreError, IntegrityError: the store failed.
    """
    with open_run(store):
        version = resolve(store, reference)
        model, digest = version.model, version.digest
        if version.name is None:
            raise ArtifactNotFoundError(f"{reference} has no name (any more); compress its source again to publish it")
        held = [version.name]
        if reference.endswith(f"@{digest}"):
            held = [name for name, record in names(store, model) if record.digest == digest]
        for name in held:
            sign_version(store, signer, model, name, digest)
        if version.alias is not None:
            sign_alias(store, model, version.alias, version.name, signer)
        return version


def is_signed(store: Store, version: Version, signer: Signer) -> bool:
    """Whether a version that was found by an alias is signed under its name by this key, and the alias too."""
    if version.alias is None or version.pointer is None:
        return False
    record = read_signatures(store, version.model, version.digest, signer.public)
    named = version.name in signed_names(signer.public, version.model, version.digest, record)
    return named and alias_signed_by(signer.public, version.model, version.alias, version.pointer)


def is_whole(store: Store, manifest: VersionManifest) -> bool:
    """Whether every blob of a version is stored in its right size."""

    def present(record: BlobRecord) -> bool:
        try:
            return store.head(blob_key(record.blob)).size == record.bytes
        except ObjectNotFoundError:
            return False

    with ThreadPoolExecutor(max_workers=8) as pool:
        return all(pool.map(present, manifest.stored))


def models(store: Store) -> list[str]:
    """Names of the models that have a version."""
    parts = (info.key.split("/") for info in store.list("models/"))
    return sorted({part[1] for part in parts if len(part) > 3 and part[2] == "names"})


def resolve(store: Store, reference: str) -> Version:
    """The version of `MODEL`, `MODEL@ALIAS`, `MODEL@v3` or `MODEL@DIGEST`, its manifest checked against its digest.

    Raises:
        ArtifactNotFoundError: no such model, version or alias.
        IntegrityError: the manifest does not match its digest.
    """
    model, _, ref = reference.partition("@")
    if not NAME_PATTERN.fullmatch(model) or (ref and not NAME_PATTERN.fullmatch(ref)):
        raise ArtifactNotFoundError(f"{reference!r} is no MODEL[@VERSION|ALIAS|DIGEST]")
    name, digest, pointer = _find(store, model, ref or ALIAS_LATEST)
    version = Version(model=model, name=name, digest=digest, manifest=load_version(store, model, digest))
    return version if pointer is None else replace(version, alias=ref or ALIAS_LATEST, pointer=pointer)


def _find(store: Store, model: str, ref: str) -> tuple[str | None, str, AliasRecord | None]:
    """Name, digest, and the alias that led to them."""
    try:
        if DIGEST.fullmatch(ref):
            return next((name for name, record in names(store, model) if record.digest == ref), None), ref, None
        if VERSION_NAME.fullmatch(ref):
            return ref, _named(store, model, ref), None
        alias = fetch_document(store, AliasRecord, alias_key(model, ref))
        return alias.version, alias.digest, alias
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(_missing(store, model, ref)) from None


def _named(store: Store, model: str, name: str) -> str:
    record = read_name(store, model, name)
    if record.retired is not None:
        raise ArtifactNotFoundError(f"{_missing(store, model, name)}; {name} was retired on {record.retired}")
    return record.digest


def latest_version(store: Store, model: str) -> Version | None:
    """The version that `latest` points at, if there is one."""
    try:
        return resolve(store, model)
    except ArtifactNotFoundError:
        return None


def load_version(store: Store, model: str, digest: str) -> VersionManifest:
    """The manifest of a version, checked against its digest. Raises as `resolve`."""
    key = version_key(model, digest)
    try:
        body = store.get(key, length=MAX_DOCUMENT_BYTES + 1)
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(_missing(store, model, digest)) from None
    check_size(key, body)
    if sha256(body) != digest:
        raise IntegrityError(f"{key}: its bytes have digest {sha256(body)}: the stored manifest is damaged")
    manifest = read_document(VersionManifest, key, body)
    if manifest.model != model:
        raise IntegrityError(
            f"{key}: a version of model {printable(manifest.model[:80])!r}, not of {model!r}: misplaced"
        )
    return manifest


def _missing(store: Store, model: str, ref: str) -> str:
    known = [name for name, _ in names(store, model)]
    if known:
        named = list(aliases(store, model))
        there = [*named, *reversed(known)]  # newest first
        return f"{store.url}: model {model!r} has no version or alias{suggestion(ref, named)}; it has: {some(there)}"
    there = models(store)
    if there:
        return f"{store.url} has no model{suggestion(model, there)}; it has: {some(there)}"
    return (
        f"{store.url} has no model {model!r}, nor any other: check --store and BIRKHOFF_STORE, or publish one with "
        "`birkhoff compress`"
    )
