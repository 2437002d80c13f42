"""Dense checkpoints: what torch itself would have written, with one tensor in memory at a time."""

import io
import os
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from birkhoff.codec import tensor as tensors
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.artifact import export as module
from birkhoff.pipeline.artifact import readers
from birkhoff.pipeline.artifact.export import export
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.publishing import publish_tensors

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    **{f"blocks.{n}.weight": torch.randn(64, 32 + n, generator=GENERATOR) for n in range(12)},
    "half.weight": torch.randn(40, 64, generator=GENERATOR).half(),
    "brain.bias": torch.randn(5, generator=GENERATOR).bfloat16(),
    "steps": torch.tensor(7),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store((tmp_path / "store").as_uri()) as opened:
        publish_tensors(opened, "net", TENSORS, shard_weights=4000, nesting=("model", "net"))
        yield opened


def written(store: Store, path: Path) -> Path:
    with open_artifact("net", store.url) as artifact:
        assert export(artifact, path) == path.stat().st_size
    return path


def test_the_bytes_are_those_of_torch_save(store: Store, tmp_path: Path) -> None:
    with open_artifact("net", store.url) as artifact:
        dense = dict(artifact.tensors())
    expected = io.BytesIO()
    torch.save({"model": {"net": dense}}, expected)
    path = written(store, tmp_path / "net.pth")
    assert path.read_bytes() == expected.getvalue()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every record has its checksum


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it_whichever_way(store: Store, tmp_path: Path, mmap: bool) -> None:
    loaded = torch.load(written(store, tmp_path / "net.pt"), weights_only=True, mmap=mmap)["model"]["net"]
    with open_artifact("net", store.url) as artifact:
        for name, tensor in artifact.tensors():
            assert torch.equal(loaded.pop(name), tensor)
    assert not loaded


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_one_decoded_tensor_is_alive_at_a_time(
    store: Store, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(*arguments: Any) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(tensor := decode_tensor(*arguments)))
        return tensor

    monkeypatch.setattr(tensors, "decode_tensor", watched)
    written(store, tmp_path / f"net{suffix}")
    assert len(made) == len(TENSORS)
    assert max(alive) <= 1  # the one before goes when the next is there


def test_a_header_that_is_not_of_its_body_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forged(artifact: readers.Artifact) -> list[readers.TensorRow]:
        first, *others = readers.inspect(artifact)
        return [replace(first, shape=(640, 320)), *others]

    monkeypatch.setattr(module, "inspect", forged)
    with pytest.raises(IntegrityError, match=r"header and body disagree about blocks\.0\.weight"):
        written(store, tmp_path / "net.pth")
    assert not (tmp_path / "net.pth").exists()


PEAK = """
import sys
from pathlib import Path
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.artifact.export import export

def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

with open_artifact("large", sys.argv[1]) as artifact:
    next(artifact.tensors())  # the decoder's own libraries are there before the count begins
    before = peak()
    export(artifact, Path(sys.argv[2]))
print(peak() - before)
"""


def test_memory_is_that_of_a_shard_and_not_of_the_model(tmp_path: Path) -> None:
    tensor = torch.randn(1024, 1024, generator=GENERATOR)  # 4 MiB
    with open_store((tmp_path / "large").as_uri()) as store:
        publish_tensors(store, "large", {f"{n}.weight": tensor for n in range(24)}, shard_weights=1)
        program = [sys.executable, "-c", PEAK, store.url, str(tmp_path / "large.pth")]
    # What the export holds, and not what glibc keeps of freed memory: it gives each thread an arena, and raises the
    # size from which blocks go back at once with the first large block that is freed.
    glibc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | glibc)
    dense = 24 * tensor.nbytes
    assert (tmp_path / "large.pth").stat().st_size > dense
    assert int(ran.stdout) < dense / 4, ran.stdout
