"""Shards in threads of this process: side by side, with the bytes of one thread, and ended when the user says so."""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.errors import ValidationError
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.run import inline
from birkhoff.pipeline.run.demand import START_BYTES, Demand, threads_suffice
from birkhoff.pipeline.run.inline import GPU_BYTES, GPU_WORKERS, InlineExecutor
from birkhoff.pipeline.run.outcome import Outcome, out_of_memory_outcome
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard.task import ShardResult, ShardTask
from birkhoff.pipeline.statistics.task import StatisticsTask
from birkhoff.pipeline.store.base import Store, StoreAddress
from tests.patience import PATIENT_SECONDS

SHARDS = 6
PROFILE = PROFILES["fast"]


@pytest.fixture
def tasks(tmp_path: Path) -> list[ShardTask]:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "net.safetensors"
    save_file({f"b.{n}.w": torch.randn(64, 64, generator=generator) for n in range(SHARDS)}, path)
    return list(plan_model("net", open_checkpoint(path), PROFILE, shard_bytes=1).tasks("net"))


@pytest.fixture
def whole(tasks: list[ShardTask], tmp_path: Path) -> list[Task]:
    """Tasks that use every processor by themselves."""
    about: Any = {
        "model": "net",
        "source_sha256": "0" * 64,
        "checkpoint": open_checkpoint(tmp_path / "net.safetensors"),
        "subject": Subject(builder="m.py:build", inputs="m.py:inputs"),
    }
    return [StatisticsTask(**about)]


def store(tmp_path: Path, name: str = "store") -> StoreAddress:
    return StoreAddress.parse((tmp_path / name).as_uri())


def run(executor: InlineExecutor, tasks: list[Any]) -> list[Outcome]:
    return list(executor.run(TaskQueue(tasks, budget=1 << 30)))


def replace_work(monkeypatch: pytest.MonkeyPatch, work: Callable[[Task], Outcome]) -> None:
    monkeypatch.setattr(Worker, "run", lambda _, task: work(task))


def test_threads_make_the_bytes_of_one(tasks: list[ShardTask], tmp_path: Path) -> None:
    found = []
    for workers in (1, 3):
        with InlineExecutor(store(tmp_path, f"{workers}"), workers=workers) as executor:
            outcomes = run(executor, tasks)
        results = {outcome.task.index: outcome.result for outcome in outcomes}
        found.append(
            {index: result.record.blob for index, result in results.items() if isinstance(result, ShardResult)}
        )
    assert found[0] == found[1]
    assert len(set(found[0].values())) == SHARDS


def test_as_many_shards_run_side_by_side_as_there_are_workers(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)

    def meet(task: Task) -> Outcome:
        together.wait(PATIENT_SECONDS)  # breaks unless three are here
        return Outcome(task=task)

    replace_work(monkeypatch, meet)
    with InlineExecutor(store(tmp_path), workers=3) as executor:
        assert len(run(executor, tasks)) == SHARDS


