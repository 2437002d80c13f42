"""The page of the benchmark `scaling`, from its data."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tests.harness.benchmarks import common

LIMIT = 1.8
"""Times the speed of one GPU that two must reach."""


def page(data: dict[str, Any]) -> str:
    """The page of results."""
    by_count: dict[str, list[dict[str, Any]]] = {}
    for one in data["runs"]:
        by_count.setdefault(str(one["asked"]), []).append(one)
    counts, first = _counts(by_count), data["runs"][0]
    facts = ", ".join(f"{name} {value}" for name, value in data["conditions"].items())
    return (
        "# The encode stage on more GPUs\n\n"
        f"`python -m tests.harness.benchmarks scaling`: {data['model']}'s tensors with drawn weights, {data['copies']} "
        f"times over, sources and store in memory, {len(next(iter(by_count.values())))} runs of each in turns; MB of "
        f"source a second. Every run made the same blobs. Two are to reach {LIMIT} times the first. Workers are busy "
        "from a shard's reading to its record; the tail begins when as many tasks are left as there are workers."
        f"{' Runs of one GPU each (1 + 1) share nothing but the host.' if len(by_count) > len(counts) else ''}\n\n"
        f"{_speeds(by_count, 'workers' if not first['gpus'] else 'GPUs')}\n\n"
        "## Where workers spend their time\n\n"
        "Seconds of all workers together, medians, and thousands of pages that the kernel mapped for them.\n\n"
        f"{_times(by_count)}\n\n{_bound(by_count)}\n\n{facts}\n"
    )


def _counts(by_count: Iterable[str]) -> list[str]:
    """The counts of GPUs in one run; what is left are runs side by side."""
    return [count for count in by_count if "+" not in count]


def _bound(by_count: dict[str, list[dict[str, Any]]]) -> str:
    """What processors alone allow."""
    counts = _counts(by_count)
    before, after = (_median(by_count[count], partial(_stage, "key")) for count in (counts[0], counts[-1]))
    times = int(counts[-1]) / int(counts[0])
    return (
        "The stage `key` hashes bytes that are in memory: no GPU, no lock, no storage. With all workers it takes "
        f"{after / before:.2f} times the seconds: a processor of this host gets less done the more of them are busy. "
        f"Such work becomes {times * before / after:.2f} times as fast with {times:g} times the workers."
    )


def _median(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, runs))


def _rate(one: dict[str, Any]) -> float:
    """MB of source a second."""
    return float(one["bytes"]) / float(one["seconds"]) / 1e6


def _speeds(by_count: dict[str, list[dict[str, Any]]], unit: str) -> str:
    """A row for each count."""
    base, rows = _median(next(iter(by_count.values())), _rate), []
    for count, runs in by_count.items():
        rate, rates = _median(runs, _rate), list(map(_rate, runs))
        rows.append(
            [
                count,
                str(runs[0]["cores"]),
                str(runs[0]["workers"]),
                str(runs[0]["shards"]),
                f"{_median(runs, lambda one: one['seconds']):.2f}",
                f"{rate:.0f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{rate / base:.2f}",
                f"{_median(runs, lambda one: one['busy']):.0%}",
                f"{_median(runs, lambda one: one['tail_s']):.2f}",
            ]
        )
    head = [unit, "cores", "workers", "shards", "s", "MB/s", "range", "times the first", "busy", "tail s"]
    return common.table(head, rows)


def _stage(name: str, one: dict[str, Any]) -> float:
    """Seconds of all workers in a stage."""
    return float(one["stages_worker_s"][name])


def _times(by_count: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each stage, and for what processors did."""
    first = next(iter(by_count.values()))
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        name: partial(_stage, name) for name in first[0]["stages_worker_s"]
    }
    values["all stages"] = lambda one: sum(one["stages_worker_s"].values())
    values["processors, program"] = lambda one: one["used"]["user_s"]
    values["processors, kernel"] = lambda one: one["used"]["system_s"]
    values["pages mapped, thousands"] = lambda one: one["used"]["pages"] / 1000
    rows = []
    for name, value in values.items():
        medians = [_median(runs, value) for runs in by_count.values()]
        shares = [f"{median / medians[0]:.2f}" if medians[0] > 0.05 else "" for median in medians[1:]]
        rows.append([name, *(f"{median:.1f}" for median in medians), *shares])
    return common.table(["", *by_count, *(f"{count} to the first" for count in list(by_count)[1:])], rows)
