"""Figures that benchmarks append from run to run, and which of them got worse."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.benchmarks import history
from tests.harness.benchmarks.common import RESULTS


def masks(agreement: float, *, commit: str = "a", size: int = 100, processor: str = "cpu") -> dict[str, Any]:
    rows = [
        {"name": "output, 5", "agreement": agreement, "fifth": 0.8, "bytes": size},
        {"name": "int8", "agreement": 0.5, "bytes": 7},
    ]
    return {"made_on": {"commit": commit, "processor": processor}, "pictures": 24, "rows": rows}


def test_a_run_appends_what_is_followed_with_its_conditions(tmp_path: Path) -> None:
    assert history.append("masks", masks(0.9), tmp_path) == 1
    (line,) = history.read(tmp_path)
    assert line["conditions"] == {"commit": "a", "processor": "cpu"}
    assert line["figures"] == {
        "rows/output, 5/agreement": 0.9,
        "rows/output, 5/fifth": 0.8,
        "rows/output, 5/bytes": 100,
    }


def test_a_result_that_is_there_is_not_appended_again(tmp_path: Path) -> None:
    assert history.append("masks", masks(0.9), tmp_path) == 1
    assert history.append("masks", masks(0.9), tmp_path) == 0
    assert history.append("masks", masks(0.9, commit="b"), tmp_path) == 1
    assert len(history.read(tmp_path)) == 2


def test_parts_of_a_result_that_ran_apart_are_lines_of_their_own() -> None:
    def calls(gpu: str) -> dict[str, Any]:
        return {"made_on": {"gpu": gpu, "commit": "a"}, "found": {"host time, packed, us": [3.0, 1.0, 2.0]}}

    found = list(history.lines("kernels", {"calls": calls("H200"), "tune": {"made_on": {"gpu": "H200"}, "found": {}}}))
    assert [line["figures"] for line in found] == [{"calls/found/host time, packed, us": 2.0}]


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (masks(0.9, commit="b"), []),
        (masks(0.895, commit="b"), []),
        (masks(0.8, commit="b"), ["rows/output, 5/agreement"]),
        (masks(0.95, commit="b", size=102), ["rows/output, 5/bytes"]),
        (masks(0.1, commit="b", processor="another"), []),
    ],
)
def test_what_got_worse_is_named(now: dict[str, Any], worse: list[str]) -> None:
    entries = [line for data in (masks(0.9), now) for line in history.lines("masks", data)]
    assert [course.figure for course in history.courses(entries) if course.worse] == worse


def test_the_trend_says_what_got_worse_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(history, "record", lambda: None)
    monkeypatch.setattr(history, "read", lambda: history_of(0.7, 0.9, 0.8))
    assert history.trend(["masks"]) == 1
    said = capsys.readouterr().out
    assert "▁█▅ rows/output, 5/agreement: 0.7 (0) to 0.8 (2)" in said
    assert "1 worse than in the run before\n  masks, cpu: rows/output, 5/agreement 0.9 to 0.8" in said
    assert history.trend(["codec"]) == 0


def history_of(*values: float) -> list[dict[str, Any]]:
    found = (history.lines("masks", masks(value, commit=str(index))) for index, value in enumerate(values))
    return [line for lines in found for line in lines]


@pytest.mark.parametrize("part", history.HEADLINES)
def test_every_result_has_figures_that_are_followed_and_they_are_in_the_history(part: str) -> None:
    found = list(history.lines(part, json.loads((RESULTS / f"{part}.json").read_text())))
    assert found
    kept = {json.dumps(line, sort_keys=True) for line in history.read()}
    lacking = [line["conditions"] for line in found if json.dumps(line, sort_keys=True) not in kept]
    assert lacking == [], "`python -m tests.harness.benchmarks trend` appends them"
