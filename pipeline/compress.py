"""The main job: plan every model, run the shards that are missing, publish what is whole.

Reads as the table of contents of the pipeline; each step has its module.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES, Profile
from birkhoff.codec.tensor import FALLBACKS
from birkhoff.pipeline import companions, fetch, interrupt, overrides
from birkhoff.pipeline.artifact import (
    BudgetRecord,
    FileRecord,
    ShardRecord,
    SourceRecord,
    VersionManifest,
    blob_key,
    sqnr_summary,
)
from birkhoff.pipeline.collect import retire
from birkhoff.pipeline.companions import Companion
from birkhoff.pipeline.digests import checkpoint_digest, checkpoint_state
from birkhoff.pipeline.errors import (
    ArtifactNotFoundError,
    ManifestError,
    PartialError,
    SourceError,
    StoreError,
)
from birkhoff.pipeline.execute import Executor, Outcome
from birkhoff.pipeline.fetch_spec import is_remote
from birkhoff.pipeline.leases import open_run
from birkhoff.pipeline.manifest import Manifest, ModelEntry
from birkhoff.pipeline.overrides import check_matches
from birkhoff.pipeline.passes import Passes, Terms
from birkhoff.pipeline.plan import MIB, ModelPlan, plan_model
from birkhoff.pipeline.progress import Progress
from birkhoff.pipeline.publish import Version, is_signed, is_whole, publish, resolve
from birkhoff.pipeline.quality import suggestion
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import Reuse, ShardResult, ShardTask
from birkhoff.pipeline.signing import Signer
from birkhoff.pipeline.source import Checkpoint
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.workplace import source_cache

Status = Literal["published", "up to date", "failed"]


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


@dataclass(slots=True, kw_only=True)
class ModelRun:
    """One model on its way through a run. `seconds` is wall time from the run's start to its end."""

    name: str
    profile: str
    planned: Planned | None = None
    source_sha256: str = ""
    source_state: dict[str, list[int]] = field(default_factory=dict)
    status: Status | None = None
    error: BirkhoffError | None = None
    version: Version | None = None
    before: Version | None = None
    """What `latest` pointed at when the run began."""
    passes: Passes | None = None
    records: dict[int, ShardRecord] = field(default_factory=dict)
    reused: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def fail(self, error: BirkhoffError) -> None:
        """Give this model up; the others go on."""
        self.status, self.error = "failed", error

    @property
    def source_bytes(self) -> int:
        """Size of the source file; 0 where it could not be read."""
        return self.planned.checkpoint.nbytes if self.planned else 0

    def row(self) -> dict[str, object]:
        """The model's line of the result table, under the keys of `--json`."""
        least, median = sqnr_summary(self.version.manifest.shards if self.version else ())
        source = self.source_bytes or None
        stored = self.version.stored_bytes if self.version else None
        return {
            "model": self.name,
            "profile": self.profile,
            "version": self.version.name if self.version else None,
            "digest": self.version.digest if self.version else None,
            "status": self.status,
            "source_bytes": source,
            "stored_bytes": stored,
            "ratio": round(source / stored, 3) if source and stored else None,
            "sqnr_db_min": least,
            "sqnr_db_median": median,
            "seconds": round(self.seconds, 2),
            "shards": len(self.records) or None,
            "shards_reused": self.reused,
            "stages": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "target_db": self.version.manifest.recipe.get("target_db") if self.version else None,
            "passes": self.passes.count if self.passes else 0,
            "warnings": self.warnings(),
            "error": str(self.error) if self.error else None,
        }

    def warnings(self) -> list[str]:
        """Tensors that are lossless for what their weights are, though coding was asked for."""
        shards = self.version.manifest.shards if self.version else ()
        fallen = {name: reason for shard in shards for name, reason in (shard.fallbacks or {}).items()}
        return [f"tensor {name!r} is stored lossless: {FALLBACKS.get(why, why)}" for name, why in fallen.items()]


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


def compress(
    manifest: Manifest,
    store: Store,
    start_executor: Callable[[], Executor],
    progress: Progress,
    *,
    reuse: Reuse = "trust",
    mirror: Path | None = None,
    single_publisher: bool = False,
    signer: Signer | None = None,
) -> list[ModelRun]:
    """Compress, validate and publish every model of a manifest; one run for each, in its order.

    An error that concerns one model ends that model alone. The executor is started only if a shard is to be made.

    Raises:
        StoreError: the store failed in a way that concerns every model.
        WorkerError: no worker could be had.
    """
    clock = _Clock()
    runs = [ModelRun(name=entry.name, profile=manifest.fidelity(entry).profile.name) for entry in manifest.models]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # digests are nearly all of it, and leave the GIL
        prepared = [
            pool.submit(
                _prepare,
                run,
                partial(plan_entry, manifest, entry, mirror=mirror, report=progress.downloaded),
                store,
                reuse,
                signer,
            )
            for run, entry in zip(runs, manifest.models, strict=True)
        ]
        for run, future in zip(runs, prepared, strict=True):
            future.result()
            run.seconds = clock.seconds()
            shards = len(run.planned.plan.shards) if run.planned else 0
            progress.planned(run.name, run.source_bytes, run.status, shards=shards)
    check_rules(manifest, [run.planned for run in runs])
    waiting = {run.name: run for run in runs if run.status is None}
    if waiting:
        # Open from before the first look for a shard until its version is published: nothing is collected meanwhile.
        with open_run(store), start_executor() as executor:
            starts = (task for run in waiting.values() for task in _start(run, reuse))
            queue = TaskQueue(starts, budget=_in_flight(manifest))
            for outcome in executor.run(queue):
                run = waiting[outcome.task.model]
                if run.status is None:
                    queue.add(_take(run, outcome, store, single_publisher, signer))
                    if run.status == "published" and manifest.keep is not None:
                        retire(store, run.name, manifest.keep)
                    run.seconds = clock.seconds()
                    counts = run.passes is not None and run.passes.first and not outcome.task.foretell
                    nbytes = outcome.task.nbytes if counts else 0
                    reused = isinstance(outcome.result, ShardResult) and outcome.result.reused
                    progress.advanced(run.name, nbytes, run.status, reused=reused)
                if run.status == "failed":
                    queue.drop(run.name)
    return runs


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _in_flight(manifest: Manifest) -> int:
    """Source bytes that may be at work at any time."""
    if manifest.in_flight_mib is not None:
        return manifest.in_flight_mib * MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _prepare(run: ModelRun, plan: Callable[[], Planned], store: Store, reuse: Reuse, signer: Signer | None) -> None:
    """Plan one model and find out whether its latest version is what would be made."""
    try:
        run.planned = plan()
        run.source_state = checkpoint_state(run.planned.checkpoint)
        run.source_sha256 = checkpoint_digest(run.planned.checkpoint)
        latest = run.before = latest_version(store, run.name)
        same = reuse == "trust" and latest is not None and _same(latest.manifest, run)
        if same and latest and is_whole(store, latest.manifest) and (not signer or is_signed(store, latest, signer)):
            run.version, run.status = latest, "up to date"
    except BirkhoffError as error:
        if isinstance(error, StoreError):
            raise
        run.fail(error)


