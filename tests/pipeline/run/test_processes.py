"""Processes of Ray's that start before the driver knows what for: they become the workers of the run."""

import os
from pathlib import Path

import pytest

from birkhoff.pipeline import logs
from birkhoff.pipeline.run.choice import Choice
from birkhoff.pipeline.run.cluster import WorkerProcess, start_cluster
from birkhoff.pipeline.run.demand import Demand
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
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
        choice.ahead(1)
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
def test_what_becomes_no_worker_ends(tmp_path: Path) -> None:
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


def test_a_store_that_cannot_be_opened_is_for_the_first_task_to_say(tmp_path: Path) -> None:
    address = StoreAddress.parse(f"embedded://{tmp_path / 'nobody'}")
    process = WorkerProcess(address)  # nothing serves there
    assert process.become(_Worker, address, gpu=False, environment={"SET_FOR_IT": "yes"})["pid"] == os.getpid()  # type: ignore[arg-type]
    assert os.environ.pop("SET_FOR_IT") == "yes"
    assert process.run(None) == "ran"  # type: ignore[arg-type, comparison-overlap]


class _Worker:
    """Stands for a worker, which would hide GPUs from this process."""

    def __init__(self, store: StoreAddress, *, gpu: bool) -> None:
        assert not gpu

    def identity(self) -> dict[str, int]:
        return {"pid": os.getpid()}

    def run(self, _task: None) -> str:
        return "ran"
