"""The main job: plan every model, run the shards that are missing, publish each model once it is complete.

The functions follow the pipeline in order; each step has its own module.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.native.processors import processors
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.bases import find_base, newer_base
from birkhoff.pipeline.checkpoint.digests import checkpoint_digest, checkpoint_state
from birkhoff.pipeline.errors import ProofError, SourceError, StoreError
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.plan.models import Planned, check_rules, matches_plan, plan_entry
from birkhoff.pipeline.plan.shards import MIB, ModelPlan
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.proof.subject import subjects_of
from birkhoff.pipeline.proof.task import ProofTask, Subject
from birkhoff.pipeline.registry.documents import ShardRecord, SourceRecord, VersionManifest, blob_key
from birkhoff.pipeline.registry.gc import retire
from birkhoff.pipeline.registry.labels import change_labels
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.parallel import pool
from birkhoff.pipeline.registry.signing import Signer
from birkhoff.pipeline.registry.versions import is_signed, is_whole, latest_version, publish
from birkhoff.pipeline.run.bases import base_in_run, waits_for
from birkhoff.pipeline.run.demand import Demand
from birkhoff.pipeline.run.environment import memory_bytes
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.run.outcome import Executor, Outcome
from birkhoff.pipeline.run.passes import Passes, Terms
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.shard.task import Reuse, ShardResult, ShardTask
from birkhoff.pipeline.statistics.task import StatisticsTask, keys_of
from birkhoff.pipeline.store.base import Store

_CPUS_TO_A_DIGEST = 8
"""Digests of new models are taken beside their encoding, in one thread for so many CPUs: Ray's workers leave as many
free."""

_PUBLISHERS = 4
"""Versions that are published at a time: each takes many requests to the store, one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """State shared by the models of a run."""

    manifest: Manifest
    store: Store
    progress: Progress
    reuse: Reuse
    single_publisher: bool
    signer: Signer | None
    began: float
    """The start, in seconds of `time.perf_counter`."""
    seen: set[tuple[str, int]]
    """Blobs of versions found whole while the run was prepared, with their sizes: models share many."""
    digests: ThreadPoolExecutor

    def seconds(self) -> float:
        """Wall time of the run so far."""
        return time.perf_counter() - self.began


