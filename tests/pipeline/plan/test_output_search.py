"""The search for the smallest version that agrees far enough, against models of how agreement depends on dB."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birkhoff.pipeline.plan.grid import Grid
from birkhoff.pipeline.plan.output_search import PROBES, RESOLUTION_DB, START_DB, OutputSearch, Wanted

GRID = Grid(low=6.0, high=60.0)


def run(wanted: Wanted, measure: Callable[[float], tuple[float | None, float | None]], lowest_db: float = 6.0):
    """(the search, the targets that were tried in their order)."""
    search, tried = OutputSearch(grid=GRID, lowest=GRID.step(lowest_db)), []
    while (step := search.next()) is not None:
        target = GRID.target(step)
        assert target not in tried, "nothing is proven twice"
        assert target >= lowest_db
        tried.append(target)
        search.note(step, wanted.lacking_db(*measure(target)))
    return search, tried


def agreement(steepness: float, at: float) -> Callable[[float], tuple[float, None]]:
    return lambda db: (round(max(0.0, 1 - 0.1 * 10 ** ((at - db) / steepness)), 3), None)


@given(wanted=st.floats(0.6, 0.99), steepness=st.floats(10, 40), at=st.floats(15, 40))
def test_the_lowest_target_that_reaches_it_is_found(wanted: float, steepness: float, at: float) -> None:
    measure, aim = agreement(steepness, at), Wanted(agreement=wanted)
    search, tried = run(aim, measure)
    assert len(tried) <= PROBES
    reached = [target for target in tried if measure(target)[0] >= wanted]
    if not reached:
        assert tried[-1] == GRID.high
        assert search.best is None
        return
    assert search.best is not None
    best = GRID.target(search.best)
    assert best == min(reached)
    below = best - RESOLUTION_DB
    assert len(tried) == PROBES or below < GRID.low or measure(below)[0] < wanted


@pytest.mark.parametrize("wanted", [0.8, 0.9, 0.95, 0.97, 0.99])
def test_a_model_like_the_first_real_one_takes_few_probes(wanted: float) -> None:
    """LiteMedSAM: 0.917 at 30 dB, 0.813 at 24, 0.686 at 20."""
    _, tried = run(Wanted(agreement=wanted), agreement(17.0, 28.6))
    assert tried[0] == START_DB
    assert len(tried) <= 7


def test_an_sqnr_of_outputs_is_found_at_once() -> None:
    search, tried = run(Wanted(output_db=35.0), lambda db: (None, db - 2.1))
    assert GRID.target(search.best or 0) == 37.25
    assert len(tried) <= 4


def test_outputs_without_error_go_down() -> None:
    search, _ = run(Wanted(output_db=35.0), lambda db: (None, None if db > 20 else db))
    assert GRID.target(search.best or 0) == 20.25


def test_the_floor_and_the_ceiling_end_it() -> None:
    search, tried = run(Wanted(agreement=0.5), lambda _: (1.0, None), lowest_db=15.0)
    assert (GRID.target(search.best or 0), tried[-1]) == (15.0, 15.0)
    search, tried = run(Wanted(agreement=0.99), lambda _: (0.2, None))
    assert (search.best, tried[-1]) == (None, 60.0)
    search, _ = run(Wanted(agreement=0.9), lambda _: (None, None))
    assert search.best is None


def test_noise_leaves_a_target_that_reaches_it() -> None:
    """Agreement is not strictly monotone: what is taken was measured, and reached it."""
    measure = lambda db: (round(1 - 0.1 * 10 ** ((28 - db) / 17) + 0.02 * math.sin(40 * db), 3), None)  # noqa: E731
    search, tried = run(Wanted(agreement=0.9), measure)
    assert search.best is not None
    assert measure(GRID.target(search.best))[0] >= 0.9
    assert len(tried) <= PROBES
