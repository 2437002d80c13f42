"""Collect a run's report: from the outcomes of shards during the run, and from the stored versions at its end.

Figures of tensors are read back from the headers of stored shards, so the report describes what is in the store.
"""

import base64
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import FALLBACKS
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.readers import StoredArtifact, TensorRow, inspect_shard
from birkhoff.pipeline.errors import StoreError
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.proof.task import Proof
from birkhoff.pipeline.registry.documents import NO_FIGURES, ShardRecord, sqnr_summary
from birkhoff.pipeline.registry.parallel import pool
from birkhoff.pipeline.report.changes import changes
from birkhoff.pipeline.report.document import LayerRecord, ModelRecord, RunReport, ShardTiming, Totals
from birkhoff.pipeline.report.stored import RunClock, write_report
from birkhoff.pipeline.run.environment import environment
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.run.outcome import Executor, Outcome
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.shard.task import ShardSizes, ShardTask
from birkhoff.pipeline.statistics.task import Statistics
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.text import first_line

log: logging.Logger = logging.getLogger("birkhoff.report")

SLOWEST = 20
"""Number of slowest shards that a report lists."""

_THREADS = 8
"""How many headers are read in parallel."""

_FROM_ROW = (
    "profile",
    "allocation",
    "base",
    "base_bytes",
    "version",
    "digest",
    "source_bytes",
    "stored_bytes",
    "ratio",
    "sqnr_db_min",
    "sqnr_db_median",
    *NO_FIGURES,
    "stages",
    "error",
)
"""The fields of a model's record that come from its row in the result table."""


