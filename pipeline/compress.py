"""The main job: plan every model, run the shards that are missing, publish what is whole.

Reads as the table of contents of the pipeline; each step has its module.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import Profile
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact import ShardRecord, SourceRecord, VersionManifest, blob_key
from birkhoff.pipeline.collect import retire
from birkhoff.pipeline.digests import checkpoint_digest, checkpoint_state
from birkhoff.pipeline.environment import memory_bytes
from birkhoff.pipeline.errors import SourceError, StoreError
from birkhoff.pipeline.execute import Executor, Outcome
from birkhoff.pipeline.leases import open_run
from birkhoff.pipeline.manifest import Manifest
from birkhoff.pipeline.model_run import ModelRun
from birkhoff.pipeline.passes import Passes, Terms
from birkhoff.pipeline.plan import MIB
from birkhoff.pipeline.planned import Planned, check_rules, made_so, plan_entry
from birkhoff.pipeline.progress import Progress
from birkhoff.pipeline.publish import is_signed, is_whole, latest_version, publish
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import Reuse, ShardResult, ShardTask
from birkhoff.pipeline.signing import Signer
from birkhoff.pipeline.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the models of a run share."""

    manifest: Manifest
    store: Store
    progress: Progress
    reuse: Reuse
    single_publisher: bool
    signer: Signer | None
    began: float
    """Seconds of `time.perf_counter`."""

    def seconds(self) -> float:
        """Wall time of the run so far."""
        return time.perf_counter() - self.began


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
    job = _Job(
        manifest=manifest,
        store=store,
        progress=progress,
        reuse=reuse,
        single_publisher=single_publisher,
        signer=signer,
        began=time.perf_counter(),
    )
    runs = [ModelRun(name=entry.name, profile=manifest.fidelity(entry).profile.name) for entry in manifest.models]
    _prepare_all(job, runs, mirror)
    check_rules(manifest, [run.planned for run in runs])
    waiting = {run.name: run for run in runs if run.status is None}
    if waiting:
        # Open from before the first look for a shard until its version is published: nothing is collected meanwhile.
        with open_run(store), start_executor() as executor:
            _run(job, waiting, executor)
    return runs


def _prepare_all(job: _Job, runs: Sequence[ModelRun], mirror: Path | None) -> None:
    """Plan all models beside each other: digests are nearly all of it, and leave the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        plans = [
            partial(plan_entry, job.manifest, entry, mirror=mirror, report=job.progress.downloaded)
            for entry in job.manifest.models
        ]
        prepared = [pool.submit(_prepare, job, run, plan) for run, plan in zip(runs, plans, strict=True)]
        for run, future in zip(runs, prepared, strict=True):
            future.result()
            run.seconds = job.seconds()
            shards = len(run.planned.plan.shards) if run.planned else 0
            job.progress.planned(run.name, run.source_bytes, run.status, shards=shards)


def _prepare(job: _Job, run: ModelRun, plan: Callable[[], Planned]) -> None:
    """Plan one model and find out whether its latest version is what would be made."""
    store, signer = job.store, job.signer
    try:
        run.planned = plan()
        run.source_state = checkpoint_state(run.planned.checkpoint)
        run.source_sha256 = checkpoint_digest(run.planned.checkpoint)
        latest = run.before = latest_version(store, run.name)
        same = job.reuse == "trust" and latest is not None and _same(latest.manifest, run)
        if same and latest and is_whole(store, latest.manifest) and (not signer or is_signed(store, latest, signer)):
            run.version, run.status = latest, "up to date"
    except BirkhoffError as error:
        if isinstance(error, StoreError):
            raise
        run.fail(error)


def _same(manifest: VersionManifest, run: ModelRun) -> bool:
    """Whether a version was made from the same bytes by the same recipe."""
    same = (manifest.source.sha256, manifest.code) == (run.source_sha256, birkhoff.__version__)
    return same and run.planned is not None and made_so(manifest, run.planned)


def _run(job: _Job, waiting: Mapping[str, ModelRun], executor: Executor) -> None:
    """Run the shards of the models that wait, and publish each model with its last one."""
    starts = (task for run in waiting.values() for task in _start(run, job.reuse))
    queue = TaskQueue(starts, budget=_in_flight(job.manifest))
    for outcome in executor.run(queue):
        run = waiting[outcome.task.model]
        if run.status is None:
            queue.add(_take(job, run, outcome))
            if run.status == "published" and job.manifest.keep is not None:
                retire(job.store, run.name, job.manifest.keep)
            run.seconds = job.seconds()
            _tell(job.progress, run, outcome)
        if run.status == "failed":
            queue.drop(run.name)


def _tell(progress: Progress, run: ModelRun, outcome: Outcome) -> None:
    """Show how far the model is; of a budget's passes the first alone counts bytes."""
    counts = run.passes is not None and run.passes.first and not outcome.task.foretell
    reused = isinstance(outcome.result, ShardResult) and outcome.result.reused
    progress.advanced(run.name, outcome.task.nbytes if counts else 0, run.status, reused=reused)


def _in_flight(manifest: Manifest) -> int:
    """Source bytes that may be at work at any time."""
    if manifest.in_flight_mib is not None:
        return manifest.in_flight_mib * MIB
    return memory_bytes() // 8


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


def _take(job: _Job, run: ModelRun, outcome: Outcome) -> list[ShardTask]:
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
            _publish(job, run, run.planned, run.passes.profile)
        return more
    except BirkhoffError as error:
        run.fail(error)
        return []


def _publish(job: _Job, run: ModelRun, planned: Planned, profile: Profile) -> None:
    """Publish what a model's passes have come to."""
    if checkpoint_state(planned.checkpoint) != run.source_state:
        raise SourceError(f"{planned.checkpoint.path}: changed while it was being compressed; run again")
    records = [run.records[index] for index in range(len(planned.plan.shards))]
    manifest = _version_manifest(run, planned, profile, records)
    for companion in planned.files:
        job.store.create(blob_key(companion.record.blob), companion.body)
    run.version = publish(job.store, manifest, single_publisher=job.single_publisher, signer=job.signer)
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
