"""Bases of the models of a run: which version each is coded as a difference to, and who waits for whom."""

from birkhoff.pipeline.artifact.bases import open_base
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.store.base import Store


def waits_for(manifest: Manifest, planned: Planned) -> str | None:
    """The model of the run that must be published before this one, as its base; None if there is none."""
    base = manifest.base_of(planned.entry)
    return None if base is None else base.name


def base_in_run(store: Store, planned: Planned, base: ModelRun) -> Planned:
    """A planned model with the base that this run has published, or found published.

    Raises ManifestError where there is none, and as `bases.find_base`.
    """
    if base.version is None:
        raise ManifestError(f"base: {base.name} was not published, so nothing can be a difference to it: see its error")
    return open_base(store, base.version).on(planned)