class Recorder(AbstractContextManager["Recorder"]):
    """Follows one run: its models (`follow`) and its executor (`watch`). The report is written beside the end of the
    executor, and the block waits for it; what it needs of a published model is read beside the rest of the run.

    If an error ends the run, the report shows the models as far as they got. No report is written if the error came
    before a worker was started or from the store, if the user ended the run, or if everything was up to date. Failing
    to write the report is only a warning, as the versions are published.
    """

    def __init__(self, manifest: Manifest, store: Store, **options: object) -> None:
        self._manifest, self._store = manifest, store
        self._options = {key: value for key, value in options.items() if value is not None}
        self._clock = RunClock()
        self._timings: list[ShardTiming] = []
        self._made: dict[str, int] = {}
        self.run: str = self._clock.run
        self._runs: Sequence[ModelRun] = ()
        self._layers = _Layers(store)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._read: dict[str, Future[tuple[LayerRecord, ...]]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._began = False
        self._gpus: tuple[str, ...] = ()
        self.written: bool = False

    def follow(self, runs: Sequence[ModelRun]) -> None:
        """Set the models to follow."""
        self._runs = runs

    def note_option(self, name: str, value: object) -> None:
        """Record that an option differs from the requested one."""
        self._options[name] = value

    def watch(self, executor: Executor) -> Executor:
        """Return a wrapper of the executor that records outcomes as they pass."""
        self._began = True
        return _Watched(executor, self._note, self._read_published, self._ended)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        broken = self._began and isinstance(error, BirkhoffError) and not isinstance(error, StoreError)
        try:
            if error is None:
                self._begin()
            if self._writing is not None and (error is None or broken):
                wait([self._writing])
            if broken:
                self._write(error)
        finally:
            self._layers.stopping.set()
            for threads in (self._reader, self._writer):
                threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, executor: Executor, error: BaseException | None) -> None:
        try:
            self._gpus = tuple(executor.gpus().values())
        except Exception as failure:  # whatever became of the workers, the run has ended
            log.debug("the workers' GPUs are not known: %s", first_line(failure))
        if error is None:
            self._begin()

    def _begin(self) -> None:
        """Begin to write the report, unless everything was up to date: beside the end of the executor."""
        if self._writing is None and any(run.status != "up to date" for run in self._runs):
            self._writing = self._writer.submit(self._write_beside)

    def _write_beside(self) -> None:
        with interrupt.ends_with(self._layers.stopping):
            self._write(None)

    def _write(self, error: BaseException | None) -> None:
        try:
            write_report(self._store, self.report(None if error is None else str(error)))
            self.written = True
        except Exception as failure:
            log.debug("%s", traceback.format_exc())
            log.warning("the report of run %s could not be written: %s", self.run, first_line(failure))

    def report(self, error: str | None = None) -> RunReport:
        """Return the report of the models in their present state. `error` is what ended the run early.

        Raises:
            StoreError, IntegrityError: A published version cannot be read back.
        """
        runs = self._runs
        self._read_published()
        return RunReport(
            **self._frame(),
            totals=self._totals(runs),
            models=tuple(map(self._model, runs)),
            slowest=tuple(sorted(self._timings, key=lambda timing: -timing.seconds)[:SLOWEST]),
            error=error,
            seconds=self._clock.seconds(),
        )

    def _frame(self) -> dict[str, Any]:
        settings = self._manifest.model_dump(mode="json", exclude={"models", "store"}, exclude_none=True)
        return {
            "run": self.run,
            "started": self._clock.started,
            "store": self._store.url,
            "settings": {**settings, **self._options},
            "environment": environment(self._gpus),
        }

    def _note(self, outcome: Outcome) -> None:
        task, result = outcome.task, outcome.result
        if not isinstance(task, ShardTask) or isinstance(result, ShardSizes | Proof | Statistics):
            return
        if result is not None and not result.reused:
            self._made[result.record.blob] = result.record.bytes
        self._timings.append(
            ShardTiming(
                model=task.model,
                index=task.index,
                first=task.tensors[0].tensor.name,
                tensors=len(task.tensors),
                source_bytes=task.nbytes,
                stored_bytes=result.record.bytes if result else None,
                seconds=round(result.seconds, 3) if result else 0.0,
                stages=_rounded(result.stages) if result else {},
                reused=bool(result and result.reused),
                error=str(outcome.error) if outcome.error else None,
            )
        )

    def _read_published(self) -> None:
        """Begin to read the tensors of models that were published since the last call, beside the run."""
        for run in self._runs:
            if run.status == "published" and run.version is not None and run.name not in self._read:
                self._read[run.name] = self._reader.submit(self._layers.of, run)

    def _model(self, run: ModelRun) -> ModelRecord:
        row = run.row()
        version = run.version
        shards = version.manifest.shards if version else ()
        published = version is not None and run.status == "published"
        reused = {index for (model, index), taken in self._last().items() if model == run.name and taken}
        return ModelRecord.model_validate(
            {
                **{key: row[key] for key in _FROM_ROW},
                "name": run.name,
                "status": run.status or "failed",
                "seconds": round(run.seconds, 2),
                "source": run.planned.checkpoint.path.name if run.planned else None,
                "source_sha256": run.source_sha256 or None,
                **_proven(run),
                "probe_error": max((shard.probe_error for shard in shards if shard.probe_db), default=None),
                "shards": len(shards) or (len(run.planned.plan.shards) if run.planned else None),
                "shards_reused": len(reused),
                "reused_bytes": sum(shards[index].bytes for index in reused) if published else 0,
                "layers": self._layers_of(run) if published else (),
                "changes": changes(self._store, run.before, version) if published and version and run.before else None,
            }
        )

    def _layers_of(self, run: ModelRun) -> tuple[LayerRecord, ...]:
        try:
            return self._read[run.name].result()
        except BirkhoffError:  # the store may be well again
            return self._layers.of(run)

    def _last(self) -> dict[tuple[str, int], bool]:
        """Return by shard whether it came from the store. Under a budget, the last of several encodings counts."""
        return {(timing.model, timing.index): timing.reused for timing in self._timings}

    def _totals(self, runs: Sequence[ModelRun]) -> Totals:
        there = [run for run in runs if run.version is not None]
        shards = [shard for run in there if run.version for shard in run.version.manifest.shards]
        least, median = sqnr_summary(shards)
        statuses = [run.status for run in runs]
        return Totals(
            models=len(runs),
            published=statuses.count("published"),
            up_to_date=statuses.count("up to date"),
            failed=statuses.count("failed") + statuses.count(None),
            source_bytes=sum(run.source_bytes for run in there),
            stored_bytes=sum(run.version.stored_bytes for run in there if run.version),
            unique_bytes=sum({shard.blob: shard.bytes for shard in shards}.values()),
            new_bytes=sum(self._made.values()),
            shards=len(shards),
            shards_reused=sum(self._last().values()),
            sqnr_db_min=least,
            sqnr_db_median=median,
        )


