"""Budgets and overrides from the manifest to the store: what is published fits, is what the rules say, and stays so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.container import parse, serialise
from birkhoff.codec.profiles import BUDGET_FLOOR_DB, PROFILES, Profile
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.artifact.verify import verify
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import ValidationError
from birkhoff.pipeline.registry.documents import ShardRecord, VersionManifest, sha256
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.shard.validate import validate_shard
from birkhoff.pipeline.store.open import open_store
from tests.codec.by_profile import decisions, encode_tensor
from tests.pipeline.command import captured


def weights(width: int = 192) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.03

    blocks = {f"encoder.blocks.{n}.weight": normal(256, width) for n in range(4)}
    biases = {f"encoder.blocks.{n}.bias": normal(256) for n in range(4)}
    return {**blocks, **biases, "encoder.pos_embed": normal(1, 64, 48), "decoder.out.weight": normal(64, 96)}


class Place:
    """A folder with a checkpoint, a store and the command line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.store, self._capsys = folder, folder / "store", capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments)

    def describe(self, text: str, model: str = "") -> None:
        lines = [f"store: {self.store.as_uri()}", "shard_mib: 1", text, "models:"]
        (self.folder / "m.yaml").write_text("\n".join([*lines, f"  - {{name: net, source: net.safetensors{model}}}"]))

    def compress(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, the model's row, standard error)."""
        manifest = str(self.folder / "m.yaml")
        code, out, err = self.run("compress", manifest, "--executor", "inline", "--json", *arguments)
        found = json.loads(out)
        return code, found[0] if isinstance(found, list) else found, err

    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("plan", str(self.folder / "m.yaml"), "--json")[1])[0]
        return found

    def version(self) -> VersionManifest:
        with open_store(self.store.as_uri()) as store:
            return resolve(store, "net").manifest

    def inspect(self) -> dict[str, dict[str, Any]]:
        out = self.run("inspect", "net", "--store", self.store.as_uri(), "--json")[1]
        return {row["name"]: row for row in json.loads(out)}


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    save_file(weights(), tmp_path / "net.safetensors")
    return Place(tmp_path, capsys)


def every_byte(place: Place) -> int:
    """What the store holds of the latest version, counted from its files."""
    manifest = place.version()
    files = [place.store / f"models/net/versions/{manifest.digest}/manifest.json"]
    for shard in manifest.shards:
        files.append(place.store / f"blobs/sha256/{shard.blob[:2]}/{shard.blob}")
        files.append(place.store / f"shards/{shard.key[:2]}/{shard.key}.json")
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("allocation", ["uniform", "size", "header"])
@pytest.mark.parametrize("budget", ["target_ratio: 5", "max_bytes: 120 KB"])
def test_the_published_version_fits_and_a_higher_target_would_not(place: Place, budget: str, allocation: str) -> None:
    place.describe(f"{budget}\nallocation: {allocation}")
    source = (place.folder / "net.safetensors").stat().st_size
    limit = source // 5 if "ratio" in budget else 120_000
    code, row, err = place.compress()
    assert (code, row["status"]) == (0, "published"), err
    assert every_byte(place) <= limit
    assert row["stored_bytes"] == every_byte(place)
    recipe = place.version().recipe
    assert row["target_db"] == recipe["target_db"]
    assert recipe.get("allocation", "uniform") == allocation
    profile = Profile.of_recipe("any", recipe)
    assert stored(profile, row["target_db"] + 0.1) - stored(profile, row["target_db"]) > limit - every_byte(place)


def stored(profile: Any, target_db: float) -> int:
    """Bytes of all tensors at a target."""
    profile = replace(profile, target_db=target_db)
    return sum(encode_tensor(name, tensor, profile).tensor.nbytes for name, tensor in weights().items())


