"""Publish versions and find them: names are created, aliases are swapped, readers follow digests.

Order of writes: blobs and shard records (by the workers), the version's manifest, its name, the alias `latest`. A crash
in between leaves objects that nothing refers to yet, and the next run continues from there.

The name is claimed before the version is checked for the last time, and made live after: see PROTOCOL.md.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import chain
from typing import Any

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, check_size, read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError, StoreError
from birkhoff.pipeline.notebook import facts_html
from birkhoff.pipeline.registry.aliases import advance, aliases
from birkhoff.pipeline.registry.aliases import sign as sign_alias
from birkhoff.pipeline.registry.documents import (
    NOTHING,
    AliasRecord,
    BlobRecord,
    VersionManifest,
    VersionSignatures,
    alias_key,
    blob_key,
    fetch_document,
    name_key,
    sha256,
    signatures_key,
    version_key,
)
from birkhoff.pipeline.registry.fencing import settle
from birkhoff.pipeline.registry.leases import Lease, open_run
from birkhoff.pipeline.registry.names import (
    VERSION_NAME,
    Claim,
    adopt_claim,
    all_names,
    bury,
    check_name,
    claim_name,
    make_live,
    names,
    read_name,
)
from birkhoff.pipeline.registry.parallel import each
from birkhoff.pipeline.registry.signing import (
    Signer,
    add_signatures,
    alias_signed_by,
    audience_of,
    read_signatures,
    sign_version,
    signed_names,
)
from birkhoff.pipeline.registry.swaps import RACES
from birkhoff.pipeline.store.base import ObjectInfo, Store
from birkhoff.pipeline.store.keys import ALIAS_LATEST, DIGEST, NAME_PATTERN
from birkhoff.pipeline.text import fixed, printable, short, size, some, suggestion

FRESH = timedelta(hours=1)
"""Objects written within this time need no touch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version as found in a store."""

    model: str
    name: str | None
    """Its name, such as `v3`; None if it was found by digest and has no name."""
    digest: str
    manifest: VersionManifest
    alias: str | None = None
    """The alias it was asked for by, if any."""
    pointer: AliasRecord | None = None
    """The state of that alias."""
    same_as: str | None = None
    """Its newest older name, if it was just published under one more."""

    @property
    def reference(self) -> str:
        """Its unique name in its store: `demo-sam@v3`."""
        return f"{self.model}@{self.name or self.digest}"

    @property
    def stored_bytes(self) -> int:
        """As `VersionManifest.stored_bytes`."""
        return self.manifest.stored_bytes

    def _repr_html_(self) -> str:
        return facts_html(self.reference, {**said_figures(self.manifest), "digest": short(self.digest)})


def said_figures(manifest: VersionManifest) -> dict[str, str]:
    """Return profile and figures of a version for people; empty for figures that were not measured."""
    found = manifest.figures()
    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "source": ("source_bytes", size),
        "stored": ("stored_bytes", size),
        "ratio": ("ratio", fixed(2)),
        "SQNR min dB": ("sqnr_db_min", fixed(2)),
        "SQNR median dB": ("sqnr_db_median", fixed(2)),
        "agreement": ("agreement_mean", fixed(3)),
        "output SQNR dB": ("output_db", fixed(2)),
    }
    said = {title: "" if found[key] is None else form(found[key]) for title, (key, form) in forms.items()}
    return {"profile": manifest.profile, **said}


def publish(
    store: Store,
    manifest: VersionManifest,
    *,
    name: str | None = None,
    signatures: Sequence[VersionSignatures] = (),
    single_publisher: bool = False,
    signer: Signer | None = None,
) -> Version:
    """Make a version visible whose blobs are all stored: write manifest, signatures, name, alias `latest`.

    If the newest version is published again, it keeps its name. No pause of this process, clock or collection can make
    the version visible without all of its blobs.

    Args:
        store: The store with its blobs.
        manifest: The version.
        name: The name that it has in another store; None for the next free one.
        signatures: Statements of keys from another store; stored before the name.
        single_publisher: Record in its name that the store has no conditional writes.
        signer: Signs it under its name.

    Raises:
        PreconditionError: The name is another version's here, or was retired.
        StoreError: A blob is missing, or the store failed.
    """
    model, digest, publisher = manifest.model, manifest.digest, uuid.uuid4().hex

    def sign(name: str, lost: str | None) -> None:
        for record in signatures:
            add_signatures(store, model, digest, record)
        if signer is not None:
            sign_version(store, signer, model, name, digest, withdraw=lost)

    with open_run(store) as run:
        known = _keep_young(store, manifest, run.renew())
        run.check()
        # Names tell what was published when, so content that comes back gets a new one: `latest` only goes forward, and
        # could not return to the old name.
        given = all_names(store, model, newest_first=True)
        highest = next(given, None) if name is None else None
        live = (entry for entry in chain((highest,), given) if entry is not None and entry[1].live)
        newest = next(live, None) if name is None else None
        if name is not None and check_name(store, model, name, digest):
            older = None
            sign(name, None)
        elif newest is not None and newest[1].digest == digest:
            name, older = newest[0], None
            sign(name, None)
        else:
            older = next((found for found, record in live if record.digest == digest), None) if known else None
            claim = partial(claim_name, store, model, digest, publisher, single_publisher=single_publisher)
            left = None
            if highest is not None and highest[1].claimed and highest[1].digest == digest:
                left = adopt_claim(store, model, highest[0], digest, publisher)
            keys = {record.key for record in signatures} | ({signer.public.id} if signer is not None else set())
            name = _take_name(store, manifest, run, left, partial(claim, wanted=name, announce=sign), sign, keys)
        run.check()
        advance(store, model, name, publisher, signer=signer)
        return Version(model=model, name=name, digest=digest, manifest=manifest, same_as=older)


def _keep_young(store: Store, manifest: VersionManifest, now: datetime) -> bool:
    """Store the manifest, and touch objects older than `FRESH`, so that their grace period starts again.

    Returns whether the manifest was there. Raises StoreError if a blob is missing.
    """
    found = each(lambda record: _blob(store, record), manifest.stored)
    if None in found:
        raise _gone(store, manifest)
    key = version_key(manifest.model, manifest.digest)
    there = _info(store, key)
    old = [info.key for info in (*found, there) if info is not None and info.modified < now - FRESH]
    try:
        each(store.touch, old)
    except ObjectNotFoundError:
        raise _gone(store, manifest) from None
    store.create(key, manifest.to_bytes())
    return there is not None


def _take_name(
    store: Store,
    manifest: VersionManifest,
    run: Lease,
    claimed: Claim | None,
    claim: Callable[[], Claim],
    sign: Callable[[str, str | None], None],
    keys: AbstractSet[str],
) -> str:
    """Claim a name unless one is `claimed`, make sure that no collection deletes what it needs, and make it live.

    Raises:
        StoreError: A blob is missing; the claim is withdrawn.
    """
    model, digest = manifest.model, manifest.digest
    needed = {version_key(model, digest), *(blob_key(record.blob) for record in manifest.stored)}
    needed |= {signatures_key(model, digest, key) for key in keys}
    for _ in range(RACES):
        claimed = claimed or claim()
        settle(store, run, needed | {name_key(model, claimed.name)})
        if _info(store, version_key(model, digest)) is None:
            store.create(version_key(model, digest), manifest.to_bytes())
        if not is_whole(store, manifest):
            if not claimed.record.live:  # another publisher of this version may have made a wanted name live
                bury(store, model, claimed.name, claimed.record, claimed.tag)
            raise _gone(store, manifest)
        sign(claimed.name, None)  # again, because a collection may have deleted the first signature
        if make_live(store, model, claimed):
            return claimed.name
        claimed = None
    raise StoreError(f"{store.url}: every name of {model} that was claimed in {RACES} tries was collected")


def _gone(store: Store, manifest: VersionManifest) -> StoreError:
    return StoreError(f"{store.url}: a blob of {manifest.model} has gone since it was stored; run again")


def sign_published(store: Store, reference: str, signer: Signer) -> Version:
    """Sign a stored version under its name, or under all its names if `reference` is a digest; sign the alias too.

    Nothing else changes: no name is given and no alias moved. It may be called twice.

    Raises:
        ArtifactNotFoundError: There is no such version, or it has no name to sign.
        PreconditionError: The alias moved meanwhile.
        StoreError, IntegrityError: The store failed.
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
    """Return whether a version found by an alias is signed under its name by this key, and the alias too."""
    if version.alias is None or version.pointer is None:
        return False
    record = read_signatures(store, version.model, version.digest, signer.public)
    audience = audience_of(store)
    named = version.name in signed_names(signer.public, version.model, version.digest, record, audience=audience)
    return named and alias_signed_by(signer.public, version.model, version.alias, version.pointer, audience=audience)


