"""The search for a budget's target: decisions alone, on made-up encoders."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.budget import Grid
from birkhoff.pipeline.artifact import BudgetRecord
from birkhoff.pipeline.budget import MISSES, PASSES, Search, Trial

GRID = Grid(low=6, high=48)
WEIGHTS = 1_000_000


def straight(step: int) -> float:
    """Bytes of a version at a step of the grid: so many bits a weight."""
    return WEIGHTS * (GRID.target(step) / 6.02 + 0.1) / 8


def begin(limit: int, *, wrong_by: float = 0.0, hint_db: float | None = None) -> Search:
    """A search whose foretold sizes are too small by a share."""
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
def test_the_best_fits_and_the_next_step_would_not(limit: int, wrong_by: float, tilt: float) -> None:
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
        assert encode(search.best.step + 2) > limit


@pytest.mark.parametrize(("wrong_by", "passes"), [(0.0, 1), (0.02, 2), (-0.02, 2)])
def test_few_passes_suffice(wrong_by: float, passes: int) -> None:
    for limit in range(300_000, 900_000, 37_000):
        search = begin(limit, wrong_by=wrong_by)
        assert len(finish(search, straight)) <= passes
        assert search.best is not None
        assert straight(search.best.step + 1) > limit


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
