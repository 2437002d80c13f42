"""Some schedules in every run of the tests, and proof that the simulator sees what it looks for."""

import subprocess
import sys

import pytest

from tests.harness.simulator.engine import Weather
from tests.harness.simulator.mutants import MUTANTS
from tests.harness.simulator.scenario import Schedule, run, simulated

SCHEDULES = 500
DERIVED_SCHEDULES = 300
ODD_SEEDS = (3188260, 4112910, 5059324, 5388175)
"""Seeds in which one of a million schedules once found a fault, or a check that asked too much: a killed collection's
record, a number claimed after days, a store's clock that ends 70 days behind, a name that lives although an earlier
claim of it was collected."""


def test_no_schedule_breaks_a_version_an_alias_or_a_name() -> None:
    operations, finding = run(range(SCHEDULES))
    assert finding is None, f"{finding.text}\nagain: python -m tests.harness.simulator --trace --seed {finding.seed}"
    assert operations > 100 * SCHEDULES


def test_no_schedule_takes_away_what_a_version_is_a_difference_to() -> None:
    operations, finding = run(range(DERIVED_SCHEDULES), derived=True)
    assert finding is None, (
        f"{finding.text}\nagain: python -m tests.harness.simulator --derived --trace --seed {finding.seed}"
    )
    assert operations > 100 * DERIVED_SCHEDULES


@pytest.mark.parametrize("seed", ODD_SEEDS)
def test_what_a_million_schedules_found_is_found_no_more(seed: int) -> None:
    _, finding = run([seed])
    assert finding is None, finding.text


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_found_out(name: str) -> None:
    mutant = MUTANTS[name]
    assert run([mutant.seed], focus=mutant.focus)[1] is None, "the fault is not the mutant's"
    _, finding = run([mutant.seed], focus=mutant.focus, **mutant.changes)
    again = f'python -m tests.harness.simulator --mutant "{name}" --schedules 20000'
    assert finding is not None, (
        f"seed {mutant.seed} finds it no more; if schedules have changed, look for another: {again}"
    )
    assert finding.text.startswith("Violation: ")


def test_schedules_differ_in_what_disturbs_them() -> None:
    with simulated():
        schedules = [Schedule(seed) for seed in range(200)]
    assert {schedule.like for schedule in schedules} == {"directory", "s3", "plain"}
    for name in ("pause", "kill", "lost", "ghost", "twice", "stale", "skewed", "store_steps"):
        seen = {bool(getattr(schedule.weather, name)) for schedule in schedules}
        assert seen == {False, True}, f"{name} of {Weather.__name__}"


_TRACE = """
import hashlib
from tests.harness.simulator.scenario import Schedule, simulated
with simulated():
    for seed in range(40):
        schedule = Schedule(seed, trace=True)
        schedule.run()
        print(seed, hashlib.sha256("".join(schedule.simulation.trace).encode()).hexdigest())
"""


def test_a_seed_replays_exactly_in_another_process() -> None:
    def traces(hash_seed: str) -> str:
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path), "PATH": ""}
        command = [sys.executable, "-c", _TRACE]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = traces("1")
    assert first.count("\n") == 40
    assert traces("2") == first
