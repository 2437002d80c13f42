"""Publishers against collections, judged by the history checker; longer by `python -m tests.harness.faults races`."""

from datetime import timedelta

import pytest

from birkhoff.pipeline.registry import leases
from birkhoff.pipeline.store.base import Store
from tests.harness.faults.history import Op, highest, lifetime, linearizable
from tests.harness.faults.race_collections import CollectionRace
from tests.pipeline.conftest import directory_store, memory_store, s3_store, store

__all__ = ["directory_store", "memory_store", "s3_store", "store"]

pytestmark = pytest.mark.faults


def op(name: str, answer: object, called: float, answered: float) -> Op:
    return Op(name=name, argument=1, answer=answer, called=called, answered=answered)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("good", "ops"),
    [
        (True, [op("publish", 1, 1, 3), op("read", "no", 2, 4), op("read", "whole", 2, 5)]),
        (True, [op("publish", 1, 1, 2), op("retire", True, 3, 5), op("read", "whole", 4, 6), op("read", "no", 4, 6)]),
        (False, [op("publish", 1, 1, 2), op("read", "no", 3, 4)]),  # acknowledged, and lost
        (False, [op("publish", 1, 1, 2), op("retire", True, 3, 4), op("read", "whole", 5, 6)]),  # came back
        (False, [op("publish", 1, 1, 2), op("retire", True, 3, 4), op("retire", True, 5, 6)]),
        (False, [op("publish", 1, 1, 9), op("read", "broken", 2, 8)]),
        (False, [op("publish", 1, 1, 9), op("retire", True, 1, 9), op("read", "broken", 2, 8)]),
    ],
)
def test_the_checker_tells_lives_of_versions_apart(good: bool, ops: list[Op]) -> None:
    assert linearizable(ops, "absent", lifetime) is good


@pytest.mark.parametrize(
    ("good", "ops"),
    [
        (True, [op("publish", 1, 1, 5), op("publish", 2, 2, 3), op("latest", 2, 4, 6)]),
        (False, [op("publish", 1, 1, 2), op("latest", 0, 3, 4)]),
        (False, [op("publish", 2, 1, 2), op("publish", 1, 3, 4), op("latest", 1, 5, 6)]),  # went back
    ],
)
def test_the_checker_tells_moves_of_latest_apart(good: bool, ops: list[Op]) -> None:
    assert linearizable(ops, 0, highest) is good


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.02)


def test_publishers_against_a_collector_without_grace(store: Store, impatient: None) -> None:
    race = CollectionRace(store=store, grace=timedelta(0))
    assert race.run() == []
    assert race.swept > 0


def test_publishers_against_a_collector_with_grace(directory_store: Store, impatient: None) -> None:
    race = CollectionRace(store=directory_store, grace=timedelta(seconds=3), sweeps=1)
    assert race.run() == []
    assert race.swept > 0
    assert race.within_grace > 0


def test_a_collector_that_does_not_look_for_runs_is_found_out(
    directory_store: Store, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race itself is tried on a collector that is wrong: it sweeps what it marked, whoever publishes meanwhile."""
    monkeypatch.setattr(leases, "_live", lambda *_: [])
    found: list[str] = []
    for seed in range(5):
        found += CollectionRace(store=directory_store, grace=timedelta(0), seed=seed, turns=8).run()
        if found:
            break
    assert found
