"""A joined cluster of two nodes on this machine, one of which is killed in the middle of a run."""

import contextlib
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
from tests.patience import PATIENT_SECONDS, RAY_GAVE_UP, RAY_SETTINGS

pytestmark = pytest.mark.slow
SHARDS = 16
PREEMPTIONS = TRIES


class Nodes:
    """A cluster of nodes on this machine; one that is killed is noticed within seconds, one that starves is not."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster

    def add(self, cpus: int, **arguments: Any) -> Any:
        """Start a node, and wait for it longer than Ray itself would: nodes that start side by side on a busy machine
        make each other late."""
        node = self.cluster.add_node(wait=False, num_cpus=cpus, **arguments)
        self.cluster.wait_for_nodes(PATIENT_SECONDS)
        return node

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def find(self, node_id: str) -> Any:
        (found,) = [node for node in self.cluster.worker_nodes if node.node_id == node_id]
        return found


def start(head_cpus: int, others: int) -> Nodes:
    """A head, and other nodes with a CPU each. Where Ray gives up, all start again until `PATIENT_SECONDS` are over."""
    from ray.cluster_utils import Cluster

    # A killed node refuses connections, and five such answers are enough: later than the second that Ray itself would
    # wait for the reason of a death. How long an answer may take is another matter: a living node on a busy machine
    # takes seconds for it.
    noticed = {"health_check_period_ms": 500, "health_check_timeout_ms": 60_000}
    end = time.monotonic() + PATIENT_SECONDS
    while True:
        nodes = Nodes(Cluster())
        try:
            nodes.add(head_cpus, include_dashboard=False, _system_config=noticed)
            for _ in range(others):
                nodes.add(cpus=1)
            return nodes
        except Exception as error:
            nodes.cluster.shutdown()
            if RAY_GAVE_UP not in str(error) or time.monotonic() > end:
                raise


@contextlib.contextmanager
def started(head_cpus: int, others: int) -> Iterator[Nodes]:
    """Nodes whose workers have this process's priority, until the block ends."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**RAY_SETTINGS, "RAY_worker_niceness": "0"}.items():
            patch.setenv(name, value)
        ray._raylet.Config.initialize("")  # this process may have read the settings before
        nodes = start(head_cpus, others)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()
    ray._raylet.Config.initialize("")


@pytest.fixture
def two() -> Iterator[Nodes]:
    """A head and a node, with one CPU each."""
    with started(head_cpus=1, others=1) as nodes:
        yield nodes


def test_a_run_completes_although_a_node_dies(two: Nodes, tmp_path: Path) -> None:
    import ray

    (second,) = two.cluster.worker_nodes
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"b.{n}.w": torch.randn(128, 256, generator=generator) for n in range(SHARDS)}, tmp_path / "net.safetensors"
    )
    profile = PROFILES["balanced"]
    work = plan_model("net", open_checkpoint(tmp_path / "net.safetensors"), profile, shard_bytes=1).tasks("net")
    store = StoreAddress.parse((tmp_path / "store").as_uri())
    with RayExecutor(store, address=two.cluster.address) as executor:
        assert executor.capacity() == (2, 0, 0.0)
        facts = ray.get([actor.identity.remote() for actor in executor.workers])  # one on each node, both at work
        assert all("py_modules" in fact["package"] for fact in facts)  # the driver's code, not what a node has
        outcomes = executor.run(TaskQueue(work, budget=1 << 30))
        ended = [next(outcomes) for _ in range(3)]
        two.kill(second)
        ended += outcomes
        late = time.monotonic() + PATIENT_SECONDS  # the cluster notices a death by missing heartbeats
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
            time.sleep(PATIENT_SECONDS)
        return super().run(task)


class SpotExecutor(RayExecutor):
    worker = SpotWorker


@pytest.fixture
def spot() -> Iterator[Nodes]:
    """A head that does no work, as in rayjob.yaml, and a node with one CPU for each preemption, and one more."""
    with started(head_cpus=0, others=PREEMPTIONS + 1) as nodes:
        yield nodes


def _preempt(nodes: Nodes, folder: Path, took: list[float]) -> None:
    """Kill the node that the first shard is tried on, each time."""
    for number in range(PREEMPTIONS):
        mark = folder / f"try-0-{number}"
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        killed = time.monotonic()
        nodes.kill(nodes.find(mark.read_text()))
        while not (folder / f"try-0-{number + 1}").exists():
            time.sleep(0.05)
        took.append(time.monotonic() - killed)


def test_a_preempted_node_costs_what_its_workers_were_at_and_no_shard_its_tries(
    spot: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More preemptions than a shard has tries: each costs the shard at work on that node, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    shards = 6
    tensors = {f"b.{n}.w": torch.randn(64, 64, generator=generator) for n in range(shards)}
    save_file(tensors, tmp_path / "net.safetensors")
    model = plan_model("net", open_checkpoint(tmp_path / "net.safetensors"), PROFILES["fast"], shard_bytes=1)
    store, took = StoreAddress.parse((tmp_path / "store").as_uri()), list[float]()
    with SpotExecutor(store, address=spot.cluster.address) as executor:
        killer = threading.Thread(target=_preempt, args=(spot, tmp_path, took), daemon=True)
        killer.start()
        ended = list(executor.run(TaskQueue(model.tasks("net"), budget=1 << 30)))
    killer.join(PATIENT_SECONDS)
    assert sorted(outcome.task.index for outcome in ended) == list(range(shards))
    assert [outcome.error for outcome in ended if outcome.error] == []
    tries = Counter(path.name.split("-")[1] for path in tmp_path.glob("try-*"))
    assert tries == {"0": PREEMPTIONS + 1} | {str(index): 1 for index in range(1, shards)}
    print("seconds from a node's death to the next try of its shard:", [round(seconds, 1) for seconds in took])
    assert caplog.text.count("was lost; trying again") == PREEMPTIONS
