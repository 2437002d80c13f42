"""The table of the family: does each member build, compress, load, give its publishers' masks, find everything, export.

    BIRKHOFF_UPSTREAM=DIR .venv-family/bin/python -m tests.harness.benchmarks family [--only NAME,...] [--again]

In the environment of `make setup-family`, with the clones that tests/family names below DIR. Every member has its full
architecture; weights are random but LiteMedSAM's, which are trained. A process for each member, so that its memory goes
back; each row is kept in `results/family.json` as soon as it is there, and left alone by the next run unless `--again`
or `--only` says otherwise. `results/family.md` is drawn from it.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.family.members import MEMBERS
from tests.harness.benchmarks import common, family_report

PACKAGES = ("torch", "torchvision", "transformers", "timm")
MOST_SECONDS = 3600


def measure(name: str, work: Path | None) -> dict[str, Any]:
    """The row of a member, from a process of its own."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        home = os.environ | {"BIRKHOFF_HOME": str(Path(folder) / "home")}
        command = [sys.executable, "-W", "ignore", "-m", "tests.harness.benchmarks.family_row", name, folder]
        try:
            ended = subprocess.run(
                command, cwd=common.ROOT, env=home, stdout=subprocess.PIPE, text=True, timeout=MOST_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"name": name, "builds": {"reason": f"not done after {MOST_SECONDS} s"}}
    if ended.returncode:
        return {"name": name, "builds": {"reason": f"its process ended with {ended.returncode}"}}
    row: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024  # of the largest so far
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the rows that are not there and draw the table; 1 where a cell has no result."""
    parser = argparse.ArgumentParser(prog="bench family", description=__doc__)
    parser.add_argument("--only", help="these members, again")
    parser.add_argument("--again", action="store_true", help="also the rows that are there")
    parser.add_argument("--draw", action="store_true", help="draw the page from the rows that are there, and no more")
    parser.add_argument("--work", type=Path, help="where models and artifacts lie meanwhile; a temporary folder else")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("torchvision") is None and not options.draw:
        print("family: left out, torchvision is not here; make setup-family")
        return 0
    wanted = [member.name for member in MEMBERS]
    if options.only:
        chosen = options.only.split(",")
        if unknown := [name for name in chosen if name not in wanted]:
            parser.error(f"no member {unknown[0]!r}; there are: {', '.join(wanted)}")
        wanted = [name for name in wanted if name in chosen]
    path = options.out / "family.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in (
        [] if options.draw else sorted(wanted, key=lambda name: "-H" in name or "-L" in name)
    ):  # large ones last
        if name in kept and not (options.again or options.only):
            continue
        print(f"family: {name}", file=sys.stderr, flush=True)
        made_on = common.conditions(*PACKAGES)
        kept = common.keep(options.out, "family", name, measure(name, options.work) | {"made_on": made_on})
        (options.out / "family.md").write_text(family_report.markdown(kept))
    (options.out / "family.md").write_text(family_report.markdown(kept))
    print((options.out / "family.md").read_text())
    return int(any(family_report.failed(row) for row in kept.values()))
