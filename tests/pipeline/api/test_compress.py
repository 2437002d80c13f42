"""`birkhoff.compress`: a model in memory becomes a version as a manifest's would, and stays what it was."""

import json
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import birkhoff
from birkhoff.codec.errors import BirkhoffWarning, CodecError
from birkhoff.pipeline.api.compress import ModelTerms, OverrideTerms
from birkhoff.pipeline.errors import ManifestError, SourceError, StoreError
from birkhoff.pipeline.plan.manifest import ModelEntry
from birkhoff.pipeline.plan.quality import OverrideRule
from birkhoff.pipeline.registry.labels import read_labels
from birkhoff.pipeline.store.base import Store
from tests.pipeline.command import captured


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))


def test_a_module_is_published_and_loads_back(model: nn.Module, memory_store: Store) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        version = birkhoff.compress(model, "net", store=memory_store, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (version.reference, version.manifest.profile) == ("net@v1", "balanced")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
    assert birkhoff.load_into(loaded, version.reference, memory_store) == ["0", "2"]
    x = torch.randn(8, 96)
    assert (loaded(x) - model(x)).norm() < 0.05 * model(x).norm()
    tensors = birkhoff.load_state_dict(version.reference, memory_store)
    assert list(tensors) == list(before)
    assert torch.equal(tensors["0.bias"], before["0.bias"])


def test_the_same_model_again_is_the_same_version(
    model: nn.Module, directory_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = birkhoff.compress(model, "net", store=directory_store.url)
    again = birkhoff.compress(model.state_dict(), "net", store=directory_store.url)
    assert (again.reference, again.digest) == (first.reference, first.digest) == ("net@v1", first.manifest.digest)
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    assert birkhoff.compress(model, "net", store=directory_store.url).reference == "net@v2"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("birkhoff-")] == []
    assert capsys.readouterr().err == ""  # no terminal, no progress
    _, text, _ = captured(capsys, "report", "--list", "--store", directory_store.url, "--json")
    assert len(json.loads(text)) == 2  # of the three runs those that had work to do


def test_terms_are_those_of_a_manifest(model: nn.Module, memory_store: Store) -> None:
    version = birkhoff.compress(
        model,
        "net",
        store=memory_store,
        target_ratio=2,
        overrides=[{"tensors": "2.*", "lossless": True}],
        labels={"licence": "MIT"},
    )
    assert version.manifest.profile == "ratio 2"
    assert version.manifest.overrides == {"2.weight": "lossless"}
    assert read_labels(memory_store, "net", version.digest) == {"licence": "MIT"}
    assert torch.equal(birkhoff.load_state_dict("net", memory_store)["2.weight"], model[2].weight)


def test_a_fine_tune_as_a_difference(model: nn.Module, memory_store: Store) -> None:
    before = birkhoff.compress(model, "before", store=memory_store)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * weight.std() * torch.randn_like(weight)
    tuned = birkhoff.compress(model, "tuned", store=memory_store, base="before@v1")
    alone = birkhoff.compress(model, "alone", store=memory_store)
    assert tuned.manifest.base is not None
    assert tuned.manifest.base.digest == before.digest
    assert sum(shard.bytes for shard in tuned.manifest.shards) < sum(shard.bytes for shard in alone.manifest.shards)


def test_the_types_name_every_key_of_a_manifest() -> None:
    keys = set(ModelEntry.model_fields) - {"name", "source"}
    assert set(typing.get_type_hints(ModelTerms)) == keys
    assert set(typing.get_type_hints(OverrideTerms)) == set(OverrideRule.model_fields)


@pytest.mark.parametrize(
    ("name", "terms", "line"),
    [
        ("net", {"profile": "smal"}, r"^models\[0\]\.profile: unknown profile 'smal', did you mean 'small'\?"),
        ("net", {"profil": "small"}, r"^models\[0\]\.profil: unknown key 'profil', did you mean 'profile'\?"),
        ("../net", {}, r"^models\[0\]\.name: a name is 1 to 100 letters"),
        ("net", {"target_ratio": 3, "max_bytes": 9}, r"two budgets"),
        ("net", {"labels": {"a b": "c"}}, r"^models\[0\]\.labels"),
    ],
)
def test_what_a_manifest_may_not_say_is_refused_by_key(
    model: nn.Module, memory_store: Store, name: str, terms: dict[str, typing.Any], line: str
) -> None:
    with pytest.raises(ManifestError, match=line):
        birkhoff.compress(model, name, store=memory_store, **terms)
    assert list(memory_store.list()) == []


def test_models_that_cannot_be_compressed_are_refused(model: nn.Module, memory_store: Store) -> None:
    version = birkhoff.compress(model, "net", store=memory_store)
    birkhoff.load_into(model, version.reference, memory_store)
    refused = {
        "2 layers of the model are compressed already": model,
        "has no tensors": nn.ReLU(),
        "'weight' is on the meta device": nn.Linear(4, 4, device="meta"),
        "'w' is sparse or quantized": {"w": torch.eye(4).to_sparse()},
    }
    for line, wrong in refused.items():
        with pytest.raises(SourceError, match=line):
            birkhoff.compress(wrong, "wrong", store=memory_store)
    with pytest.raises(CodecError, match="NaN"):
        birkhoff.compress({"w": torch.full((64, 64), torch.nan)}, "wrong", store=memory_store)
    assert [listed.model for listed in birkhoff.list(store=memory_store)] == ["net"]


def test_views_take_their_own_bytes_and_tied_tensors_stay_one(memory_store: Store) -> None:
    torch.manual_seed(0)
    whole = torch.randn(64, 4096)
    tied = torch.randn(128, 96)
    tensors = {"part": whole[:, 7], "turned": whole[:32, :64].T, "a": tied, "b": tied}
    version = birkhoff.compress(tensors, "views", store=memory_store)
    assert version.manifest.source.bytes < tied.nbytes + 4 * (64 + 32 * 64) + 4096
    found = birkhoff.load_state_dict("views", memory_store)
    assert torch.equal(found["part"], whole[:, 7])
    assert found["turned"].shape == (64, 32)
    assert torch.equal(found["a"], found["b"])


def test_a_transformers_model_takes_its_configuration_along(memory_store: Store, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SamConfig.from_json_file(Path(__file__).parents[3] / "manifests" / "demo" / "demo_sam.json")
    torch.manual_seed(0)
    sam = transformers.SamModel(config).eval()
    with torch.no_grad():
        for parameter in sam.parameters():  # all zeros, as some are at first, is a warning
            parameter += 0.01 * torch.randn_like(parameter)
    version = birkhoff.compress(sam, "sam", store=memory_store, profile="fast", proof=False)
    assert [file.name for file in version.manifest.files or ()] == ["config.json"]
    pulled = birkhoff.pull("sam", tmp_path / "folder", store=memory_store, format="transformers")
    loaded = transformers.SamModel.from_pretrained(pulled.folder)
    assert (loaded.config.vision_config.num_hidden_layers, loaded.config.vision_config.hidden_size) == (
        config.vision_config.num_hidden_layers,
        config.vision_config.hidden_size,
    )
    assert torch.equal(loaded.mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)


def test_what_may_not_be_meant_is_warned_of(memory_store: Store) -> None:
    with pytest.warns(BirkhoffWarning, match="same: tensor 'w' is stored lossless: all its weights are equal"):
        birkhoff.compress({"w": torch.ones(64, 64)}, "same", store=memory_store)
    with pytest.raises(StoreError, match="store URL"):
        birkhoff.compress({"w": torch.ones(3)}, "tiny", store="ftp://x")
