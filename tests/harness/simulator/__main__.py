"""`python -m tests.harness.simulator`: schedules by seed, until one breaks an invariant of PROTOCOL.md.

    python -m tests.harness.simulator --schedules 1000000 --jobs 2
    python -m tests.harness.simulator --seed 29 --trace             # one again, step by step
    python -m tests.harness.simulator --mutant "old publish" --schedules 2000    # one rule broken: how soon it is found

Exit code 1: an invariant was broken (with `--mutant`: none was).
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence

from tests.harness.simulator.mutants import MUTANTS, work
from tests.harness.simulator.scenario import Schedule, simulated

CHUNK = 500


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.simulator")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--schedules", type=int, default=1, help="how many, each with the next seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--derived", action="store_true", help="some publishers' versions are differences to others")
    parser.add_argument("--mutant", choices=MUTANTS, help="break one rule of the product first")
    parser.add_argument("--trace", action="store_true", help="print every step of the first schedule")
    options = parser.parse_args(arguments)
    if options.trace:
        return trace(options.seed, options.mutant, derived=options.derived)
    began, done, operations = time.monotonic(), 0, 0
    seeds = range(options.seed, options.seed + options.schedules)
    chunks = [(seeds[start : start + CHUNK], options.mutant, options.derived) for start in range(0, len(seeds), CHUNK)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for chunk, (steps, finding) in zip(chunks, pool.imap(work, chunks), strict=True):
            operations += steps
            if finding is not None:
                print(f"seed {finding.seed}: {finding.text}")
                print(
                    f"again: python -m tests.harness.simulator --trace --seed {finding.seed}"
                    + _option(options.mutant)
                    + (" --derived" if options.derived else "")
                )
                return 0 if options.mutant else 1
            done += len(chunk[0])
            seconds = time.monotonic() - began
            print(f"{done} schedules, {operations} operations, {seconds:.0f} s, nothing found", flush=True)
    return 1 if options.mutant else 0


def trace(seed: int, mutant: str | None, *, derived: bool) -> int:
    """One schedule, step by step."""
    chosen = MUTANTS[mutant] if mutant else None
    with simulated(**chosen.changes if chosen else {}):
        schedule = Schedule(seed, focus=chosen.focus if chosen else None, derived=derived, trace=True)
        try:
            schedule.run()
        except BaseException:
            traceback.print_exc()
        print(schedule)
        print("\n".join(schedule.simulation.trace or ()))
    return 0


def _option(mutant: str | None) -> str:
    return f' --mutant "{mutant}"' if mutant else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
