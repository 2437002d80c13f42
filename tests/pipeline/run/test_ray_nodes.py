"""A joined cluster of two nodes on this machine, one of which is killed in the middle of a run."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import TRIES, RayExecutor
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.store.base import StoreAddress

pytestmark = pytest.mark.slow
SHARDS = 16
PREEMPTIONS = TRIES


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A cluster of two nodes with one CPU each; a node that is gone is noticed within seconds."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    noticed = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": noticed},
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_run_completes_although_a_node_dies(nodes: object, tmp_path: Path) -> None:
    import ray

    second = nodes.add_node(num_cpus=1)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"b.{n}.w": torch.randn(128, 256, generator=generator) for n in range(SHARDS)}, tmp_path / "net.safetensors"
    )
    profile = PROFILES["balanced"]
    work = plan_model("net", open_checkpoint(tmp_path / "net.safetensors"), profile, shard_bytes=1).tasks("net")
    store = StoreAddress.parse((tmp_path / "store").as_uri())
    with RayExecutor(store, address=nodes.address) as executor:  # type: ignore[attr-defined]
        assert executor.capacity() == (0.0, 2)
        facts = ray.get([actor.identity.remote() for actor in executor.workers])  # one on each node, both at work
        assert all("py_modules" in fact["package"] for fact in facts)  # the driver's code, not what a node has
        outcomes = executor.run(TaskQueue(work, budget=1 << 30))
        ended = [next(outcomes) for _ in range(3)]
        nodes.remove_node(second, allow_graceful=False)  # type: ignore[attr-defined]
        ended += outcomes
        late = time.monotonic() + 60  # the cluster notices a death by missing heartbeats
        while sum(node["Alive"] for node in ray.nodes()) > 1:
            assert time.monotonic() < late, "the killed node still counts as alive"
            time.sleep(0.1)
    assert sorted(outcome.task.index for outcome in ended) == list(range(SHARDS))
    assert all(outcome.error is None for outcome in ended)


class SpotWorker(Worker):
    """Notes every try of a shard; is still at the first shard when its node goes, as often as `PREEMPTIONS` says."""

    def run(self, task: ShardTask) -> Outcome:
        import ray

        folder = Path(task.tensors[0].tensor.path).parent
        tries = len(list(folder.glob(f"try-{task.index}-*")))
        (folder / f"try-{task.index}-{tries}").write_text(ray.get_runtime_context().get_node_id())
        if task.index == 0 and tries < PREEMPTIONS:
            time.sleep(600)
        return super().run(task)


class SpotExecutor(RayExecutor):
    worker = SpotWorker


@pytest.fixture
def spot_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head that does no work, as in rayjob.yaml, and a node with one CPU for each preemption, and one more."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    noticed = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(PREEMPTIONS + 1):
            cluster.add_node(num_cpus=1, wait=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def _preempt(cluster: Any, folder: Path, took: list[float]) -> None:
    """Kill the node that the first shard is tried on, each time."""
    for number in range(PREEMPTIONS):
        mark = folder / f"try-0-{number}"
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        (node,) = [one for one in cluster.worker_nodes if one.node_id == mark.read_text()]
        killed = time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
        while not (folder / f"try-0-{number + 1}").exists():
            time.sleep(0.05)
        took.append(time.monotonic() - killed)


@pytest.mark.timeout(120)
def test_a_preempted_node_costs_what_its_workers_were_at_and_no_shard_its_tries(
    spot_nodes: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More preemptions than a shard has tries: each costs the shard at work on that node, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    shards = 6
    tensors = {f"b.{n}.w": torch.randn(64, 64, generator=generator) for n in range(shards)}
    save_file(tensors, tmp_path / "net.safetensors")
    model = plan_model("net", open_checkpoint(tmp_path / "net.safetensors"), PROFILES["fast"], shard_bytes=1)
    store, took = StoreAddress.parse((tmp_path / "store").as_uri()), list[float]()
    with SpotExecutor(store, address=spot_nodes.address) as executor:
        killer = threading.Thread(target=_preempt, args=(spot_nodes, tmp_path, took), daemon=True)
        killer.start()
        ended = list(executor.run(TaskQueue(model.tasks("net"), budget=1 << 30)))
    killer.join(60)
    assert sorted(outcome.task.index for outcome in ended) == list(range(shards))
    assert [outcome.error for outcome in ended if outcome.error] == []
    tries = Counter(path.name.split("-")[1] for path in tmp_path.glob("try-*"))
    assert tries == {"0": PREEMPTIONS + 1} | {str(index): 1 for index in range(1, shards)}
    print("seconds from a node's death to the next try of its shard:", [round(seconds, 1) for seconds in took])
    assert caplog.text.count("was lost; trying again") == PREEMPTIONS
