"""`python -m tests.harness.benchmarks [PART] [ARGS]`: one part (codec, ...), or every part with its defaults.

Beside the parts: `trend [PART...]` draws the course of their figures, `summary [--write]` README's table.
"""

import importlib
import sys
from pathlib import Path

from tests.harness.benchmarks import history, summary

PAGES = {"trend": history.trend, "summary": summary.main}
"""What is drawn from results, and measures nothing."""


def parts() -> list[str]:
    """The parts there are: a part X is a module bench_X with a function main(arguments)."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(arguments: list[str]) -> int:
    """Run the part named first, else all; returns the exit code."""
    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    if named and named[0] in PAGES:
        return PAGES[named[0]](arguments[1:])
    if named and named[0] not in parts():
        expected = ", ".join([*parts(), *PAGES])
        print(f"no benchmark {named[0]!r}: expected one of {expected}", file=sys.stderr)
        return 2
    codes = [
        importlib.import_module(f"tests.harness.benchmarks.bench_{part}").main(arguments[len(named) :])
        for part in named or parts()
    ]
    history.record()
    return max(code or 0 for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