def test_a_run_again_does_not_search_and_a_changed_tensor_keeps_the_other_shards(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights(768), place.folder / "net.safetensors")
    # Under `scale` more of a louder tensor has to fit, so the others get less.
    place.describe("target_ratio: 5.2\nprofile: fast\nallocation: header")
    assert place.plan()["budget_bytes"] == (place.folder / "net.safetensors").stat().st_size * 10 // 52
    _, first, _ = place.compress()
    assert place.plan()["predicted_target_db"] == first["target_db"]
    with monkeypatch.context() as patch:
        patch.setattr("birkhoff.pipeline.shard.run.sizes", lambda *_: pytest.fail("searched again"))
        code, again, _ = place.compress()
    assert (code, again["status"], again["digest"]) == (0, "up to date", first["digest"])
    changed = weights(768)
    changed["decoder.out.weight"] *= 1.5
    save_file(changed, place.folder / "net.safetensors")
    code, row, err = place.compress()
    assert (code, row["version"], row["target_db"]) == (0, "v2", first["target_db"]), err
    assert row["shards"] - row["shards_reused"] == 1


def test_a_profile_on_the_command_line_goes_over_a_budget(place: Place) -> None:
    place.describe("", model=", target_ratio: 5")
    _, row, _ = place.compress("--profile", "fast")
    assert (row["profile"], row["target_db"]) == ("fast", 30.0)
    _, row, _ = place.compress()
    assert (row["profile"], row["version"]) == ("ratio 5", "v2")


def test_a_budget_that_nothing_fits_says_what_the_lowest_quality_needs(place: Place) -> None:
    place.describe("max_bytes: 5KB\nallocation: uniform")
    code, row, err = place.compress()
    assert (code, row["status"]) == (21, "failed")
    assert "budget 4.9KiB leaves 4.9 KiB (5000 bytes); at the lowest quality the version takes about" in err
    least = int(row["error"].split("about ")[1].split("(")[1].split()[0])
    place.describe(f"max_bytes: {round(least * 1.1)}\nallocation: uniform")
    code, row, err = place.compress()
    assert (code, row["status"]) == (0, "published"), err


@pytest.mark.parametrize("allocation", ["uniform", "size"])
def test_a_budget_ruins_no_tensor_unless_its_floor_is_lowered(place: Place, allocation: str) -> None:
    place.describe(f"target_ratio: 14\nallocation: {allocation}")
    code, row, err = place.compress()
    assert (code, row["status"]) == (21, "failed"), err
    assert "or lower floor_db, which is 15" in err
    assert not list(place.store.glob("models/**/*"))
    place.describe(f"target_ratio: 14\nallocation: {allocation}\nfloor_db: 6")
    code, row, err = place.compress()
    assert (code, row["status"]) == (0, "published"), err
    lossy = [tensor["sqnr_db"] for tensor in place.inspect().values() if tensor["sqnr_db"] is not None]
    assert 6 <= min(lossy) < BUDGET_FLOOR_DB
    assert place.plan()["predicted_tensor_db"][0] < BUDGET_FLOOR_DB
    place.describe(f"target_ratio: 14\nallocation: {allocation}\nfloor_db: 10")
    assert place.plan()["status"] == "changed"  # another floor is another budget


def test_an_override_may_go_below_the_floor(place: Place) -> None:
    place.describe("target_ratio: 5\noverrides: [{tensors: decoder.*, target_db: 8}]")
    code, row, err = place.compress()
    assert (code, row["status"]) == (0, "published"), err
    assert place.inspect()["decoder.out.weight"]["sqnr_db"] < 10


def test_a_version_larger_than_its_source_is_warned_of(place: Place) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number:04}": torch.randn(8, generator=generator) for number in range(600)}
    save_file(tensors | {"a.weight": torch.randn(32, 33, generator=generator)}, place.folder / "net.safetensors")
    place.describe("")
    code, row, err = place.compress()
    assert (code, row["status"], row["ratio"] < 1) == (0, "published", True), err
    assert "warning: net: the version takes" in err
    assert row["warnings"][0].endswith("takes more than coding saves; keep the source instead")


OVERRIDES = """
overrides:
  - {tensors: "encoder.*", target_db: 24}
  - {tensors: "*.pos_embed", lossless: true}
"""


