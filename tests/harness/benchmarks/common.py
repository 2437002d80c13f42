"""What every result carries: machine, versions, commit, date; and the two files that it becomes."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from birkhoff.pipeline.run.environment import processor

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results"


def conditions(*packages: str, commit_hash: str | None = None) -> dict[str, str]:
    """Date, commit (with `+` where files differ from it), processor, cores, load and the versions of `packages`.

    `commit_hash` stands for the commit where there is no git.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit_hash or commit(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f} processes in the minute before",
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
    }


def commit() -> str:
    """Short hash of HEAD, `+` behind it where tracked sources of the codec differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "codec", "kernels", "pipeline"], cwd=ROOT)
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def installed(package: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median processor time of `repeats` runs: what they take of a core of their own, whoever else is busy."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column to the left, others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def keep(folder: Path, name: str, key: str, record: dict[str, Any]) -> dict[str, Any]:
    """Put a record into `folder/NAME.json` in the place of its earlier one; returns all that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    records: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    records[key] = record
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return records


def facts(records: dict[str, Any]) -> str:
    """The conditions of records, a line for each."""
    return "\n".join(
        f"- {name}: {', '.join(f'{key} {value}' for key, value in one['conditions'].items())}"
        for name, one in records.items()
    )


def write(name: str, markdown: str, data: dict[str, Any]) -> None:
    """Store `results/NAME.md` and `.json`, and print the first."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(markdown)
