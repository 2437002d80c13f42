"""Executors: where shards run. `inline` in this process, `ray` on long-lived workers of a local or remote cluster.

Both draw from a `TaskQueue` and yield outcomes in the order in which they end. An error of ours is an outcome of its
shard, not the end of the run. A worker that dies, or is killed as its shard took too long, is replaced, and the shard
it was at is tried again, `TRIES` times in all, the last time alone. A worker whose node has gone says nothing against
its shard: that is how spot nodes end. A shard that ran out of memory is tried once more, alone; then it has failed.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar

from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.plan.manifest import SHARD_SECONDS
from birkhoff.pipeline.run.cluster import Cluster
from birkhoff.pipeline.run.metrics import metrics
from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.run.worker import Worker, out_of_memory_outcome
from birkhoff.pipeline.run.workers import WorkerSlot, WorkerSlots
from birkhoff.pipeline.store.base import StoreAddress
from birkhoff.pipeline.text import first_line

log: logging.Logger = logging.getLogger("birkhoff.execute")

TRIES = 3
"""Times a shard is tried when its worker dies."""

NODE_LOSSES = 10
"""Nodes that may go while they are at one shard, before it counts as what ends them."""

WORKERS_PER_GPU = 12
"""Reading, entropy coding and validation keep CPUs busy while the GPU waits; each worker costs it 0.5 GB."""

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""glibc's settings for workers: buffers go back to the heap and serve the next tensor. By default the kernel gets them
back, and maps and clears each page anew: a tenth of a worker's time, and the workers of a machine wait for each other.
The first is the greatest that glibc takes."""

RESTARTS = 2
"""Times that Ray is started anew on this machine when its node dies in the middle of a run."""

POLL_SECONDS = 1.0
"""How often time limits and Ctrl-C are looked at while nothing ends."""

