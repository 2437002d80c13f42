"""An executor that runs shards on long-lived workers of a local or remote Ray cluster.

It draws from a `TaskQueue` and yields outcomes in the order in which tasks end. An error of this package is the outcome
of its task, and the run continues. A worker that dies, or is killed because its task took too long, is replaced. Its
task is tried `TRIES` times in all, the last time alone. The loss of a node, as of a spot instance, is counted
separately, up to `NODE_LOSSES`. A task that ran out of memory is tried once more, alone.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.plan.manifest import SHARD_SECONDS
from birkhoff.pipeline.run.cluster import Cluster, start_cluster
from birkhoff.pipeline.run.metrics import metrics
from birkhoff.pipeline.run.outcome import Outcome, again_alone, out_of_memory_outcome
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.run.workers import WorkerSlot, WorkerSlots
from birkhoff.pipeline.store.base import StoreAddress
from birkhoff.pipeline.text import first_line

if TYPE_CHECKING:
    from birkhoff.pipeline.run.worker import Worker

log: logging.Logger = logging.getLogger("birkhoff.execute")

TRIES = 3
"""How often a task is tried if its worker dies."""

NODE_LOSSES = 10
"""How many nodes may be lost while they run a task, before the task is taken for the cause."""

WORKERS_PER_GPU = 4
"""Workers that share a GPU, if the run has tasks for one. It gives processes its time in turns, so all together encode
as fast with 4 workers as with 12; each takes 0.5 GB of its memory and 1.5 GB of the host's."""

RESTARTS = 2
"""How often the private cluster is restarted if its node dies during a run."""

GPU_SECONDS = 1.0
"""How long workers may take to name their GPUs for the report. They need milliseconds."""

POLL_SECONDS = 1.0
"""How often time limits and Ctrl-C are checked while no task ends."""

