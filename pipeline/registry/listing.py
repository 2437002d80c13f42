"""The versions in a store, for `birkhoff list`."""

from collections.abc import Iterable
from dataclasses import dataclass

from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError
from birkhoff.pipeline.notebook import facts_html
from birkhoff.pipeline.registry.aliases import aliases
from birkhoff.pipeline.registry.documents import FIGURES, NameRecord, VersionManifest
from birkhoff.pipeline.registry.labels import read_labels
from birkhoff.pipeline.registry.names import names
from birkhoff.pipeline.registry.versions import load_version, missing_blobs, models, resolve, said_figures
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import ALIAS_LATEST
from birkhoff.pipeline.text import pairs, short

Row = dict[str, object]
Named = tuple[str, NameRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedVersion:
    """A named version in a store."""

    model: str
    name: str
    """Such as `v3`."""
    digest: str
    aliases: tuple[str, ...]
    """Aliases that point at its content, sorted."""
    manifest: VersionManifest | None
    """None if it is missing or damaged; `problem` says which."""
    missing_blobs: int | None
    """Number of its blobs that the store lacks; None without a manifest."""
    missing_bytes: int | None
    problem: str | None
    """What is wrong with it, for people."""
    created: str
    """When it got its name, in ISO 8601."""
    labels: dict[str, str]

    @property
    def reference(self) -> str:
        """Its unique name in its store: `demo-sam@v3`."""
        return f"{self.model}@{self.name}"

    def row(self) -> Row:
        """Return it under the keys of `--json`."""
        manifest = self.manifest
        unknown = dict.fromkeys(("profile", *FIGURES))
        return {
            "model": self.model,
            "version": self.name,
            "digest": self.digest,
            "aliases": list(self.aliases),
            **(unknown if manifest is None else {"profile": manifest.profile, **manifest.figures()}),
            "missing_blobs": self.missing_blobs,
            "missing_bytes": self.missing_bytes,
            "problem": self.problem,
            "created": self.created,
            "labels": self.labels,
        }

    def facts(self) -> dict[str, str]:
        """Return it for people, under the titles of a table."""
        return {
            "aliases": ", ".join(self.aliases),
            **({} if self.manifest is None else said_figures(self.manifest)),
            "digest": short(self.digest),
            "created": self.created,
            "labels": pairs(self.labels),
            "problem": self.problem or "",
        }

    def _repr_html_(self) -> str:
        return facts_html(self.reference, self.facts())


def current_versions(store: Store) -> list[ListedVersion]:
    """Return the versions in use: of every model, those that aliases point at, oldest first.

    If no alias `latest` exists, the newest version stands in for it.
    """
    found = []
    for model in models(store):
        named, pointers = list(names(store, model)), aliases(store, model)
        used = {state.version for state in pointers.values()}
        if ALIAS_LATEST not in pointers:
            used.update(name for name, _ in named[-1:])
        found += _listed(store, model, [(name, record) for name, record in named if name in used] or named[-1:])
    return found


def versions_of(store: Store, model: str) -> list[ListedVersion]:
    """Return every named version of a model, oldest first. Raises ArtifactNotFoundError."""
    found = _listed(store, model, list(names(store, model)))
    if not found:
        resolve(store, model)  # raises with what there is instead
        raise ArtifactNotFoundError(f"{store.url}: model {model!r} has no named version")
    return found


def _listed(store: Store, model: str, named: Iterable[Named]) -> list[ListedVersion]:
    pointers = aliases(store, model)
    found = []
    for name, record in named:
        manifest, lack = _manifest(store, model, record.digest)
        found.append(
            ListedVersion(
                model=model,
                name=name,
                digest=record.digest,
                aliases=tuple(sorted(alias for alias, state in pointers.items() if state.digest == record.digest)),
                manifest=manifest,
                missing_blobs=lack.blobs,
                missing_bytes=lack.nbytes,
                problem=lack.problem,
                created=record.created,
                labels=read_labels(store, model, record.digest),
            )
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What a store lacks of a version. `problem` says it for people; None if nothing is missing."""

    blobs: int | None
    nbytes: int | None
    problem: str | None = None


def _manifest(store: Store, model: str, digest: str) -> tuple[VersionManifest | None, Lack]:
    """Return a version's manifest, and what the store lacks of it: a copy by hand may look whole until it is pulled."""
    try:
        manifest = load_version(store, model, digest)
    except (ArtifactNotFoundError, IntegrityError) as error:
        what = "its manifest is missing" if isinstance(error, ArtifactNotFoundError) else "its manifest is damaged"
        return None, Lack(blobs=None, nbytes=None, problem=what)
    return manifest, lacking(store, manifest)


def lacking(store: Store, manifest: VersionManifest) -> Lack:
    """Return what a store lacks of a version."""
    missing = missing_blobs(store, manifest.stored)
    blobs = len({record.blob for record in manifest.stored})
    return Lack(
        blobs=len(missing),
        nbytes=sum(record.bytes for record in missing),
        problem=f"{len(missing)} of its {blobs} blobs are missing" if missing else None,
    )
