"""Executors: where shards run. `inline` in this process, `ray` on long-lived workers of a local or remote cluster.

Both draw from a `TaskQueue` and yield outcomes in the order in which they end. An error of ours is an outcome of its
shard, not the end of the run; a worker that dies is replaced and its shard tried again, `TRIES` times in all.
"""

import importlib.util
import logging
import os
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import ShardResult, ShardTask, compress_shard
from birkhoff.pipeline.source_types import first_line
from birkhoff.pipeline.store import Store, StoreAddress

log = logging.getLogger("birkhoff.execute")

TRIES = 3
"""Times a shard is tried when its worker dies."""

WORKERS_PER_GPU = 12
"""Reading, entropy coding and validation keep CPUs busy while the GPU waits; each worker costs it 0.5 GB."""

OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster started here: descriptors and records pass through it, never tensors."""

QUEUED_PER_WORKER = 2
"""Tasks a worker holds: one at work, one ready, so that it never waits for the driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended: exactly one of `result` and `error` is set."""

    task: ShardTask
    result: ShardResult | None = None
    error: BirkhoffError | None = None


class Executor(AbstractContextManager["Executor"], Protocol):
    """Runs shards."""

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Outcomes of all tasks, in the order in which they end; tasks dropped meanwhile are left out."""
        ...


class InlineExecutor(AbstractContextManager["InlineExecutor"]):
    """One shard after another in this process: for tests, small jobs, and machines without Ray."""

    def __init__(self, store: StoreAddress) -> None:
        self._worker = Worker(store)

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Run each task when its outcome is asked for."""
        while task := queue.take():
            interrupt.check()
            outcome = self._worker.run(task)
            queue.done(task)
            yield outcome

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._worker.close()


class Worker:
    """Holds what shards of one process share: the store's client and the device."""

    def __init__(self, store: StoreAddress) -> None:
        # Shards are the unit of parallel work; threads inside one would wait for each other at every small operation.
        torch.set_num_threads(1)
        self._address = store
        self._store: Store | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, task: ShardTask) -> Outcome:
        """Run one task; every error becomes its outcome."""
        log.info("start %s, %d bytes", task.label, task.nbytes)
        try:
            # Opened here and not at the start: a store that refuses is the shard's error, not a worker's death.
            self._store = self._store or self._address.open()
            return Outcome(task=task, result=compress_shard(task, self._store, self._device))
        except BirkhoffError as error:
            return Outcome(task=task, error=error)
        except Exception as error:
            log.debug("%s", traceback.format_exc())
            kind = type(error).__name__
            return Outcome(task=task, error=WorkerError(f"{task.label}: {kind}: {error}; run with --debug for more"))

    def identity(self) -> dict[str, Any]:
        """What this process is: its id, whether it sees a GPU, and who owns a top-level `kernels`, if anyone."""
        spec = importlib.util.find_spec("kernels")
        return {"pid": os.getpid(), "cuda": torch.cuda.is_available(), "kernels": spec and spec.origin}

    def close(self) -> None:
        """Release the store's connections."""
        if self._store is not None:
            self._store.close()


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Long-lived Ray actors: up to `WORKERS_PER_GPU` to a GPU where there are GPUs, else one per CPU.

    Actors, not tasks: a GPU task gets a process of its own, and torch's import and CUDA's start each time. With an
    `address` the cluster of that address is joined; otherwise one is started here and stopped at the end, without
    dashboard, never an existing one by accident. Ray binds its ports to every interface and asks for a token
    (`RAY_AUTH_MODE=token`, its default).
    """

    def __init__(self, store: StoreAddress, *, address: str | None = None, workers: int | None = None) -> None:
        self._store = store
        self._ray = _start_ray(address)
        try:
            self._gpu, count = self.capacity(workers)
        except WorkerError:
            self._ray.shutdown()
            raise
        self.workers = [self._actor() for _ in range(count)]

    def capacity(self, workers: int | None = None) -> tuple[float, int]:
        """(each worker's share of a GPU, how many workers there are to be).

        Raises:
            WorkerError: the cluster cannot give so many; asked for all the same, they would be waited for for ever.
        """
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        most = min(cpus, gpus * WORKERS_PER_GPU) if gpus else cpus
        if not most:
            raise WorkerError("the Ray cluster has no CPUs or GPUs to give; start a node, or use --executor inline")
        if workers is not None and workers > most:
            raise WorkerError(f"{workers} workers asked for, the cluster has room for {most}: {gpus} GPUs, {cpus} CPUs")
        count = workers or most
        return (gpus / count if gpus else 0.0), count

    def _actor(self) -> Any:
        # An actor with num_gpus=0 would still see every GPU.
        environment = {} if self._gpu else {"CUDA_VISIBLE_DEVICES": ""}
        kind = self._ray.remote(Worker).options(
            num_cpus=1, num_gpus=min(1.0, self._gpu), max_restarts=0, runtime_env={"env_vars": environment}
        )
        return kind.remote(self._store)

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Keep every worker busy, one task ahead, as far as the queue's byte budget goes."""
        free = deque(actor for _ in range(QUEUED_PER_WORKER) for actor in self.workers)
        running: dict[Any, tuple[Any, ShardTask]] = {}
        deaths: Counter[tuple[str, int]] = Counter()
        while True:
            interrupt.check()
            while free and (task := queue.take()):
                actor = free.popleft()
                running[actor.run.remote(task)] = actor, task
            if not running:
                return
            (reference,), _ = self._ray.wait(list(running), num_returns=1)
            actor, task = running.pop(reference)
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                if actor in self.workers:  # its first task to fail; the ones queued behind it fail too
                    self._replace(actor, free)
                deaths[task.model, task.index] += 1
                if deaths[task.model, task.index] < TRIES:
                    log.warning("worker died at %s (%s); trying again", task.label, first_line(error))
                    queue.put_back(task)
                    continue
                message = f"{task.label}: its worker died {TRIES} times, last: {first_line(error)}"
                outcome = Outcome(task=task, error=WorkerError(f"{message}; lower shard_mib if memory ran out"))
            else:
                free.append(actor)
            queue.done(task)
            yield outcome

    def _replace(self, actor: Any, free: deque[Any]) -> None:
        """A new worker for a dead one."""
        self.workers.remove(actor)
        self.workers.append(self._actor())
        for _ in range(free.count(actor)):
            free.remove(actor)
        free.extend([self.workers[-1]] * QUEUED_PER_WORKER)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ray.shutdown()


def _start_ray(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        own = {} if address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise WorkerError(f"cannot reach {where}: {first_line(error)}; try --executor inline") from None
    return ray