def latest_version(store: Store, model: str) -> Version | None:
    """The version that `latest` points at, if there is one."""
    try:
        return resolve(store, model)
    except ArtifactNotFoundError:
        return None


def _same(manifest: VersionManifest, run: ModelRun) -> bool:
    """Whether a version was made from the same bytes by the same recipe."""
    same = (manifest.source.sha256, manifest.code) == (run.source_sha256, birkhoff.__version__)
    return same and run.planned is not None and made_so(manifest, run.planned)


def made_so(manifest: VersionManifest, planned: Planned) -> bool:
    """Whether a version has recipe, budget, overrides and files of a plan; of a budget, any target it has led to."""
    wanted, found = planned.profile.recipe(), manifest.recipe
    if planned.budget is not None:
        wanted, found = ({**recipe, "target_db": None} for recipe in (wanted, found))
    terms = found, manifest.budget, manifest.overrides or {}, manifest.files or ()
    return terms == (wanted, planned.budget, planned.plan.overrides, planned.file_records)


def _start(run: ModelRun, reuse: Reuse) -> list[ShardTask]:
    """The first tasks of a model."""
    planned, terms = run.planned, None
    assert planned is not None  # only planned models run
    if planned.budget is not None:
        hint = run.before.manifest.recipe.get("target_db") if run.before else None
        terms = Terms(
            budget=planned.budget,
            limit=planned.budget.limit(planned.checkpoint.nbytes),
            hint_db=hint if isinstance(hint, float) else None,
        )
    describe = partial(_version_manifest, run, planned)
    run.passes = Passes(run.name, planned.plan, planned.profile, describe, terms=terms, reuse=reuse)
    return run.passes.start()


def _take(
    run: ModelRun, outcome: Outcome, store: Store, single_publisher: bool, signer: Signer | None
) -> list[ShardTask]:
    """Account for one outcome; the last one of a model publishes it. Returns the tasks that follow."""
    assert run.planned is not None
    assert run.passes is not None  # only started models have tasks
    if outcome.result is None:
        run.fail(outcome.error or BirkhoffError(f"{outcome.task.label}: no result and no error"))
        return []
    run.stages.update(outcome.result.stages)
    try:
        more = run.passes.take(outcome.task.index, outcome.result)
        run.records, run.reused = run.passes.records, run.passes.reused
        if run.passes.whole:
            interrupt.check()
            _publish(run, run.planned, store, single_publisher, signer)
        return more
    except BirkhoffError as error:
        run.fail(error)
        return []


def _publish(run: ModelRun, planned: Planned, store: Store, single_publisher: bool, signer: Signer | None) -> None:
    """Publish what a model's passes have come to."""
    assert run.passes is not None
    if checkpoint_state(planned.checkpoint) != run.source_state:
        raise SourceError(f"{planned.checkpoint.path}: changed while it was being compressed; run again")
    records = [run.records[index] for index in range(len(planned.plan.shards))]
    manifest = _version_manifest(run, planned, run.passes.profile, records)
    for companion in planned.files:
        store.create(blob_key(companion.record.blob), companion.body)
    run.version = publish(store, manifest, single_publisher=single_publisher, signer=signer)
    run.status = "published"


def _version_manifest(
    run: ModelRun, planned: Planned, profile: Profile, records: Sequence[ShardRecord]
) -> VersionManifest:
    checkpoint = planned.checkpoint
    return VersionManifest(
        model=run.name,
        source=SourceRecord(
            file=checkpoint.path.name,
            sha256=run.source_sha256,
            bytes=checkpoint.nbytes,
            format=checkpoint.format,
            nesting=checkpoint.nesting,
        ),
        profile=profile.name,
        recipe=profile.recipe(),
        budget=planned.budget,
        overrides=dict(planned.plan.overrides) or None,
        code=birkhoff.__version__,
        shards=tuple(records),
        files=planned.file_records or None,
    )


def failure(errors: Sequence[BirkhoffError | None]) -> BirkhoffError | None:
    """What the models of a run, one entry for each, make it end with: their one kind of error, or PartialError."""
    failed = [error for error in errors if error is not None]
    if not failed:
        return None
    if len(failed) == len(errors) and len({type(error) for error in failed}) == 1:
        return failed[0]
    return PartialError(f"{len(failed)} of {len(errors)} models failed")
