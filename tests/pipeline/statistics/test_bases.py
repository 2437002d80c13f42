"""Fine-tunes as differences under `allocation: output` and under targets of the outputs."""

import json
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.registry.documents import VersionManifest
from tests.pipeline.statistics.places import Place

OUTPUT = "allocation: output"
HERE = "builder: net.py:build, inputs: net.py:batches, floor_output_db: 3"


@pytest.fixture
def tuned(place: Place) -> Place:
    """The place with a fine-tune of the model, some 34 dB below its weights."""
    state, generator = torch.load(place.folder / "net.pth"), torch.Generator().manual_seed(5)
    moved = {k: v + 0.02 * v.std() * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    torch.save(moved, place.folder / "tuned.pth")
    return place


def compress(place: Place, *models: str) -> list[dict]:
    (place.folder / "m.yaml").write_text("\n".join(["models:", *(f"  - {{{words}, {HERE}}}" for words in models)]))
    code, out, err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline", "--json")
    assert code == 0, err
    return json.loads(out)


def named(name: str, words: str, source: str = "tuned.pth") -> str:
    return f"name: {name}, source: {source}, {words}"


def manifest_of(place: Place, row: dict) -> VersionManifest:
    (path,) = place.files(f"models/{row['model']}/versions/{row['digest']}/manifest.json")
    return VersionManifest.model_validate_json(path.read_bytes())


def tensors(place: Place, name: str) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(place.run("inspect", name, "--json")[1])}


def test_the_sensitivity_is_the_fine_tunes_own_and_its_outputs_are_as_near_for_a_share_of_the_bytes(
    tuned: Place,
) -> None:
    fine, base, direct = compress(
        tuned,
        named("fine", f"{OUTPUT}, base: net"),
        named("net", OUTPUT, "net.pth"),
        named("direct", OUTPUT),
    )
    assert (fine["base"], fine["allocation"]) == ("net@v1", "output")
    assert manifest_of(tuned, fine).gains_db == manifest_of(tuned, direct).gains_db
    assert manifest_of(tuned, fine).gains_db != manifest_of(tuned, base).gains_db
    found, whole = tensors(tuned, "fine"), tensors(tuned, "direct")
    differences = [name for name, row in found.items() if row["action"] == "difference"]
    assert {"2.weight", "4.weight"} <= set(differences)
    assert all(found[name]["nominal"] for name in differences)
    for name in ("2.weight", "4.weight"):
        assert found[name]["bits_per_weight"] < 0.6 * whole[name]["bits_per_weight"]
    assert fine["stored_bytes"] < direct["stored_bytes"]
    assert fine["output_db"] > direct["output_db"] - 0.5
    for name in ("fine", "direct"):
        assert tuned.run("verify", name, "--against", str(tuned.folder / "tuned.pth"))[0] == 0
    (again, *_) = compress(tuned, named("fine", f"{OUTPUT}, base: net"))
    assert (again["status"], again["digest"]) == ("up to date", fine["digest"])
    (forced,) = json.loads(
        tuned.run("compress", str(tuned.folder / "m.yaml"), "--executor", "inline", "--json", "--force")[1]
    )
    assert forced["digest"] == fine["digest"]


def test_stored_differences_are_validated_again_with_their_hessians(tuned: Place) -> None:
    compress(tuned, named("net", OUTPUT, "net.pth"), named("fine", f"{OUTPUT}, base: net"))
    code, out, err = tuned.run(
        "compress", str(tuned.folder / "m.yaml"), "--executor", "inline", "--json", "--revalidate"
    )
    assert code == 0, err
    assert all(row["shards_reused"] == row["shards"] for row in json.loads(out))


@pytest.mark.parametrize("allocation", ["header", "output"])
def test_a_target_of_the_outputs_is_searched_with_differences(tuned: Place, allocation: str) -> None:
    words = f"target_output_db: 28, allocation: {allocation}"
    compress(tuned, named("net", f"allocation: {allocation}", "net.pth"))
    fine, direct = compress(tuned, named("fine", f"{words}, base: net"), named("direct", words))
    assert fine["base"] == "net@v1"
    assert min(fine["output_db"], direct["output_db"]) >= 28
    assert fine["stored_bytes"] < direct["stored_bytes"]
    assert fine["passes"] > 1
    assert tuned.run("verify", "fine")[0] == 0


@pytest.mark.parametrize("budget", ["target_ratio: 6", "max_bytes: 12KiB"])
def test_budgets_in_bytes_are_kept_by_output_too(tuned: Place, budget: str) -> None:
    compress(tuned, named("net", OUTPUT, "net.pth"))
    fine, direct = compress(
        tuned, named("fine", f"{budget}, {OUTPUT}, base: net"), named("direct", f"{budget}, {OUTPUT}")
    )
    for row in (fine, direct):
        assert row["ratio"] >= 6 if "ratio" in budget else row["stored_bytes"] <= 12 << 10
    assert fine["output_db"] > direct["output_db"] + 1


def test_a_plan_needs_no_statistics_and_says_what_follows_later(tuned: Place) -> None:
    compress(tuned, named("net", OUTPUT, "net.pth"))
    (tuned.folder / "m.yaml").write_text(f"models:\n  - {{{named('fine', f'{OUTPUT}, base: net')}, {HERE}}}\n")
    code, out, err = tuned.run("plan", str(tuned.folder / "m.yaml"), "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["base"], row["allocation"]) == ("net@v1", "output")
    assert 0 < row["base_share"] < 0.8
    assert "as differences to net@v1" in row["note"]
    assert "targets of single tensors follow" in row["note"]


def test_a_missing_base_is_named(tuned: Place, tmp_path: Path) -> None:
    compress(tuned, named("net", OUTPUT, "net.pth"))
    _, fine = compress(tuned, named("net", OUTPUT, "net.pth"), named("fine", f"{OUTPUT}, base: net"))
    blob = manifest_of(tuned, fine).bases[0].blob
    for path in tuned.files(f"blobs/sha256/{blob[:2]}/{blob}"):
        path.unlink()
    code, _, err = tuned.run("verify", "fine")
    assert code != 0
    assert blob in err
    assert "net@v1" in err
