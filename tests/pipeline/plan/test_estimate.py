"""The forecast of `birkhoff plan`: ranges that hold what a run comes to."""

import re
from pathlib import Path

import pytest

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.plan.estimate import plan_rows
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.plan.models import select

DEMO = Path(__file__).parents[3] / "manifests" / "demo.yaml"
BUDGET = DEMO.with_name("demo_budget.yaml")

STORED = {"small": 753654, "balanced": 846223, "fine": 1049908, "fast": 865906, "match-paper": 678208, "paper": 1143627}
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
    assert row["predicted_tensor_db"] == (25.14, 48.0)
    (row,), _ = plan_rows(select(load_manifest(DEMO), [], "paper"), None, None)
    assert row["predicted_tensor_db"] is None


def test_a_budget_bounds_the_range_and_gives_small_tensors_more() -> None:
    rows, _ = plan_rows(load_manifest(BUDGET), None, None)
    for row in rows:
        low, high = row["predicted_stored_bytes_range"]  # type: ignore[misc]
        least, most = row["predicted_tensor_db"]  # type: ignore[misc]
        assert low < high <= row["budget_bytes"]
        assert 15 < least < 30 < most <= 48
