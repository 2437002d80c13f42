"""The bounded form of the kill harness: one round with a kill of the driver and one of the store."""

from pathlib import Path

import pytest

from tests.chaos.kills import Harness
from tests.chaos.world import World


@pytest.mark.slow
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
