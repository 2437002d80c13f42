"""How the encode stage grows with GPUs when storage is no limit: sources and store in memory, SAM-H's size.

    python -m tests.benchmarks scaling [--gpus 1,2] [--repeats N]     # needs as many GPUs
    python -m tests.benchmarks scaling --cpu                          # workers on CPUs instead, for trying it out

Each count runs in a process of its own that sees so many GPUs, in turns. A first pass over all shards starts workers,
CUDA and kernels, and its blobs must be the same for every count; then the same shards are made anew, more often, and
timed from the first task to the last result: reading, encoding, validating and writing, all of `compress_shard`.

What a lesser gain is due to, the page shows too: how much of the time workers were busy, how long the last tasks took
(fewer than there are workers), what each stage took of the workers' time, and of it the processors', in the program and
in the kernel, with the pages that the kernel had to map.
Results go to `results/scaling.json` and `scaling.md`. Exit code 1: blobs that differ, or no such GPUs.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.execute import RayExecutor, Worker
from birkhoff.pipeline.plan import MIB, plan_model
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import ShardResult, ShardTask
from birkhoff.pipeline.source import open_checkpoint
from birkhoff.pipeline.store import StoreAddress
from tests.benchmarks import common, family, synthetic

MODEL = "SAM-H"
SHARD_MIB = 32
FIRST_COPIES = 3
"""Times the model is made in the first pass: enough for each worker to meet each kind of shard."""

BUDGET = 64 << 30
"""Bytes in flight: no limit here."""

LIMIT = 1.8
"""Times the speed of one GPU that two must reach."""


class MeasuredWorker(Worker):
    """A worker that tells what it has used."""

    def usage(self) -> Counter[str]:
        """Seconds of processors so far, in the program and in the kernel, and pages mapped."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Counter(user_s=used.ru_utime, system_s=used.ru_stime, pages=used.ru_minflt)


class MeasuredExecutor(RayExecutor):
    """An executor of such workers."""

    worker = MeasuredWorker

    def usage(self) -> Counter[str]:
        """What all of them have used."""
        return sum(self._ray.get([worker.usage.remote() for worker in self.workers]), Counter())


@dataclass(slots=True, kw_only=True)
class Pass:
    """What a pass over tasks has brought: blob digests by shard, worker seconds by stage, when each task had ended."""

    blobs: dict[int, str] = field(default_factory=dict)
    stages: Counter[str] = field(default_factory=Counter)
    ended: list[float] = field(default_factory=list)
    """Seconds from the start, rising."""


def tasks(checkpoint: Path, copies: int) -> Iterator[ShardTask]:
    """Every shard of the checkpoint as a task that is made anew, once for each copy."""
    profile = PROFILES["balanced"]
    plan = plan_model(MODEL, open_checkpoint(checkpoint), profile, shard_bytes=SHARD_MIB * MIB)
    for copy in range(copies):
        for index, tensors in enumerate(plan.shards):
            yield ShardTask(model=f"copy-{copy}", index=index, tensors=tensors, profile=profile, reuse="never")


def run(executor: RayExecutor, work: Sequence[ShardTask]) -> Pass:
    """Run tasks to their end. Raises the first error."""
    found = Pass()
    start = time.perf_counter()
    for outcome in executor.run(TaskQueue(work, budget=BUDGET)):
        if not isinstance(outcome.result, ShardResult):
            raise outcome.error or RuntimeError(f"{outcome.task.label}: no result")
        found.ended.append(time.perf_counter() - start)
        found.blobs[outcome.task.index] = outcome.result.record.blob
        found.stages.update(outcome.result.stages)
    return found


def measure(checkpoint: Path, store: Path, copies: int, workers: int | None) -> dict[str, Any]:
    """One count of GPUs, in this process: worker and GPU counts, seconds and bytes of the timed pass, blobs' digest."""
    address = StoreAddress.parse(store.as_uri())
    work = list(tasks(checkpoint, copies))
    with MeasuredExecutor(address, workers=workers) as executor:
        first, before = run(executor, list(tasks(checkpoint, min(copies, FIRST_COPIES)))), executor.usage()
        timed, after = run(executor, work), executor.usage()
        count = len(executor.workers)
    if timed.blobs != first.blobs:
        raise RuntimeError("the timed pass made other blobs than the first one")
    seconds = timed.ended[-1]
    return {
        "gpus": torch.cuda.device_count(),
        "workers": count,
        "shards": len(work),
        "cores": len(os.sched_getaffinity(0)),
        "first_pass_s": round(first.ended[-1], 3),
        "seconds": seconds,
        "tail_s": round(seconds - timed.ended[-count], 3) if len(work) >= count else seconds,
        "busy": round(timed.stages.total() / (count * seconds), 4),
        "stages_worker_s": {name: round(value, 2) for name, value in timed.stages.items()},
        "used": {name: round(after[name] - before[name], 2) for name in after},
        "bytes": sum(task.nbytes for task in work),
        "blobs": hashlib.sha256("".join(first.blobs[index] for index in sorted(first.blobs)).encode()).hexdigest(),
    }


