"""The driver's record of its workers: which are ready, the tasks of each, and when the running task began.

A worker runs its tasks in order, so its first task is the running one. Only workers that have answered once get tasks:
after the loss of a node, the replacements of its workers may never start.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.run.queue import Task

QUEUED_PER_WORKER = 2
"""Tasks held by a worker: one running, one ready, so that it never waits for the driver. Near the end each worker
holds one, so that no task waits behind another while a worker is idle."""

START_SECONDS = 300.0
"""If nothing runs, a worker that can take a task must start within this time."""

FAILED_STARTS = 3
"""How often in a row a start may fail, times the number of workers."""


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerSlot:
    """One worker: its actor, the reference that resolves when it has started (then None), and its tasks by
    reference, in order."""

    actor: Any
    gpu: bool
    """Whether it has a share of a GPU."""
    starting: Any
    tasks: dict[Any, Task] = field(default_factory=dict)
    since: float = 0.0
    """When the running task began, in seconds of `time.monotonic`."""

    def give(self, task: Task) -> None:
        """Append a task to this worker's queue."""
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks[self.actor.run.remote(task)] = task

    def overdue(self, limit: float) -> bool:
        """Return whether the running task has taken longer than `limit` seconds times the task's own factor,
        `patience`."""
        first = next(iter(self.tasks.values()), None)
        return first is not None and time.monotonic() - self.since > limit * first.patience

    def ended(self, reference: Any) -> Task:
        """Remove and return the ended task behind `reference`. The next one begins."""
        self.since = time.monotonic()
        return self.tasks.pop(reference)


class WorkerSlots:
    """All workers. `start` starts an actor, with a share of a GPU or without, and returns it with the reference that
    resolves once it runs. `gpus` says for each worker whether it has one."""

    def __init__(self, start: Callable[[bool], tuple[Any, Any]], gpus: Sequence[bool]) -> None:
        self._start = start
        self._all: list[WorkerSlot] = []
        self._changed = time.monotonic()
        self._failed = 0
        for gpu in gpus:
            self._add(gpu)

    def __iter__(self) -> Iterator[WorkerSlot]:
        return iter(self._all)

    def begin(self) -> None:
        """Count the time that workers may take to start from now on: nobody asked before whether they have."""
        self._changed = time.monotonic()

    def references(self) -> dict[Any, WorkerSlot]:
        """Return every reference to wait for, with its worker."""
        found = {slot.starting: slot for slot in self._all if slot.starting is not None}
        return found | {reference: slot for slot in self._all for reference in slot.tasks}

    def free(self, waiting: int, *, on_gpu: bool = False) -> WorkerSlot | None:
        """Return the ready worker with the fewest tasks, if it can take another; `waiting` tasks are in the queue.

        Tasks for a GPU go to workers that have one, if any has. Such a worker takes another task only if it is idle and
        the others are not: a model that runs on the GPU takes longer than any shard.
        """
        most = QUEUED_PER_WORKER if waiting > len(self._all) else 1
        ready = [slot for slot in self._all if slot.starting is None and len(slot.tasks) < most]
        if on_gpu and any(slot.gpu for slot in self._all):
            ready = [slot for slot in ready if slot.gpu]
        else:
            ready = [slot for slot in ready if not (slot.gpu and slot.tasks)]
        return min(ready, key=lambda slot: (len(slot.tasks), slot.gpu), default=None)

    def replace(self, slot: WorkerSlot) -> None:
        """Replace a worker by a new one."""
        self._all.remove(slot)
        self._add(slot.gpu)

    def overdue(self, limit: float) -> list[WorkerSlot]:
        """Return the workers whose running task takes too long. `limit` is what a shard may take, in seconds."""
        return [slot for slot in self._all if slot.overdue(limit)]

    def count_start(self, slot: WorkerSlot) -> None:
        """Record that a worker has started."""
        slot.starting, self._failed = None, 0

    def count_failed_start(self, reason: str) -> None:
        """Record that a worker died while starting. Raises WorkerError after too many in a row."""
        self._failed += 1
        if self._failed > FAILED_STARTS * len(self._all):
            raise WorkerError(f"workers die at their start, the last of {self._failed} by {reason}; run with --debug")

    def check_started(self) -> None:
        """Raise WorkerError if tasks wait, none runs, and no worker for them has started for too long."""
        if any(slot.tasks for slot in self._all):
            self._changed = time.monotonic()
        elif time.monotonic() - self._changed > START_SECONDS:
            late = sum(slot.starting is not None for slot in self._all)
            raise WorkerError(
                f"{late} of {len(self._all)} workers did not start within {START_SECONDS:g} s; see the nodes of the "
                "Ray cluster with `ray status`, or use --executor inline"
            )

    def _add(self, gpu: bool) -> None:
        actor, starting = self._start(gpu)
        self._all.append(WorkerSlot(actor=actor, gpu=gpu, starting=starting))
