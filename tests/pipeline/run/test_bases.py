"""Models coded as differences to others: in manifests, stores, folders and models."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from birkhoff.codec.container import is_difference, parse, serialise
from birkhoff.codec.metrics import fidelity
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import blob_files, pull
from birkhoff.pipeline.artifact.readers import PulledArtifact, StoredArtifact
from birkhoff.pipeline.artifact.references import Found
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError
from birkhoff.pipeline.load.load import load_into, load_state_dict
from birkhoff.pipeline.registry.documents import (
    BaseBlob,
    ShardRecord,
    VersionManifest,
    blob_key,
    sha256,
)
from birkhoff.pipeline.registry.versions import Version, resolve
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Three blocks, a convolution, a vector."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"blocks.{k}.weight": torch.randn(96, 128, generator=generator) * 0.05 for k in range(3)}
    state |= {f"blocks.{k}.bias": torch.randn(96, generator=generator) for k in range(3)}
    return state | {"neck.weight": torch.randn(16, 8, 3, 3, generator=generator)}


def tuned(state: dict[str, Tensor], share: float, seed: int = 9) -> dict[str, Tensor]:
    """All of it moved by a share of its size."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + share * v.std() * torch.randn(v.shape, generator=generator) for k, v in state.items()}


class Place:
    """A folder with checkpoints, a manifest and a directory store, and the command line on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.store, self._capsys = folder, folder / "store", capsys
        self.url = self.store.as_uri()
        base = weights()
        self.states = {"base": base, "near": tuned(base, 0.02), "other": weights(5)}
        for name, state in self.states.items():
            save_file(state, folder / f"{name}.safetensors")

    def describe(self, *models: str, head: str = "profile: fast\nallocation: header") -> None:
        lines = [f"store: {self.url}", "proof: false", head, "models:", *(f"  - {{{model}}}" for model in models)]
        (self.folder / "m.yaml").write_text("\n".join(lines))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments)

    def compress(self, *arguments: str) -> tuple[int, list[dict[str, object]], str]:
        manifest = str(self.folder / "m.yaml")
        code, out, err = self.run("compress", manifest, "--executor", "inline", "--json", *arguments)
        return code, json.loads(out) if out else [], err

    def at(self, *arguments: str) -> tuple[int, str, str]:
        return self.run(*arguments, "--store", self.url)

    def manifest_of(self, reference: str) -> dict[str, object]:
        with open_store(self.url) as store:
            return json.loads(resolve(store, reference).manifest.to_bytes())

    def blob(self, digest: str) -> Path:
        return self.store / "blobs" / "sha256" / digest[:2] / digest


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    return Place(tmp_path, capsys)


BOTH = ("name: near, source: near.safetensors, base: base", "name: base, source: base.safetensors")


@pytest.fixture
def published(place: Place) -> Place:
    place.describe(*BOTH)
    code, rows, err = place.compress()
    assert code == 0, err
    assert [row["status"] for row in rows] == ["published", "published"]
    return place


def test_a_base_of_the_manifest_comes_first_and_the_difference_costs_a_share(published: Place) -> None:
    published.describe(*BOTH, "name: alone, source: near.safetensors")
    _, rows, _ = published.compress()
    near, base, alone = rows
    assert (near["base"], base["base"], alone["base"]) == ("base@v1", None, None)
    assert near["base_bytes"] > 0  # type: ignore[operator]
    assert near["stored_bytes"] < 0.6 * alone["stored_bytes"]  # type: ignore[operator]
    assert near["sqnr_db_min"] >= alone["sqnr_db_min"] - 0.1  # type: ignore[operator]
    manifest = published.manifest_of("near")
    with open_store(published.url) as store:
        assert manifest["base"] == {"model": "base", "version": "v1", "digest": resolve(store, "base").digest}
    assert all(shard["bases"] for shard in manifest["shards"])  # type: ignore[index, union-attr]


def test_what_is_there_is_up_to_date(published: Place) -> None:
    code, rows, _ = published.compress()
    assert code == 0
    assert [row["status"] for row in rows] == ["up to date", "up to date"]


def test_versions_are_the_same_bytes_every_time(published: Place) -> None:
    first = published.manifest_of("near")
    code, rows, err = published.compress("--force")
    assert (code, [row["version"] for row in rows]) == (0, ["v1", "v1"]), err
    assert published.manifest_of("near") == first


def test_every_tensor_meets_its_target_in_every_form(published: Place, tmp_path: Path) -> None:
    code, _, err = published.at("verify", "near", "--against", str(tmp_path / "near.safetensors"))
    assert code == 0, err
    found = load_state_dict("near", published.url)
    source = published.states["near"]
    assert list(found) == sorted(source)
    for name, tensor in found.items():
        assert fidelity(source[name], tensor).sqnr_db > 20
    code, _, err = published.at("export", "near", "--output", str(tmp_path / "dense.safetensors"))
    assert code == 0, err
    dense = load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(dense[name], tensor) for name, tensor in found.items())


def test_in_a_model_layers_are_compressed_as_any(published: Place) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(128, 96) for _ in range(3)), "neck": nn.Conv2d(8, 16, 3)})
    del model["neck"].bias
    model["neck"].bias = None  # type: ignore[assignment]
    assert load_into(model, "near", published.url) == ["blocks.0", "blocks.1", "blocks.2"]
    layer = model["blocks"][1]  # type: ignore[index]
    assert isinstance(layer, HyperLinear)
    found = load_state_dict("near", published.url)
    x = torch.randn(5, 128)
    wanted = nn.functional.linear(x, found["blocks.1.weight"], found["blocks.1.bias"])
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_inspect_diff_and_plan_show_it(published: Place) -> None:
    _, out, _ = published.at("inspect", "near", "--json")
    actions = {row["name"]: row["action"] for row in json.loads(out)}
    assert {actions[f"blocks.{k}.weight"] for k in range(3)} == {"difference"}
    assert actions["blocks.0.bias"] in ("planes", "raw")
    _, out, _ = published.at("inspect", "near")
    assert "difference" in out
    assert "base@v1" in out
    _, out, err = published.at("diff", "base", "near", "--json")
    assert {row["change"] for row in json.loads(out)} == {"changed"}, err
    code, out, err = published.run("plan", str(published.folder / "m.yaml"), "--json")
    row = json.loads(out)[0]
    assert (code, row["base"], row["status"]) == (0, "base@v1", "to be read"), err
    assert 0 < row["base_share"] < 0.6


def test_a_pulled_folder_holds_what_it_takes(published: Place, tmp_path: Path) -> None:
    folder = tmp_path / "pulled"
    code, _, err = published.at("pull", "near", "--output", str(folder))
    assert code == 0, err
    assert sorted(path.name.split("-")[0] for path in folder.glob("*.safetensors")) == [
        "base",
        "base",
        "shard",
        "shard",
    ]
    (published.store).rename(tmp_path / "elsewhere")
    found = load_state_dict(folder)
    (tmp_path / "elsewhere").rename(published.store)
    assert all(torch.equal(found[k], v) for k, v in load_state_dict("near", published.url).items())
    assert published.run("verify", str(folder))[0] == 0
    code, _, err = published.at("pull", "base", "--output", str(folder))  # what was there goes
    assert code == 0, err
    assert not list(folder.glob("base-*"))


def test_offline_it_comes_from_the_cache(published: Place, tmp_path: Path) -> None:
    first = load_state_dict("near", published.url)
    published.store.rename(tmp_path / "elsewhere")
    again = load_state_dict("near", published.url, offline=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def base_blobs(place: Place) -> list[str]:
    shards = place.manifest_of("near")["shards"]
    return [base["blob"] for shard in shards for base in shard["bases"]]  # type: ignore[union-attr, index]


def test_a_missing_blob_of_the_base_is_named_everywhere(published: Place, tmp_path: Path) -> None:
    digest = base_blobs(published)[0]
    published.blob(digest).unlink()
    for arguments in (("verify", "near"), ("export", "near", "--output", str(tmp_path / "d.safetensors"))):
        code, _, err = published.at(*arguments)
        assert code != 0
        assert f"blob {digest} is missing" in err
        assert "it is of base@v1, to which tensors of near@v1 are differences" in err
    with pytest.raises(IntegrityError, match=digest):
        load_state_dict("near", published.url)
    code, _, err = published.at("pull", "near", "--output", str(tmp_path / "pulled"))
    assert code != 0
    assert digest in err
    _, out, _ = published.at("list", "near", "--json")
    assert json.loads(out)[0]["missing_blobs"] == 1


def test_a_damaged_blob_of_the_base_is_named(published: Place) -> None:
    digest = base_blobs(published)[0]
    body = bytearray(published.blob(digest).read_bytes())
    body[-1] ^= 1
    published.blob(digest).write_bytes(body)
    code, _, err = published.at("verify", "near")
    assert code != 0
    assert f"blob {digest} is damaged" in err
    assert "it is of base@v1" in err
    with pytest.raises(IntegrityError, match=digest):
        load_state_dict("near", published.url)


def test_a_damaged_base_stops_what_is_made_with_it_and_is_mended_with_it(published: Place) -> None:
    digest = base_blobs(published)[0]
    published.blob(digest).unlink()
    published.describe("name: more, source: near.safetensors, base: base@v1")
    code, rows, err = published.compress()
    assert code != 0
    assert rows[0]["status"] == "failed"
    assert digest in err
    published.describe(*BOTH)
    code, rows, err = published.compress()  # the base is not whole, so it is made again, the same
    assert (code, [row["version"] for row in rows]) == (0, ["v1", "v1"]), err
    assert published.at("verify", "near")[0] == 0


def test_a_new_base_leaves_versions_as_they_are_and_what_makes_them_again_is_said(published: Place) -> None:
    before, first = load_state_dict("near", published.url), published.manifest_of("near")
    save_file(tuned(published.states["base"], 0.3), published.folder / "base.safetensors")
    published.describe(*BOTH)
    manifest = str(published.folder / "m.yaml")
    code, rows, err = published.compress()
    assert (code, [(row["version"], row["status"]) for row in rows]) == (
        0, [("v1", "up to date"), ("v2", "published")]), err  # fmt: skip
    assert [(row["base"], row["newer_base"]) for row in rows] == [("base@v1", "base@v2"), (None, None)]
    assert published.manifest_of("near") == first
    after = load_state_dict("near@v1", published.url)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    _, _, told = published.run("compress", manifest, "--executor", "inline")
    line = told.partition("near: its base is ")[2]
    said = "base@v2 by now; it stays a difference to base@v1 until you make it again: "
    assert line.startswith(said)
    plan = json.loads(published.run("plan", manifest, "--json")[1])[0]
    assert plan["status"] in ("to be read", "up to date")  # as far as the digest of its source is remembered
    assert (plan["base"], plan["newer_base"]) == ("base@v1", "base@v2")
    assert said in published.run("plan", manifest)[2]
    words = shlex.split(line.removeprefix(said).splitlines()[0])
    assert words[words.index("compress") :][:5] == ["compress", manifest, "--only", "near", "--force"]
    code, _, err = published.run(*words[words.index("compress") :], "--executor", "inline")
    assert code == 0, err
    made = published.manifest_of("near")
    assert made["base"]["version"] == "v2"  # type: ignore[index]
    assert published.compress()[1][0]["newer_base"] is None
    published.describe("name: near, source: near.safetensors, base: base@v1")
    _, rows, _ = published.compress()
    assert [(row["version"], row["base"], row["newer_base"]) for row in rows] == [("v3", "base@v1", None)]


def test_promoting_a_base_changes_no_version_that_is_a_difference_to_it(published: Place) -> None:
    assert published.at("promote", "base@v1")[0] == 0
    near = "name: near, source: near.safetensors, base: base@stable"
    published.describe(near)
    assert published.compress()[1][0]["status"] == "up to date"
    save_file(tuned(published.states["base"], 0.3), published.folder / "base.safetensors")
    published.describe("name: base, source: base.safetensors")
    assert published.compress()[0] == 0
    published.describe(near)
    assert published.compress()[1][0]["newer_base"] is None  # `stable` has not moved
    assert published.at("promote", "base@v2")[0] == 0
    code, (row,), err = published.compress()
    assert code == 0, err
    assert (row["version"], row["status"], row["newer_base"]) == ("v1", "up to date", "base@v2")
    save_file(tuned(published.states["base"], 0.021), published.folder / "near.safetensors")
    code, (row,), err = published.compress()  # made again anyhow, with what its base is now
    assert (row["version"], row["base"], row["newer_base"]) == ("v2", "base@v2", None), err


def test_a_base_that_was_found_by_itself_is_told_of_too(place: Place) -> None:
    place.describe("name: base, source: base.safetensors")
    assert place.compress()[0] == 0
    place.describe("name: near, source: near.safetensors, base: auto")
    assert place.compress()[1][0]["base"] == "base@v1"
    save_file(tuned(place.states["base"], 0.01), place.folder / "base.safetensors")
    place.describe("name: base, source: base.safetensors")
    assert place.compress()[0] == 0
    place.describe("name: near, source: near.safetensors, base: auto")
    (row,) = place.compress()[1]
    assert (row["status"], row["base"], row["newer_base"]) == ("up to date", "base@v1", "base@v2")
    assert json.loads(place.run("plan", str(place.folder / "m.yaml"), "--json")[1])[0]["newer_base"] == "base@v2"
    (row,) = place.compress("--force")[1]
    assert (row["status"], row["base"], row["newer_base"]) == ("published", "base@v2", None)


def stored(place: Place, model: str, quality: str, *, base: bool) -> dict[str, object]:
    place.describe(f"name: {model}, source: near.safetensors, {quality}" + (", base: base" if base else ""))
    code, (row,), err = place.compress()
    assert code == 0, err
    return row


@pytest.mark.parametrize("share", [0.5, 0.35])
def test_a_budget_in_bytes_counts_what_a_difference_adds_and_buys_a_higher_target(
    published: Place, share: float
) -> None:
    limit = int(share * stored(published, "alone", "profile: balanced", base=False)["stored_bytes"])  # type: ignore[call-overload]
    row = stored(published, "near", f"max_bytes: {limit}", base=True)
    assert row["base"] == "base@v1"
    assert row["stored_bytes"] <= limit  # type: ignore[operator]
    assert row["passes"] <= 5  # type: ignore[operator]
    if share == 0.5:
        direct = stored(published, "direct", f"max_bytes: {limit}, floor_db: 6", base=False)
        assert row["target_db"] > direct["target_db"] + 6  # type: ignore[operator]
        assert row["sqnr_db_min"] > direct["sqnr_db_min"] + 6  # type: ignore[operator]
    assert published.at("verify", "near", "--against", str(published.folder / "near.safetensors"))[0] == 0
    assert stored(published, "near", f"max_bytes: {limit}", base=True)["status"] == "up to date"


def test_a_plan_tells_a_budgets_target_with_a_base(published: Place) -> None:
    models = "name: near, source: near.safetensors, base: base", "name: alone, source: near.safetensors"
    published.describe(*models, head="target_ratio: 9")
    _, out, err = published.run("plan", str(published.folder / "m.yaml"), "--json")
    near, alone = json.loads(out)
    assert near["predicted_target_db"] > alone["predicted_target_db"] + 4, err
    assert 0 < near["base_share"] < 0.7
    _, rows, _ = published.compress()
    assert rows[0]["target_db"] == pytest.approx(near["predicted_target_db"], abs=4)
    assert rows[0]["ratio"] >= 9  # type: ignore[operator]


def test_a_budget_that_not_even_differences_meet_is_refused_with_what_they_take(published: Place) -> None:
    published.describe("name: near, source: near.safetensors, base: base, max_bytes: 3000")
    code, rows, err = published.compress()
    assert code != 0
    assert rows[0]["failure"]["kind"] == "BudgetError"  # type: ignore[index]
    assert "budget max_bytes 3000 leaves" in err or "leaves 2.9 KiB" in err, err


def test_collections_keep_what_a_version_is_a_difference_to(published: Place) -> None:
    before, digest = load_state_dict("near", published.url), published.manifest_of("near")["base"]["digest"]  # type: ignore[index]
    save_file(published.states["other"], published.folder / "base.safetensors")
    published.describe("name: base, source: base.safetensors")
    assert published.compress()[0] == 0
    assert published.at("remove", "base@v1")[0] == 0
    for _ in range(2):
        code, _, err = published.at("gc", "--yes", "--grace", "0s", "--json")
        assert code == 0, err
    assert not list((published.store / "models" / "base" / "versions" / digest).glob("*"))
    after = load_state_dict("near", published.url)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert published.at("verify", "near")[0] == 0
    held = base_blobs(published)
    save_file(published.states["other"], published.folder / "near.safetensors")
    published.describe("name: near, source: near.safetensors")
    assert published.compress()[0] == 0
    assert published.at("remove", "near@v1")[0] == 0
    assert all(published.blob(blob).exists() for blob in held)
    for _ in range(2):
        assert published.at("gc", "--yes", "--grace", "0s")[0] == 0
    assert not any(published.blob(blob).exists() for blob in held)


def test_copies_and_archives_take_the_base_along(published: Place, tmp_path: Path) -> None:
    other = (tmp_path / "mirror").as_uri()
    code, _, err = published.at("copy", "near", "--to", other)
    assert code == 0, err
    assert published.run("verify", "near", "--store", other)[0] == 0
    archive, third = tmp_path / "near.tar", (tmp_path / "third").as_uri()
    code, _, err = published.at("save", "near", "--output", str(archive))
    assert code == 0, err
    code, _, err = published.run("load", str(archive), "--store", third)
    assert code == 0, err
    assert published.run("verify", "near", "--store", third)[0] == 0
    mine, theirs = (load_state_dict("near", url) for url in (published.url, third))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


def test_what_is_the_very_shard_of_the_base_is_shared(place: Place) -> None:
    state = dict(place.states["base"])
    state["neck.weight"] = tuned(state, 0.05)["neck.weight"]
    save_file(state, place.folder / "head.safetensors")
    place.describe("name: base, source: base.safetensors", "name: head, source: head.safetensors, base: base")
    assert place.compress()[0] == 0
    base, head = (place.manifest_of(name)["shards"] for name in ("base", "head"))
    shared = {shard["blob"] for shard in base} & {shard["blob"] for shard in head}  # type: ignore[union-attr, index]
    assert len(shared) == 1
    assert place.at("verify", "head")[0] == 0


def test_auto_finds_the_nearest_version_and_keeps_to_it(place: Place) -> None:
    save_file(tuned(place.states["near"], 0.5), place.folder / "far.safetensors")
    place.describe(
        "name: base, source: base.safetensors",
        "name: far, source: far.safetensors",
        "name: other, source: other.safetensors",
    )
    assert place.compress()[0] == 0
    place.describe("name: near, source: near.safetensors, base: auto")
    _, out, _ = place.run("plan", str(place.folder / "m.yaml"), "--json")
    assert json.loads(out)[0]["base"] == "base@v1"
    assert "take about" in json.loads(out)[0]["note"]
    _, rows, err = place.compress()
    assert (rows[0]["status"], rows[0]["base"]) == ("published", "base@v1"), err
    save_file(tuned(place.states["near"], 0.001), place.folder / "nearer.safetensors")
    place.describe("name: nearer, source: nearer.safetensors")
    assert place.compress()[0] == 0
    place.describe("name: near, source: near.safetensors, base: auto")
    assert place.compress()[1][0]["status"] == "up to date"


def test_auto_without_anything_near_codes_a_model_for_itself(place: Place) -> None:
    place.describe("name: other, source: other.safetensors")
    assert place.compress()[0] == 0
    place.describe("name: near, source: near.safetensors, base: auto")
    code, rows, _ = place.compress()
    assert (code, rows[0]["base"]) == (0, None)
    assert "base" not in place.manifest_of("near")
    assert place.compress()[1][0]["status"] == "up to date"


def test_a_version_that_is_a_difference_is_no_base(published: Place) -> None:
    published.describe("name: third, source: near.safetensors, base: near")
    code, rows, err = published.compress()
    assert code != 0
    assert "base: near@v1 is itself a difference, to base@v1, and differences have no chains; name base@v1" in err
    assert rows[0]["failure"]["kind"] == "ManifestError"  # type: ignore[index]


def test_a_base_that_fails_is_the_error_of_what_waits_for_it(place: Place) -> None:
    (place.folder / "base.safetensors").write_bytes(b"no checkpoint")
    place.describe(*BOTH, "name: other, source: other.safetensors")
    code, rows, err = place.compress()
    assert code != 0
    assert [row["status"] for row in rows] == ["failed", "failed", "published"]
    assert "near: base: base was not published, so no difference to it can be coded" in err


def test_an_unknown_base_is_the_models_error_alone(place: Place) -> None:
    place.describe("name: near, source: near.safetensors, base: nobody@v3", "name: other, source: other.safetensors")
    code, rows, err = place.compress()
    assert code != 0
    assert [row["status"] for row in rows] == ["failed", "published"]
    assert "near: base: " in err
    assert "nobody" in err
    code, out, err = place.run("plan", str(place.folder / "m.yaml"), "--json")
    assert code != 0
    assert json.loads(out)[0]["failure"]["kind"] == ArtifactNotFoundError.__name__


@pytest.mark.parametrize(("models", "head", "what"), [
    (("name: a, source: x, base: a",), "", "models[0].base: a model cannot be its own base"),
    (("name: a, source: x, base: b", "name: b, source: y, base: c", "name: c, source: z"), "",
     "models[0].base: 'b' has a base itself, and differences have no chains"),
    (("name: a, source: x, base: b",), "profile: paper", "models[0].base: profile 'paper' codes no differences"),
    (("name: a, source: x, base: '@v1'",), "", "is no MODEL[@VERSION|ALIAS|DIGEST], nor `auto`"),
])  # fmt: skip
def test_what_goes_with_no_base_is_refused_by_its_key(
    place: Place, models: tuple[str, ...], head: str, what: str
) -> None:
    place.describe(*models, head=head)
    code, _, err = place.compress()
    assert code != 0
    assert what in err


def test_a_manifest_that_does_not_name_what_its_shard_needs_is_forged(published: Place) -> None:
    with open_store(published.url) as store:
        version = resolve(store, "near")
        shards = tuple(shard.model_copy(update={"bases": None}) for shard in version.manifest.shards)
        manifest = version.manifest.model_copy(update={"shards": shards})
        artifact = StoredArtifact(store, Version(model="near", name="v1", digest=manifest.digest, manifest=manifest))
        with pytest.raises(
            IntegrityError, match=r"is a difference to blob [0-9a-f]{64}, which its manifest does not name"
        ):
            list(artifact.tensors())


def forged(place: Place, change: Callable[[ShardRecord], ShardRecord]) -> Version:
    """The version near@v1 with other shard records, under the digest that these give it."""
    with open_store(place.url) as store:
        version = resolve(store, "near")
    shards = tuple(change(shard) for shard in version.manifest.shards)
    manifest = version.manifest.model_copy(update={"shards": shards})
    return Version(model="near", name="v1", digest=manifest.digest, manifest=manifest)


def test_a_base_that_is_no_container_is_named(published: Place) -> None:
    junk = b"no container"
    base = BaseBlob(blob=sha256(junk), bytes=len(junk))
    with open_store(published.url) as store:
        store.put(blob_key(base.blob), junk)
        digest = resolve(store, "near").manifest.shards[0].bases[0].blob  # type: ignore[index]

        def stored(shard: ShardRecord) -> ShardRecord:
            body = store.get(blob_key(shard.blob))
            # The index is packed, so the container is written anew with the other digest.
            coded = [
                replace(one, params=replace(one.params, base=base.blob)) if is_difference(one) else one  # type: ignore[type-var]
                for one in parse(body)
            ]
            changed = serialise(coded)
            store.put(blob_key(sha256(changed)), changed)
            return shard.model_copy(update={"blob": sha256(changed), "bytes": len(changed), "bases": (base,)})

        version = forged(published, stored)
        with pytest.raises(IntegrityError, match=rf"near@v1: blob {base.blob}: .*; it is of base@v1") as caught:
            list(StoredArtifact(store, version).tensors())
    assert digest not in str(caught.value)


def test_a_base_with_two_sizes_is_refused(published: Place) -> None:
    def change(shard: ShardRecord) -> ShardRecord:
        held = shard.bases[0]  # type: ignore[index]
        return shard.model_copy(update={"bases": (held, held.model_copy(update={"bytes": held.bytes + 1}))})

    with pytest.raises(IntegrityError, match="not a VersionManifest"):
        read_document(VersionManifest, "manifest.json", forged(published, change).manifest.to_bytes())


def test_a_shard_whose_base_is_another_shard_of_the_version_is_no_chain(published: Place, tmp_path: Path) -> None:
    """Nobody writes such a version; it is refused by name, from the store and from a folder."""

    def change(shard: ShardRecord) -> ShardRecord:
        return shard.model_copy(update={"bases": (*shard.bases, BaseBlob(blob=first.blob, bytes=first.bytes))})  # type: ignore[misc]

    with open_store(published.url) as store:
        first = resolve(store, "near").manifest.shards[0]
    version = forged(published, change)
    assert set(blob_files(version.manifest).values()) == {
        *(f"shard-0000{k}-of-00002.safetensors" for k in (1, 2)),
        *(f"base-0000{k}-of-00002.safetensors" for k in (1, 2)),
    }
    found = Found(model="near", name="v1", digest=version.digest, manifest=version.manifest)
    with open_store(published.url) as store:
        pull(found, store, tmp_path / "out", BlobCache(tmp_path / "own cache"))
    assert len(list(PulledArtifact(tmp_path / "out").tensors())) == 7


def test_a_damaged_base_is_found_before_its_differences_are_reused(published: Place) -> None:
    digest = base_blobs(published)[0]
    body = bytearray(published.blob(digest).read_bytes())
    body[-1] ^= 1
    published.blob(digest).write_bytes(body)
    published.describe("name: more, source: near.safetensors, base: base@v1")
    code, rows, err = published.compress()
    assert code != 0
    assert rows[0]["status"] == "failed"
    assert f"blob {digest} of the base is damaged" in err


def test_offline_a_base_that_left_the_cache_is_named(published: Place, tmp_path: Path) -> None:
    load_state_dict("near", published.url)
    digest = base_blobs(published)[0]
    BlobCache().path(digest).unlink()
    with pytest.raises(ArtifactNotFoundError, match=digest):
        load_state_dict("near", published.url, offline=True)
    code, _, err = published.at("pull", "near", "--offline", "--output", str(tmp_path / "out"))
    assert code != 0
    assert digest in err


def test_the_latest_version_of_a_base_that_became_a_difference_is_not_offered(place: Place) -> None:
    """Two models that each look for a base: neither may end as a difference to a difference."""
    place.describe("name: base, source: base.safetensors", "name: other, source: near.safetensors")
    assert place.compress()[0] == 0
    both = "name: base, source: base.safetensors, base: auto", "name: other, source: near.safetensors, base: auto"
    place.describe(*both)
    code, _, err = place.compress("--force")
    assert code == 0, err
    bases = [place.manifest_of(name).get("base") for name in ("base", "other")]
    assert {base["version"] for base in bases if base is not None} == {"v1"}  # type: ignore[index]
    code, rows, err = place.compress()
    assert (code, [(row["status"], row["newer_base"]) for row in rows]) == (0, [("up to date", None)] * 2), err
    for name in ("base", "other"):
        assert place.at("verify", name)[0] == 0


def test_tensors_of_no_weights_and_of_one_have_no_difference(place: Place) -> None:
    odd = {"empty.weight": torch.zeros(0, 64), "none.weight": torch.zeros(64, 0), "one.weight": torch.ones(1, 1)}
    odd["half.weight"] = weights()["blocks.0.weight"].half()
    for name, seed in (("a", 1), ("b", 2)):
        save_file({**tuned(weights(), 0.01, seed), **odd}, place.folder / f"{name}.safetensors")
    odd["half.weight"] = odd["half.weight"].float()
    save_file({**tuned(weights(), 0.01, 3), **odd}, place.folder / "c.safetensors")
    place.describe(
        "name: a, source: a.safetensors",
        "name: b, source: b.safetensors, base: a",
        "name: c, source: c.safetensors, base: a",
    )
    code, _, err = place.compress()
    assert code == 0, err
    for name in ("b", "c"):
        found = load_state_dict(name, place.url)
        assert {key: tuple(found[key].shape) for key in odd} == {key: tuple(value.shape) for key, value in odd.items()}
        assert place.at("verify", name, "--against", str(place.folder / f"{name}.safetensors"))[0] == 0
    assert load_state_dict("b", place.url)["half.weight"].dtype == torch.float16
    assert load_state_dict("c", place.url)["half.weight"].dtype == torch.float32


@pytest.mark.parametrize("harm", ["blob", "manifest"])
def test_auto_passes_over_what_cannot_be_read(place: Place, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    """Other models of the store may be damaged: that is their error, not this model's."""
    save_file(tuned(place.states["near"], 0.001), place.folder / "nearest.safetensors")
    place.describe("name: base, source: base.safetensors", "name: nearest, source: nearest.safetensors")
    assert place.compress()[0] == 0
    with open_store(place.url) as store:
        version = resolve(store, "nearest")
    damaged = place.store / "models" / "nearest" / "versions" / version.digest / "manifest.json"
    if harm == "blob":
        damaged = place.blob(max(version.manifest.shards, key=lambda shard: shard.bytes).blob)
    body = bytearray(damaged.read_bytes())
    body[len(body) // 2] ^= 1
    damaged.write_bytes(body)
    place.describe("name: near, source: near.safetensors, base: auto")
    code, rows, err = place.compress()
    assert (code, rows[0]["base"]) == (0, "base@v1"), err
    assert "near: nearest is no base, for it cannot be read: " in caplog.text
