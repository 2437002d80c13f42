"""A joined cluster of two nodes on this machine, one of which is killed in the middle of a run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.store.base import StoreAddress

pytestmark = pytest.mark.slow
SHARDS = 16


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
