"""Bases within a run: which models are coded as differences to others, and wait for them."""

from birkhoff.pipeline.artifact.bases import open_base
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.store.base import Store


def waits_for(manifest: Manifest, planned: Planned) -> str | None:
    """Return the model of this run that must be published first, as the base of this one; None if there is none."""
    base = manifest.base_of(planned.entry)
    return None if base is None else base.name


def base_in_run(store: Store, planned: Planned, base: ModelRun) -> Planned:
    """Return a planned model with the base that this run has published or found up to date.

    Raises ManifestError if the base was not published, and the errors of `open_base`.
    """
    if base.version is None:
        raise ManifestError(f"base: {base.name} was not published, so no difference to it can be coded: see its error")
    return open_base(store, base.version).on(planned)
