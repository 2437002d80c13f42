"""Root mean squares by a sample, and the targets that models get from them."""

import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from math import log10, prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.native.library import native
from birkhoff.codec.output.allocation import root_mean_square
from birkhoff.codec.profiles import FINEST_DB, PROFILES
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.plan import scales as module
from birkhoff.pipeline.plan.scales import BLOCK, BLOCKS, scales_of
from birkhoff.pipeline.plan.shards import ModelPlan, plan_model

BALANCED = PROFILES["balanced"]


def stored(folder: Path, tensors: dict[str, torch.Tensor], name: str = "net") -> tuple[StoredTensor, ...]:
    save_file(tensors, folder / f"{name}.safetensors")
    return open_checkpoint(folder / f"{name}.safetensors").tensors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "normal": normal(1024, 512) * 0.02,
    "rows of their own scale": normal(1024, 512) * torch.logspace(-3, 0, 1024)[:, None],
    "columns of their own scale": normal(1024, 512) * torch.logspace(-3, 0, 512),
    "half": (normal(512, 512) * 0.02).half(),
    "bfloat16": (normal(512, 512) * 3).bfloat16(),
    "double": normal(300, 300).double(),
    "a convolution": normal(256, 64, 3, 3) * 0.1,
    "few": normal(32, 40),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_sample_tells_the_root_mean_square(tmp_path: Path, kind: str) -> None:
    found = scales_of(stored(tmp_path, {"w": WEIGHTS[kind]}))["w"]
    tolerance = 0.0 if WEIGHTS[kind].numel() <= BLOCKS * BLOCK else 0.3
    assert abs(20 * log10(found / root_mean_square(WEIGHTS[kind]))) <= tolerance


def test_an_outlier_does_not_count(tmp_path: Path) -> None:
    weight = normal(64, 64)
    weight[3, 3] = 1e6
    assert scales_of(stored(tmp_path, {"w": weight}))["w"] == pytest.approx(1.0, abs=0.05)


def test_weights_that_cannot_be_coded_have_no_scale(tmp_path: Path) -> None:
    weight = normal(64, 64)
    weight[1, 1] = torch.nan
    tensors = {
        "nan": weight,
        "zero": torch.zeros(64, 64),
        "constant": torch.full((64, 64), 0.3),
        "none": torch.zeros(0, 64),
        "mask": torch.ones(128, 128).tril(),
        "huge": normal(64, 64).double() * 1e160,
        "tiny": normal(64, 64) * 1e-30,
    }
    assert scales_of(stored(tmp_path, tensors)) == dict.fromkeys(tensors, 0.0)