def is_whole(store: Store, manifest: VersionManifest, seen: set[tuple[str, int]] | None = None) -> bool:
    """Return whether every blob of a version is stored at its right size. `seen` is as in `missing_blobs`."""
    return not missing_blobs(store, manifest.stored, seen)


def missing_blobs(
    store: Store, records: Iterable[BlobRecord], seen: set[tuple[str, int]] | None = None
) -> list[BlobRecord]:
    """Return the records whose blob a store lacks or has at another size. Each blob once; none is read.

    The store is not asked for blobs, with their sizes, that were `seen` a moment ago for another version. What it has
    is added to them. Raises StoreError.
    """
    seen = set() if seen is None else seen
    wanted = {key: record for record in records if (key := (record.blob, record.bytes)) not in seen}
    found = each(lambda record: _blob(store, record), wanted.values())
    there = {key for key, info in zip(wanted, found, strict=True) if info is not None}
    seen |= there
    return [record for key, record in wanted.items() if key not in there]


def _blob(store: Store, record: BlobRecord) -> ObjectInfo | None:
    """Return the store's facts about a blob; None unless it is there at its right size."""
    info = _info(store, blob_key(record.blob))
    return info if info is not None and info.size == record.bytes else None


def _info(store: Store, key: str) -> ObjectInfo | None:
    try:
        return store.head(key)
    except ObjectNotFoundError:
        return None


