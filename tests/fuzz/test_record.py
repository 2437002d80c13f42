"""The table of fuzzing runs, and what is said where the fuzzer is not installed."""

import json
import sys
from pathlib import Path

import pytest

from tests.harness.fuzz.__main__ import PART_INPUTS, main

STATS = """stat::number_of_executed_units: 123456
stat::average_exec_per_sec:     68
stat::new_units_added:          7
stat::slowest_unit_time_sec:    2
stat::peak_rss_mb:              345
"""


def test_without_the_fuzzer_one_line_tells_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    assert main(["manifest", "--seconds", "1", "--inputs", "1"]) == 1
    assert capsys.readouterr().err == (
        "no atheris here; pip install -c constraints.txt -e '.[fuzz]', or use make fuzz\n"
    )


def _entered(tmp_path: Path, text: str) -> int:
    log = tmp_path / "log"
    log.write_text(text)
    given = ["--seconds", "1800", "--record", "--log", str(log), "--commit", "abc1234", "--out", str(tmp_path)]
    return main(["manifest", *given])


def test_a_run_is_entered_by_its_last_words(tmp_path: Path) -> None:
    assert _entered(tmp_path, "#123456 DONE\n" + STATS) == 0
    one = json.loads((tmp_path / "fuzz.json").read_text())["manifest"]
    assert [one[key] for key in ("seconds", "executions", "new", "slowest_s", "peak_mib")] == [1800, 123456, 7, 2, 345]
    assert one["inputs"] > 10
    assert one["findings"] == []
    (row,) = [line for line in (tmp_path / "fuzz.md").read_text().splitlines() if line.startswith("| manifest")]
    assert row.startswith("| manifest | 1,800 | 123,456 |")
    assert row.endswith("| 0 | abc1234 |")


def test_a_finding_is_entered_as_one(tmp_path: Path) -> None:
    assert _entered(tmp_path, "SUMMARY: libFuzzer: fuzz target exited\n" + STATS) == 0
    page = (tmp_path / "fuzz.md").read_text()
    assert "| 1 | abc1234 |" in page
    assert "- manifest: `SUMMARY: libFuzzer: fuzz target exited`" in page


def test_words_without_figures_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _entered(tmp_path, STATS.replace("peak", "peek")) == 1
    assert capsys.readouterr().err.startswith("manifest: nothing recorded: expected libFuzzer's final statistics")
    assert not (tmp_path / "fuzz.json").exists()


def test_a_long_run_is_several_processes_until_its_time_is_up_or_one_finds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(command: list[str]) -> tuple[int, str, float]:
        assert f"--inputs={PART_INPUTS}" in command
        asked.append(next(word for word in command if word.startswith("--seconds")))
        return 0, STATS if len(asked) != 2 else STATS.replace(" 345", " 350"), 499.0

    monkeypatch.setattr("tests.harness.fuzz.record.run", run)
    assert main(["manifest", "--seconds", "1500", "--record", "--out", str(tmp_path)]) == 0
    assert asked == ["--seconds=1500", "--seconds=1001", "--seconds=502"]
    one = json.loads((tmp_path / "fuzz.json").read_text())["manifest"]
    assert [one[key] for key in ("seconds", "executions", "new", "peak_mib")] == [1497, 3 * 123456, 21, 350]

    asked.clear()
    monkeypatch.setattr("tests.harness.fuzz.record.run", lambda command: (77, STATS, run(list(command))[2]))
    assert main(["manifest", "--seconds", "1500"]) == 77
    assert asked == ["--seconds=1500"]
