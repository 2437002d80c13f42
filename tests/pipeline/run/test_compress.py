"""The whole job on a small checkpoint: compress, publish, pull, verify, load, export."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import birkhoff
from birkhoff.codec.metrics import fidelity
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.pipeline.errors import IntegrityError, ModelMismatchError
from tests.pipeline.command import captured


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 130), nn.GELU(), nn.Linear(130, 96)) for _ in range(3))
        self.norm = nn.BatchNorm1d(96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class Place:
    """A folder with a checkpoint, a manifest and a directory store, and the command line on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.store, self._capsys = folder, folder / "store", capsys
        self.manifest = folder / "m.yaml"

    def describe(self, *models: tuple[str, str], extra: str = "") -> None:
        lines = [f"store: {self.store.as_uri()}", "shard_mib: 1", extra, "models:"]
        lines += [f"  - {{name: {name}, source: {source}}}" for name, source in models]
        self.manifest.write_text("\n".join(lines))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command."""
        return captured(self._capsys, *arguments)

    def compress(self, *arguments: str) -> tuple[int, str, str]:
        return self.run("compress", str(self.manifest), "--executor", "inline", *arguments)

    def at(self, *arguments: str) -> tuple[int, str, str]:
        return self.run(*arguments, "--store", self.store.as_uri())

    def blobs(self) -> list[Path]:
        return sorted(path for path in (self.store / "blobs").rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    return Place(tmp_path, capsys)


@pytest.fixture
def published(place: Place, net: Net) -> Place:
    torch.save({"model": net.state_dict(), "epoch": 3}, place.folder / "net.pth")
    place.describe(("net", "net.pth"), extra="allocation: uniform")
    code, _, err = place.compress()
    assert code == 0, err
    return place


def test_a_run_publishes_and_a_second_finds_it_up_to_date(place: Place, net: Net) -> None:
    save_file(net.state_dict(), place.folder / "net.safetensors")
    place.describe(("net", "net.safetensors"), extra="allocation: uniform")
    code, out, _ = place.compress("--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["model"], row["version"], row["status"]) == ("net", "v1", "published")
    assert row["source_bytes"] == (place.folder / "net.safetensors").stat().st_size
    beside = {".store", "runs", "names", "aliases"}
    kept = [path for path in place.store.rglob("*") if path.is_file() and not beside & set(path.parts)]
    assert row["stored_bytes"] == sum(path.stat().st_size for path in kept)
    assert row["ratio"] == pytest.approx(row["source_bytes"] / row["stored_bytes"], abs=1e-3)
    assert 30 <= row["sqnr_db_min"] <= row["sqnr_db_median"] <= 30.3
    blobs = place.blobs()
    code, out, _ = place.compress("--json")
    (again,) = json.loads(out)
    assert (code, again["status"], again["digest"]) == (0, "up to date", row["digest"])
    assert place.blobs() == blobs


def test_a_changed_tensor_makes_a_new_version_of_one_new_shard(published: Place, net: Net) -> None:
    before = published.blobs()
    with torch.no_grad():
        net.conv.weight.mul_(1.5)
    torch.save({"model": net.state_dict(), "epoch": 4}, published.folder / "net.pth")
    code, out, _ = published.compress("--json")
    assert (code, json.loads(out)[0]["version"]) == (0, "v2")
    assert len(published.blobs()) == len(before) + 1
    assert [row["version"] for row in json.loads(published.at("list", "net", "--json")[1])] == ["v1", "v2"]
    assert json.loads(published.at("list", "--json")[1])[0]["aliases"] == ["latest"]


def test_pull_verify_load_and_export_give_the_same_weights(published: Place, net: Net) -> None:
    folder = published.folder / "pulled"
    assert published.at("pull", "net", "-o", str(folder))[0] == 0
    for reference in ("net", "net@v1", "net@latest", str(folder)):
        code, out, err = published.at("verify", reference, "--against", str(published.folder / "net.pth"), "--json")
        assert code == 0, err
        assert json.loads(out)["sqnr_db"] >= 30
    tensors = birkhoff.load_state_dict(folder)
    assert list(tensors) == list(net.state_dict())
    for name, source in net.state_dict().items():
        assert (tensors[name].dtype, tensors[name].shape) == (source.dtype, source.shape)
        coded = source.dim() > 1
        assert fidelity(source, tensors[name]).sqnr_db >= 30 if coded else torch.equal(source, tensors[name])
    dense = published.folder / "dense.safetensors"
    nested = published.folder / "dense.pth"
    for path in (dense, nested):
        assert published.at("export", "net", "-o", str(path))[0] == 0
        first = path.read_bytes()
        assert published.at("export", str(folder), "-o", str(path))[0] == 0
        assert path.read_bytes() == first
    for name, tensor in load_file(dense).items():
        assert torch.equal(tensor, tensors[name])
    loaded = torch.load(nested, weights_only=True)
    assert list(loaded) == ["model"]
    Net().load_state_dict(loaded["model"], strict=True)


def test_load_into_computes_on_the_compressed_weights(published: Place, net: Net) -> None:
    model = Net().eval()
    swapped = birkhoff.load_into(model, "net")
    assert swapped == [f"blocks.{block}.{layer}" for block in range(3) for layer in (0, 2)]
    assert isinstance(model.blocks[1][2], HyperLinear)
    dense = Net().eval()
    dense.load_state_dict(birkhoff.load_state_dict("net"))
    inputs = torch.randn(5, 96)
    with torch.inference_mode():
        assert torch.allclose(model(inputs), dense(inputs), atol=1e-5)
        assert fidelity(net(inputs), model(inputs)).sqnr_db > 25
    with torch.device("meta"):
        empty = Net().eval()
    birkhoff.load_into(empty, "net")
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    with torch.inference_mode():
        assert torch.allclose(empty(inputs), model(inputs), atol=1e-6)


def test_load_into_packed_takes_less_memory_and_says_what_it_costs(published: Place, net: Net) -> None:
    model = Net().eval()
    swapped = birkhoff.load_into(model, "net", memory="packed12")
    assert len(swapped) == 6
    assert all(isinstance(model.get_submodule(name), PackedHyperLinear) for name in swapped)
    inputs = torch.randn(5, 96)
    with torch.inference_mode():
        assert fidelity(net(inputs), model(inputs)).sqnr_db > 23


def test_load_into_names_what_does_not_fit_and_changes_nothing(published: Place) -> None:
    model = Net()
    model.conv = nn.Conv2d(8, 16, 3)
    model.extra = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatchError, match=r"conv\.weight is \[32, 8, 3, 3\].*2 missing: extra"):
        birkhoff.load_into(model, "net")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_flipping_any_byte_of_a_blob_is_found_and_the_blob_named(published: Place) -> None:
    blob = published.blobs()[0]
    good = blob.read_bytes()
    rng = random.Random(0)
    for position in [0, 7, 8, len(good) - 1, *(rng.randrange(len(good)) for _ in range(20))]:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        blob.write_bytes(bad)
        for command in (["verify", "net"], ["pull", "net", "-o", str(published.folder / "p")]):
            code, _, err = published.at(*command)
            assert code == 11
            assert blob.name in err
            assert err.count("\n") == 1
        shutil.rmtree(published.folder / "p")
    blob.write_bytes(good)
    assert published.at("verify", "net")[0] == 0
    blob.unlink()
    code, _, err = published.at("verify", "net")
    assert (code, f"blob {blob.name} is missing" in err) == (11, True)


def test_damage_to_a_pulled_folder_is_found(published: Place) -> None:
    folder = published.folder / "pulled"
    published.at("pull", "net", "-o", str(folder))
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        with pytest.raises(IntegrityError):
            birkhoff.load_state_dict(folder)
        path.write_bytes(good)
    assert birkhoff.load_state_dict(folder)


def test_inspect_and_plan_show_every_tensor(published: Place, net: Net) -> None:
    rows = json.loads(published.at("inspect", "net", "--json")[1])
    assert [row["name"] for row in rows] == list(net.state_dict())
    assert {"name", "shape", "dtype", "action", "bits_per_weight", "sqnr_db", "max_abs_error"} <= rows[0].keys()
    weight = next(row for row in rows if row["name"] == "blocks.0.0.weight")
    assert (weight["action"], weight["shape"]) == ("lattice", [130, 96])
    assert 4 < weight["bits_per_weight"] < 7
    (plan,) = json.loads(published.run("plan", str(published.manifest), "--json")[1])
    assert sum(group["tensors"] for group in plan["groups"]) == len(net.state_dict())
    assert {group["reason"] for group in plan["groups"]} == {"", "one-dimensional", "int64 is not a float type"}
    stored = json.loads(published.at("list", "--json")[1])[0]["stored_bytes"]
    assert plan["status"] in ("up to date", "to be read")
    low, high = plan["predicted_stored_bytes_range"]
    assert low <= stored <= high
    code, out, _ = published.run("plan", str(published.manifest))
    assert (code, "lossless: one-dimensional" in out) == (0, True)


def bad_nan(folder: Path, net: Net) -> None:
    net.blocks[1][0].weight.data[3, 3] = float("nan")
    torch.save(net.state_dict(), folder / "bad.pth")


def bad_truncated(folder: Path, net: Net) -> None:
    torch.save(net.state_dict(), folder / "bad.pth")
    data = (folder / "bad.pth").read_bytes()
    (folder / "bad.pth").write_bytes(data[: len(data) // 2])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


BAD_SOURCES: dict[str, tuple[Callable[[Path, Net], object], int, str]] = {
    "missing": (lambda folder, net: None, 4, "bad.pth"),
    "truncated": (bad_truncated, 4, "bad.pth"),
    "code": (lambda folder, net: torch.save({"model": Evil()}, folder / "bad.pth"), 5, "bad.pth"),
    "empty": (lambda folder, net: torch.save({}, folder / "bad.pth"), 4, "bad.pth"),
    "integers": (lambda folder, net: torch.save({"n": torch.arange(9)}, folder / "bad.pth"), 4, "are int64; coded are"),
    "nan": (bad_nan, 6, "'blocks.1.0.weight' holds NaN or Inf"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_fails_alone_with_one_line_and_its_exit_code(place: Place, net: Net, kind: str) -> None:
    make, expected, message = BAD_SOURCES[kind]
    save_file(net.state_dict(), place.folder / "good.safetensors")
    make(place.folder, net)
    place.describe(("bad", "bad.pth"))
    code, _, err = place.compress()
    error = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, len(error)) == (expected, 1)
    assert message in error[0]
    planned = 0 if kind == "nan" else expected  # weights are not looked at
    assert place.run("plan", str(place.manifest))[0] == planned
    assert "Traceback" not in err
    assert place.at("list", "--json")[1] == "[]\n"
    place.describe(("bad", "bad.pth"), ("good", "good.safetensors"))
    code, out, err = place.compress("--json")
    assert (code, [row["status"] for row in json.loads(out)]) == (14, ["failed", "published"])
    assert sum(line.startswith("error: bad: ") for line in err.splitlines()) == 1
    code, out, err = place.run("plan", str(place.manifest), "--json")
    assert (code, json.loads(out)[0]["status"]) == ((0, "new") if kind == "nan" else (14, "failed"))
    assert sum(line.startswith("error: bad: ") for line in err.splitlines()) == (kind != "nan")


def test_keep_retires_the_oldest_versions_and_gc_frees_them(published: Place, net: Net) -> None:
    published.describe(("net", "net.pth"), extra="keep: 2")
    for scale in (1.5, 1.7, 1.9):
        with torch.no_grad():
            net.conv.weight.mul_(scale)
        torch.save({"model": net.state_dict()}, published.folder / "net.pth")
        assert published.compress()[0] == 0
    assert [row["version"] for row in json.loads(published.at("list", "net", "--json")[1])] == ["v3", "v4"]
    assert [path for kind in ("open", "sweep") for path in (published.store / "runs" / kind).rglob("*.json")] == []
    assert published.at("verify", "net@v1")[0] == 10
    assert published.at("verify", "net@v3")[0] == 0
    assert published.at("gc", "--json")[0] == 0


def test_references_that_do_not_exist_say_what_does(published: Place) -> None:
    for reference, message in (("nope", "it has: net"), ("net@v9", "latest, v1"), ("net@stable", "latest, v1")):
        code, _, err = published.at("verify", reference)
        assert (code, message in err) == (10, True), err


def test_a_model_that_must_not_be_overwritten_by_a_name_trick(published: Place) -> None:
    code, _, err = published.at("verify", "net@../../x")
    assert (code, "is no MODEL[@VERSION|ALIAS|DIGEST]" in err) == (10, True)


def test_an_unwritable_store_fails_before_any_work(place: Place, net: Net) -> None:
    save_file(net.state_dict(), place.folder / "net.safetensors")
    place.describe(("net", "net.safetensors"))
    place.store.write_text("a file where the store should be")
    code, _, err = place.compress()
    assert code in (7, 8, 9)
    assert err.count("error:") == 1


def test_damaged_shards_are_never_reused_but_made_anew(published: Place) -> None:
    blob = published.blobs()[0]
    good = blob.read_bytes()
    record = next((published.store / "shards").rglob("*.json"))
    published.describe(("net", "net.pth"), ("other", "net.pth"), extra="allocation: uniform")
    for damage in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2], b""):
        blob.write_bytes(damage)
        code, out, _ = published.compress("--revalidate", "--json")
        assert (code, [row["version"] for row in json.loads(out)]) == (0, ["v1", "v1"])
        assert blob.read_bytes() == good
    record.write_text("{}")
    code, out, _ = published.compress("--revalidate", "--json")
    assert code == 0
    assert json.loads(record.read_text())["tensors"] > 0
    assert published.at("verify", "other")[0] == 0


def test_force_makes_every_shard_anew(published: Place) -> None:
    code, out, _ = published.compress("--force", "--json")
    (row,) = json.loads(out)
    assert (code, row["version"], row["shards_reused"]) == (0, "v1", 0)
    code, out, _ = published.compress("--revalidate", "--json")
    (row,) = json.loads(out)
    assert (code, row["shards_reused"]) == (0, row["shards"])


def test_an_earlier_recipe_published_again_becomes_the_latest(published: Place) -> None:
    first = json.loads(published.at("list", "--json")[1])[0]["digest"]
    assert json.loads(published.compress("--json", "--profile", "fast")[1])[0]["version"] == "v2"
    (row,) = json.loads(published.compress("--json")[1])
    assert (row["version"], row["status"], row["digest"]) == ("v3", "published", first)
    assert json.loads(published.compress("--json")[1])[0]["status"] == "up to date"
    assert json.loads(published.at("list", "--json")[1])[0]["version"] == "v3"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_end_to_end(place: Place, dtype: torch.dtype) -> None:
    tensors = {
        "a.weight": (torch.randn(96, 128) * 0.02).to(dtype),
        "small.weight": (torch.randn(64, 96) * 3e-6).to(dtype),
        "thin.weight": torch.randn(2048, 1).to(dtype),
        "conv": torch.randn(16, 8, 3, 3).to(dtype),
    }
    torch.save(tensors, place.folder / "half.pth")
    place.describe(("half", "half.pth"), extra="allocation: uniform")
    code, _, err = place.compress()
    assert code == 0, err
    loaded = birkhoff.load_state_dict("half")
    for name, source in tensors.items():
        assert loaded[name].dtype == dtype
        assert fidelity(source, loaded[name]).sqnr_db >= 30


def test_a_layer_of_one_input_is_loaded_dense(place: Place) -> None:
    model = nn.Sequential(nn.Linear(1, 2048), nn.Linear(2048, 64))
    torch.save(model.state_dict(), place.folder / "thin.pth")
    place.describe(("thin", "thin.pth"))
    assert place.compress()[0] == 0
    assert birkhoff.load_into(model, "thin") == ["1"]
    assert model(torch.randn(3, 1)).shape == (3, 64)


def test_a_corrupt_byte_of_a_checkpoint_is_found_by_its_checksum(place: Place, net: Net) -> None:
    path = place.folder / "net.pth"
    torch.save(net.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    place.describe(("net", "net.pth"))
    code, _, err = place.compress()
    assert (code, "do not match the checksum" in err) == (4, True)


def test_pull_and_export_refuse_places_they_must_not_touch(published: Place) -> None:
    mine = published.folder / "mine"
    mine.mkdir()
    (mine / "shard-00007.safetensors").write_text("my own")
    code, _, err = published.at("pull", "net", "-o", str(mine))
    assert (code, "was not made by `pull`" in err) == (16, True)
    assert (mine / "shard-00007.safetensors").read_text() == "my own"
    file = published.folder / "file"
    file.write_text("")
    for command in (["pull", "net", "-o", str(file)], ["export", "net", "-o", str(file / "x.pth")]):
        code, _, err = published.at(*command)
        assert (code, err.count("\n")) == (16, 1), err
    assert published.at("export", "net", "-o", str(published.folder / "x.onnx"))[0] == 16


def test_a_source_that_changes_during_the_run_is_not_published(
    place: Place, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    from birkhoff.pipeline.shard import run as shard

    path = place.folder / "net.pth"
    torch.save(net.state_dict(), path)
    place.describe(("net", "net.pth"))
    keep = shard.keep_shard

    def keep_and_touch(*arguments: object) -> None:
        keep(*arguments)  # type: ignore[arg-type]
        path.touch()

    monkeypatch.setattr(shard, "keep_shard", keep_and_touch)
    code, _, err = place.compress()
    assert (code, "changed while it was being compressed" in err) == (4, True)
    assert place.at("list", "--json")[1] == "[]\n"


def test_a_lost_blob_is_made_again(published: Place) -> None:
    blob = published.blobs()[0]
    blob.unlink()
    code, out, _ = published.compress("--json")
    (row,) = json.loads(out)
    assert (code, row["status"], row["version"]) == (0, "published", "v1")
    assert row["shards"] - row["shards_reused"] == 1
    assert blob.exists()


def test_models_that_share_tensors_share_their_shards(place: Place, net: Net) -> None:
    save_file(net.state_dict(), place.folder / "one.safetensors")
    save_file({**net.state_dict(), "head.weight": torch.randn(64, 64)}, place.folder / "two.safetensors")
    place.describe(("one", "one.safetensors"), ("two", "two.safetensors"), extra="allocation: header")
    code, out, _ = place.compress("--json")
    one, two = json.loads(out)
    assert code == 0
    assert one["shards_reused"] + two["shards_reused"] == one["shards"]
    assert len(place.blobs()) == one["shards"] + 1
    assert set(one["stages"]) >= {"read", "key", "find"}


def test_an_unchanged_source_is_not_read_again(published: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from birkhoff.pipeline import files
    from birkhoff.pipeline.checkpoint import digests

    source = published.folder / "net.pth"
    monkeypatch.setattr(files, "_SETTLED_SECONDS", -1.0)
    assert json.loads(published.compress("--json")[1])[0]["status"] == "up to date"
    monkeypatch.setattr(digests, "source_digest", lambda checkpoint: pytest.fail("the source was read again"))
    assert json.loads(published.compress("--json")[1])[0]["status"] == "up to date"
    monkeypatch.undo()
    monkeypatch.setenv("BIRKHOFF_HOME", str(published.folder / "home"))
    os.utime(source)
    assert json.loads(published.compress("--json")[1])[0]["status"] == "up to date"
