from itertools import count
from pathlib import Path

import pytest

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.run.workers import QUEUED_PER_WORKER, START_SECONDS, WorkerSlots
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


def unstarted(workers: int, with_gpu: int = 0) -> WorkerSlots:
    return WorkerSlots(lambda _: (Actor(), object()), [number < with_gpu for number in range(workers)])


def started(workers: int, with_gpu: int = 0) -> WorkerSlots:
    slots = unstarted(workers, with_gpu)
    for slot in slots:
        slots.count_start(slot)
    return slots


def shard(index: int = 0) -> ShardTask:
    return ShardTask(model="m", index=index, tensors=(), recipe={})


def hand_out(slots: WorkerSlots, waiting: int) -> list[int]:
    """Give tasks as long as a worker takes one; how many each then holds."""
    while waiting and (slot := slots.free(waiting)):
        slot.give(shard(waiting))
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
    second.give(shard())
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
    assert unstarted(2).free(10) is None


def test_what_is_for_a_gpu_goes_to_workers_that_have_one() -> None:
    slots = started(4, with_gpu=1)
    with_gpu = next(slot for slot in slots if slot.gpu)
    for _ in range(QUEUED_PER_WORKER):
        assert slots.free(100, on_gpu=True) is with_gpu
        with_gpu.give(shard())
    assert slots.free(100, on_gpu=True) is None
    assert slots.free(100) is not None


def test_other_tasks_go_to_a_worker_with_a_gpu_only_if_it_alone_is_idle() -> None:
    slots = started(3, with_gpu=1)
    given = []
    while slot := slots.free(100):
        slot.give(shard())
        given.append(slot.gpu)
    assert given == [False, False, True, False, False]


def test_without_any_gpu_all_workers_take_what_one_is_of_use_to() -> None:
    slots = started(2)
    assert slots.free(100, on_gpu=True) is not None


def test_a_worker_is_replaced_by_one_of_its_kind() -> None:
    asked: list[bool] = []

    def start(gpu: bool) -> tuple[Actor, object]:
        asked.append(gpu)
        return Actor(), object()

    slots = WorkerSlots(start, [True, False])
    for slot in list(slots):
        slots.replace(slot)
    assert asked == [True, False, True, False]
    assert [slot.gpu for slot in slots] == [True, False]


def test_the_start_of_a_worker_is_waited_for_as_long_as_others_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("birkhoff.pipeline.run.workers.time.monotonic", lambda: now[0])
    slots = unstarted(2, with_gpu=1)
    (other,) = (slot for slot in slots if not slot.gpu)
    slots.count_start(other)
    other.give(shard())
    now[0] = START_SECONDS + 1
    slots.check_started()
    other.ended(next(iter(other.tasks)))
    now[0] += START_SECONDS
    slots.check_started()
    now[0] += 1
    with pytest.raises(WorkerError, match="1 of 2 workers did not start within 300 s"):
        slots.check_started()


def test_the_time_before_tasks_are_handed_out_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("birkhoff.pipeline.run.workers.time.monotonic", lambda: now[0])
    slots = unstarted(2)
    now[0] = 2 * START_SECONDS  # digests took so long
    slots.begin()
    slots.check_started()
