"""Threads follow what a container grants, not what the machine has."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from birkhoff.codec.native import processors as module
from birkhoff.codec.native.processors import processors

TREE = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_control_group_grants_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], granted: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processors() == min(8, math.inf if granted == math.inf else math.ceil(granted))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to processors here")
def test_a_process_that_is_bound_to_one_processor_uses_one() -> None:
    asked = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from birkhoff.codec.native.processors import processors; print(processors())"
    )
    assert subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout == "1\n"


def test_nothing_counts_the_machines_processors_instead() -> None:
    counting = [
        f"{path.relative_to(TREE)}"
        for package in ("codec", "kernels", "pipeline")
        for path in (TREE / package).rglob("*.py")
        if re.search(r"os\.(cpu_count|sched_getaffinity)", path.read_text()) and path.name != "processors.py"
    ]
    assert counting == []