def test_a_view_is_read_through_its_strides(tmp_path: Path) -> None:
    whole = normal(2000, 400)
    whole[:, 100:] *= 1000
    torch.save({"w": whole[:, :100]}, tmp_path / "net.pth")
    assert scales_of(open_checkpoint(tmp_path / "net.pth").tensors)["w"] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_view_takes_little_more_memory_than_itself(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    whole = normal(2000, 400).to(getattr(torch, dtype))
    torch.save({"w": whole[:, :300]}, tmp_path / "net.pth")
    (tensor,) = open_checkpoint(tmp_path / "net.pth").tensors
    with tensor_sample(tensor) as sample:
        tracemalloc.start()
        try:
            found = module._scale(sample)
            assert tracemalloc.get_traced_memory()[1] < 20 * 8 * module._CHUNK < sample.size * 8
        finally:
            tracemalloc.stop()
    assert found == pytest.approx(root_mean_square(whole[:, :300]), rel=1e-12)


@contextmanager
def tensor_sample(tensor: StoredTensor) -> Iterator[module.Stored]:
    with Path(tensor.path).open("rb") as file:
        yield module._sample(tensor, file.fileno())


@pytest.mark.filterwarnings("error")
def test_doubles_whose_squares_overflow_are_not_coded(tmp_path: Path) -> None:
    weights = {"sum": normal(4000).double().sign() * 1.3e154, "each": normal(4000).double() * 1e200}
    assert scales_of(stored(tmp_path, weights)) == {"sum": 0.0, "each": 0.0}


def test_one_file_is_open_at_a_time(tmp_path: Path) -> None:
    tensors = [tensor for n in range(64) for tensor in stored(tmp_path, {f"w{n}": normal(40, 40)}, f"net{n}")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 8, hard))
    try:
        assert len(scales_of(tensors)) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(params=["native", "python"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(module, "native", lambda: None)
    elif native() is None:
        pytest.skip("no native library here")


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_of_a_large_tensor_little_is_read(tmp_path: Path) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    tensors = stored(tmp_path, {"w": normal(2048, 2048)})
    before = read()
    scales_of(tensors)
    assert 4 * BLOCKS * BLOCK <= read() - before < 2048 * 2048 / 50


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if WEIGHTS[kind].numel() > BLOCKS * BLOCK])
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_the_library_reads_the_same_sample(
    tmp_path: Path, kind: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = stored(tmp_path, {"another": torch.zeros(3), "w": WEIGHTS[kind]})
    (tensor,) = (tensor for tensor in tensors if tensor.name == "w")
    path = tmp_path / "net.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with path.open("rb") as file:
        mine = module._sample(tensor, file.fileno())
        monkeypatch.setattr(module, "native", lambda: None)
        assert np.array_equal(mine, module._sample(tensor, file.fileno()))
    assert mine.size == BLOCKS * BLOCK if kept == 1 else 0 < mine.size < BLOCKS * BLOCK


@pytest.mark.usefixtures("library")
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tensor,) = stored(tmp_path, {"w": normal(512, 512)})
    with (tmp_path / "other").open("wb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        module._sample(tensor, file.fileno())  # open for writing alone


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    tensors = stored(tmp_path, {"w": normal(64, 64)})
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(SourceError, match=r"net\.safetensors: cannot be read"):
        scales_of(tensors)


def scaled(folder: Path, tensors: dict[str, torch.Tensor]) -> ModelPlan:
    """The plan of a model under `balanced`, with a shard for each block."""
    save_file(tensors, folder / "net.safetensors")
    plan = plan_model("net", open_checkpoint(folder / "net.safetensors"), BALANCED, shard_bytes=1)
    return plan.with_scales(scales_of(plan.scaled))


def targets(plan: ModelPlan) -> dict[str, float | None]:
    return {item.tensor.name: item.decision.target_db for item in plan.tensors}


ENCODER = {f"encoder.{n}.weight": normal(256, 512, seed=n) * 0.03 for n in range(6)}


def test_a_quieter_tensor_gets_less_and_the_mean_stays(tmp_path: Path) -> None:
    loud = targets(scaled(tmp_path, ENCODER))
    quiet = targets(scaled(tmp_path, ENCODER | {"encoder.5.weight": ENCODER["encoder.5.weight"] / 4}))
    assert quiet["encoder.0.weight"] - quiet["encoder.5.weight"] == pytest.approx(12.04, abs=0.3)  # type: ignore[operator]
    for found in (loud, quiet):
        mean = sum(target * prod(ENCODER[name].shape) for name, target in found.items() if target)
        assert mean / sum(prod(weight.shape) for weight in ENCODER.values()) == pytest.approx(30.0, abs=1.05)


def test_one_changed_tensor_moves_no_other_target(tmp_path: Path) -> None:
    before = targets(scaled(tmp_path, ENCODER))
    after = targets(scaled(tmp_path, ENCODER | {"encoder.2.weight": ENCODER["encoder.2.weight"] * 1.05}))
    assert before.pop("encoder.2.weight") != after.pop("encoder.2.weight")
    assert before == after


def test_models_that_share_an_encoder_decide_it_alike(tmp_path: Path) -> None:
    first = targets(scaled(tmp_path, ENCODER | {"decoder.0.weight": normal(64, 64)}))
    second = targets(scaled(tmp_path, ENCODER | {"decoder.0.weight": normal(128, 48) / 50}))
    assert {name: first[name] for name in ENCODER} == {name: second[name] for name in ENCODER}


def test_targets_end_at_the_finest_and_at_the_floor(tmp_path: Path) -> None:
    large = {f"a.{n}": normal(1024, 1024, seed=n) for n in range(4)}
    found = targets(scaled(tmp_path, large | {"b.0": normal(128, 1, 3, 3), "b.1": normal(64, 64) * 1e-6}))
    assert (found["b.0"], found["b.1"]) == (FINEST_DB, 15.0)
