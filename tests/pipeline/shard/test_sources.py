"""A worker reads the shards' tensors one shard after the other into the same memory."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.shard import sources as module
from birkhoff.pipeline.shard.sources import SourceBuffer


def stored(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of several dtypes and sizes, and one whose stored strides are not those of its shape."""
    tensors = {
        "half": torch.randn(7, dtype=torch.float16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "matrix": torch.randn(33, 65),
        "turned": torch.randn(12, 20),
    }
    save_file(tensors, folder / "net.safetensors")
    found = {tensor.name: tensor for tensor in open_checkpoint(folder / "net.safetensors").tensors}
    return found | {"turned": replace(found["turned"], shape=(20, 12), stride=(1, 20))}


def test_tensors_are_those_of_the_file_each_aligned_as_in_memory_of_its_own(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    found = SourceBuffer().read(list(tensors.values()))
    assert list(found) == list(tensors)
    for name, tensor in found.items():
        alone = read_tensor(tensors[name])
        assert tensor.dtype == alone.dtype
        assert torch.equal(tensor, alone)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


def test_the_next_shard_lies_where_the_last_one_lay(tmp_path: Path) -> None:
    tensors, memory = stored(tmp_path), SourceBuffer()
    large = memory.read([tensors["matrix"]])["matrix"].data_ptr()
    assert memory.read([tensors["half"]])["half"].data_ptr() == large
    assert memory.read([tensors["matrix"]])["matrix"].data_ptr() == large


def test_a_large_shard_has_memory_of_its_own_which_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, memory = stored(tmp_path), SourceBuffer()
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", tensors["matrix"].nbytes + 63)
    kept = memory.read([tensors["matrix"]])["matrix"]
    before = kept.clone()
    both = memory.read([tensors["matrix"], tensors["half"]])
    assert both["matrix"].data_ptr() != kept.data_ptr()
    assert torch.equal(kept, before)
    assert memory._kept.numel() < both["matrix"].nbytes + 64


def test_strides_that_lead_to_a_neighbours_bytes_are_refused(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    beyond = replace(tensors["matrix"], stride=(66, 1))
    with pytest.raises(SourceError, match="'matrix' reaches beyond its 8580 bytes"):
        SourceBuffer().read([beyond, tensors["half"]])


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    with (tmp_path / "net.safetensors").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(SourceError, match="the file has changed since it was opened"):
        SourceBuffer().read(list(tensors.values()))
