"""The main job: plan every model, run the shards that are missing, publish what is whole.

Reads as the table of contents of the pipeline; each step has its module.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES, Profile
from birkhoff.pipeline import fetch, interrupt
from birkhoff.pipeline.artifact import ShardRecord, SourceRecord, VersionManifest
from birkhoff.pipeline.collect import retire
from birkhoff.pipeline.digests import checkpoint_digest, file_state
from birkhoff.pipeline.errors import ArtifactNotFoundError, ManifestError, PartialError, SourceError, StoreError
from birkhoff.pipeline.execute import Executor, Outcome
from birkhoff.pipeline.leases import open_run
from birkhoff.pipeline.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan import MIB, ModelPlan, plan_model
from birkhoff.pipeline.progress import Progress
from birkhoff.pipeline.publish import Version, is_signed, is_whole, publish, resolve
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import Reuse, ShardTask
from birkhoff.pipeline.signing import Signer
from birkhoff.pipeline.source import Checkpoint
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.validate import summary
from birkhoff.pipeline.workplace import source_cache

Status = Literal["published", "up to date", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A model whose header was read and whose shards were cut."""

    entry: ModelEntry
    profile: Profile
    checkpoint: Checkpoint
    plan: ModelPlan


@dataclass(slots=True, kw_only=True)
class ModelRun:
    """One model on its way through a run. `seconds` is wall time from the run's start to its end."""

    name: str
    profile: str
    planned: Planned | None = None
    source_sha256: str = ""
    source_state: list[list[object]] = field(default_factory=list)
    status: Status | None = None
    error: BirkhoffError | None = None
    version: Version | None = None
    before: Version | None = None
    """What `latest` pointed at when the run began."""
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
        sqnrs = [db for shard in self.version.manifest.shards for db in shard.sqnr_db] if self.version else []
        least, median = summary(sqnrs)
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
            "error": str(self.error) if self.error else None,
        }


def select(manifest: Manifest, only: Iterable[str], profile: str | None) -> Manifest:
    """The manifest cut down to the models of `--only`, with the profile of `--profile`.

    Raises:
        ManifestError: a name that is not in the manifest, or an unknown profile.
    """
    wanted = list(only)
    known = {model.name for model in manifest.models}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ManifestError(f"--only {missing[0]}: the manifest has no such model; it has {', '.join(sorted(known))}")
    if profile is not None and profile not in PROFILES:
        raise ManifestError(f"--profile {profile}: unknown; known: {', '.join(PROFILES)}")
    models = tuple(
        model.model_copy(update={"profile": profile or model.profile})
        for model in manifest.models
        if not wanted or model.name in wanted
    )
    return manifest.model_copy(update={"models": models})


def plan_entry(
    manifest: Manifest,
    entry: ModelEntry,
    *,
    mirror: Path | None = None,
    report: fetch.Report | None = None,
    download: bool = True,
) -> Planned:
    """Read the header of one model's checkpoint and plan it; `mirror` and `report` as in `fetch.resolve`.

    Raises SourceError, without `download` also for a checkpoint that is still to be downloaded.
    """
    profile = PROFILES[entry.profile or manifest.profile]
    checkpoint: Checkpoint | fetch.NotDownloaded
    if download:
        checkpoint = fetch.resolve(entry.source, cache=source_cache(), mirror=mirror, report=report)
    else:
        checkpoint = fetch.peek(entry.source, cache=source_cache(), mirror=mirror)
    if isinstance(checkpoint, fetch.NotDownloaded):
        raise SourceError(str(checkpoint))
    plan = plan_model(entry.name, checkpoint, profile, shard_bytes=manifest.shard_mib * MIB)
    return Planned(entry=entry, profile=profile, checkpoint=checkpoint, plan=plan)


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
    runs = [ModelRun(name=entry.name, profile=entry.profile or manifest.profile) for entry in manifest.models]
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
            progress.planned(run.name, run.source_bytes, run.status)
    waiting = {run.name: run for run in runs if run.status is None}
    if waiting:
        # Open from before the first look for a shard until its version is published: nothing is collected meanwhile.
        with open_run(store), start_executor() as executor:
            queue = TaskQueue(_tasks(list(waiting.values()), reuse), budget=_budget(manifest))
            for outcome in executor.run(queue):
                run = waiting[outcome.task.model]
                if run.status is None:
                    _take(run, outcome, store, single_publisher, signer)
                    if run.status == "published" and manifest.keep is not None:
                        retire(store, run.name, manifest.keep)
                    run.seconds = clock.seconds()
                    progress.advanced(run.name, outcome.task.nbytes, run.status)
                if run.status == "failed":
                    queue.drop(run.name)
    return runs


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _budget(manifest: Manifest) -> int:
    """Source bytes that may be at work at any time."""
    if manifest.in_flight_mib is not None:
        return manifest.in_flight_mib * MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _prepare(
    run: ModelRun, plan: Callable[[], Planned], store: Store, reuse: Reuse, signer: Signer | None
) -> None:
    """Plan one model and find out whether its latest version is what would be made."""
    try:
        run.planned = plan()
        run.source_state = file_state(run.planned.checkpoint)
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
    return run.planned is not None and (manifest.source.sha256, manifest.recipe, manifest.code) == (
        run.source_sha256,
        run.planned.profile.recipe(),
        birkhoff.__version__,
    )


def _tasks(runs: list[ModelRun], reuse: Reuse) -> Iterator[ShardTask]:
    """Shards of all models."""
    for run in runs:
        if run.planned is not None:
            for index, tensors in enumerate(run.planned.plan.shards):
                yield ShardTask(model=run.name, index=index, tensors=tensors, profile=run.planned.profile, reuse=reuse)


def _take(
    run: ModelRun, outcome: Outcome, store: Store, single_publisher: bool, signer: Signer | None
) -> None:
    """Account for one outcome; the last one of a model publishes it."""
    assert run.planned is not None  # only planned models have tasks
    if outcome.result is None:
        run.fail(outcome.error or BirkhoffError(f"{outcome.task.label}: no result and no error"))
        return
    run.records[outcome.task.index] = outcome.result.record
    run.reused += outcome.result.reused
    run.stages.update(outcome.result.stages)
    if len(run.records) < len(run.planned.plan.shards):
        return
    interrupt.check()
    try:
        if file_state(run.planned.checkpoint) != run.source_state:
            raise SourceError(f"{run.planned.checkpoint.path}: changed while it was being compressed; run again")
        manifest = _version_manifest(run, run.planned)
        run.version = publish(store, manifest, single_publisher=single_publisher, signer=signer)
        run.status = "published"
    except BirkhoffError as error:
        run.fail(error)


def _version_manifest(run: ModelRun, planned: Planned) -> VersionManifest:
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
        profile=planned.profile.name,
        recipe=planned.profile.recipe(),
        code=birkhoff.__version__,
        shards=tuple(run.records[index] for index in range(len(planned.plan.shards))),
    )


def failure(runs: list[ModelRun]) -> BirkhoffError | None:
    """What a run that published less than everything ends with: the one kind of error there was, or PartialError."""
    failed = [run.error for run in runs if run.error is not None]
    if not failed:
        return None
    if len(failed) == len(runs) and len({type(error) for error in failed}) == 1:
        return failed[0]
    return PartialError(f"{len(failed)} of {len(runs)} models were not published")
