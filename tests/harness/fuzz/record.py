"""What runs of the fuzzers came to: `fuzz.json`, a record for each target, and `fuzz.md`, drawn from it."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.benchmarks import common

NAME = "fuzz"

PREFACE = """# Fuzzing, parser by parser

Drawn by `python -m tests.harness.fuzz TARGET --seconds N --record` from `fuzz.json`. Coverage guides the search
(atheris, of libFuzzer), which starts from the committed corpus and the valid inputs that a target makes. *Inputs*: both
of these, counted when the run was entered; *new*: what the run found that reaches code which nothing before it did.
*Peak* is the whole process with its libraries. A run above 1024 MiB, an input above 20 s, or any error but a refusal of
ours in one line is a finding, and ends the run."""

HEAD = [
    "target", "seconds", "executions", "inputs", "new", "slowest input, s", "peak, MiB", "findings", "commit",
]  # fmt: skip

_STAT = re.compile(r"^stat::(\w+):\s+(\d+)\s*$", re.MULTILINE)
_SUMMARY = re.compile(r"^SUMMARY: .*$", re.MULTILINE)
_STATS = ("number_of_executed_units", "new_units_added", "slowest_unit_time_sec", "peak_rss_mb")


def run(command: Sequence[str]) -> tuple[int, str, float]:
    """Run a fuzzer, its words shown as they come; returns its exit code, these words, and the seconds that it took."""
    start, words = time.monotonic(), []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(line)
            words.append(line)
    return child.returncode, "".join(words), time.monotonic() - start


def record(texts: Sequence[str], *, seconds: float, code: int, inputs: int, commit: str | None) -> dict[str, Any]:
    """The record of a run whose parts printed these words. Raises ValueError where the statistics are not in them."""
    parts = [{name: int(value) for name, value in _STAT.findall(text)} for text in texts]
    if missing := [name for part in parts for name in _STATS if name not in part]:
        raise ValueError(f"expected libFuzzer's final statistics, found no {missing[0]!r}")
    summary = _SUMMARY.search(texts[-1])
    return {
        "conditions": common.conditions("atheris", "torch", commit_hash=commit),
        "seconds": round(seconds),
        "executions": sum(part["number_of_executed_units"] for part in parts),
        "inputs": inputs,
        "new": sum(part["new_units_added"] for part in parts),
        "slowest_s": max(part["slowest_unit_time_sec"] for part in parts),
        "peak_mib": max(part["peak_rss_mb"] for part in parts),
        "findings": [summary[0] if summary else f"exit code {code}"] if summary or code else [],
    }


def save(folder: Path, target: str, one: dict[str, Any]) -> str:
    """Put a target's record beside those of the others, and draw the page anew; returns it."""
    records = dict(sorted(common.keep(folder, NAME, target, one).items()))
    table = common.table(HEAD, [_cells(name, row) for name, row in records.items()])
    found = "\n".join(f"- {name}: `{text}`" for name, row in records.items() for text in row["findings"])
    parts = [PREFACE, table, *([f"Findings:\n\n{found}"] if found else []), common.facts(records)]
    page = "\n\n".join(parts) + "\n"
    (folder / f"{NAME}.md").write_text(page)
    return page


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    numbers = [f"{row[key]:,}" for key in ("seconds", "executions", "inputs", "new", "slowest_s", "peak_mib")]
    return [name, *numbers, str(len(row["findings"])), row["conditions"]["commit"]]
