"""Which shards a GPU is of use to, and which are taken from others of the run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard import task as module
from birkhoff.pipeline.shard.run import compress_shard
from birkhoff.pipeline.shard.sources import SourceBuffer
from birkhoff.pipeline.shard.task import Reuse, ShardResult, ShardTask, TensorPlan
from birkhoff.pipeline.store.base import StoreAddress
from birkhoff.pipeline.store.memory import MemoryStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.randn(128, 128), "a.bias": torch.randn(128)}, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def task_of(path: Path, profile: str) -> ShardTask:
    (task,) = plan_model("net", open_checkpoint(path), PROFILES[profile], shard_bytes=1 << 30).tasks("net")
    return task


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_published_codec_and_its_match_search_by_themselves(path: Path, profile: str) -> None:
    assert task_of(path, profile).on_gpu == (profile in ("paper", "match-paper"))


def test_feedback_of_errors_is_for_a_gpu(path: Path) -> None:
    task = task_of(path, "balanced")

    def with_decision(decision: Decision) -> ShardTask:
        return replace(task, tensors=(*task.tensors[1:], TensorPlan(tensor=task.tensors[0].tensor, decision=decision)))

    assert with_decision(Decision(codec="lattice", target_db=20.0, nominal=True, hessian="0" * 64)).on_gpu
    assert not with_decision(Decision(codec="lattice", target_db=20.0, nominal=True)).on_gpu


def test_without_the_native_library_a_gpu_encodes_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", lambda: None)
    assert task_of(path, "balanced").on_gpu


@pytest.mark.parametrize("reuse", ["trust", "revalidate", "prove", "never"])
def test_a_shard_that_this_run_has_made_is_taken_without_the_store(path: Path, reuse: Reuse) -> None:
    asked: list[str] = []

    class Watched(MemoryStore):
        def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
            asked.append(key)
            return super().get(key, start=start, length=length)

    store, cpu, task = Watched(), torch.device("cpu"), task_of(path, "balanced")
    made = compress_shard(task, store, cpu, SourceBuffer())
    assert isinstance(made, ShardResult)
    others = [made.record.model_copy(update={"key": key * 64}) for key in "ab"]
    asked.clear()
    found = compress_shard(
        replace(task, known=(others[0], made.record, others[1]), reuse=reuse), store, cpu, SourceBuffer()
    )
    assert isinstance(found, ShardResult)
    assert found.record == made.record
    assert bool(asked) == (reuse in ("revalidate", "prove"))
    assert found.reused == (reuse != "never")


def test_one_whose_blob_has_gone_is_made_again(path: Path) -> None:
    store, cpu, task = MemoryStore(), torch.device("cpu"), task_of(path, "balanced")
    made = compress_shard(task, store, cpu, SourceBuffer())
    store.delete(blob_key(made.record.blob))
    found = compress_shard(replace(task, known=(made.record,)), store, cpu, SourceBuffer())
    assert (found.record, found.reused) == (made.record, False)
    assert store.get(blob_key(made.record.blob))


def test_a_worker_does_not_send_back_what_the_driver_knows(path: Path, tmp_path: Path) -> None:
    address, task = StoreAddress.parse((tmp_path / "store").as_uri()), task_of(path, "balanced")
    worker = Worker(address, gpu=False, thread=True)
    made = worker.run(task).result
    assert isinstance(made, ShardResult)
    outcome = worker.run(replace(task, known=(made.record,)))
    worker.close()
    assert (outcome.task, outcome.error) == (task, None)


def test_one_that_only_looks_the_same_is_made(path: Path) -> None:
    task, cpu = task_of(path, "balanced"), torch.device("cpu")
    made = compress_shard(task, MemoryStore(), cpu, SourceBuffer())
    other = made.record.model_copy(update={"key": "f" * 64, "blob": "e" * 64})
    found = compress_shard(replace(task, known=(other,)), MemoryStore(), cpu, SourceBuffer())
    assert (found.record, found.reused) == (made.record, False)


def test_sizes_are_estimated_on_processors(path: Path) -> None:
    task = task_of(path, "match-paper")
    assert not replace(task, targets_db=((30.0,),) * len(task.tensors)).on_gpu