def in_own_process(options: argparse.Namespace, checkpoint: Path, store: Path, count: int) -> dict[str, Any]:
    """`measure` in a process that sees `count` GPUs, or has `count` workers on CPUs."""
    visible = "" if options.cpu else ",".join(map(str, range(count)))
    command = [sys.executable, "-m", "tests.benchmarks.bench_scaling", "--child", str(checkpoint), str(store)]
    command += ["--copies", str(options.copies), "--workers", str(count if options.cpu else options.workers * count)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    if options.cores:
        command = ["taskset", "-c", f"0-{options.cores * count - 1}", *command]
    found = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{count} GPUs: {' | '.join(found.stderr.strip().splitlines()[-3:])}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {"asked": count, **result}


def report(options: argparse.Namespace, found: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The page and its data."""
    by_count = {count: [one for one in found if one["asked"] == count] for count in options.gpus}
    conditions = common.conditions("torch", "triton", "ray", commit_hash=options.commit)
    if not options.cpu:
        conditions["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    facts = ", ".join(f"{name} {value}" for name, value in conditions.items())
    page = (
        "# The encode stage on more GPUs\n\n"
        f"`python -m tests.benchmarks scaling`: {MODEL}'s tensors with drawn weights, {options.copies} times over, "
        f"sources and store in memory, {len(found) // len(options.gpus)} runs of each in turns; MB of source a second. "
        f"Every count made the same blobs. Two are to reach {LIMIT} times the first. Workers are busy from a shard's "
        "reading to its record; the tail begins when as many tasks are left as there are workers.\n\n"
        f"{_speeds(by_count, 'workers' if options.cpu else 'GPUs')}\n\n"
        "## Where workers spend their time\n\n"
        "Seconds of all workers together, medians, and thousands of pages that the kernel mapped for them; a stage "
        "that more GPUs do not slow down takes as long with each count.\n\n"
        f"{_times(by_count)}\n\n{facts}\n"
    )
    return page, {"conditions": conditions, "runs": list(found)}


def _median(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, runs))


def _rate(one: dict[str, Any]) -> float:
    """MB of source a second."""
    return float(one["bytes"]) / float(one["seconds"]) / 1e6


def _speeds(by_count: dict[int, list[dict[str, Any]]], unit: str) -> str:
    """A row for each count."""
    base, rows = _median(next(iter(by_count.values())), _rate), []
    for count, runs in by_count.items():
        rate, rates = _median(runs, _rate), list(map(_rate, runs))
        rows.append(
            [
                str(count),
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


def _times(by_count: dict[int, list[dict[str, Any]]]) -> str:
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
        share = f"{medians[-1] / medians[0]:.2f}" if medians[0] > 0.05 else ""
        rows.append([name, *(f"{median:.1f}" for median in medians), share])
    return common.table(["", *map(str, by_count), "last to first"], rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks scaling", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gpus", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2], metavar="1,2")
    add("--repeats", type=int, default=2, help="runs of each count")
    add("--copies", type=int, default=6, help="times the model is made in the timed pass: 6 are as much as the fleet")
    add("--workers", type=int, default=12, help="to a GPU")
    add("--cores", type=int, metavar="N", help="to a GPU: what a host with fewer GPUs would have; all where left out")
    add("--cpu", action="store_true", help="workers on CPUs in the place of GPUs")
    add("--scale", type=float, default=1.0, help="of the drawn checkpoint")
    add("--memory", type=Path, default=Path("/dev/shm"), metavar="DIR", help="parent of the temporary folder")
    add("--commit", metavar="HASH", help="what is measured, where there is no git")
    add("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.benchmarks scaling`."""
    options = parse(argv)
    if options.child:
        print(json.dumps(measure(*options.child, options.copies, options.workers)))
        return 0
    if not options.cpu and torch.cuda.device_count() < max(options.gpus):
        print(f"scaling: {torch.cuda.device_count()} GPUs here, {max(options.gpus)} asked for", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bf-scaling-", dir=options.memory) as name:
        (spec,) = family.wanted_files([MODEL])
        (checkpoint,) = synthetic.write_files(Path(name), [spec], scale=options.scale)
        found = []
        for _ in range(options.repeats):
            for count in options.gpus:
                found.append(in_own_process(options, checkpoint, Path(name) / "store", count))
                print(json.dumps(found[-1]), flush=True)
    if len({one["blobs"] for one in found}) > 1:
        print("scaling: the counts made different blobs", file=sys.stderr)
        return 1
    page, data = report(options, found)
    if options.scale == 1.0 and not options.cpu:
        common.write("scaling", page, data)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
