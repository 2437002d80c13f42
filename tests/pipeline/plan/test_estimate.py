"""The forecast of `birkhoff plan`: ranges that hold what a run comes to."""

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.plan.estimate import plan_rows
from birkhoff.pipeline.plan.manifest import Manifest, load_manifest
from birkhoff.pipeline.plan.selection import select
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.run.compress import compress
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.store.base import Store

DEMO = Path(__file__).parents[3] / "manifests" / "demo.yaml"
BUDGET = DEMO.with_name("demo_budget.yaml")

STORED = {"small": 791759, "balanced": 876045, "fine": 1061682, "fast": 896344, "match-paper": 678208, "paper": 1143627}
"""What `birkhoff compress manifests/demo.yaml --profile P` stores of the demo model."""


@pytest.mark.parametrize("profile", STORED)
def test_the_range_holds_what_a_run_stores_and_is_no_wider_than_it_must_be(profile: str) -> None:
    (row,), _ = plan_rows(select(load_manifest(DEMO), [], profile), None, None)
    low, high = row["predicted_stored_bytes_range"]  # type: ignore[misc]
    assert low <= STORED[profile] <= high
    assert high / low < (1.6 if "paper" in profile else 1.2)
    assert low <= row["predicted_stored_bytes"] <= high  # type: ignore[operator]
    source = row["source_bytes"]
    assert row["predicted_ratio_range"] == (round(source / high, 2), round(source / low, 2))  # type: ignore[operator]


def test_the_table_of_profiles_names_them_all_with_their_ratios() -> None:
    text = (
        (DEMO.parents[1] / "manifests" / "README.md")
        .read_text()
        .split("| profile | each coded tensor |")[1]
        .split("\n\n")[0]
    )
    found = dict(re.findall(r"^\| `([a-z-]+)`[^|]*\|[^|]*\| ([0-9.]+) \|", text, re.M))
    source = DEMO.parent.joinpath("demo", "demo_sam.safetensors").stat().st_size
    assert found == {name: f"{source / stored:.2f}" for name, stored in STORED.items()}
    assert found.keys() == PROFILES.keys()


def test_targets_are_those_of_tensors() -> None:
    (row,), _ = plan_rows(load_manifest(DEMO), None, None)
    assert row["predicted_tensor_db"] == (23.07, 63.0)
    (row,), _ = plan_rows(select(load_manifest(DEMO), [], "paper"), None, None)
    assert row["predicted_tensor_db"] is None


def test_a_budget_bounds_the_range_and_gives_small_tensors_more() -> None:
    rows, _ = plan_rows(load_manifest(BUDGET), None, None)
    for row in rows:
        low, high = row["predicted_stored_bytes_range"]  # type: ignore[misc]
        least, most = row["predicted_tensor_db"]  # type: ignore[misc]
        assert low < high <= row["budget_bytes"]
        assert 15 <= least < 30 < most <= 63


def fleet(folder: Path, *models: tuple[str, dict[str, torch.Tensor]], allocation: str = "header") -> Manifest:
    """A manifest of models with these tensors."""
    lines = [f"allocation: {allocation}", "models:"]
    for name, tensors in models:
        save_file(tensors, folder / f"{name}.safetensors")
        lines.append(f"  - {{name: {name}, source: {name}.safetensors}}")
    (folder / "fleet.yaml").write_text("\n".join(lines))
    return load_manifest(folder / "fleet.yaml")


def weight(seed: int, rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def test_shards_that_the_store_has_of_the_same_source_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory_store: Store
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "birkhoff.pipeline.files._SETTLED_SECONDS", -1.0
    )  # digests of files this young are remembered too
    tensors = {"a.weight": weight(0), "b.weight": weight(1)}
    manifest = fleet(tmp_path, ("first", tensors))
    with Progress(Console(quiet=True), models=1) as progress:
        (run,) = compress(manifest, directory_store, lambda _: InlineExecutor(directory_store.address), progress)
    assert run.status == "published", run.error
    other = tmp_path / "other.yaml"
    other.write_text("allocation: header\nmodels: [{name: second, source: first.safetensors}]\n")
    (row,), _ = plan_rows(load_manifest(other), directory_store, None)
    assert (row["status"], row["shards"], row["shared_shards"]) == ("new", 2, 2)
    (row,), _ = plan_rows(select(load_manifest(other), [], "small"), directory_store, None)
    assert row["shared_shards"] == 0  # by another recipe


def test_equal_tensors_with_other_targets_are_no_riddle(tmp_path: Path) -> None:
    whole = {"a.weight": weight(0), "b.weight": weight(1, rows=4096)}
    models = ("small", {"a.weight": weight(0)}), ("whole", whole)
    rows, _ = plan_rows(fleet(tmp_path, *models), None, None)
    assert [row["shared_shards"] for row in rows] == [0, 0]
    assert "note" not in rows[0]
    assert str(rows[1]["note"]).startswith("1 of its shards have the tensors of another model but other targets")
    rows, _ = plan_rows(fleet(tmp_path, *models, allocation="uniform"), None, None)
    assert [(row["shared_shards"], "note" in row) for row in rows] == [(0, False), (1, False)]
