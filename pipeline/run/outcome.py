"""The results of executors: one outcome for every task that was not dropped."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.proof.task import Proof
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.shard.run import ShardResult, ShardSizes
from birkhoff.pipeline.statistics.task import Statistics

Result = ShardResult | ShardSizes | Proof | Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended: exactly one of `result` and `error` is set."""

    task: Task
    result: Result | None = None
    error: BirkhoffError | None = None
    out_of_memory: bool = False
    """Whether the error is for want of memory, so that another try by itself may end better."""


class Executor(AbstractContextManager["Executor"], Protocol):
    """Runs shards."""

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Yield the outcomes of all tasks as they end, except those dropped meanwhile."""
        ...
