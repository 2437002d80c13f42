"""Pull versions into folders: `birkhoff.pull`, and the steps that `birkhoff pull` shares with it."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from birkhoff.codec.errors import BirkhoffWarning
from birkhoff.pipeline.api.transfer import transferring
from birkhoff.pipeline.artifact.cache import BlobCache, usable_cache
from birkhoff.pipeline.artifact.oms import remembered
from birkhoff.pipeline.artifact.references import Found, find, recall
from birkhoff.pipeline.errors import ArtifactNotFoundError, OutputError
from birkhoff.pipeline.notebook import facts_html
from birkhoff.pipeline.registry.documents import VersionManifest
from birkhoff.pipeline.registry.listing import Lack, lacking
from birkhoff.pipeline.registry.trust import Trust
from birkhoff.pipeline.registry.versions import said_figures
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.default import borrowed_store, http_allowed
from birkhoff.pipeline.text import short, size

FolderFormat = Literal["birkhoff", "transformers"]
"""Form of a pulled folder: the artifact as stored, or a folder for transformers' `from_pretrained`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A pulled version."""

    model: str
    version: str | None
    """Its name, such as `v3`; None if it was requested by digest and has none."""
    digest: str
    manifest: VersionManifest
    folder: Path
    fetched_bytes: int
    """Bytes fetched from the store; the rest was in the folder or the cache."""
    missing_blobs: int | None
    """Blobs that the store lacks and the cache of this machine had; None if no store was asked."""
    missing_bytes: int | None
    problem: str | None
    """A line for people if blobs are missing: other machines cannot pull this version."""

    def facts(self) -> dict[str, object]:
        """Return the result under the keys of `--json`."""
        return {
            "model": self.model,
            "version": self.version,
            "digest": self.digest,
            "fetched_bytes": self.fetched_bytes,
            "output": str(self.folder),
            "missing_blobs": self.missing_blobs,
            "missing_bytes": self.missing_bytes,
        }

    def _repr_html_(self) -> str:
        more = {"digest": short(self.digest), "fetched": size(self.fetched_bytes), "problem": self.problem or ""}
        title = f"{self.model}@{self.version or short(self.digest)} in {self.folder}"
        return facts_html(title, {**said_figures(self.manifest), **more})


def pull(
    reference: str,
    folder: str | os.PathLike[str],
    *,
    store: str | Store | None = None,
    format: FolderFormat = "birkhoff",
    offline: bool = False,
    require_signature: Sequence[str | os.PathLike[str]] | None = None,
    signed_for: str | None = None,
    accept_older: bool = False,
    card: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Pulled:
    """Fetch a version into a folder and check every digest; fetch only what neither folder nor cache holds.

    Args:
        reference: `MODEL[@VERSION|ALIAS|DIGEST]`, or `oci://HOST/REPOSITORY:TAG` for a registry.
        folder: A new or empty folder, or one of an earlier pull.
        store: The store or its URL. Default: `BIRKHOFF_STORE`, then `embedded`.
        format: `birkhoff` for the artifact as stored; `transformers` for `from_pretrained`, into a new or empty folder.
        offline: Use the cache only.
        require_signature: Files of public keys; one of them must have signed the version for this store.
        signed_for: The store that signatures must name instead, if this one is its mirror.
        accept_older: Accept an alias in an older state than this machine has seen.
        card: Jinja template of the model card for `format="transformers"`. Default: the built-in one.
        progress: Show a progress bar, in a terminal or a notebook.

    Warns:
        BirkhoffWarning: The store lacks blobs that the cache of this machine had.

    Raises:
        ArtifactNotFoundError: There is no such version, or, offline, none in the cache.
        TrustError: A signature is missing or wrong, or the alias went back to an older state.
        IntegrityError: Stored bytes do not match their digest.
        BuilderError, ModelMismatchError: transformers cannot build the model.
        OutputError: The folder cannot be written, or holds something else.
        StoreError: The store cannot be reached or read.
    """
    trust, folder = Trust.of(require_signature, audience=signed_for, accept_older=accept_older), Path(folder)
    with ExitStack() as stack:
        if offline:
            check_not_remote(reference)
            cache, opened = BlobCache(), None
            found = recall(store, reference, cache, trust)
        else:
            cache = stack.enter_context(usable_cache(folder, _warn))
            opened, named = stack.enter_context(origin_of(reference, store))
            found = find(opened, named, cache, trust)
        total = sum(record.bytes for record in found.manifest.stored)
        with transferring(found.label, total, quiet=not progress) as report:
            template = None if card is None else Path(card)
            done = pull_found(found, opened, folder, cache, format, card=template, report=report)
    if done.problem:
        _warn(done.problem)
    return done


@contextmanager
def origin_of(reference: str, store: str | Store | None) -> Iterator[tuple[Store, str]]:
    """Open the store of a reference, and return its name there. A registry's image is a store of one version."""
    if reference.startswith("oci://"):
        from birkhoff.pipeline.artifact.oci import OciStore
        from birkhoff.pipeline.artifact.oci_client import OciReference

        with OciStore(OciReference.parse(reference), allow_http=http_allowed()) as image:
            yield image, image.reference
        return
    with borrowed_store(store) as opened:
        yield opened, reference


def check_not_remote(reference: str) -> None:
    """Refuse a registry's image while offline. Raises ArtifactNotFoundError."""
    if reference.startswith("oci://"):
        raise ArtifactNotFoundError(f"{reference}: a registry is asked each time; pull it without --offline")


def pull_found(
    found: Found,
    store: Store | None,
    folder: Path,
    cache: BlobCache,
    form: FolderFormat,
    *,
    card: Path | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Pulled:
    """Fetch a version after it was found. `store` is None if offline. Raises what `pull` raises."""
    if form == "transformers":
        from birkhoff.pipeline.load.transformers_folder import pull_folder

        fetched = pull_folder(found, store, folder, cache, report=report, card=card)
    else:
        from birkhoff.pipeline.artifact.pull import pull as fetch

        if card is not None:
            raise OutputError("a model card goes with a folder for transformers; say so, or leave the template out")
        signature = remembered(found, store, cache)
        fetched = fetch(found, store, folder, cache, signature=signature, report=report)
    total = sum(record.bytes for record in found.manifest.stored)
    lack, problem = Lack(blobs=0, nbytes=0), None
    if store is None:
        lack = Lack(blobs=None, nbytes=None)
    elif fetched < total:  # what came from this machine's cache is not known to be in the store
        lack = lacking(store, found.manifest)
        if lack.problem:
            problem = (
                f"{found.label}: {lack.problem} in {store.url}; they were in this machine's cache, and nobody else can "
                "pull it: bring it there once more with `copy`"
            )
    return Pulled(
        model=found.model,
        version=found.name,
        digest=found.digest,
        manifest=found.manifest,
        folder=folder,
        fetched_bytes=fetched,
        missing_blobs=lack.blobs,
        missing_bytes=lack.nbytes,
        problem=problem,
    )


def _warn(message: str) -> None:
    warnings.warn(message, BirkhoffWarning, stacklevel=3)
