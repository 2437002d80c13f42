"""From a manifest to planned models: which are meant, what their checkpoints hold, and what is to become of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from birkhoff.codec.profiles import PROFILES, Profile
from birkhoff.pipeline import companions, fetch, overrides
from birkhoff.pipeline.artifact import BudgetRecord, FileRecord, VersionManifest
from birkhoff.pipeline.companions import Companion
from birkhoff.pipeline.errors import ManifestError, suggestion
from birkhoff.pipeline.fetch_spec import is_remote
from birkhoff.pipeline.manifest import Manifest, ModelEntry
from birkhoff.pipeline.overrides import check_matches
from birkhoff.pipeline.plan import MIB, ModelPlan, plan_model
from birkhoff.pipeline.source import Checkpoint
from birkhoff.pipeline.workplace import source_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A model whose header was read and whose shards were cut; with a `budget`, the profile's target is to be found."""

    entry: ModelEntry
    profile: Profile
    checkpoint: Checkpoint
    plan: ModelPlan
    budget: BudgetRecord | None = None
    files: tuple[Companion, ...] = ()
    """What goes with the weights."""

    @property
    def file_records(self) -> tuple[FileRecord, ...]:
        """What a manifest says of `files`."""
        return tuple(companion.record for companion in self.files)


def select(manifest: Manifest, only: Iterable[str], profile: str | None) -> Manifest:
    """The manifest cut down to the models of `--only`, with the profile of `--profile` over all profiles and budgets.

    Raises:
        ManifestError: a name that is not in the manifest, or an unknown profile.
    """
    wanted = list(only)
    known = {model.name for model in manifest.models}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ManifestError(
            f"--only: the manifest has no model{suggestion(missing[0], known)}; it has {', '.join(sorted(known))}"
        )
    if profile is not None and profile not in PROFILES:
        raise ManifestError(f"--profile: unknown profile{suggestion(profile, PROFILES)}; known: {', '.join(PROFILES)}")
    over = {"profile": profile, "target_ratio": None, "max_bytes": None, "allocation": None} if profile else {}
    return manifest.cut(
        model.model_copy(update=over) for model in manifest.models if not wanted or model.name in wanted
    )


def plan_entry(
    manifest: Manifest,
    entry: ModelEntry,
    *,
    mirror: Path | None = None,
    report: fetch.Report | None = None,
) -> Planned:
    """Bring one model's checkpoint here and plan it; `mirror` and `report` as in `fetch.resolve`.

    Raises:
        SourceError: the checkpoint cannot be had.
        SourceError, ManifestError: as `plan_checkpoint`.
    """
    checkpoint = fetch.resolve(entry.source, cache=source_cache(), mirror=mirror, report=report)
    return plan_checkpoint(manifest, entry, checkpoint)


def plan_checkpoint(manifest: Manifest, entry: ModelEntry, checkpoint: Checkpoint) -> Planned:
    """Plan one model from the header of its checkpoint.

    Raises:
        SourceError: no tensor of it is coded, or a file that goes with it cannot be read.
        ManifestError: an override of the model matches none of its tensors.
    """
    fidelity = manifest.fidelity(entry)
    check_matches(entry.overrides, [(entry.name, checkpoint)])
    own = overrides.resolve(fidelity.rules, checkpoint.tensors, fidelity.profile)
    plan = plan_model(entry.name, checkpoint, fidelity.profile, shard_bytes=manifest.shard_mib * MIB, overrides=own)
    return Planned(
        entry=entry,
        profile=fidelity.profile,
        checkpoint=checkpoint,
        plan=plan,
        budget=fidelity.budget,
        files=_files(entry, checkpoint),
    )


def _files(entry: ModelEntry, checkpoint: Checkpoint) -> tuple[Companion, ...]:
    """What goes with a model's weights, read once: what is stored is what decided that it must be."""
    if entry.files is not None:
        return companions.named(entry.files)
    (first, *others) = entry.source
    local = any(not is_remote(url) and Path(url) == checkpoint.path for url in first.urls)
    whole = local and first.whole and not others and checkpoint.format == "safetensors"
    return companions.beside(checkpoint.path) if whole else ()


def check_rules(manifest: Manifest, planned: Sequence[Planned | None]) -> None:
    """Refuse an override of the whole manifest that matches no tensor of any of its models.

    Says nothing where a model was left out, or could not be planned: it may be the one. Raises ManifestError.
    """
    found = [(item.entry.name, item.checkpoint) for item in planned if item is not None]
    if manifest.whole and len(found) == len(manifest.models):
        check_matches(manifest.overrides, found)


def made_so(manifest: VersionManifest, planned: Planned) -> bool:
    """Whether a version has recipe, budget, overrides and files of a plan; of a budget, any target it has led to."""
    wanted, found = planned.profile.recipe(), manifest.recipe
    if planned.budget is not None:
        wanted, found = ({**recipe, "target_db": None} for recipe in (wanted, found))
    terms = found, manifest.budget, manifest.overrides or {}, manifest.files or ()
    return terms == (wanted, planned.budget, planned.plan.overrides, planned.file_records)
