"""`under`: which of several state dicts in a file is meant."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor, source_digest
from birkhoff.pipeline.download import resolve as fetch
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.errors import ManifestError, SourceError
from birkhoff.pipeline.plan.manifest import load_manifest

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}
OTHER = {"w": torch.ones(4), "b": torch.zeros(2)}
LOADED: dict[str, Any] = {
    "raw": OrderedDict(WEIGHTS),
    "ema": {"model": OTHER, "decay": 0.9, "model.last": WEIGHTS},
    "epoch": 7,
}


def saved(folder: Path, *, legacy: bool = False) -> Path:
    path = folder / "net.pth"
    torch.save(LOADED, path, _use_new_zipfile_serialization=not legacy)
    return path


def held(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {tensor.name: read_tensor(tensor) for tensor in checkpoint.tensors}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("under", "expected", "nesting"),
    [
        ("raw", WEIGHTS, ("raw",)),
        ("ema.model", OTHER, ("ema", "model")),
        ("ema.model.last", WEIGHTS, ("ema", "model.last")),  # a key may hold dots
    ],
)
def test_the_named_state_dict_is_taken(
    tmp_path: Path, legacy: bool, under: str, expected: dict[str, torch.Tensor], nesting: tuple[str, ...]
) -> None:
    path = saved(tmp_path, legacy=legacy)
    for _ in range(2):  # the second time from the copy of a legacy pickle
        found = open_checkpoint(path, cache=tmp_path / "cache", under=under)
        assert found.nesting == nesting
        assert ("epoch", "int") in found.skipped
        tensors = held(found)
        assert list(tensors) == list(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("under", "complaint"),
    [
        ("EMA", r"no dict under 'EMA'; at the top there is 'raw' \(1 tensors\), 'ema' \(0 tensors\)"),
        ("ema.modell", r"no dict under 'ema.modell'; at 'ema' there is 'model' \(2 tensors\), 'model.last'"),
        ("raw.w", "no dict under 'raw.w'; at 'raw' there is none among 1 entries"),
        ("epoch", "no dict under 'epoch'"),
        ("ema", r"'ema' holds no tensors; in it there is 'model' \(2 tensors\)"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path, legacy: bool, under: str, complaint: str) -> None:
    with pytest.raises(SourceError, match=complaint):
        open_checkpoint(saved(tmp_path, legacy=legacy), cache=tmp_path / "cache", under=under)


def test_a_flat_file_has_nothing_under_it(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "net.safetensors")
    with pytest.raises(SourceError, match="holds one flat state dict, nothing under 'raw'"):
        open_checkpoint(tmp_path / "net.safetensors", under="raw")


def test_the_choice_is_part_of_the_digest_and_of_the_nesting(tmp_path: Path) -> None:
    path = str(saved(tmp_path))

    def resolve(*parts: dict[str, Any]) -> Checkpoint:
        source = tuple(SourcePart(urls=(path,), **part) for part in parts)
        return fetch.resolve(source, cache=tmp_path / "cache", downloads=tmp_path / "downloads")

    raw, ema = resolve({"under": "raw"}), resolve({"under": "ema.model"})
    assert source_digest(raw) != source_digest(ema)
    assert (raw.nesting, ema.nesting) == (("raw",), ("ema", "model"))
    both = resolve({"under": "raw", "prefix": "a."}, {"under": "ema.model", "prefix": "b."})
    assert [tensor.name for tensor in both.tensors] == ["a.w", "b.w", "b.b"]
    assert both.nesting == ()
    assert both.nbytes == Path(path).stat().st_size


def test_a_manifest_says_it(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: {urls: [net.pth], under: ema.model}}]")
    (entry,) = load_manifest(tmp_path / "m.yaml").models
    assert entry.source[0].under == "ema.model"
    assert not entry.source[0].whole
    (tmp_path / "m.yaml").write_text('models: [{name: net, source: {urls: [net.pth], under: ""}}]')
    with pytest.raises(ManifestError, match="under"):
        load_manifest(tmp_path / "m.yaml")