def test_overrides_are_resolved_stored_shown_and_honoured(place: Place) -> None:
    place.describe(OVERRIDES, model=', overrides: [{tensors: "*.3.*", target_db: 36}]')
    code, _, err = place.compress()
    assert code == 0, err
    resolved = place.version().overrides
    assert resolved == {
        **{f"encoder.blocks.{n}.weight": 24.0 for n in range(3)},
        "encoder.blocks.3.weight": 36.0,
        "encoder.pos_embed": "lossless",
    }
    assert place.plan()["overrides"] == resolved
    assert place.plan()["status"] in ("up to date", "to be read")
    reasons = {group["reason"]: group["tensors"] for group in place.plan()["groups"]}
    assert (reasons["24 dB by override"], reasons["36 dB by override"], reasons["by override"]) == (3, 1, 1)
    rows = place.inspect()
    for name, target in (("encoder.blocks.0.weight", 24.0), ("encoder.blocks.3.weight", 36.0)):
        assert (rows[name]["target_db"], rows[name]["why"]) == (target, "by override")
        assert target <= rows[name]["sqnr_db"] <= target + 0.3
    assert (rows["decoder.out.weight"]["target_db"], rows["decoder.out.weight"]["why"]) == (39.91, "")
    assert (rows["encoder.pos_embed"]["action"], rows["encoder.pos_embed"]["why"]) == ("planes", "by override")
    assert rows["encoder.blocks.0.bias"]["why"] == "one-dimensional"
    source = str(place.folder / "net.safetensors")
    code, _, err = place.run("verify", "net", "--against", source, "--store", place.store.as_uri())
    assert code == 0, err
    assert place.compress()[1]["status"] == "up to date"


def test_only_the_shards_concerned_get_another_key(place: Place) -> None:
    place.describe("")
    before = place.compress()[1]
    place.describe("overrides: [{tensors: decoder.*, target_db: 36}]")
    code, row, err = place.compress()
    assert (code, row["shards"] - row["shards_reused"]) == (0, 1), err
    assert before["shards"] == row["shards"]
    place.describe("")
    assert place.compress()[1]["digest"] == before["digest"]


def test_overridden_tensors_keep_their_target_under_a_budget(place: Place) -> None:
    place.describe("target_ratio: 6\nallocation: uniform\noverrides: [{tensors: decoder.*, target_db: 40}]")
    code, row, err = place.compress()
    assert code == 0, err
    assert 40 <= place.inspect()["decoder.out.weight"]["sqnr_db"] <= 40.3
    assert row["target_db"] < 36
    assert every_byte(place) <= (place.folder / "net.safetensors").stat().st_size // 6


@pytest.mark.parametrize("where", ["manifest", "model"])
def test_a_glob_that_matches_nothing_stops_before_any_work(place: Place, where: str) -> None:
    rule = "overrides: [{tensors: decodr.*, lossless: true}]"
    place.describe(rule if where == "manifest" else "", model="" if where == "manifest" else f", {rule}")
    code, _, err = place.compress()
    key = "overrides[0]" if where == "manifest" else "models[0].overrides[0]"
    assert code == 3
    assert f"m.yaml, line {3 if where == 'manifest' else 5}: {key}.tensors: 'decodr.*' matches none of the 10" in err
    assert "near it are 'decoder.*'" in err
    assert not list(place.store.glob("blobs/**/*"))


def test_only_suggests_the_near_name(place: Place) -> None:
    place.describe("")
    code, _, err = place.compress("--only", "nett")
    assert (code, "--only: the manifest has no model 'nett', did you mean 'net'?" in err) == (3, True)


def test_falling_back_to_lossless_is_warned_of_and_shown(place: Place) -> None:
    tensors = weights() | {"decoder.mask": torch.full((64, 64), 0.5)}
    save_file(tensors, place.folder / "net.safetensors")
    place.describe("")
    code, row, err = place.compress()
    assert (code, row["warnings"]) == (
        0,
        ["tensor 'decoder.mask' is stored lossless: all its weights are equal"],
    ), err
    assert "warning: net: tensor 'decoder.mask' is stored lossless: all its weights are equal" in err
    assert place.inspect()["decoder.mask"]["why"] == "all its weights are equal"
    _, again, _ = place.compress()
    assert (again["status"], again["warnings"]) == ("up to date", row["warnings"])


