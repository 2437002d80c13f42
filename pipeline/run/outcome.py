"""The results of executors: one outcome for every task that was not dropped."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.proof.task import Proof
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.shard.task import ShardResult, ShardSizes
from birkhoff.pipeline.statistics.task import Statistics
from birkhoff.pipeline.text import first_line

log: logging.Logger = logging.getLogger("birkhoff.execute")

Result = ShardResult | ShardSizes | Proof | Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended: either `result` or `error` is set."""

    task: Task
    result: Result | None = None
    error: BirkhoffError | None = None
    out_of_memory: bool = False
    """Whether memory ran out, so that running the task alone may succeed."""


def out_of_memory_outcome(task: Task, reason: Exception | str) -> Outcome:
    """Return the failure of a task that ran out of memory, with the remedy."""
    why = reason if isinstance(reason, str) else first_line(reason)
    message = f"{task.label}: out of memory with {task.nbytes >> 20} MiB of weights ({why}); {task.memory_remedy}"
    return Outcome(task=task, error=WorkerError(message), out_of_memory=True)


class Executor(AbstractContextManager["Executor"], Protocol):
    """Runs the tasks of a queue."""

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Yield the outcome of every task as it ends, except of tasks dropped meanwhile."""
        ...

    def gpus(self) -> dict[str, str]:
        """Return name and memory of every GPU of its workers, by the GPU's identifier."""
        ...


def again_alone(outcome: Outcome, queue: TaskQueue) -> bool:
    """Queue a task again that ran out of memory beside others, and log that. Returns whether it was."""
    if not outcome.out_of_memory or queue.is_alone(outcome.task):
        return False
    log.warning("%s; trying again, alone", outcome.error)
    queue.put_back(outcome.task, alone=True)
    return True
