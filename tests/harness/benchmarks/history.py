"""The course of figures from run to run: `results/history.jsonl`, a line for each result and machine.

    python -m tests.harness.benchmarks trend [PART...]     # exit code 1 if the newest run made a figure worse

Every run of a part appends what `HEADLINES` names of its results, while the tables in `results` show the newest run
alone. A figure got worse if it lost more than `SLACK` since the run before on the same machine.
"""

import fnmatch
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birkhoff.pipeline.text import sparkline
from tests.harness.benchmarks.common import RESULTS

NAME = "history.jsonl"

HEADLINES = {
    "by_output": ("*/run_s",),
    "budget": ("rows/*/bytes", "rows/*/box_truth"),
    "codec": tuple(f"rows/MiniLM-L6/{profile}/*" for profile in ("small", "balanced", "fast", "fine", "match-paper")),
    "family": ("*/compresses/stored", "*/seconds/compresses"),
    "fleet": ("*/runs/*wall_s", "*/runs/*second_run_s", "*/runs/*stored_bytes"),
    "inference": ("* SAM-H/rows/ours*/latency_ms", "* SAM-H/rows/ours*/weights_bytes", "* SAM-H/rows/ours*/load_s"),
    "kernels": (
        "calls/found/host time*",
        "chain/found/*/ratio",
        "int8_chain/found/*/int8/ratio",
        "*/found/*/of_copy",
        "search/found/wall_ms",
    ),
    "lite_medsam": ("profiles/*/mean", "profiles/*/fifth", "profiles/*/stored_bytes"),
    "load_cuda": ("figures/ours*/load_s",),
    "masks": tuple(f"rows/{ours}*/*" for ours in ("output", "scale", "header")),
    "pull": ("figures/birkhoff*/*_s",),
    "scaling": ("*runs*/seconds", "*runs*/first_pass_s"),
}
"""The figures that are followed, by result: globs on their paths."""

_KINDS = {
    "fidelity": re.compile(r"(agreement|mean|fifth|box_truth|_db)$"),
    "speed": re.compile(r"(of_copy|_mb_s)$"),
    "time": re.compile(r"(_s|_ms|us|seconds|seconds/[^/]*|compresses|ratio)$"),
    "size": re.compile(r"(bytes|stored|bits)$"),
}
"""What a figure is, by its last key; figures of no kind are not followed. More of the first two is better."""

SLACK = {"fidelity": 0.01, "size": 0.005, "speed": 0.1, "time": 0.15}
"""The part of itself that a figure may lose between two runs: times differ from run to run, sizes do not."""

_IDENTITY = (("name",), ("form",), ("model", "profile", "allocation", "ratio"))
"""Keys that tell the rows of a list apart: the first of these that a row has."""

