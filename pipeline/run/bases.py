"""Bases of the models of a run: which version each is coded as a difference to, and who waits for whom."""

from birkhoff.pipeline.artifact.bases import BaseVersion, best_base, kept_base, named_base, open_base
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import AUTO, Manifest
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.store.base import Store


def waits_for(manifest: Manifest, planned: Planned) -> str | None:
    """The model of the run that must be published before this one, as its base; None if there is none."""
    base = manifest.base_of(planned.entry)
    return None if base is None else base.name


def find_base(store: Store, planned: Planned, before: Version | None, *, again: bool) -> Planned:
    """A planned model with its base, which lies in the store.

    What was found by itself once stays, so that a version does not change with what others publish, unless it is to be
    looked for `again`.

    Raises:
        ArtifactNotFoundError: no such version.
        ManifestError: it is a difference itself.
        StoreError, IntegrityError, SourceError: it, or the source, cannot be read.
    """
    reference = planned.entry.base
    if reference is None:
        return planned
    if reference != AUTO:
        return named_base(store, reference).on(planned)
    held: BaseVersion | None = None
    if before is not None and not again:
        record = before.manifest.base
        held = kept_base(store, record) if record is not None else None
        if record is None and before.manifest.recipe == planned.plan.profile.recipe():
            return planned
    found = held or best_base(store, planned)
    return planned if found is None else found.on(planned)


def base_in_run(store: Store, planned: Planned, base: ModelRun) -> Planned:
    """A planned model with the base that this run has published, or found published.

    Raises ManifestError where there is none, and as `find_base`.
    """
    if base.version is None:
        raise ManifestError(f"base: {base.name} was not published, so nothing can be a difference to it: see its error")
    return open_base(store, base.version).on(planned)
