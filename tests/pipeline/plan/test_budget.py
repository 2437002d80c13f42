"""The search for a budget's target: decisions alone, on made-up encoders."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.profiles import BUDGET_FLOOR_DB, PROFILES, Profile
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.plan.budget import ENOUGH, MISSES, PASSES, Search, Trial, lowest_step
from birkhoff.pipeline.plan.grid import Grid
from birkhoff.pipeline.plan.shards import ModelPlan, plan_model
from birkhoff.pipeline.registry.documents import BudgetRecord
from tests.pipeline.plan.test_shards import stored

GRID = Grid(low=6, high=48)
WEIGHTS = 1_000_000


def straight(step: int) -> float:
    """Bytes of a version at a step of the grid: so many bits a weight."""
    return WEIGHTS * (GRID.target(step) / 6.02 + 0.1) / 8


def begin(limit: int, *, wrong_by: float = 0.0, hint_db: float | None = None) -> Search:
    """A search whose estimated sizes are too small by a share."""
    knots = np.array([straight(GRID.step(db)) for db in GRID.knots]) * (1 - wrong_by)
    return Search.begin(GRID, limit, [knots * 0.5, knots * 0.5], 0, hint_db=hint_db)


def finish(search: Search, encode: Callable[[int], float]) -> list[int]:
    """The steps tried."""
    tried: list[int] = []
    while (step := search.next()) is not None:
        assert step not in tried
        tried.append(step)
        search.note(Trial(step=step, bytes=math.ceil(encode(step)), records={}))
    return tried


@settings(max_examples=300, deadline=None)
@given(limit=st.integers(150_000, 1_100_000), wrong_by=st.floats(-0.15, 0.15), tilt=st.floats(-0.0002, 0.0002))
def test_the_best_fits_and_fills_the_budget_or_the_next_steps_would_not_fit(
    limit: int, wrong_by: float, tilt: float
) -> None:
    def encode(step: int) -> float:
        return straight(step) * (1 + tilt * (step - 420))

    search = begin(limit, wrong_by=wrong_by)
    tried = finish(search, encode)
    assert len(tried) <= PASSES + MISSES
    if search.best is None:
        assert encode(0) > limit
        return
    assert encode(search.best.step) <= limit
    if search.best.step < GRID.step(48.0):
        assert search.best.bytes >= ENOUGH * limit or encode(search.best.step + 2) > limit


@pytest.mark.parametrize(("wrong_by", "passes"), [(0.0, 1), (0.02, 2), (-0.02, 2)])
def test_few_passes_suffice(wrong_by: float, passes: int) -> None:
    for limit in range(300_000, 900_000, 37_000):
        search = begin(limit, wrong_by=wrong_by)
        assert len(finish(search, straight)) <= passes
        assert search.best is not None
        assert straight(search.best.step + 1) > limit


def test_a_version_that_fills_the_budget_ends_the_search() -> None:
    limit, step = 600_000, begin(600_000, wrong_by=0.01).next()
    assert step is not None
    for share, ends in ((ENOUGH, True), (ENOUGH - 0.001, False)):
        search = begin(limit, wrong_by=0.01)
        search.note(Trial(step=step, bytes=math.ceil(share * limit), records={}))
        assert (search.next() is None) is ends


def test_noise_between_neighbouring_steps_never_breaks_the_bound() -> None:
    rng = np.random.default_rng(0)
    for limit in range(300_000, 900_000, 21_000):
        noise = rng.normal(0, 0.004, 2000)
        search = begin(limit, wrong_by=0.03)
        tried = finish(search, lambda step, noise=noise: straight(step) * (1 + noise[step]))  # type: ignore[misc]
        assert search.best is not None
        assert search.best.bytes <= limit
        assert len(tried) <= PASSES + MISSES


def test_a_target_that_is_there_already_is_tried_first_where_it_is_near() -> None:
    limit = round(straight(GRID.step(30.0)) + 10)
    assert begin(limit, hint_db=29.9).next() == GRID.step(29.9)
    assert begin(limit, hint_db=29.0).next() == GRID.step(30.0)
    search = begin(limit, wrong_by=0.01, hint_db=30.0)
    assert finish(search, straight) == [GRID.step(30.0)]


def test_a_budget_below_the_lowest_target_is_refused_without_a_pass() -> None:
    search = begin(round(straight(0) * 0.5))
    assert finish(search, straight) == []
    assert search.least() == (round(straight(0)), False)


def test_a_budget_just_below_the_lowest_target_is_refused_by_a_count() -> None:
    search = begin(round(straight(0) * 0.97))
    assert finish(search, straight) == [0]
    assert search.best is None
    assert search.least() == (math.ceil(straight(0)), True)


def test_a_budget_for_more_than_the_highest_target_takes_that() -> None:
    search = begin(10_000_000)
    assert finish(search, straight) == [GRID.step(48.0)]


def test_limits() -> None:
    assert BudgetRecord(target_ratio=7).limit(1000) == 142
    assert BudgetRecord(max_bytes=64 << 20).limit(1000) == 64 << 20


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(150_000, 1_100_000), floor=st.integers(6, 30), wrong_by=st.floats(-0.1, 0.1))
def test_no_step_below_the_floor_is_tried(limit: int, floor: int, wrong_by: float) -> None:
    lowest = GRID.step(floor)
    knots = np.array([straight(GRID.step(db)) for db in GRID.knots]) * (1 - wrong_by)
    search = Search.begin(GRID, limit, [knots], 0, hint_db=7.0, lowest=lowest)
    tried = finish(search, straight)
    assert all(step >= lowest for step in tried)
    assert (search.best is None) == (straight(lowest) > limit)
    if search.best is None:
        least, counted = search.least()
        assert not counted or least == math.ceil(straight(lowest))


@pytest.mark.parametrize("allocation", ["uniform", "size", "header"])
@pytest.mark.parametrize("floor", [6.0, 15.0, 30.0])
def test_the_lowest_step_leaves_every_tensor_its_floor_and_the_one_before_does_not(
    allocation: str, floor: float
) -> None:
    profile = replace(PROFILES["balanced"], allocation=allocation)  # type: ignore[arg-type]
    shapes = [(64, 64), (1280, 5120), (32, 1, 3, 3)]
    plan = plan_of(profile, shapes)
    grid = Grid.of(plan.profile)
    step = lowest_step(plan, floor)

    def least(step: int) -> float:
        decided = (item.decision for item in plan.at(grid.target(step)).tensors)
        return min(made.target_db or 0.0 for made in decided if made.action == "coded")

    assert least(step) >= floor
    assert step == 0 or least(step - 1) < floor
    uniform = replace(PROFILES["balanced"], allocation="uniform")
    assert lowest_step(plan_of(uniform, shapes), BUDGET_FLOOR_DB) == Grid.of(uniform).step(BUDGET_FLOOR_DB)


def plan_of(profile: Profile, shapes: list[tuple[int, ...]]) -> ModelPlan:
    tensors = tuple(stored(f"b.{number}.weight", shape) for number, shape in enumerate(shapes))
    path = Path("/none")
    found = Checkpoint(path=path, files=(path,), nbytes=0, format="safetensors", tensors=tensors)
    return plan_model("net", found, profile, shard_bytes=1 << 20)
