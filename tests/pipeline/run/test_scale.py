"""The default allocation through a whole run: stored gains, fixed point, bases, the same bytes again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import birkhoff
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import FINEST_DB, MATRIX_DB, TARGET_DB_RANGE
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured

Capture = pytest.CaptureFixture[str]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SOURCE = {
    **{f"body.{n}.weight": normal(n, 256, 512) for n in range(4)},
    "body.4.weight": normal(4, 256, 512) / 30,
    "head.depthwise.weight": normal(5, 128, 1, 3, 3),
    "head.small.weight": normal(6, 32, 64),
    "head.small.bias": normal(7, 32),
}


class Place:
    def __init__(self, folder: Path, capsys: Capture) -> None:
        self.folder, self.store, self._capsys = folder, (folder / "store").as_uri(), capsys

    def run(self, *words: str) -> str:
        code, out, err = captured(self._capsys, *words, "--store", self.store)
        assert code == 0, err
        return out

    def compress(self, *models: str, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        lines = ["shard_mib: 1", "models:", *(f"  - {{{model}}}" for model in models)]
        (self.folder / "m.yaml").write_text("\n".join(lines))
        words = ("compress", str(self.folder / "m.yaml"), "--executor", "inline", "--json", *options)
        found: list[dict[str, Any]] = json.loads(self.run(*words))
        return found

    def inspect(self, name: str) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads(self.run("inspect", name, "--json"))}

    def gains(self, row: dict[str, Any]) -> dict[str, float] | None:
        with open_store(self.store) as store:
            manifest = json.loads(store.get(f"models/{row['model']}/versions/{row['digest']}/manifest.json"))
        found: dict[str, float] | None = manifest.get("gains_db")
        return found


@pytest.fixture
def place(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    save_file(SOURCE, tmp_path / "net.safetensors")
    return Place(tmp_path, capsys)


NET = "name: net, source: net.safetensors"


def test_a_version_stores_what_its_targets_follow_from_and_every_tensor_reaches_its_own(place: Place) -> None:
    (row,) = place.compress(NET)
    gains = place.gains(row)
    assert gains is not None
    assert gains.keys() == {name for name, weight in SOURCE.items() if weight.dim() > 1}
    found = place.inspect("net")
    steps = {}
    for name in gains:
        most = MATRIX_DB if SOURCE[name].dim() == 2 else FINEST_DB
        assert found[name]["target_db"] == pytest.approx(min(max(15.0, 30.0 + gains[name]), most), abs=0.006)
        assert found[name]["target_db"] <= found[name]["sqnr_db"] <= found[name]["target_db"] + 0.3
        steps[name] = SOURCE[name].square().mean().sqrt() * 10 ** (-found[name]["target_db"] / 20)
    body = [steps[f"body.{n}.weight"] for n in range(4)]
    assert max(body) / min(body) < 1.02  # one step for all of one size
    assert found["body.4.weight"]["target_db"] == 15.0
    assert found["head.small.weight"]["target_db"] == MATRIX_DB
    assert found["head.depthwise.weight"]["target_db"] == FINEST_DB
    place.run("verify", "net", "--against", str(place.folder / "net.safetensors"))


def test_the_same_inputs_give_the_same_bytes_and_a_second_run_is_a_no_op(place: Place) -> None:
    (first,) = place.compress(NET)
    (again,) = place.compress(NET)
    assert (again["status"], again["digest"]) == ("up to date", first["digest"])
    (forced,) = place.compress(NET, options=("--force",))
    assert forced["digest"] == first["digest"]


def test_weights_in_fixed_point_come_back_and_matrices_run_compressed(place: Place) -> None:
    place.compress(f"{NET}, target_ratio: 4")
    found = place.inspect("net")
    fixed = [name for name, row in found.items() if (row["target_db"] or 0) > TARGET_DB_RANGE[1]]
    assert fixed == ["head.depthwise.weight"]
    decoded = birkhoff.load_state_dict("net", store=place.store)
    assert fidelity(SOURCE[fixed[0]], decoded[fixed[0]]).sqnr_db >= found[fixed[0]]["target_db"]
    small = torch.nn.Module()
    small.head = torch.nn.ModuleDict({"small": torch.nn.Linear(64, 32)})
    names = ["head.small.weight", "head.small.bias"]
    save_file({name: SOURCE[name] for name in names}, place.folder / "small.safetensors")
    place.compress("name: small, source: small.safetensors, target_ratio: 1.5")
    assert birkhoff.load_into(small, "small", store=place.store) == ["head.small"]
    inputs = normal(9, 4, 64)
    wanted = torch.nn.functional.linear(inputs, SOURCE["head.small.weight"], SOURCE["head.small.bias"])
    assert fidelity(wanted, small.head["small"](inputs).detach()).sqnr_db > 40


def test_a_budget_keeps_its_floor_whatever_the_weights_scale(place: Place) -> None:
    quiet = SOURCE | {"body.4.weight": SOURCE["body.4.weight"] / 1e5}
    save_file(quiet, place.folder / "quiet.safetensors")
    (row,) = place.compress("name: quiet, source: quiet.safetensors, target_ratio: 4.5, floor_db: 24")
    assert (row["status"], row["ratio"] >= 4.5, row["sqnr_db_min"] >= 24) == ("published", True, True)
    place.run("verify", "quiet", "--against", str(place.folder / "quiet.safetensors"))
    (again,) = place.compress("name: quiet, source: quiet.safetensors, target_ratio: 4.5, floor_db: 24")
    assert (again["status"], again["digest"]) == ("up to date", row["digest"])


def test_weights_of_any_kind_are_published_beside_each_other(place: Place) -> None:
    kinds = {
        "a.weight": SOURCE["body.0.weight"].bfloat16(),
        "gamma": (1 + 0.05 * normal(20, 1, 1024, 1, 1) / 0.03).bfloat16(),
        "ternary": (torch.randint(-1, 2, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 0.37).bfloat16(),
        "huge": normal(21, 64, 64).double() * 1e160,
        "dead": normal(22, 256, 256) * 1e-12,
        "zeros": torch.zeros(256, 256),
        "mask": torch.ones(1, 1, 64, 64).tril(),
    }
    save_file(kinds, place.folder / "kinds.safetensors")
    kinds_row, net = place.compress("name: kinds, source: kinds.safetensors", NET)
    assert (kinds_row["status"], net["status"]) == ("published", "published")
    place.run("verify", "kinds", "--against", str(place.folder / "kinds.safetensors"))
    decoded, found = birkhoff.load_state_dict("kinds", store=place.store), place.inspect("kinds")
    for name in ("huge", "zeros", "mask"):
        assert torch.equal(decoded[name], kinds[name])
    coded = {name: row for name, row in found.items() if row["action"] == "lattice"}
    assert {"a.weight", "dead"} <= coded.keys()
    weights = sum(kinds[name].numel() for name in coded)
    assert sum(row["target_db"] * kinds[name].numel() for name, row in coded.items()) / weights == pytest.approx(
        30.0, abs=2.1
    )


def test_a_fine_tune_is_a_difference_where_its_target_is_on_the_trajectory(place: Place) -> None:
    tuned = {name: weight + 0.03 * normal(50 + n, *weight.shape) for n, (name, weight) in enumerate(SOURCE.items())}
    save_file(tuned, place.folder / "tuned.safetensors")
    place.compress(NET)
    fine, direct = place.compress(
        "name: fine, source: tuned.safetensors, base: net", "name: direct, source: tuned.safetensors"
    )
    assert place.gains(fine) == place.gains(direct)
    assert fine["stored_bytes"] < direct["stored_bytes"]
    found = place.inspect("fine")
    assert all(found[f"body.{n}.weight"]["action"] == "difference" for n in range(4))
    assert found["head.depthwise.weight"]["action"] == "lattice"
    place.run("verify", "fine", "--against", str(place.folder / "tuned.safetensors"))


def test_an_override_moves_no_other_target(place: Place) -> None:
    place.compress(NET)
    before = place.inspect("net")
    place.compress(
        NET + ", overrides: [{tensors: body.0.weight, target_db: 20}, {tensors: body.1.weight, lossless: true}]"
    )
    after = place.inspect("net")
    moved = {name for name, row in before.items() if row["target_db"] != after[name]["target_db"]}
    assert moved == {"body.0.weight", "body.1.weight"}


def test_a_plan_names_the_targets_of_a_run(place: Place) -> None:
    (place.folder / "m.yaml").write_text(f"models:\n  - {{{NET}}}\n")
    (row,) = json.loads(place.run("plan", str(place.folder / "m.yaml"), "--json"))
    place.compress(NET)
    targets = [found["target_db"] for found in place.inspect("net").values() if found["target_db"] is not None]
    assert row["predicted_tensor_db"] == [min(targets), max(targets)]


def test_a_source_that_vanishes_fails_its_model_alone(
    place: Place, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from birkhoff.pipeline.errors import SourceError
    from birkhoff.pipeline.plan import models

    scales_of = models.scales_of

    def vanish(tensors: Any) -> dict[str, float]:
        if any("gone" in tensor.path for tensor in tensors):
            raise SourceError("gone.safetensors: cannot be read (no such file); put it back")
        return scales_of(tensors)

    monkeypatch.setattr(models, "scales_of", vanish)
    save_file(SOURCE, place.folder / "gone.safetensors")
    lines = ["models:", f"  - {{{NET}}}", "  - {name: gone, source: gone.safetensors}"]
    (place.folder / "m.yaml").write_text("\n".join(lines))
    words = ("compress", str(place.folder / "m.yaml"), "--executor", "inline", "--json", "--store", place.store)
    code, out, _ = captured(capsys, *words)
    assert code != 0
    rows = {row["model"]: row for row in json.loads(out)}
    assert rows["net"]["status"] == "published"
    assert (rows["gone"]["status"], "cannot be read" in rows["gone"]["error"]) == ("failed", True)