def compress(
    manifest: Manifest,
    store: Store,
    start_executor: Callable[[Demand], Executor],
    progress: Progress,
    *,
    reuse: Reuse = "trust",
    mirror: Path | None = None,
    single_publisher: bool = False,
    signer: Signer | None = None,
    begun: Callable[[Sequence[ModelRun]], object] = lambda _: None,
    ahead: Callable[[int], object] = lambda _: None,
) -> list[ModelRun]:
    """Compress, validate and publish every model of a manifest. Returns one `ModelRun` per model, in its order.

    An error of one model ends that model alone. The executor is started only if a shard must be encoded. `begun` gets
    the model runs before any work, so observers see them even if an error ends all. `ahead` is called while models are
    still planned, with the bytes of those that need the executor in any case, so that it can begin what takes long.

    Raises:
        StoreError: The store failed for all models.
        WorkerError: No worker could be started, or more were asked for than the cluster has room for.
    """
    began = time.perf_counter()
    runs = [
        ModelRun(name=entry.name, profile=manifest.fidelity(entry).profile.name, labels=manifest.labels_of(entry))
        for entry in manifest.models
    ]
    begun(runs)
    with (
        pool(max(1, processors() // _CPUS_TO_A_DIGEST), "digest") as digests,
        ExitStack() as lease,
        ExitStack() as stack,
    ):
        job = _Job(
            manifest=manifest,
            store=store,
            progress=progress,
            reuse=reuse,
            single_publisher=single_publisher,
            signer=signer,
            began=began,
            seen=set(),
            digests=digests,
        )
        for run in runs:
            stack.callback(run.ended.set)

        def start() -> Executor:
            left = [run for run in runs if run.status is None]
            demand = Demand(nbytes=sum(run.source_bytes for run in left), gpu=any(run.wants_gpu for run in left))
            return stack.enter_context(start_executor(demand))

        early = _prepare_all(job, runs, mirror, start, ahead)
        check_rules(manifest, [run.planned for run in runs])
        for run in runs:
            if run.status is None and (base := _awaited(job, run, runs)) is not None and base.status is not None:
                _take_base(job, run, base)
        waiting = {run.name: run for run in runs if run.status is None}
        if waiting:
            # Open from before the first look for a shard until its version is published: nothing is collected then.
            lease.enter_context(open_run(store))
            _run(job, waiting, early or start())
    return runs


def _prepare_all(
    job: _Job,
    runs: Sequence[ModelRun],
    mirror: Path | None,
    start: Callable[[], Executor],
    ahead: Callable[[int], object],
) -> Executor | None:
    """Plan all models beside each other.

    A model of which the store has no version needs the executor in any case, which is then started beside the rest and
    returned. It waits for all checkpoints to be here: workers that wait for a download would hold their memory. (Their
    processes start earlier if nothing has to be downloaded; see `Choice.ahead`.) Such a model's digest is only needed
    to publish it, and is taken from then on, smallest models first, as they are encoded.
    """
    with pool(processors(), "plan") as threads:
        prepared: dict[str, Future[None]] = {}

        def begin(run: ModelRun, plan: Callable[[], Planned]) -> bool:
            found = _plan(job, run, plan)
            prepared[run.name] = threads.submit(_prepare, job, run)  # not by the loop below, which may wait for Ray
            return found

        planning = {
            threads.submit(
                begin, run, partial(plan_entry, job.manifest, entry, mirror=mirror, report=job.progress.downloaded)
            ): run
            for run, entry in zip(runs, job.manifest.models, strict=True)
        }
        new = 0
        for future in as_completed(planning):
            if future.result():
                new += planning[future].source_bytes
                ahead(new)
        early = start() if new else None
        for run in runs:
            prepared[run.name].result()
            run.seconds = job.seconds()
            shards = len(run.planned.plan.shards) if run.planned else 0
            job.progress.planned(run.name, run.source_bytes, run.status, shards=shards)
    for run in sorted(runs, key=lambda run: run.source_bytes):
        if run.status is None and not run.source_sha256 and run.planned is not None:
            run.digest = job.digests.submit(_digest, run, run.planned)
    return early


def _digest(run: ModelRun, planned: Planned) -> str:
    with interrupt.ends_with(run.ended):
        return checkpoint_digest(planned.checkpoint)


def _plan(job: _Job, run: ModelRun, plan: Callable[[], Planned]) -> bool:
    """Plan one model; return whether it can be made and the store has no version of it."""
    try:
        run.planned = plan()
        run.subjects = subjects_of(run.planned)
        run.source_state = checkpoint_state(run.planned.checkpoint)
        return latest_version(job.store, run.name) is None
    except BirkhoffError as error:
        if isinstance(error, StoreError):
            raise
        run.fail(error)
        return False


def _prepare(job: _Job, run: ModelRun) -> None:
    """Find out whether the latest version of a planned model is what would be made."""
    if run.status is not None:
        return
    store = job.store
    assert run.planned is not None  # else it has failed
    try:
        run.before = latest_version(store, run.name)
        if run.before is not None or run.subjects.statistics is not None:
            run.source_sha256 = checkpoint_digest(run.planned.checkpoint)
        if waits_for(job.manifest, run.planned) is None:
            base = find_base(store, run.planned, run.before, again=job.reuse != "trust")
            run.planned = run.planned if base is None else base.on(run.planned)
            _compare(job, run, job.seen)
        if run.status is None:
            run.planned = run.planned.scaled()
    except BirkhoffError as error:
        if isinstance(error, StoreError):
            raise
        run.fail(error)


def _compare(job: _Job, run: ModelRun, seen: set[tuple[str, int]] | None = None) -> None:
    """Find out whether a model's latest version is what would be made; `seen` as in `missing_blobs`. Raises as
    `latest_version`."""
    store, signer, latest, planned = job.store, job.signer, run.before, run.planned
    if job.reuse != "trust" or latest is None or planned is None:
        return
    newer = newer_base(store, planned, latest, planned.base)
    if newer is not None and latest.manifest.base is not None:
        planned = planned.on(latest.manifest.base, ())
    same = _same(latest.manifest, run, planned)
    if same and is_whole(store, latest.manifest, seen) and (not signer or is_signed(store, latest, signer)):
        run.version, run.status, run.newer_base = latest, "up to date", newer
        _say_labels(store, run)


def _awaited(job: _Job, run: ModelRun, runs: Iterable[ModelRun]) -> ModelRun | None:
    """Return the run of the model's base; None if the base is not of this run."""
    name = None if run.planned is None else waits_for(job.manifest, run.planned)
    return next((other for other in runs if other.name == name), None)


def _take_base(job: _Job, run: ModelRun, base: ModelRun) -> None:
    """Continue a model after its base's run has ended."""
    assert run.planned is not None
    try:
        run.planned = base_in_run(job.store, run.planned, base)
        _compare(job, run)
    except BirkhoffError as error:
        if isinstance(error, StoreError):
            raise
        run.fail(error)
    if run.status is not None:
        run.seconds = job.seconds()
        job.progress.planned(run.name, run.source_bytes, run.status, shards=len(run.planned.plan.shards))


def _same(manifest: VersionManifest, run: ModelRun, planned: Planned) -> bool:
    """Return whether a version was made from the same bytes by the same recipe, and with the base of `planned`."""
    same = (manifest.source.sha256, manifest.code) == (run.source_sha256, birkhoff.__version__)
    if run.subjects.statistics is not None:
        same = same and manifest.recipe.get("statistics") in keys_of(run.source_sha256, run.subjects.statistics)
    return same and matches_plan(manifest, planned)


def _run(job: _Job, waiting: Mapping[str, ModelRun], executor: Executor) -> None:
    """Run the shards of the waiting models, and publish each model after its last shard.

    That happens in threads, so that workers get tasks meanwhile; progress shows it at the next outcome. A model that is
    the base of others is published at once, because they wait for it.
    """
    # A signature vouches for every byte, so shards that others stored are verified too.
    reuse: Reuse = "prove" if job.signer is not None and job.reuse == "trust" else job.reuse
    # A model whose base is also waiting starts when the base is published.
    later = {name: base for name, run in waiting.items() if (base := _awaited(job, run, waiting.values())) is not None}
    starts = (task for name, run in waiting.items() if name not in later for task in _start(run, reuse))
    queue = TaskQueue(starts, budget=_in_flight(job.manifest))
    publishing: dict[Future[None], Outcome] = {}

    def settle(run: ModelRun, outcome: Outcome) -> None:
        """Go on after an outcome, or after a model's end."""
        _tell(job.progress, run, outcome)
        if run.status == "failed":
            run.seconds = job.seconds()
            queue.drop(run.name)
        for name in [name for name, base in later.items() if base is run and run.status is not None]:
            del later[name]
            _take_base(job, waiting[name], run)
            if waiting[name].status is None:
                queue.add(_start(waiting[name], reuse))

    def settle_published() -> None:
        for future in [future for future in publishing if future.done()]:
            outcome = publishing.pop(future)
            future.result()
            settle(waiting[outcome.task.model], outcome)

    def take(outcome: Outcome) -> None:
        run = waiting[outcome.task.model]
        if isinstance(outcome.result, ShardResult):
            queue.note(outcome.task, outcome.result.record)
        if run.status is None:
            queue.add(_take(run, outcome))
        whole = run.status is None and run.passes is not None and run.passes.whole
        if whole and not any(base is run for base in later.values()):
            publishing[threads.submit(_finish, job, run)] = outcome
            return
        if whole:
            _finish(job, run)
        settle(run, outcome)

    with pool(_PUBLISHERS, "publish") as threads:
        try:
            while True:
                for outcome in executor.run(queue):
                    take(outcome)
                    settle_published()
                if not publishing:
                    return
                wait(publishing, return_when=FIRST_COMPLETED)
                settle_published()
        except BirkhoffError:
            wait(publishing)  # what is whole is published, although the run ends
            raise


def _tell(progress: Progress, run: ModelRun, outcome: Outcome) -> None:
    """Report progress. Under a budget only the first pass counts bytes."""
    task = outcome.task
    counts = isinstance(task, ShardTask) and run.passes is not None and run.passes.first and not task.estimate_only
    reused = isinstance(outcome.result, ShardResult) and outcome.result.reused
    progress.advanced(run.name, task.nbytes if counts else 0, run.status, reused=reused)


def _in_flight(manifest: Manifest) -> int:
    """Return the most source bytes that may be in flight."""
    if manifest.in_flight_mib is not None:
        return manifest.in_flight_mib * MIB
    return memory_bytes() // 8


def _start(run: ModelRun, reuse: Reuse) -> list[Task]:
    """Return the first tasks of a model."""
    planned, terms = run.planned, None
    assert planned is not None  # only planned models run
    if planned.budget is not None:
        hint = run.before.manifest.recipe.get("target_db") if run.before else None
        terms = Terms(
            budget=planned.budget,
            limit=0 if planned.budget.by_output else planned.budget.limit(planned.checkpoint.nbytes),
            hint_db=hint if isinstance(hint, float) else None,
        )
    describe = partial(_version_manifest, run, planned)
    proof, statistics = run.subjects.proof, run.subjects.statistics
    prove = None if proof is None else partial(_proof_task, planned, proof)
    ask = None if statistics is None else partial(_statistics_task, run, planned, statistics, reuse)
    int8 = proof is not None and proof.int8
    run.passes = Passes(run.name, planned.plan, describe, terms=terms, reuse=reuse, prove=prove, ask=ask, int8=int8)
    return run.passes.start()


def _statistics_task(run: ModelRun, planned: Planned, subject: Subject, reuse: Reuse) -> StatisticsTask:
    return StatisticsTask(
        model=run.name,
        source_sha256=run.source_sha256,
        checkpoint=planned.checkpoint,
        subject=subject,
        reuse=reuse,
    )


def _proof_task(planned: Planned, subject: Subject, manifest: VersionManifest) -> ProofTask:
    return ProofTask(model=manifest.model, manifest=manifest, checkpoint=planned.checkpoint, subject=subject)


def _take(run: ModelRun, outcome: Outcome) -> list[Task]:
    """Record one outcome. Returns the tasks that follow."""
    assert run.passes is not None  # only started models have tasks
    if outcome.result is None:
        run.fail(outcome.error or BirkhoffError(f"{outcome.task.label}: no result and no error"))
        return []
    run.stages.update(outcome.result.stages)
    try:
        more = run.passes.take(outcome.task.index, outcome.result)
        run.records, run.reused = run.passes.records, run.passes.reused
        return more
    except BirkhoffError as error:
        run.fail(error)
        return []


def _finish(job: _Job, run: ModelRun) -> None:
    """Publish a model whose passes have ended."""
    assert run.planned is not None
    assert run.passes is not None
    try:
        interrupt.check()
        _check_proof(run, run.planned)
        _publish(job, run, run.planned, run.passes.plan)
    except BirkhoffError as error:
        run.fail(error)
        return
    finally:
        run.seconds = job.seconds()
    if job.manifest.keep is not None:
        retire(job.store, run.name, job.manifest.keep)


def _check_proof(run: ModelRun, planned: Planned) -> None:
    """Check a proof against the manifest's floors. Raises ProofError if it falls below one."""
    proof = run.passes.proof if run.passes else None
    if proof is None or proof.record is None:
        return
    complaint = planned.proof.complaint(proof.record)
    if complaint is not None:
        raise ProofError(
            f"{complaint}: not published; allow more bytes or dB, or lower the floor in the manifest if that "
            "is enough for you"
        )


def _publish(job: _Job, run: ModelRun, planned: Planned, plan: ModelPlan) -> None:
    """Publish the version that a model's passes ended with."""
    records = [run.records[index] for index in range(len(plan.shards))]
    manifest = _version_manifest(run, planned, plan, records)  # waits for the digest, which reads the source
    if checkpoint_state(planned.checkpoint) != run.source_state:
        raise SourceError(f"{planned.checkpoint.path}: changed while it was being compressed; run again")
    for sidecar in planned.files:
        job.store.create(blob_key(sidecar.record.blob), sidecar.body)
    run.version = publish(job.store, manifest, single_publisher=job.single_publisher, signer=job.signer)
    _say_labels(job.store, run)
    run.status = "published"


def _say_labels(store: Store, run: ModelRun) -> None:
    """Set the labels that the manifest names on a model's version. Its other labels stay."""
    if run.version is not None and run.labels:
        change_labels(store, run.name, run.version.digest, run.labels)


def _sha256(run: ModelRun) -> str:
    """Return the digest of a model's source, once it has been taken. Raises SourceError, OutputError."""
    if run.digest is not None:
        run.source_sha256, run.digest = run.digest.result(), None
    return run.source_sha256


def _version_manifest(
    run: ModelRun, planned: Planned, plan: ModelPlan, records: Sequence[ShardRecord]
) -> VersionManifest:
    checkpoint = planned.checkpoint
    proof = run.passes.proof if run.passes else None
    return VersionManifest(
        model=run.name,
        source=SourceRecord(
            file=checkpoint.path.name,
            sha256=_sha256(run),
            bytes=checkpoint.nbytes,
            format=checkpoint.format,
            nesting=checkpoint.nesting,
            origin=checkpoint.origin or None,
        ),
        profile=plan.profile.name,
        recipe=plan.profile.recipe(),
        budget=planned.budget,
        overrides=plan.overrides or None,
        gains_db=None if plan.shares is None else dict(plan.shares.gains_db),
        adapter=planned.entry.adapter,
        code=birkhoff.__version__,
        shards=tuple(records),
        files=planned.file_records or None,
        proof=proof.record if proof else None,
        base=planned.base,
    )
