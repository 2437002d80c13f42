"""Resolve references to a version in a store or, offline, to the one that was pulled last.

MODEL, MODEL@latest, MODEL@v3, MODEL@<digest>
"""

import json
from dataclasses import dataclass
from typing import Any

from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError
from birkhoff.pipeline.registry.documents import VersionManifest, VersionSignatures, sha256
from birkhoff.pipeline.registry.trust import Trust, check_signatures, check_version
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store, StoreAddress
from birkhoff.pipeline.store.default import default_store_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A version that a reference resolved to. `name` is such as v3; None if it was found by digest and has none."""

    model: str
    name: str | None
    digest: str
    manifest: VersionManifest
    signatures: tuple[VersionSignatures, ...] = ()
    """The signatures that were required."""

    @property
    def label(self) -> str:
        """The reference, for messages: `demo-sam@v3`."""
        return f"{self.model}@{self.name or self.digest[:12]}"

    def pointer(self) -> dict[str, str | None]:
        """Return model, name and digest, as a pulled folder stores them."""
        return {"model": self.model, "version": self.name, "digest": self.digest}

    def note(self) -> dict[str, object]:
        """Return what a pulled folder and the cache store besides the manifest."""
        return {**self.pointer(), "signatures": [record.model_dump(mode="json") for record in self.signatures]}


def find(store: Store, reference: str, cache: BlobCache, trust: Trust) -> Found:
    """Return the version in a store, and remember it in the cache.

    Raises TrustError if it does not meet the demands of `trust`, else what `versions.resolve` raises.
    """
    version = resolve(store, reference)
    signatures = check_version(store, version, trust)
    found = Found(
        model=version.model,
        name=version.name,
        digest=version.digest,
        manifest=version.manifest,
        signatures=signatures,
    )
    body = json.dumps({**found.note(), "manifest": found.manifest.to_bytes().decode()}).encode()
    for known in {reference, f"{found.model}@{found.digest}"}:
        cache.remember(f"{store.url} {known}", body)
    return found


def recall(store: str | Store | None, reference: str, cache: BlobCache, trust: Trust) -> Found:
    """Return the last version of a reference from the cache alone.

    Raises:
        ArtifactNotFoundError: It was never pulled from this store.
        TrustError: It was pulled without the signature that `trust` requires.
        IntegrityError: The cache's record is damaged.
    """
    url = store.url if isinstance(store, Store) else StoreAddress.parse(default_store_url(store)).url
    body = cache.recall(f"{url} {reference}")
    if body is None:
        raise ArtifactNotFoundError(
            f"{reference}: the cache {cache.folder} has no such version of {url}; pull it once without --offline"
        )
    try:
        note = json.loads(body)
        text, digest = note["manifest"].encode(), str(note["digest"])
        if sha256(text) != digest:
            raise ValueError("its manifest does not match its digest")
        manifest = read_document(VersionManifest, reference, text)
        found = Found(
            model=note["model"],
            name=note["version"],
            digest=digest,
            manifest=manifest,
            signatures=noted_signatures(note),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IntegrityError) as error:
        raise IntegrityError(
            f"cache {cache.folder}: its note of {reference} is damaged ({error}); pull again"
        ) from None
    check_signatures(found.model, found.name, digest, found.signatures, trust, f"cache {cache.folder}")
    return found


def noted_signatures(note: dict[str, Any]) -> tuple[VersionSignatures, ...]:
    """Return the signatures of a `Found.note`. Raises IntegrityError, TypeError."""
    held = note.get("signatures", [])
    return tuple(read_document(VersionSignatures, "a signature", json.dumps(entry).encode()) for entry in held[:64])
