"""The driver's record of its workers: which are ready, the tasks of each, and when the running task began.

A worker runs its tasks in order, so its first task is the running one. Only workers that have answered once get tasks:
after the loss of a node, the replacements of its workers may never start.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.run.queue import Task

QUEUED_PER_WORKER = 2
"""Tasks held by a worker: one running, one ready, so that it never waits for the driver. Near the end each worker
holds one, so that no task waits behind another while a worker is idle."""

START_SECONDS = 300.0
"""If no worker runs, one must start within this time."""

FAILED_STARTS = 3
"""How often in a row a start may fail, times the number of workers."""


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerSlot:
    """One worker: its actor, the reference that resolves when it has started (then None), and its tasks by
    reference, in order."""

    actor: Any
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
    """All workers. `start` starts an actor, and returns it with the reference that resolves once it runs."""

    def __init__(self, start: Callable[[], tuple[Any, Any]], count: int) -> None:
        self._start = start
        self._all: list[WorkerSlot] = []
        self._changed = time.monotonic()
        self._failed = 0
        for _ in range(count):
            self._add()

    def __iter__(self) -> Iterator[WorkerSlot]:
        return iter(self._all)

    def references(self) -> dict[Any, WorkerSlot]:
        """Return every reference to wait for, with its worker."""
        found = {slot.starting: slot for slot in self._all if slot.starting is not None}
        return found | {reference: slot for slot in self._all for reference in slot.tasks}

    def free(self, waiting: int) -> WorkerSlot | None:
        """Return the ready worker with the fewest tasks, if it can take another; `waiting` tasks are in the queue."""
        most = QUEUED_PER_WORKER if waiting > len(self._all) else 1
        ready = [slot for slot in self._all if slot.starting is None and len(slot.tasks) < most]
        return min(ready, key=lambda slot: len(slot.tasks), default=None)

    def replace(self, slot: WorkerSlot) -> None:
        """Replace a worker by a new one."""
        self._all.remove(slot)
        self._add()

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
        """Raise WorkerError if no worker runs and none has started for too long."""
        if any(slot.starting is None for slot in self._all):
            self._changed = time.monotonic()
        elif time.monotonic() - self._changed > START_SECONDS:
            raise WorkerError(
                f"none of {len(self._all)} workers started within {START_SECONDS:g} s; see the nodes of the Ray "
                "cluster with `ray status`, or use --executor inline"
            )

    def _add(self) -> None:
        actor, starting = self._start()
        self._all.append(WorkerSlot(actor=actor, starting=starting))
