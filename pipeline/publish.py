"""Publishing a version, and finding one: names are created, aliases are swapped, readers follow digests.

Order of writes: blobs and shard records (by the workers), then the version's manifest, then its name, then the alias
`latest`. A crash between two of them leaves objects that nothing refers to yet, and the next run goes on from there.
"""

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from birkhoff.pipeline.artifact import (
    ALIAS_LATEST,
    AliasRecord,
    NameRecord,
    ShardRecord,
    VersionManifest,
    alias_key,
    blob_key,
    name_key,
    read_document,
    sha256,
    version_key,
)
from birkhoff.pipeline.errors import (
    ArtifactNotFoundError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
)
from birkhoff.pipeline.manifest import NAME_PATTERN
from birkhoff.pipeline.store import Store

_VERSION_NAME = re.compile(r"v[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RACES = 100
"""Lost races before giving up: with exactly one winner a race, more means the store does not do what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version as found in a store."""

    model: str
    name: str | None
    """Human name, such as `v3`; None when it was asked for by digest and no name was looked up."""
    digest: str
    manifest: VersionManifest
    stored_bytes: int
    """Every byte the store holds for it: blobs, shard records, manifest, name and `latest`."""


def publish(store: Store, manifest: VersionManifest, *, single_publisher: bool = False) -> Version:
    """Make a version whose blobs are all stored visible: manifest, name, alias `latest`.

    A version that has a name already keeps it.

    Raises:
        StoreError: a blob is missing, or the store failed.
    """
    if not is_whole(store, manifest):
        raise StoreError(f"{store.url}: a blob of {manifest.model} has gone since it was stored; run again")
    model, digest, publisher = manifest.model, manifest.digest, uuid.uuid4().hex
    store.create(version_key(model, digest), manifest.to_bytes())
    name = next((name for name, record in names(store, model) if record.digest == digest), None)
    name = name or _take_name(store, model, digest, publisher, single_publisher)
    _advance(store, model, ALIAS_LATEST, name, digest, publisher)
    return _describe(store, model, name, manifest)


def is_whole(store: Store, manifest: VersionManifest) -> bool:
    """Whether every blob of a version is stored in its right size."""

    def present(shard: ShardRecord) -> bool:
        try:
            return store.head(blob_key(shard.blob)).size == shard.bytes
        except ObjectNotFoundError:
            return False

    with ThreadPoolExecutor(max_workers=8) as pool:
        return all(pool.map(present, manifest.shards))


def _take_name(store: Store, model: str, digest: str, publisher: str, single_publisher: bool) -> str:
    """Create the next free `v<N>`: of several publishers exactly one gets each."""
    number = max((_number(name) for name, _ in names(store, model)), default=0)
    for _ in range(_RACES):
        number += 1
        record = NameRecord(
            digest=digest, created=_now(), publisher=publisher, single_publisher=single_publisher or None
        )
        try:
            store.create(name_key(model, f"v{number}"), record.to_bytes())
        except PreconditionError:
            continue
        return f"v{number}"
    raise StoreError(f"{store.url}: no version name of {model} could be had in {_RACES} tries")


def _advance(store: Store, model: str, alias: str, name: str, digest: str, publisher: str) -> None:
    """Move an alias to a version, unless it points at that one or a later one."""
    key = alias_key(model, alias)
    for _ in range(_RACES):
        try:
            body, tag = store.read(key)
        except ObjectNotFoundError:
            body, tag = b"", ""
        current = read_document(AliasRecord, key, body) if tag else None
        if current is not None and _number(current.version) >= _number(name):
            return
        record = AliasRecord(
            version=name, digest=digest, gen=current.gen + 1 if current else 1, moved=_now(), publisher=publisher
        )
        try:
            store.replace(key, record.to_bytes(), tag=tag) if tag else store.create(key, record.to_bytes())
        except PreconditionError:
            continue
        return
    raise StoreError(f"{store.url}: alias {alias} of {model} changed under {_RACES} tries to move it")


def names(store: Store, model: str) -> Iterator[tuple[str, NameRecord]]:
    """(name, record) of the named versions of a model, oldest first."""
    prefix = f"models/{model}/names/"
    found = [info.key.removeprefix(prefix).removesuffix(".json") for info in store.list(prefix)]
    for name in sorted((name for name in found if _VERSION_NAME.fullmatch(name)), key=_number):
        key = name_key(model, name)
        yield name, read_document(NameRecord, key, store.get(key))


def aliases(store: Store, model: str) -> dict[str, AliasRecord]:
    """Aliases of a model."""
    prefix = f"models/{model}/aliases/"
    keys = [info.key for info in store.list(prefix) if info.key.endswith(".json")]
    return {
        key.removeprefix(prefix).removesuffix(".json"): read_document(AliasRecord, key, store.get(key)) for key in keys
    }


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
    name, digest = _find(store, model, ref or ALIAS_LATEST)
    return _describe(store, model, name, load_version(store, model, digest))


def _find(store: Store, model: str, ref: str) -> tuple[str | None, str]:
    try:
        if _DIGEST.fullmatch(ref):
            return next((name for name, record in names(store, model) if record.digest == ref), None), ref
        if _VERSION_NAME.fullmatch(ref):
            key = name_key(model, ref)
            return ref, read_document(NameRecord, key, store.get(key)).digest
        key = alias_key(model, ref)
        alias = read_document(AliasRecord, key, store.get(key))
        return alias.version, alias.digest
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(_missing(store, model, ref)) from None


def load_version(store: Store, model: str, digest: str) -> VersionManifest:
    """The manifest of a version, checked against its digest. Raises as `resolve`."""
    key = version_key(model, digest)
    try:
        body = store.get(key)
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(_missing(store, model, digest)) from None
    if sha256(body) != digest:
        raise IntegrityError(f"{key}: its bytes have digest {sha256(body)}: the stored manifest is damaged")
    return read_document(VersionManifest, key, body)


def _missing(store: Store, model: str, ref: str) -> str:
    known = [name for name, _ in names(store, model)]
    if not known:
        there = ", ".join(models(store)[:10]) or "none"
        return f"{store.url} has no model {model!r}; it has: {there}"
    there = ", ".join([*aliases(store, model), *known[-5:]])
    return f"{store.url}: model {model!r} has no version or alias {ref!r}; it has: {there}"


def _describe(store: Store, model: str, name: str | None, manifest: VersionManifest) -> Version:
    own = len(manifest.to_bytes()) + sum(shard.bytes + len(shard.to_bytes()) for shard in manifest.shards)
    pointers = [alias_key(model, ALIAS_LATEST)] + ([name_key(model, name)] if name else [])
    sizes = [store.head(key).size for key in pointers]
    return Version(model=model, name=name, digest=manifest.digest, manifest=manifest, stored_bytes=own + sum(sizes))


def _number(name: str) -> int:
    return int(name.removeprefix("v"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