class _Watched(AbstractContextManager["_Watched"]):
    """Calls `note` with each outcome, `taken` before and after the run takes it, and `ended` with the executor and the
    error before that ends, unless the user ends it."""

    def __init__(
        self,
        executor: Executor,
        note: Callable[[Outcome], None],
        taken: Callable[[], None],
        ended: Callable[[Executor, BaseException | None], None],
    ) -> None:
        self._executor, self._note, self._taken, self._ended = executor, note, taken, ended

    def __enter__(self) -> "_Watched":
        self._executor.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None or isinstance(error, BirkhoffError):
                self._ended(self._executor, error)
        finally:
            self._executor.__exit__(kind, error, at)

    def gpus(self) -> dict[str, str]:
        return self._executor.gpus()

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        self._taken()
        for outcome in self._executor.run(queue):
            self._note(outcome)
            yield outcome
            self._taken()


class _Layers:
    """Reads the tensors of published versions, each stored shard once even if several models share it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[str, list[TensorRow]] = {}
        self.stopping: threading.Event = threading.Event()
        """Set once nobody waits for what is being read."""

    def of(self, run: ModelRun) -> tuple[LayerRecord, ...]:
        """Return every tensor of a run's version, in the checkpoint's order. Raises Interrupted once `stopping` is
        set."""
        assert run.version is not None  # only called for published models
        artifact = StoredArtifact(self._store, run.version)
        missing = {shard.blob: shard for shard in artifact.manifest.shards if shard.blob not in self._rows}
        with pool(_THREADS, "layers") as threads:
            found = threads.map(lambda shard: self._inspected(artifact, shard), missing.values())
            self._rows.update(zip(missing, found, strict=True))
        planned = run.planned.plan.tensors if run.planned else ()
        reasons = {plan.tensor.name: plan.decision.reason for plan in planned}
        target = artifact.manifest.recipe.get("target_db")
        return tuple(
            _layer(row, index, probe, float(target) if target is not None else None, reasons.get(row.name, ""))
            for index, shard in enumerate(artifact.manifest.shards)
            for row, probe in _probed(shard, self._rows[shard.blob])
        )

    def _inspected(self, artifact: StoredArtifact, shard: ShardRecord) -> list[TensorRow]:
        with interrupt.ends_with(self.stopping):
            interrupt.check()
            return inspect_shard(artifact, shard)


def _proven(run: ModelRun) -> dict[str, Any]:
    """Return the result of a model's proof by this run, or of the version that the run found up to date."""
    proof = run.passes.proof if run.passes else None
    if proof is None:
        return {"proof": run.version.manifest.proof if run.version else None, "unproven": run.unproven}
    masks = base64.b64encode(proof.picture).decode() or None
    return {"proof": proof.record, "unproven": proof.missing or None, "masks": masks}


def _probed(shard: ShardRecord, rows: list[TensorRow]) -> Iterator[tuple[TensorRow, float | None]]:
    """Yield rows with their probes. The record lists probes in order, for coded matrices only."""
    matrices = [row.name for row in rows if row.action == "lattice" and len(row.shape) == 2 and row.shape[1] > 1]
    probes = dict(zip(matrices, shard.probe_db, strict=True)) if len(matrices) == len(shard.probe_db) else {}
    return ((row, probes.get(row.name)) for row in rows)


def _layer(row: TensorRow, shard: int, probe: float | None, target: float | None, planned: str) -> LayerRecord:
    return LayerRecord(
        name=row.name,
        shape=row.shape,
        dtype=row.dtype,
        codec=row.action,
        shard=shard,
        bits_per_weight=row.bits_per_weight,
        sqnr_db=row.sqnr_db,
        target_db=None if row.lossless or row.nominal else row.target_db or target,
        nominal_db=row.target_db if row.nominal else None,
        max_abs_error=row.max_abs_error,
        probe_db=probe,
        reason=(planned or FALLBACKS.get(row.reason or "", "left lossless by the encoder")) if row.lossless else None,
    )


def _rounded(stages: dict[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 3) for stage, seconds in stages.items()}
