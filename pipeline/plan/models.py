"""Plan the models of a manifest: the models to run, the contents of their checkpoints, the decision for each tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.download import resolve
from birkhoff.pipeline.download.spec import is_remote
from birkhoff.pipeline.paths import source_cache
from birkhoff.pipeline.plan import overrides, sidecars
from birkhoff.pipeline.plan.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan.overrides import check_matches
from birkhoff.pipeline.plan.proving import ProofTerms
from birkhoff.pipeline.plan.scales import scales_of
from birkhoff.pipeline.plan.shards import MIB, ModelPlan, plan_model
from birkhoff.pipeline.plan.sidecars import Companion
from birkhoff.pipeline.registry.documents import BaseRecord, BudgetRecord, FileRecord, VersionManifest
from birkhoff.pipeline.shard.task import BaseShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A model with its header read and its shards cut. With a `budget` its target is still to be found."""

    entry: ModelEntry
    checkpoint: Checkpoint
    plan: ModelPlan
    budget: BudgetRecord | None = None
    files: tuple[Companion, ...] = ()
    """Files that go with the weights."""
    proof: ProofTerms = field(default_factory=ProofTerms)
    """The terms of its proof."""
    base: BaseRecord | None = None
    """The version that its tensors may be stored as differences to, once known."""

    def on(self, base: BaseRecord, shards: tuple[BaseShard, ...]) -> "Planned":
        """Return the model with a base: the version, and its shards that have fitting tensors."""
        return replace(self, base=base, plan=replace(self.plan, bases=shards))

    @property
    def takes_statistics(self) -> bool:
        """Whether its targets follow from the sensitivity of its outputs."""
        return self.plan.profile.allocation == "output"

    def scaled(self) -> "Planned":
        """Return the model with the targets that its weights give it under allocation by scale, unless it has them;
        reads a sample of them. Raises SourceError."""
        if self.plan.profile.allocation != "scale" or self.plan.shares is not None:
            return self
        return replace(self, plan=self.plan.with_scales(scales_of(self.plan.scaled)))

    @property
    def file_records(self) -> tuple[FileRecord, ...]:
        """The records of `files`."""
        return tuple(sidecar.record for sidecar in self.files)


def plan_entry(
    manifest: Manifest,
    entry: ModelEntry,
    *,
    mirror: Path | None = None,
    report: resolve.Report | None = None,
) -> Planned:
    """Fetch one model's checkpoint and plan it; `mirror` and `report` as in `resolve.resolve`.

    Raises:
        SourceError: The checkpoint cannot be fetched.
        SourceError, ManifestError: As `plan_checkpoint`.
    """
    checkpoint = resolve.resolve(entry.source, cache=source_cache(), mirror=mirror, report=report)
    return plan_checkpoint(manifest, entry, checkpoint)


def plan_checkpoint(manifest: Manifest, entry: ModelEntry, checkpoint: Checkpoint) -> Planned:
    """Plan one model from the header of its checkpoint.

    Raises:
        SourceError: None of its tensors can be coded, or a file that goes with it cannot be read.
        ManifestError: An override of the model matches none of its tensors.
    """
    fidelity = manifest.fidelity(entry)
    check_matches(entry.overrides, [(entry.name, checkpoint)])
    own = overrides.said(fidelity.rules, checkpoint.tensors)
    plan = plan_model(entry.name, checkpoint, fidelity.profile, shard_bytes=manifest.shard_mib * MIB, overrides=own)
    return Planned(
        entry=entry,
        checkpoint=checkpoint,
        plan=plan,
        budget=fidelity.budget,
        files=_files(entry, checkpoint),
        proof=manifest.proving(entry),
    )


def _files(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Companion, ...]:
    """Return the files that go with a model's weights. They are read once, so that the stored bytes are the ones
    compared."""
    if entry.files is not None:
        return sidecars.named(entry.files)
    (first, *others) = entry.source
    if checkpoint.origin and first.whole and not others:
        return sidecars.of_hub(checkpoint.path)
    local = any(not is_remote(url) and Path(url) == checkpoint.path for url in first.urls)
    whole = local and first.whole and not others and checkpoint.format == "safetensors"
    return sidecars.beside(checkpoint.path) if whole else ()


def check_rules(manifest: Manifest, planned: Sequence[Planned | None]) -> None:
    """Refuse an override of the whole manifest that matches no tensor of any model. Raises ManifestError.

    Nothing is checked if a model was left out or could not be planned, because the override may be for it.
    """
    found = [(item.entry.name, item.checkpoint) for item in planned if item is not None]
    if manifest.whole and len(found) == len(manifest.models):
        check_matches(manifest.overrides, found)


def matches_plan(manifest: VersionManifest, planned: Planned) -> bool:
    """Return whether a version of the same source is what a plan would make.

    It then has the plan's recipe, budget, overrides, adapter, files and base, and a proof that meets the plan's terms.
    """
    rest = manifest.adapter, manifest.files or ()
    if rest != (planned.entry.adapter, planned.file_records):
        return False
    return coded_alike(manifest, planned) and planned.proof.met_by(manifest.proof)


def coded_alike(manifest: VersionManifest, planned: Planned) -> bool:
    """Return whether a version of the same source has the recipe, budget, overrides and base of a plan.

    A budget's target is an outcome, so it is ignored; so is the key of statistics under allocation by output.
    """
    wanted, found = planned.plan.profile.recipe(), manifest.recipe
    if planned.budget is not None:
        wanted, found = ({**recipe, "target_db": None} for recipe in (wanted, found))
    if planned.takes_statistics and found.get("statistics") is not None:
        found = {key: value for key, value in found.items() if key != "statistics"}
    if (manifest.base and manifest.base.digest) != (planned.base and planned.base.digest):
        return False
    return (found, manifest.budget, manifest.overrides or {}) == (wanted, planned.budget, planned.plan.overrides)
