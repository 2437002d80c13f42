"""Rows of `birkhoff list`."""

from birkhoff.pipeline.aliases import aliases
from birkhoff.pipeline.artifact import NameRecord
from birkhoff.pipeline.errors import ArtifactNotFoundError
from birkhoff.pipeline.names import names
from birkhoff.pipeline.publish import Version, models, resolve
from birkhoff.pipeline.store import Store


def model_rows(store: Store) -> list[dict[str, object]]:
    """The latest version of every model."""
    rows = []
    for model in models(store):
        version = resolve(store, model)
        record = next((record for name, record in names(store, model) if name == version.name), None)
        rows.append(_row(store, version, record))
    return rows


def version_rows(store: Store, model: str) -> list[dict[str, object]]:
    """Every named version of a model, oldest first. Raises ArtifactNotFoundError."""
    rows = [_row(store, resolve(store, f"{model}@{name}"), record) for name, record in names(store, model)]
    if not rows:
        resolve(store, model)  # says what there is instead
        raise ArtifactNotFoundError(f"{store.url}: model {model!r} has no named version")
    return rows


def _row(store: Store, version: Version, record: NameRecord | None) -> dict[str, object]:
    manifest = version.manifest
    return {
        "model": version.model,
        "version": version.name,
        "digest": version.digest,
        "aliases": sorted(a for a, alias in aliases(store, version.model).items() if alias.digest == version.digest),
        "profile": manifest.profile,
        **manifest.figures(),
        "created": record.created if record else None,
    }
