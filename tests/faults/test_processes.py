"""The bounded form of the strikes: the driver is killed just before a version gets its name."""

from pathlib import Path

import pytest

from tests.harness.faults.processes import STRIKES, rows

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_driver_killed_before_the_name_leaves_nothing_and_the_next_run_completes(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, STRIKES[:1])
    assert (row["fault"], row["stage"], row["outcome"]) == ("SIGKILL of the driver", "name", "fails")
    assert row["wrong"] == []
    assert row["leaked"] == []