def test_verify_holds_a_version_to_what_its_manifest_promises(place: Place) -> None:
    rules = "overrides: [{tensors: decoder.*, target_db: 36}, {tensors: '*.pos_embed', lossless: true}]"
    place.describe(f"allocation: uniform\n{rules}")
    assert place.compress()[0] == 0
    with open_store(place.store.as_uri()) as store:
        artifact = StoredArtifact(store, resolve(store, "net"))
        verify(artifact)
        honest = artifact.manifest
        for overrides, message in (
            ({"decoder.out.weight": 37.0}, "claims 36.0 dB as its target, it has 37.0 dB"),
            ({"decoder.out.weight": "lossless"}, "should be lossless, it is stored as lattice"),
            ({"decoder.out.weight": 36.0}, "'encoder.pos_embed' should be coded, it is stored as planes"),
            ({**(honest.overrides or {}), "encoder.blocks.0.weight": 33.0}, "None' as target_db|None as target_db"),
        ):
            artifact.manifest = honest.model_copy(update={"overrides": overrides})
            with pytest.raises(ValidationError, match=message):
                verify(artifact)
        artifact.manifest = honest.model_copy(update={"recipe": {**honest.recipe, "target_db": 33.0}})
        with pytest.raises(ValidationError, match=r"claims 30\.\d+ dB, its target is 33 dB"):
            verify(artifact)


def test_verify_measures_the_target_that_match_paper_stores_with_a_tensor(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.describe("")
    assert place.compress("--profile", "match-paper")[0] == 0
    source = place.folder / "net.safetensors"
    with open_store(place.store.as_uri()) as store:
        artifact = StoredArtifact(store, resolve(store, "net"))
        verify(artifact, source)
        whole = artifact.blob(artifact.manifest.shards[0])
        coded = next(tensor for tensor in parse(whole) if tensor.codec == "lattice")
        claims = coded.claims
        assert claims.sqnr_db is not None
        raised = f"{claims.sqnr_db + 0.5:.3f}"
        claims = replace(claims, target_db=float(raised))
        forged = serialise([replace(t, claims=claims) if t.name == coded.name else t for t in parse(whole)])
        monkeypatch.setattr(StoredArtifact, "blob", lambda self, shard: forged)
        with pytest.raises(ValidationError, match=rf"{coded.name}.*its target is {float(raised):g} dB"):
            verify(artifact, source)


def test_validation_refuses_a_shard_that_ignores_its_overrides() -> None:
    from birkhoff.pipeline.shard.run import encode_shard

    tensors = {"a.weight": weights()["decoder.out.weight"]}
    profile, device = PROFILES["balanced"], torch.device("cpu")
    plain = encode_shard(tensors, decisions(tensors, profile), device)
    finer = encode_shard(tensors, decisions(tensors, profile, {"a.weight": 36.0}), device)
    validate_shard(finer, tensors, decisions(tensors, profile, {"a.weight": 36.0}), device)
    for blob, override in ((plain, 36.0), (plain, "lossless"), (finer, 40.0)):
        with pytest.raises(ValidationError, match=r"'a\.weight'"):
            validate_shard(blob, tensors, decisions(tensors, profile, {"a.weight": override}), device)  # type: ignore[dict-item]


def test_documents_without_the_new_fields_read_as_before_and_keep_their_digest(place: Place) -> None:
    place.describe("")
    assert place.compress()[0] == 0
    body = next(place.store.glob("models/net/versions/*/manifest.json")).read_bytes()
    assert not {"budget", "overrides"} & json.loads(body).keys()
    manifest = read_document(VersionManifest, "key", body)
    assert manifest.digest == sha256(body)
    record = next(place.store.glob("shards/*/*.json")).read_bytes()
    assert read_document(ShardRecord, "key", record).fallbacks is None
