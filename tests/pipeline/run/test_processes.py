"""Processes of Ray's that start before the driver knows what for: they become the workers of the run."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from birkhoff.pipeline import logs
from birkhoff.pipeline.errors import StoreError, WorkerError
from birkhoff.pipeline.run import cluster as module
from birkhoff.pipeline.run.choice import Choice
from birkhoff.pipeline.run.cluster import WorkerProcess, start_cluster
from birkhoff.pipeline.run.demand import Demand
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.store.base import StoreAddress
from tests.patience import PATIENT_SECONDS
from tests.pipeline.run.test_ray import tasks


@pytest.mark.slow
def test_what_started_ahead_works_and_writes_the_trace_of_a_run_that_began_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    store = StoreAddress.parse((tmp_path / "store").as_uri())
    with Choice(store, ray=True, address=None, workers=2, shard_seconds=None, told=pytest.fail) as choice:
        choice.ahead(1, workers=True)
        assert choice._cluster is not None
        ahead = [actor._actor_id.hex() for actor in choice._cluster._idle]
        with logs.trace("20260102T030405.678Z-9abc") as folder:
            executor = choice.start(Demand(nbytes=1, gpu=False))
            assert isinstance(executor, RayExecutor)
            with executor:
                assert [actor._actor_id.hex() for actor in executor.workers] == ahead
                outcomes = list(executor.run(TaskQueue(tasks(tmp_path, 6), budget=1 << 30)))
                pids = {ray.get(actor.identity.remote())["pid"] for actor in executor.workers}
    assert len(outcomes) == 6
    assert all(outcome.result is not None for outcome in outcomes)
    assert folder is not None
    traces = {path.name: path.read_text() for path in folder.glob("worker-*.jsonl")}
    assert set(traces) == {f"worker-{pid}.jsonl" for pid in pids}
    assert "".join(traces.values()).count('"stage": "encode"') == 6


@pytest.mark.slow
def test_processes_that_are_not_needed_end(tmp_path: Path) -> None:
    import ray

    store = StoreAddress.parse((tmp_path / "store").as_uri())
    cluster = start_cluster(None)
    cluster.start_processes(store, 2)
    spare = cluster._idle[1]
    with RayExecutor(store, cluster=cluster, workers=1) as executor:
        assert len(executor.workers) == 1
        assert len(list(executor.run(TaskQueue(tasks(tmp_path, 2), budget=1 << 30)))) == 2
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(spare.identity.remote(), timeout=PATIENT_SECONDS)


@pytest.mark.parametrize("error", [StoreError("nobody serves"), IsADirectoryError(21, "Is a directory")])
def test_a_store_that_cannot_be_opened_is_for_the_first_task_to_say(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SET_FOR_IT", raising=False)
    tried = list[str]()

    def fail(address: StoreAddress) -> None:
        tried.append(address.url)
        raise error

    monkeypatch.setattr(module, "open_address", fail)
    process = WorkerProcess(StoreAddress.parse(tmp_path.as_uri()))
    assert tried == [tmp_path.as_uri()]
    identity = process.become(_Worker, gpu=False, environment={"SET_FOR_IT": "yes"})  # type: ignore[arg-type]
    assert (identity, os.environ["SET_FOR_IT"]) == ({"pid": os.getpid()}, "yes")
    assert process.run(None) == "ran"  # type: ignore[arg-type, comparison-overlap]


class _OnGpu(Worker):
    """Has a GPU, or says so."""

    def gpus(self) -> dict[str, str]:
        return {"GPU-1": "NVIDIA H200, 140 GiB"}


class GpuExecutor(RayExecutor):
    worker = _OnGpu

    def capacity(self, workers: int | None = None, *, gpu: bool = True) -> tuple[int, int, float]:
        return 2, 2, 0.0


@pytest.mark.slow
def test_workers_name_the_gpu_that_they_share_once_and_the_dead_are_not_waited_for(tmp_path: Path) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with GpuExecutor(StoreAddress.parse(tmp_path.as_uri())) as executor:
        assert executor.gpus() == {}  # nobody has started yet
        ray.get([slot.starting for slot in executor._slots], timeout=PATIENT_SECONDS)
        for slot in executor._slots:
            executor._slots.count_start(slot)
        assert executor.gpus() == {"GPU-1": "NVIDIA H200, 140 GiB"}
        dead = executor.workers[0]
        ray.kill(dead)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(dead.identity.remote(), timeout=PATIENT_SECONDS)
        assert executor.gpus() == {"GPU-1": "NVIDIA H200, 140 GiB"}


class _Failing(Worker):
    def __init__(self, store: StoreAddress, *, gpu: bool = True, thread: bool = False) -> None:
        raise RuntimeError("the driver is too old\nfor this library")


class FailingExecutor(RayExecutor):
    worker = _Failing


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    store = StoreAddress.parse(tmp_path.as_uri())
    with FailingExecutor(store, workers=1) as executor, pytest.raises(WorkerError) as caught:
        list(executor.run(TaskQueue(tasks(tmp_path, 1), budget=1 << 30)))
    assert "workers die at their start" in str(caught.value)
    assert "the driver is too old" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.skipif(find_spec("rfc3987_syntax") is None, reason="rfc3987_syntax is not installed")
def test_the_command_does_not_build_the_grammar_of_iris_either() -> None:
    command = """
import runpy, sys
sys.argv = ["birkhoff", "--version"]
try:
    runpy.run_module("birkhoff", run_name="__main__")
except SystemExit:
    import ray
    print({"jsonschema", "lark"} & {*sys.modules})
"""
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "{'jsonschema'}"


class _Worker:
    """Stands for a worker, which would hide GPUs from this process."""

    def __init__(self, store: StoreAddress, *, gpu: bool) -> None:
        assert not gpu

    def identity(self) -> dict[str, int]:
        return {"pid": os.getpid()}

    def run(self, _task: None) -> str:
        return "ran"