# Messages of Ray's memory monitor about a worker that it killed. For other deaths Ray lists guesses, among them the
# kernel's OOM killer, so "OOM" alone says nothing.
_MEMORY_DEATH = re.compile(r"low on memory|memory pressure|memory monitor|exceeded.{0,40}memory", re.IGNORECASE)
_NODE_DEATH = re.compile(r"its node has died", re.IGNORECASE)
"""Ray's message about an actor whose node no longer answers."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Escape sequences of a terminal, which Ray writes into messages."""


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Runs tasks on Ray actors, one per CPU but for a few that are left free. With `gpu`, up to `WORKERS_PER_GPU` of
    them share each GPU, and alone get the tasks that are for GPUs.

    They are actors because a Ray task on a GPU gets its own process, which imports torch and starts CUDA each time.
    With an `address` the executor joins that cluster, else it starts a private one and ends it afterwards. It does the
    same with a `cluster` that was started ahead.
    `shard_seconds` is how long a worker may take for a shard before it counts as hung.
    """

    worker: ClassVar["type[Worker] | None"] = None
    """The class of workers if it is not `Worker`, which processes import themselves: it needs torch, and the driver
    does not."""

    def __init__(
        self,
        store: StoreAddress,
        *,
        address: str | None = None,
        cluster: Cluster | None = None,
        workers: int | None = None,
        shard_seconds: float = SHARD_SECONDS,
        gpu: bool = True,
    ) -> None:
        self._store, self._limit = store, shard_seconds
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._lost_nodes: Counter[tuple[str, int]] = Counter()
        self._restarts = 0
        self._cluster = start_cluster(address) if cluster is None else cluster
        self._ray = self._cluster.ray
        try:
            count, with_gpu, self._share = self.capacity(workers, gpu=gpu)
            self._metrics = metrics()
            self._slots = WorkerSlots(self._start, [n < with_gpu for n in range(count)])
            self._cluster.end_idle()
        except BaseException:
            self._cluster.close()
            raise

    @property
    def workers(self) -> list[Any]:
        """Handles of the current actors."""
        return [slot.actor for slot in self._slots]

    def capacity(self, workers: int | None = None, *, gpu: bool = True) -> tuple[int, int, float]:
        """Return (number of workers, how many of them share GPUs, the share of each). Without `gpu` none does.

        Ray gives an actor a share of one GPU, not of several, so the share is that of the GPU that most have.

        Raises:
            WorkerError: The cluster is too small.
        """
        count, gpus = self._cluster.worker_count(workers), int(self._ray.cluster_resources().get("GPU", 0))
        with_gpu = min(count, gpus * WORKERS_PER_GPU) if gpu else 0
        return count, with_gpu, 1 / math.ceil(with_gpu / gpus) if with_gpu else 0.0

    def _start(self, gpu: bool) -> tuple[Any, Any]:
        """Start an actor. Returns it with the reference that resolves once it is a worker."""
        actor = self._cluster.process(self._store, self._share if gpu else 0.0)
        return actor, actor.become.remote(self.worker, gpu=gpu, environment=logs.environment())

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Keep every worker busy with up to two tasks, within the queue's byte budget."""
        self._slots.begin()
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

    def gpus(self) -> dict[str, str]:
        """Return name and memory of every GPU of its workers, by the GPU's identifier, as far as they answer at
        once."""
        asked = [slot.actor.gpus.remote() for slot in self._slots if slot.gpu and slot.starting is None]
        found: dict[str, str] = {}
        if not asked:
            return found
        with interrupt.deferred():
            answered, _ = self._ray.wait(asked, num_returns=len(asked), timeout=GPU_SECONDS)
        for reference in answered:
            with suppress(self._ray.exceptions.RayError):  # this worker has died
                found |= self._ray.get(reference)
        return found

    def _assign(self, queue: TaskQueue) -> None:
        while waiting := len(queue):
            found = {on_gpu: self._slots.free(waiting, on_gpu=on_gpu) for on_gpu in (False, True)}
            free = {on_gpu: slot for on_gpu, slot in found.items() if slot is not None}
            if not free or (task := queue.take(free)) is None:
                return
            if queue.is_alone(task):
                for other in self._slots:
                    other.actor.trim.remote()
            free[task.on_gpu].give(task)

    def _take(self, slot: WorkerSlot, reference: Any, queue: TaskQueue) -> Iterator[Outcome]:
        """Handle a resolved reference: a worker has started, has a result, or has died."""
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if reference == slot.starting:
                self._slots.count_failed_start(_why(error))
            yield from self._lose(slot, error, queue)
            return
        if reference == slot.starting:
            self._slots.count_start(slot)
            return
        task = slot.ended(reference)
        if again_alone(found, queue):
            self._count_retry(task, "out of memory")
            return
        queue.done(task)
        yield found

    def _lose(self, slot: WorkerSlot, reason: Exception | str, queue: TaskQueue) -> Iterator[Outcome]:
        """Replace a worker that died or hangs. Finished results are kept; the running task is retried."""
        self._slots.replace(slot)
        yield from self._ended_tasks(slot, queue)
        self._ray.kill(slot.actor, no_restart=True)  # it may still run: hung, or cut off from the network
        yield from self._return_tasks(slot, reason, queue)

    def _restart(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Restart the private cluster after its node and all workers died, and continue. Raises WorkerError after
        too many deaths."""
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise WorkerError(
                f"Ray's node on this machine died {self._restarts} times; see by `dmesg` whether memory ran out; "
                "the same command continues where this one ended, also with --executor inline"
            )
        log.warning("Ray's node on this machine died; starting it again")
        slots = list(self._slots)
        for slot in slots:
            yield from self._ended_tasks(slot, queue)
        self._cluster.restart()
        self._slots = WorkerSlots(self._start, [slot.gpu for slot in slots])
        for slot in slots:
            yield from self._return_tasks(slot, WorkerError("Ray's node did"), queue)

    def _ended_tasks(self, slot: WorkerSlot, queue: TaskQueue) -> Iterator[Outcome]:
        """Yield the results that a lost worker had finished."""
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
        """Queue the tasks of a lost worker again, or yield the failure of the one that it was running."""
        for place, task in enumerate(slot.tasks.values()):
            if place:
                queue.put_back(task)
            elif outcome := self._judge(task, reason, queue):
                yield outcome

    def _judge(self, task: Task, reason: Exception | str, queue: TaskQueue) -> Outcome | None:
        """Queue a task again after its worker died (returns None), or return its failure."""
        died, memory = _died(reason), isinstance(reason, Exception) and self._killed_for_memory(reason)
        if last := logs.last_step(task.model, task.index):
            died = f"{died} at {last}"
        if self._node_went(reason):
            self._lost_nodes[task.model, task.index] += 1
            if (lost := self._lost_nodes[task.model, task.index]) < NODE_LOSSES:
                log.warning("%s: its worker's node was lost; trying again", task.label)
                self._count_retry(task, "node lost")
                queue.put_back(task, alone=lost == NODE_LOSSES - 1)
                return None
            queue.done(task)
            return Outcome(task=task, error=WorkerError(f"{task.label}: {lost} nodes were lost while they ran it"))
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
        """Return whether a worker died because its node was preempted or lost."""
        died = self._ray.exceptions.RayActorError
        return isinstance(reason, died) and (reason.preempted or bool(_NODE_DEATH.search(str(reason))))

    def _killed_for_memory(self, error: Exception) -> bool:
        kinds = self._ray.exceptions
        return isinstance(error, kinds.OutOfMemoryError) or bool(_MEMORY_DEATH.search(str(error)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._cluster.close()


def _why(error: Exception) -> str:
    """Return why a worker did not start."""
    if isinstance(cause := getattr(error, "cause", None), Exception):
        return first_line(cause)
    # Ray quotes an error of an actor's `__init__` with its traceback, in colours.
    lines = list(filter(str.strip, _COLOURS.sub("", str(error)).splitlines()))
    return lines[-1].strip() if lines else first_line(error)


def _died(reason: Exception | str) -> str:
    return reason if isinstance(reason, str) else f"died ({first_line(reason)})"
