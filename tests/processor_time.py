"""Processor time of each file of tests, which unlike the time on the clock hardly depends on what else is running.

    make test ARGS=--processor-time=25          # the 25 files that take most, after the summary

Counted are the process that runs the tests and its children that have ended and were waited for, fixtures included.
What runs on in a server, or was started by a process that nobody waited for (Ray's, mostly), is not.
"""

import os
from collections import defaultdict
from collections.abc import Generator

import pytest

NAME = "processor time"
_begun = pytest.StashKey[tuple[float, float]]()


def _now() -> tuple[float, float]:
    """Seconds of this process, and of its children."""
    times = os.times()
    return times.user + times.system, times.children_user + times.children_system


class ProcessorTime:
    """Takes the processor time of each test, and lists the files that take most."""

    def __init__(self, files: int) -> None:
        self._files = files

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        item.stash[_begun] = _now()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        try:
            return (yield)
        finally:
            begun = item.stash[_begun]
            own, children = (after - before for before, after in zip(begun, _now(), strict=True))
            item.user_properties.append((NAME, [round(own, 3), round(children, 3)]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for reports in terminalreporter.stats.values():
            for report in reports:
                taken = dict(getattr(report, "user_properties", ())).get(NAME)
                if taken is not None and report.when == "teardown":
                    for place, value in enumerate((*taken, 1)):
                        found[report.nodeid.partition("::")[0]][place] += value
        total = sum(own + children for own, children, _ in found.values())
        terminalreporter.section(f"processor time: {total:.0f} s")
        for name, (own, children, tests) in sorted(found.items(), key=lambda one: -one[1][0] - one[1][1])[
            : self._files
        ]:
            terminalreporter.write_line(
                f"{own + children:7.1f} s ({own:.1f} here, {children:.1f} in children), {tests:.0f} tests: {name}"
            )