# What Ray's memory monitor says of a worker it has killed. Of one that something else has killed it lists guesses, the
# kernel's OOM killer among them, so that "OOM" alone tells nothing.
_MEMORY_DEATH = re.compile(r"low on memory|memory pressure|memory monitor|exceeded.{0,40}memory", re.IGNORECASE)
_NODE_DEATH = re.compile(r"its node has died", re.IGNORECASE)
"""What Ray says of an actor whose node does not answer any more."""


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Long-lived Ray actors: up to `WORKERS_PER_GPU` to a GPU where there are GPUs, else one per CPU.

    Actors, not tasks: a GPU task gets a process of its own, and torch's import and CUDA's start each time. With an
    `address` the cluster of that address is joined; otherwise one is started here and stopped at the end.
    `shard_seconds` is how long a worker may take for a shard before it counts as hung.
    """

    worker: ClassVar[type[Worker]] = Worker

    def __init__(
        self,
        store: StoreAddress,
        *,
        address: str | None = None,
        workers: int | None = None,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self._store, self._limit = store, shard_seconds
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._lost_nodes: Counter[tuple[str, int]] = Counter()
        self._restarts = 0
        self._cluster = Cluster(address)
        self._ray = self._cluster.ray
        try:
            self._gpu, count = self.capacity(workers)
            self._metrics = metrics()
            self._slots = WorkerSlots(self._start, count)
        except BaseException:
            self._cluster.close()
            raise

    @property
    def workers(self) -> list[Any]:
        """Handles of the actors there are now."""
        return [slot.actor for slot in self._slots]

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

    def _start(self) -> tuple[Any, Any]:
        """An actor, and the reference that resolves when it runs."""
        # An actor with num_gpus=0 would still see every GPU.
        environment = logs.environment() | ({} if self._gpu else {"CUDA_VISIBLE_DEVICES": ""})
        environment |= {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
        kind = self._ray.remote(self.worker).options(
            num_cpus=1, num_gpus=min(1.0, self._gpu), max_restarts=0, runtime_env={"env_vars": environment}
        )
        actor = kind.remote(self._store)
        return actor, actor.identity.remote()

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Keep every worker busy, one task ahead, as far as the queue's byte budget goes."""
        while True:
            interrupt.check()
            self._assign(queue)
            if not len(queue) and not any(slot.tasks for slot in self._slots):
                return
            self._slots.check_started()
            waited = self._slots.references()
            with interrupt.deferred():
                ended, _ = self._ray.wait(list(waited), num_returns=1, timeout=POLL_SECONDS)
            for reference in ended:
                yield from self._take(waited[reference], reference, queue)
            if not ended and self._cluster.lost():
                yield from self._restart(queue)
            for slot in self._slots.overdue(self._limit):
                limit = self._limit * next(iter(slot.tasks.values())).patience
                yield from self._lose(slot, f"gave no result within {limit:g} s", queue)

    def _assign(self, queue: TaskQueue) -> None:
        while (slot := self._slots.free(len(queue))) and (task := queue.take()):
            if queue.is_alone(task):
                for other in self._slots:
                    other.actor.trim.remote()
            slot.give(task)

    def _take(self, slot: WorkerSlot, reference: Any, queue: TaskQueue) -> Iterator[Outcome]:
        """What a reference has brought: a worker that has started, a result, or the news that the worker is dead."""
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if reference == slot.starting:
                self._slots.count_failed_start(first_line(error))
            yield from self._lose(slot, error, queue)
            return
        if reference == slot.starting:
            self._slots.count_start(slot)
            return
        task = slot.ended(reference)
        if found.out_of_memory and not queue.is_alone(task):
            log.warning("%s; trying again, alone", found.error)
            self._count_retry(task, "out of memory")
            queue.put_back(task, alone=True)
            return
        queue.done(task)
        yield found

    def _lose(self, slot: WorkerSlot, reason: Exception | str, queue: TaskQueue) -> Iterator[Outcome]:
        """A worker is dead or hangs: another one takes its place. What it had ended counts; the next was at work."""
        self._slots.replace(slot)
        yield from self._ended_tasks(slot, queue)
        self._ray.kill(slot.actor, no_restart=True)  # a hung one, or one that only its node's network has lost
        yield from self._return_tasks(slot, reason, queue)

    def _restart(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Ray's node on this machine has died and all workers with it: start it anew and go on. Raises WorkerError."""
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise WorkerError(
                f"Ray's node on this machine died {self._restarts} times; see by `dmesg` whether memory ran out; "
                "the same command goes on where this one ended, also with --executor inline"
            )
        log.warning("Ray's node on this machine died; starting it again")
        slots = list(self._slots)
        for slot in slots:
            yield from self._ended_tasks(slot, queue)
        self._cluster.restart()
        self._slots = WorkerSlots(self._start, len(slots))
        for slot in slots:
            yield from self._return_tasks(slot, WorkerError("Ray's node did"), queue)

    def _ended_tasks(self, slot: WorkerSlot, queue: TaskQueue) -> Iterator[Outcome]:
        """What a worker that is lost had ended before."""
        for reference in list(slot.tasks):
            if not self._ray.wait([reference], timeout=0)[0]:
                break
            try:
                outcome = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                break
            queue.done(slot.ended(reference))
            yield outcome

    def _return_tasks(self, slot: WorkerSlot, reason: Exception | str, queue: TaskQueue) -> Iterator[Outcome]:
        """What a worker that is lost was at, and what it was still to do, goes back or has failed."""
        for place, task in enumerate(slot.tasks.values()):
            if place:
                queue.put_back(task)
            elif outcome := self._judge(task, reason, queue):
                yield outcome

    def _judge(self, task: Task, reason: Exception | str, queue: TaskQueue) -> Outcome | None:
        """Whether the task that a worker died at is tried again (None) or has failed."""
        died, memory = _died(reason), isinstance(reason, Exception) and self._killed_for_memory(reason)
        if last := logs.last_step(task.model, task.index):
            died = f"{died} at {last}"
        if self._node_went(reason):
            self._lost_nodes[task.model, task.index] += 1
            if (lost := self._lost_nodes[task.model, task.index]) < NODE_LOSSES:
                log.warning("%s: the node of its worker went; trying again", task.label)
                self._count_retry(task, "node lost")
                queue.put_back(task, alone=lost == NODE_LOSSES - 1)
                return None
            queue.done(task)
            return Outcome(task=task, error=WorkerError(f"{task.label}: {lost} nodes went while they were at it"))
        self._deaths[task.model, task.index] += 1
        deaths = self._deaths[task.model, task.index]
        if not (memory and queue.is_alone(task)) and deaths < TRIES:
            log.warning("%s: its worker %s; trying again", task.label, died)
            self._count_retry(task, "out of memory" if memory else "worker died")
            queue.put_back(task, alone=memory or deaths == TRIES - 1)
            return None
        queue.done(task)
        if memory:
            return out_of_memory_outcome(task, reason)
        message = f"{task.label}: its worker died {deaths} times, last: it {died}"
        if isinstance(reason, str):
            message = f"{task.label}: its worker {died}, {deaths} times; raise shard_seconds if it needs longer"
        return Outcome(task=task, error=WorkerError(f"{message}; lower shard_mib if memory ran out"))

    def _count_retry(self, task: Task, reason: str) -> None:
        if self._metrics:
            self._metrics.retried(task.model, reason)

    def _node_went(self, reason: Exception | str) -> bool:
        """Whether a worker is dead because its node is: preempted, or broken."""
        died = self._ray.exceptions.RayActorError
        return isinstance(reason, died) and (reason.preempted or bool(_NODE_DEATH.search(str(reason))))

    def _killed_for_memory(self, error: Exception) -> bool:
        kinds = self._ray.exceptions
        return isinstance(error, kinds.OutOfMemoryError) or bool(_MEMORY_DEATH.search(str(error)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._cluster.close()


def _died(reason: Exception | str) -> str:
    return reason if isinstance(reason, str) else f"died ({first_line(reason)})"
