"""Workers that hang or lack memory, on a real local cluster: what is tried again, how, and what is said in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.run.cluster import Cluster
from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import TRIES, RayExecutor
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.store.base import StoreAddress
from tests.patience import PATIENT_SECONDS

pytestmark = pytest.mark.slow
LIMIT = 4.0
BAD = 2
"""The shard that fares badly."""


class NoRoom:
    """Takes the place of a store's address: the first thing that a shard needs cannot be had."""

    @property
    def url(self) -> str:
        raise MemoryError("no room")


class FaultyWorker(Worker):
    """Does to shard `BAD` what the model's name says, and notes when it was at what."""

    def run(self, task: ShardTask) -> Outcome:
        folder = Path(task.tensors[0].tensor.path).parent
        start, address = time.monotonic(), self._address
        if task.index == BAD:
            tries = folder / "tries"
            before = int(tries.read_text()) if tries.exists() else 0
            tries.write_text(str(before + 1))
            fault, _, how = task.model.partition("-")
            if how.startswith("always") or not before:
                if fault == "hang":
                    time.sleep(600)
                elif fault == "node":
                    os.kill(os.getppid(), signal.SIGKILL)  # the raylet, which started this process
                    time.sleep(600)
                elif fault == "memory":
                    self._store, self._address = None, NoRoom()  # type: ignore[assignment]
        else:
            time.sleep(0.1)
        outcome = super().run(task)
        self._address = address
        self._note(folder, task, start)
        return outcome

    def _note(self, folder: Path, task: ShardTask, start: float) -> None:
        with (folder / "times").open("a") as file:
            file.write(json.dumps([task.index, start, time.monotonic()]) + "\n")


class FaultyExecutor(RayExecutor):
    worker = FaultyWorker


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyExecutor]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    store = StoreAddress.parse(tmp_path_factory.mktemp("store").as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_period_ms", "1000")  # so that a dead node is seen in 5 s and not in 25
        with FaultyExecutor(store, workers=2, shard_seconds=LIMIT) as executor:
            yield executor


def outcomes(executor: RayExecutor, folder: Path, model: str, seed: int) -> dict[int, Outcome]:
    generator = torch.Generator().manual_seed(seed)
    save_file({f"b.{n}.w": torch.randn(64, 128, generator=generator) for n in range(6)}, folder / "net.safetensors")
    profile = PROFILES["balanced"]
    work = plan_model(model, open_checkpoint(folder / "net.safetensors"), profile, shard_bytes=1).tasks(model)
    found = {outcome.task.index: outcome for outcome in executor.run(TaskQueue(work, budget=1 << 30))}
    assert sorted(found) == list(range(6))
    assert all(outcome.error is None for index, outcome in found.items() if index != BAD)
    return found


def test_a_worker_that_hangs_is_killed_and_its_shard_runs_elsewhere(executor: FaultyExecutor, tmp_path: Path) -> None:
    before = set(executor.workers)
    found = outcomes(executor, tmp_path, "hang", 1)
    assert found[BAD].error is None
    assert (tmp_path / "tries").read_text() == "2"
    assert len(before & set(executor.workers)) == 1


def test_a_shard_that_always_hangs_fails_by_name(executor: FaultyExecutor, tmp_path: Path) -> None:
    error = outcomes(executor, tmp_path, "hang-always", 2)[BAD].error
    assert (tmp_path / "tries").read_text() == str(TRIES)
    text = rf"hang-always shard 2 \(b\.2\.w\): its worker gave no result within 4 s, {TRIES} times; raise shard_seconds"
    with pytest.raises(type(error), match=text):
        raise error  # type: ignore[misc]


RAY_IN_ITS_OWN_PROCESS = """
import logging, os, pathlib, signal, sys, threading
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.store.base import StoreAddress

class Dying(Worker):
    def run(self, task):
        os.kill(os.getpid(), signal.SIGKILL)

class Executor(RayExecutor):
    worker = Dying

told = threading.Event()

class Listener(logging.Handler):
    def emit(self, record):
        if "A worker died" in record.getMessage():
            told.set()

logging.getLogger("birkhoff.cluster").setLevel(logging.INFO)
logging.getLogger("birkhoff.cluster").addHandler(Listener())
with Executor(StoreAddress.parse(pathlib.Path(sys.argv[1]).as_uri()), workers=1) as executor:
    executor.workers[0].run.remote(None)
    assert told.wait(float(sys.argv[2])), "Ray said nothing of the death"
print("[]")
"""


def test_what_ray_says_of_a_dead_worker_leaves_standard_output_to_us(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAY_IN_ITS_OWN_PROCESS, str(tmp_path), f"{PATIENT_SECONDS}"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_out_of_memory_once_is_tried_again_alone(executor: FaultyExecutor, tmp_path: Path) -> None:
    found = outcomes(executor, tmp_path, "memory", 3)
    assert found[BAD].error is None
    runs = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    tried = [(start, end) for index, start, end in runs if index == BAD]
    start, end = tried[-1]
    assert (tmp_path / "tries").read_text() == "2"
    assert not [run for run in runs if run[0] != BAD and run[1] < end and start < run[2]]


def test_out_of_memory_alone_fails_with_the_names_and_the_remedy(executor: FaultyExecutor, tmp_path: Path) -> None:
    error = outcomes(executor, tmp_path, "memory-always", 4)[BAD].error
    assert (tmp_path / "tries").read_text() == "2"
    text = r"memory-always shard 2 \(b\.2\.w\): out of memory .*MemoryError: no room.*lower shard_mib"
    with pytest.raises(type(error), match=text):
        raise error  # type: ignore[misc]


def test_shards_run_on_when_ray_itself_has_died_on_this_machine(executor: FaultyExecutor, tmp_path: Path) -> None:
    found = outcomes(executor, tmp_path, "node", 5)
    assert found[BAD].error is None
    # Once with the node, once to the end; once more if Ray told of the dead worker before it told of the dead node, and
    # another worker was started on what was left of it.
    assert 2 <= int((tmp_path / "tries").read_text()) <= TRIES
    # By now Ray's node is known to be dead, if it was not yet when the last shard ended.
    assert outcomes(executor, tmp_path, "sound", 6)[BAD].error is None


def test_ray_that_dies_again_and_again_ends_the_run_with_what_to_do(
    executor: FaultyExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "lost", lambda self: True)
    monkeypatch.setattr(Cluster, "restart", lambda self: None)
    with pytest.raises(WorkerError, match=r"Ray's node on this machine died 3 times; .*the same command continues"):
        outcomes(executor, tmp_path, "hang-always-too", 8)  # of another name: its tries are counted anew