def models(store: Store) -> list[str]:
    """Return the names of the models that have a version name."""
    parts = (info.key.split("/") for info in store.list("models/"))
    return sorted({part[1] for part in parts if len(part) > 3 and part[2] == "names"})


def resolve(store: Store, reference: str) -> Version:
    """Return the version of `MODEL`, `MODEL@ALIAS`, `MODEL@v3` or `MODEL@DIGEST`, its manifest checked.

    Raises:
        ArtifactNotFoundError: There is no such model, version or alias.
        IntegrityError: The manifest does not match its digest.
    """
    model, _, ref = reference.partition("@")
    if not NAME_PATTERN.fullmatch(model) or (ref and not NAME_PATTERN.fullmatch(ref)):
        raise ArtifactNotFoundError(f"{reference!r} is no MODEL[@VERSION|ALIAS|DIGEST]")
    name, digest, pointer = _find(store, model, ref or ALIAS_LATEST)
    version = Version(model=model, name=name, digest=digest, manifest=load_version(store, model, digest))
    return version if pointer is None else replace(version, alias=ref or ALIAS_LATEST, pointer=pointer)


def is_fixed(reference: str) -> bool:
    """Whether `MODEL@REF` means the same version for ever: REF is a version's name or digest."""
    ref = reference.partition("@")[2]
    return bool(VERSION_NAME.fullmatch(ref) or DIGEST.fullmatch(ref))


def _find(store: Store, model: str, ref: str) -> tuple[str | None, str, AliasRecord | None]:
    """Return name and digest, and the alias that led to them."""
    try:
        if DIGEST.fullmatch(ref):
            return next((name for name, record in names(store, model) if record.digest == ref), None), ref, None
        if VERSION_NAME.fullmatch(ref):
            return ref, _named(store, model, ref), None
        alias = fetch_document(store, AliasRecord, alias_key(model, ref))
    except ObjectNotFoundError:
        alias = None
    if alias is None or alias.digest == NOTHING:
        raise ArtifactNotFoundError(_missing(store, model, ref))
    return alias.version, alias.digest, alias


def _named(store: Store, model: str, name: str) -> str:
    record = read_name(store, model, name)
    if not record.live:
        raise ArtifactNotFoundError(f"{_missing(store, model, name)}; {name} was retired on {record.retired}")
    return record.digest


def latest_version(store: Store, model: str) -> Version | None:
    """Return the version that `latest` points at; None if there is none."""
    try:
        return resolve(store, model)
    except ArtifactNotFoundError:
        return None


def load_version(store: Store, model: str, digest: str) -> VersionManifest:
    """Return the manifest of a version, checked against its digest. Raises what `resolve` raises."""
    key = version_key(model, digest)
    try:
        body = store.get(key, length=MAX_DOCUMENT_BYTES + 1)
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(_missing(store, model, digest)) from None
    check_size(key, body)
    if sha256(body) != digest:
        raise IntegrityError(f"{key}: its bytes have digest {sha256(body)}: the stored manifest is damaged")
    manifest = read_document(VersionManifest, key, body)
    if manifest.digest != digest:  # pulled folders and the cache write it again, in this package's spelling
        raise IntegrityError(f"{key}: not in the spelling of this package; publish the version again")
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
        "`compress`"
    )
