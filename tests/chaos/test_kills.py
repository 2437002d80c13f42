"""The bounded form of the kill harness: a kill of the driver and one of the store, and a worker at its birth."""

import random
from pathlib import Path

import pytest

from tests.harness.chaos.kills import LIMIT_SECONDS, Harness
from tests.harness.chaos.world import World


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT_SECONDS)  # of each of its runs; on a busy machine all of them are slow
def test_kills_of_driver_and_store_break_and_leak_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        harness = Harness(world, seed=1)
        harness.prepare()
        found = harness.round(0, ["driver", "store"])
    finally:
        world.close()
    assert not found.broken, found.broken
    assert not found.leaks, found.leaks
    assert (found.made_again, found.rewritten) == (0, 0)
    assert found.polls > 0
    assert found.kills.total() + found.missed == 2


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT_SECONDS)  # of each of its runs; on a busy machine all of them are slow
def test_a_run_whose_first_worker_is_killed_while_it_starts_completes(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        world.start_store()
        world.write_checkpoints(0)
        run = world.start_run()
        assert world.kill("worker", run, random.Random(0))  # Ray answers no driver that waits for such a worker
        _, errors = run.communicate(timeout=LIMIT_SECONDS)
    finally:
        world.close()
    assert run.returncode == 0, errors