_ABOUT = ("made_on", "conditions", "machine", "versions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A figure on one machine, oldest first."""

    part: str
    machine: str
    figure: str
    values: Sequence[float]
    commits: Sequence[str]

    @property
    def kind(self) -> str:
        """`fidelity`, `size`, `speed` or `time`."""
        return kind_of(self.figure) or "time"

    @property
    def worse(self) -> bool:
        """Whether the newest run lost more than the slack."""
        if len(self.values) < 2:
            return False
        before, now = self.values[-2:]
        loss = before - now if self.kind in ("fidelity", "speed") else now - before
        return loss > abs(before) * SLACK[self.kind]

    def __str__(self) -> str:
        span = f"{self.values[0]:.4g} ({self.commits[0]}) to {self.values[-1]:.4g} ({self.commits[-1]})"
        return f"{sparkline(self.values)} {self.figure}: {span}"


def kind_of(figure: str) -> str | None:
    """What a figure is, by its path; None for what is no measurement."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(figure)), None)


def append(part: str, data: Any, folder: Path = RESULTS) -> int:
    """Append the figures of a result; returns how many lines are new. A block that is there already is left alone."""
    known = {_key(line) for line in read(folder)}
    fresh = [line for line in lines(part, data) if _key(line) not in known]
    if fresh:
        with (folder / NAME).open("a") as file:
            file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in fresh)
    return len(fresh)


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All lines, oldest first."""
    path = folder / NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def lines(part: str, data: Any) -> Iterator[dict[str, Any]]:
    """A line for each part of a result that has conditions of its own, if it has figures that are followed."""
    for path, conditions, block in _blocks(data, ()):
        found = defaultdict(list)
        for figure, value in _figures(block, path):
            if kind_of(figure) and any(fnmatch.fnmatchcase(figure, glob) for glob in HEADLINES.get(part, ())):
                found[figure].append(value)
        if found:
            figures = {figure: float(f"{statistics.median(values):.6g}") for figure, values in found.items()}
            yield {"part": part, "conditions": conditions, "figures": figures}


def courses(entries: Sequence[dict[str, Any]], parts: Sequence[str] = ()) -> list[Course]:
    """The course of each figure on each machine."""
    found: dict[tuple[str, str, str], list[tuple[float, str]]] = defaultdict(list)
    for entry in entries:
        if not parts or entry["part"] in parts:
            conditions = entry["conditions"]
            for figure, value in entry["figures"].items():
                found[entry["part"], machine(conditions), figure].append((value, conditions.get("commit", "unknown")))
    return [
        Course(part=part, machine=on, figure=figure, values=values, commits=commits)
        for (part, on, figure), course in found.items()
        for values, commits in [tuple(zip(*course, strict=True))]
    ]


def machine(conditions: dict[str, str]) -> str:
    """The machine of a line, by its GPU if it has one."""
    return conditions.get("gpu") or conditions.get("processor") or conditions.get("cpu", "unknown")


def record(folder: Path = RESULTS) -> None:
    """Append whatever results the folder has and its history lacks, also those that another machine measured."""
    for path in sorted(folder.glob("*.json")):
        if new := append(path.stem, json.loads(path.read_text()), folder):
            print(f"{NAME}: {new} new lines of {path.stem}; `python -m tests.harness.benchmarks trend` draws them")


def trend(parts: Sequence[str]) -> int:
    """Print the course of every figure, then those that got worse; returns 1 if there are any."""
    record()
    found = courses(read(), parts)
    heading = None
    for course in found:
        if (course.part, course.machine) != heading:
            heading = course.part, course.machine
            print(f"\n{course.part}, {course.machine}")
        print(f"  {course}")
    worse = [course for course in found if course.worse]
    print(f"\n{len(found)} figures, {len(worse)} worse than in the run before")
    for course in worse:
        print(f"  {course.part}, {course.machine}: {course.figure} {course.values[-2]:.4g} to {course.values[-1]:.4g}")
    return 1 if worse else 0


def _key(line: dict[str, Any]) -> str:
    return json.dumps(line, sort_keys=True)


def _blocks(data: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, str], Any]]:
    """(path, conditions, part) of what has conditions of its own, rows of a list too."""
    if isinstance(data, list):
        for row in data:
            yield from _blocks(row, (*path, _name(row)))
    if not isinstance(data, dict):
        return
    if own := _conditions(data):
        yield path, own, data
        return
    for key, value in data.items():
        yield from _blocks(value, (*path, key))


def _conditions(data: dict[str, Any]) -> dict[str, str]:
    if "machine" in data:
        known = {**data["machine"], **data.get("versions", {}), "commit": data.get("commit", "unknown")}
        return {key: str(value) for key, value in known.items()}
    return {key: str(value) for about in ("made_on", "conditions") for key, value in data.get(about, {}).items()}


def _figures(data: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Every number with its path; rows of a list go by name, several of one name share a path."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key not in _ABOUT:
                yield from _figures(value, (*path, key))
    elif isinstance(data, list):
        for row in data:
            yield from _figures(row, (*path, name) if (name := _name(row)) else path)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield "/".join(path), float(data)


def _name(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    keys = next((keys for keys in _IDENTITY if any(key in row for key in keys)), ())
    return ", ".join(str(row[key]) for key in keys if key in row)