def test_nothing_runs_beside_a_task_that_uses_all_processors(
    tasks: list[ShardTask], whole: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, seen, lock = set[str](), list[set[str]](), threading.Lock()
    together = threading.Barrier(3)

    def note(task: Task) -> Outcome:
        with lock:
            at_work.add(f"{type(task).__name__} {task.index}")
            seen.append(set(at_work))
            first = len(seen) <= 3
        if first:
            together.wait(PATIENT_SECONDS)  # breaks unless three are here
        with lock:
            at_work.remove(f"{type(task).__name__} {task.index}")
        return Outcome(task=task)

    replace_work(monkeypatch, note)
    queue = TaskQueue(tasks, budget=1 << 40)
    with InlineExecutor(store(tmp_path), workers=3) as executor:
        outcomes = executor.run(queue)
        next(outcomes)
        queue.add(whole)  # it goes before all that waits, once the two that run have ended
        kinds = [type(outcome.task) for outcome in outcomes]
    beside = [names for names in seen if any("Statistics" in name for name in names)]
    assert beside == [{"StatisticsTask -2"}]
    assert max(map(len, seen)) == 3
    assert kinds.count(ShardTask) == SHARDS - 1
    assert kinds.index(StatisticsTask) == 2


def test_a_shard_that_ran_out_of_memory_beside_others_is_tried_alone(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, tries, lock = set[int](), list[set[int]](), threading.Lock()

    def fail_beside_others(task: Task) -> Outcome:
        with lock:
            at_work.add(task.index)
        time.sleep(0.1)
        with lock:
            beside = set(at_work)
        if task.index == 0:
            tries.append(beside)
        time.sleep(0.1)
        with lock:
            at_work.remove(task.index)
        return out_of_memory_outcome(task, "no room") if task.index == 0 and len(beside) > 1 else Outcome(task=task)

    replace_work(monkeypatch, fail_beside_others)
    with InlineExecutor(store(tmp_path), workers=2) as executor:
        outcomes = run(executor, tasks)
    assert [outcome.error for outcome in outcomes] == [None] * SHARDS
    assert len(tries) == 2
    assert len(tries[0]) == 2
    assert tries[1] == {0}


def test_it_is_tried_again_too_if_the_others_have_ended_meanwhile(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, tries = threading.Event(), list[int]()

    def fail_once_later(task: Task) -> Outcome:
        tries.append(task.index)
        if tries.count(0) > 1 or task.index:
            return Outcome(task=task)
        assert gone.wait(PATIENT_SECONDS)
        return out_of_memory_outcome(task, "no room")

    replace_work(monkeypatch, fail_once_later)
    with InlineExecutor(store(tmp_path), workers=2) as executor:
        outcomes = executor.run(TaskQueue(tasks[:2], budget=1 << 30))
        assert next(outcomes).task.index == 1
        gone.set()
        (last,) = outcomes
    assert (last.task.index, last.error) == (0, None)
    assert sorted(tries) == [0, 0, 1]


def test_one_that_runs_out_of_memory_alone_fails(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_work(monkeypatch, lambda task: out_of_memory_outcome(task, "no room"))
    with InlineExecutor(store(tmp_path), workers=2) as executor:
        outcomes = run(executor, tasks[:2])
    assert sorted(outcome.task.index for outcome in outcomes) == [0, 1]
    assert all("out of memory" in str(outcome.error) for outcome in outcomes)


def test_threads_end_with_the_executor_in_the_middle_of_their_work(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped = threading.Semaphore(0), list[int]()

    def work_on(task: Task) -> Outcome:
        begun.release()
        try:
            interrupt.pause(PATIENT_SECONDS)
        except interrupt.Interrupted:
            stopped.append(task.index)
            raise
        return Outcome(task=task)

    class Stopping(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            for _ in range(2):
                assert begun.acquire(timeout=PATIENT_SECONDS)
            raise KeyboardInterrupt

    replace_work(monkeypatch, work_on)
    monkeypatch.setattr(inline, "SimpleQueue", Stopping)
    with pytest.raises(KeyboardInterrupt), InlineExecutor(store(tmp_path), workers=2) as executor:
        run(executor, tasks)
    assert len(stopped) == 2
    assert not [thread for thread in threading.enumerate() if isinstance(thread, inline._Thread)]


def test_a_run_that_is_to_stop_ends_a_shard_at_its_next_step(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def stop_the_main_thread(stage: str, *_: Any) -> None:
        interrupt.check()
        steps.append(stage)
        ended.put(None)
        assert executor._stopping.wait(PATIENT_SECONDS)

    class Stopping(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if super().get() is None:
                raise KeyboardInterrupt

    ended = Stopping()
    monkeypatch.setattr(inline, "SimpleQueue", lambda: ended)
    monkeypatch.setattr(logs, "step", stop_the_main_thread)
    with pytest.raises(KeyboardInterrupt), InlineExecutor(store(tmp_path), workers=1) as executor:
        run(executor, tasks)
    assert steps == ["read"]


def test_what_stops_a_thread_stops_the_run(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Task) -> Outcome:
        raise interrupt.Interrupted

    replace_work(monkeypatch, stop)
    with pytest.raises(interrupt.Interrupted), InlineExecutor(store(tmp_path), workers=2) as executor:
        run(executor, tasks)


def test_steps_in_the_trace_belong_to_the_shard_of_their_thread(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    with logs.trace("20260101T000000.000Z-0000") as folder, InlineExecutor(store(tmp_path), workers=3) as executor:
        assert folder is not None
        run(executor, tasks)
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    steps = {(line["shard"], line["tensor"]) for line in lines if line.get("stage") == "encode"}
    assert steps == {(n, f"b.{n}.w") for n in range(SHARDS)}


@pytest.mark.parametrize(
    ("nbytes", "gpus", "wanted", "threads"),
    [(0, 0, True, True), (START_BYTES, 0, True, True), (START_BYTES + 1, 0, True, False), (1, 1, True, True),
     (START_BYTES + 1, 1, True, False), (1, 2, True, False), (1, 2, False, True)],
)  # fmt: skip
def test_ray_starts_for_long_runs_and_for_several_gpus_that_are_of_use(
    nbytes: int, gpus: int, wanted: bool, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert threads_suffice(Demand(nbytes=nbytes, gpu=wanted)) == threads


@pytest.mark.parametrize(("free", "workers"), [(1 << 20, 1), (3 * GPU_BYTES, 3), (1 << 40, GPU_WORKERS)])
def test_on_a_gpu_every_thread_has_a_stream_and_its_memory_bounds_their_number(
    free: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    monkeypatch.setattr("birkhoff.pipeline.run.worker.triton_serves", lambda _: True)
    monkeypatch.setattr(inline, "processors", lambda: 99)
    with InlineExecutor(store(tmp_path)) as executor:
        streams = [worker._stream for worker in executor._free]
    assert None not in streams
    assert len(set(streams)) == len(streams) == workers


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    monkeypatch.setattr("birkhoff.pipeline.run.worker.triton_serves", lambda _: True)


@pytest.mark.usefixtures("fake_gpu")
def test_shards_that_a_gpu_does_not_help_run_beside_it(
    tasks: list[ShardTask], whole: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def note(task: ShardTask, _store: Store, device: torch.device, _buffer: object) -> None:
        devices.append(f"{task.recipe['codec']} on {device.type}")
        raise ValidationError("seen")

    monkeypatch.setattr("birkhoff.pipeline.run.worker.run_shard", note)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    paper = plan_model("p", open_checkpoint(tmp_path / "net.safetensors"), PROFILES["paper"], shard_bytes=1 << 20)
    with InlineExecutor(store(tmp_path)) as executor:
        run(executor, [*tasks[:2], *paper.tasks("p")])
        assert executor._free[0]._device_for(whole[0]).type == "cuda"
    assert sorted(devices) == ["lattice on cpu", "lattice on cpu", "paper on cuda"]


def test_a_run_without_work_for_a_gpu_does_not_ask_for_one(
    tasks: list[ShardTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for"))
    monkeypatch.setattr(inline, "processors", lambda: 7)
    monkeypatch.setattr(inline, "CPU_WORKERS", 5)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with InlineExecutor(store(tmp_path), gpu=False) as executor:
        assert len(executor._free) == 5
        assert all(outcome.error is None for outcome in run(executor, tasks))
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible  # it is the program's
