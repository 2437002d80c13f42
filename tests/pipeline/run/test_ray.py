"""The Ray executor on a real local cluster: shards, a worker's death, and what a worker can import."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.plan.shards import ModelPlan, plan_model
from birkhoff.pipeline.registry.documents import BudgetRecord, ShardRecord, SourceRecord, VersionManifest
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.passes import Passes, Terms
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import TRIES, RayExecutor
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.store.base import StoreAddress

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreAddress:
    return StoreAddress.parse(tmp_path_factory.mktemp("store").as_uri())


@pytest.fixture(scope="module")
def executor(store: StoreAddress) -> Iterator[RayExecutor]:
    # Workers must find no package named `kernels` even where the repository root is on their path.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with RayExecutor(store, workers=2) as executor:
            yield executor


def tasks(folder: Path, count: int, seed: int = 0) -> list[ShardTask]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"blocks.{n}.weight": torch.randn(64, 128, generator=generator) for n in range(count)}
    save_file(tensors, folder / "net.safetensors")
    profile = PROFILES["balanced"]
    return plan_model("net", open_checkpoint(folder / "net.safetensors"), profile, shard_bytes=1).tasks("net")


def test_workers_make_the_same_blobs_as_this_process(
    executor: RayExecutor, store: StoreAddress, tmp_path: Path
) -> None:
    work = tasks(tmp_path, 12)
    made = {outcome.task.index: outcome for outcome in executor.run(TaskQueue(work, budget=1 << 30))}
    assert sorted(made) == list(range(12))
    assert all(outcome.error is None for outcome in made.values())
    with InlineExecutor(StoreAddress.parse((tmp_path / "other").as_uri())) as inline:
        for outcome in inline.run(TaskQueue(work, budget=1)):
            assert outcome.result is not None
            other = made[outcome.task.index].result
            assert other is not None
            assert outcome.result.record.blob == other.record.blob
    reused = list(executor.run(TaskQueue(work, budget=1 << 30)))
    assert all(outcome.result and outcome.result.reused for outcome in reused)


def test_a_killed_worker_is_replaced_and_its_shards_run_again(executor: RayExecutor, tmp_path: Path) -> None:
    import ray

    victims = [ray.get(actor.identity.remote())["pid"] for actor in executor.workers]
    os.kill(victims[0], signal.SIGKILL)
    outcomes = list(executor.run(TaskQueue(tasks(tmp_path, 10, seed=1), budget=1 << 30)))
    assert sorted(outcome.task.index for outcome in outcomes) == list(range(10))
    assert all(outcome.error is None for outcome in outcomes)
    replaced = [ray.get(actor.identity.remote())["pid"] for actor in executor.workers]
    assert victims[0] not in replaced
    assert victims[1] in replaced


def test_an_error_in_a_worker_arrives_as_itself_and_ends_its_shard_alone(executor: RayExecutor, tmp_path: Path) -> None:
    work = tasks(tmp_path, 3, seed=2)
    data = bytearray((tmp_path / "net.safetensors").read_bytes())
    (tmp_path / "net.safetensors").write_bytes(data[:-10])
    outcomes = {outcome.task.index: outcome for outcome in executor.run(TaskQueue(work, budget=1 << 30))}
    failed = [index for index, outcome in outcomes.items() if outcome.error is not None]
    assert len(outcomes) == 3
    assert failed == [2]
    assert "net.safetensors" in str(outcomes[2].error)


def test_workers_import_transformers_beside_our_kernels(executor: RayExecutor) -> None:
    import ray

    facts = ray.get(executor.workers[0].identity.remote())
    assert facts["kernels"] is None
    assert facts["cuda"] == torch.cuda.is_available()
    if importlib.util.find_spec("transformers"):
        assert ray.get(ray.remote(import_sam).options(num_cpus=0).remote()) == "SamModel"


def test_gpus_are_hidden_from_what_has_no_share_of_one(executor: RayExecutor) -> None:
    import ray

    assert len(executor.workers)  # Ray runs
    assert ray.get(ray.remote(visible).options(num_cpus=0).remote()) == ""


def test_no_process_of_ray_builds_the_grammar_of_iris(executor: RayExecutor) -> None:
    import ray

    assert len(executor.workers)  # Ray runs
    assert ray.get(ray.remote(loaded).options(num_cpus=0).remote()) == {"jsonschema"}


def loaded() -> set[str]:
    return {"jsonschema", "lark"} & {*sys.modules}


def visible() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def import_sam() -> str:
    from transformers import SamModel

    return SamModel.__name__


def test_more_workers_than_the_cluster_has_is_refused_not_waited_for(
    executor: RayExecutor, store: StoreAddress
) -> None:
    with pytest.raises(WorkerError, match="999 workers asked for"):
        executor.capacity(999)
    assert TRIES >= 2


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers", "gpu", "found"),
    [
        (0, 1, None, True, (1, 0, 0.0)),
        (0, 7, None, True, (7, 0, 0.0)),
        (0, 16, None, True, (14, 0, 0.0)),
        (1, 16, None, True, (14, 4, 0.25)),
        (2, 32, None, True, (28, 8, 0.25)),
        (2, 32, None, False, (28, 0, 0.0)),
        (2, 8, None, True, (7, 7, 0.25)),
        (8, 16, None, True, (14, 14, 0.5)),
        (8, 4, None, True, (4, 4, 1.0)),
        (2, 8, 3, True, (3, 3, 0.5)),
        (1, 16, 2, True, (2, 2, 0.5)),
        (1, 16, 16, True, (16, 4, 0.25)),
    ],
)
def test_most_cpus_have_a_worker_and_some_of_these_share_a_gpu(
    gpus: int,
    cpus: int,
    workers: int | None,
    gpu: bool,
    found: tuple[int, int, float],
    executor: RayExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor._ray, "cluster_resources", lambda: {"GPU": float(gpus), "CPU": float(cpus)})
    assert executor.capacity(workers, gpu=gpu) == found
    _, with_gpu, share = found
    assert gpus * (1 // (share or 1.0)) >= with_gpu  # each share is one of a single GPU


def test_a_budget_ends_at_the_same_target_on_workers_as_in_this_process(executor: RayExecutor, tmp_path: Path) -> None:
    plan_tasks = tasks(tmp_path, 6, seed=7)
    plan = ModelPlan(profile=PROFILES["fast"], shards=tuple(task.tensors for task in plan_tasks))

    def describe(plan: ModelPlan, records: Sequence[ShardRecord]) -> VersionManifest:
        source = SourceRecord(file="net.safetensors", sha256="0" * 64, bytes=10**6, format="safetensors")
        recipe = plan.profile.recipe()
        return VersionManifest(model="net", source=source, profile="p", recipe=recipe, code="0", shards=tuple(records))

    def search(runner: RayExecutor | InlineExecutor) -> Passes:
        terms = Terms(budget=BudgetRecord(max_bytes=40_000), limit=39_500, hint_db=None)
        passes = Passes("net", plan, describe, terms=terms)
        queue = TaskQueue(passes.start(), budget=1 << 30)
        for outcome in runner.run(queue):
            assert outcome.result is not None, outcome.error
            queue.add(passes.take(outcome.task.index, outcome.result))
        assert passes.whole
        return passes

    remote = search(executor)
    with InlineExecutor(StoreAddress.parse((tmp_path / "other").as_uri())) as inline:
        here = search(inline)
    assert remote.plan == here.plan
    assert {i: record.blob for i, record in remote.records.items()} == {i: r.blob for i, r in here.records.items()}
