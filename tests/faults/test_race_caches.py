"""Many pullers on one cache, judged by what each wrote down; longer by `python -m tests.harness.faults races`."""

from pathlib import Path

import pytest

from birkhoff.pipeline.store.base import Store
from tests.harness.faults.history import Op
from tests.harness.faults.race_caches import CacheRace, explained
from tests.pipeline.conftest import directory_store

__all__ = ["directory_store"]

pytestmark = pytest.mark.faults


def op(argument: str, answer: tuple[str, ...], called: float, answered: float) -> Op:
    return Op(name="", argument=argument, answer=answer, called=called, answered=answered)


@pytest.mark.parametrize(
    ("good", "answer", "damage"),
    [
        (True, ("a", "b"), []),
        (False, ("a", "x"), []),
        (False, ("a",), []),
        (False, ("StoreError: gone",), []),
        (True, ("a", "x"), [op("b", (), 2, 3)]),
        (False, ("x", "b"), [op("b", (), 2, 3)]),  # another blob
        (False, ("a", "x"), [op("b", (), 5, 6)]),  # damaged later
        (False, ("a", "x"), [op("b", (), 0, 1)]),  # damaged before: the pull must have mended it
    ],
)
def test_the_checker_tells_pulls_apart(good: bool, answer: tuple[str, ...], damage: list[Op]) -> None:
    assert explained(op("v1", answer, 2, 4), ["a", "b"], damage) is good


def test_pullers_that_are_killed_on_a_cache_that_is_pruned_and_damaged(directory_store: Store, tmp_path: Path) -> None:
    race = CacheRace(store=directory_store, folder=tmp_path / "race", prunes=3, harm=3, kills=1)
    race.folder.mkdir()
    assert race.run() == []
    assert race.pruned >= race.prunes
    assert len(race.damages) >= race.harm
