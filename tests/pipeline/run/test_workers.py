from itertools import count
from pathlib import Path

import pytest

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.run.workers import QUEUED_PER_WORKER, WorkerSlots
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.statistics.task import StatisticsTask


class Method:
    """Stands for a remote method: each call gives a new reference."""

    def __init__(self) -> None:
        self._calls = count()

    def remote(self, _task: ShardTask) -> object:
        return self, next(self._calls)


class Actor:
    def __init__(self) -> None:
        self.run = Method()


def started(workers: int) -> WorkerSlots:
    slots = WorkerSlots(lambda: (Actor(), object()), workers)
    for slot in slots:
        slots.count_start(slot)
    return slots


def hand_out(slots: WorkerSlots, waiting: int) -> list[int]:
    """Give tasks as long as a worker takes one; how many each then holds."""
    while waiting and (slot := slots.free(waiting)):
        slot.give(ShardTask(model="m", index=waiting, tensors=(), recipe={}))
        waiting -= 1
    return [len(slot.tasks) for slot in slots]


def test_workers_hold_a_task_ahead_while_many_wait() -> None:
    assert hand_out(started(4), 100) == [QUEUED_PER_WORKER] * 4


def test_statistics_may_take_as_long_as_many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = started(2)
    now = [0.0]
    monkeypatch.setattr("birkhoff.pipeline.run.workers.time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(path=Path("f"), files=(Path("f"),), format="safetensors", nbytes=1, tensors=())
    long = StatisticsTask(model="m", source_sha256="0" * 64, checkpoint=checkpoint, subject=Subject())
    first, second = slots
    first.give(long)
    second.give(ShardTask(model="m", index=0, tensors=(), recipe={}))
    now[0] = 11.0
    assert slots.overdue(10.0) == [second]
    now[0] = 10.0 * long.patience
    assert slots.overdue(10.0) == [second]
    now[0] += 1
    assert slots.overdue(10.0) == [first, second]


def test_the_last_tasks_wait_for_an_idle_worker() -> None:
    slots = started(4)
    assert hand_out(slots, 4) == [1] * 4
    assert hand_out(slots, 3) == [1] * 4  # three wait: none lies behind another
    first = next(iter(slots))
    first.ended(next(iter(first.tasks)))
    assert slots.free(3) is first


def test_no_worker_is_free_before_it_has_started() -> None:
    assert WorkerSlots(lambda: (Actor(), object()), 2).free(10) is None
