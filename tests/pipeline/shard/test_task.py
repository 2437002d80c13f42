"""Which shards a GPU is of use to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.shard import task as module
from birkhoff.pipeline.shard.task import ShardTask, TensorPlan


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


def test_sizes_are_estimated_on_processors(path: Path) -> None:
    task = task_of(path, "match-paper")
    assert not replace(task, targets_db=((30.0,),) * len(task.tensors)).on_gpu
