"""The page of the benchmark `scaling`, from its data."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tests.harness.benchmarks import common

LIMIT = 1.8
"""Times the speed of one share of the host that two must reach."""

Runs = Sequence[dict[str, Any]]


def page(data: dict[str, Any]) -> str:
    """The page of results: one table for all profiles, then a section for each."""
    cases: dict[str, dict[str, Any]] = data["cases"]
    rows = [_summary(profile, _by_name(case["runs"])) for profile, case in cases.items()]
    head = ["profile", "compared", "first MB/s", "last MB/s", "times the first", "side by side", f">= {LIMIT}"]
    return (
        "# The encode stage on more GPUs and cores\n\n"
        "`python -m tests.harness.benchmarks scaling`: sources and store in memory, MB of source a second, medians. A "
        "share of the host is one GPU and the cores that the host has for each; every run has the workers that "
        "`compress` starts there, and made the same blobs. A profile that searches uses the GPUs, any other only the "
        "cores. Side by side (1 + 1), runs of one share each have nothing in common but the host: what it can give.\n\n"
        f"{common.table(head, rows)}\n\n{chr(10).join(_section(*item) for item in cases.items())}"
    )


def _by_name(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        found.setdefault(one["name"], []).append(one)
    return found


def _summary(profile: str, by_name: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A profile's row: the smallest count against the largest, and the control."""
    counts = _counts(by_name)
    first, last = (by_name[name] for name in (counts[0], counts[-1]))
    beside = [runs for name, runs in by_name.items() if name not in counts]
    base, times = _median(first, _rate), _median(last, _rate) / _median(first, _rate)
    units = (*(("gpus",) if first[0]["on_gpus"] else ()), "cores")
    compared = ", ".join(f"{first[0][unit]} against {last[0][unit]} {unit.replace('gpu', 'GPU')}" for unit in units)
    return [
        profile,
        compared,
        f"{base:.0f}",
        f"{_median(last, _rate):.0f}",
        f"{times:.2f}",
        *(f"{_median(runs, _rate) / base:.2f}" for runs in beside),
        "met" if times >= LIMIT else "missed",
    ]


def _section(profile: str, case: dict[str, Any]) -> str:
    """A profile's tables."""
    by_name = _by_name(case["runs"])
    repeats = len(next(iter(by_name.values())))
    users = "Workers on GPUs alone get tasks" if case["runs"][0]["on_gpus"] else "No GPU is used"
    facts = ", ".join(f"{name} {value}" for name, value in case["conditions"].items())
    return (
        f"## Profile `{profile}`\n\n"
        f"{case['model']}'s tensors with drawn weights, {case['copies']} times over, {repeats} runs of each in turns. "
        f"{users}. Workers are busy from a shard's reading to its record; the tail begins when as many tasks are left "
        "as there are workers for them.\n\n"
        f"{_speeds(by_name)}\n\n"
        "Seconds of all workers together for the bytes of one run, and thousands of pages that the kernel mapped:\n\n"
        f"{_times(by_name)}\n\n{_bound(by_name)}{facts}\n"
    )


def _counts(by_name: Iterable[str]) -> list[str]:
    """The counts of shares in one run; what is left are runs side by side."""
    return [name for name in by_name if "+" not in name]


def _bound(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """What processors alone allow; empty if too little was hashed to tell."""
    counts = _counts(by_name)
    before, after = (_median(by_name[name], partial(_stage, "key")) for name in (counts[0], counts[-1]))
    times = int(counts[-1]) / int(counts[0])
    if not before or not after:
        return ""
    return (
        "The stage `key` hashes bytes that are in memory: no GPU, no lock, no storage. With all workers it takes "
        f"{after / before:.2f} times the seconds, so such work becomes {times * before / after:.2f} times as fast with "
        f"{times:g} times the workers. Above 1, a processor of this host gets less done the more of them are busy.\n\n"
    )


def _median(runs: Runs, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, runs))


def _rate(one: dict[str, Any]) -> float:
    """MB of source a second."""
    return float(one["bytes"]) / float(one["seconds"]) / 1e6


def _speeds(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each count of shares."""
    base, rows = _median(next(iter(by_name.values())), _rate), []
    for name, runs in by_name.items():
        rate, rates = _median(runs, _rate), list(map(_rate, runs))
        rows.append(
            [
                name,
                str(runs[0]["cores"]),
                str(runs[0]["workers"]),
                str(runs[0]["on_gpus"]),
                str(runs[0]["shards"]),
                f"{_median(runs, lambda one: one['seconds']):.2f}",
                f"{rate:.0f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{rate / base:.2f}",
                f"{_median(runs, lambda one: one['busy']):.0%}",
                f"{_median(runs, lambda one: one['tail_s']):.2f}",
            ]
        )
    head = ["shares", "cores", "workers", "on GPUs", "shards", "s", "MB/s", "range", "times", "busy", "tail s"]
    return common.table(head, rows)


def _stage(name: str, one: dict[str, Any]) -> float:
    """Seconds of all workers in a stage."""
    return float(one["stages_worker_s"][name])


def _times(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each stage, and for what processors did. Side by side, every run does all the work: theirs is cut to
    that of one."""
    first = next(iter(by_name.values()))
    nbytes = first[0]["bytes"]
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        name: partial(_stage, name) for name in first[0]["stages_worker_s"]
    }
    values["all stages"] = lambda one: sum(one["stages_worker_s"].values())
    values["processors, program"] = lambda one: one["used"]["user_s"]
    values["processors, kernel"] = lambda one: one["used"]["system_s"]
    values["pages mapped, thousands"] = lambda one: one["used"]["pages"] / 1000
    rows = []
    for name, value in values.items():
        medians = [_median(runs, value) * nbytes / runs[0]["bytes"] for runs in by_name.values()]
        shares = [f"{median / medians[0]:.2f}" if medians[0] > 0.05 else "" for median in medians[1:]]
        rows.append([name, *(f"{median:.1f}" for median in medians), *shares])
    return common.table(["", *by_name, *(f"{name} to the first" for name in list(by_name)[1:])], rows)
