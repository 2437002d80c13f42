"""How the encode stage grows with GPUs when storage is no limit: sources and store in memory, SAM-H's size.

    python -m tests.benchmarks scaling [--gpus 1,2] [--repeats N]     # needs as many GPUs
    python -m tests.benchmarks scaling --cpu                          # workers on CPUs instead, for trying it out

Each count runs in a process of its own that sees so many GPUs, in turns. A first pass over all shards starts workers,
CUDA and kernels, and its blobs must be the same for every count; then the same shards are made anew several times, and
timed from the first task to the last result: reading, encoding, validating and writing, all of `compress_shard`.
Results go to `results/scaling.json` and `scaling.md`. Exit code 1: blobs that differ, or no such GPUs.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.execute import RayExecutor
from birkhoff.pipeline.plan import MIB, plan_model
from birkhoff.pipeline.queue import TaskQueue
from birkhoff.pipeline.shard import ShardTask
from birkhoff.pipeline.source import open_checkpoint
from birkhoff.pipeline.store import StoreAddress
from tests.benchmarks import common, family, synthetic

MODEL = "SAM-H"
SHARD_MIB = 32
BUDGET = 64 << 30
"""Bytes in flight: no limit here."""

LIMIT = 1.8
"""Times the speed of one GPU that two must reach."""


def tasks(checkpoint: Path, copies: int) -> Iterator[ShardTask]:
    """Every shard of the checkpoint as a task that is made anew, once for each copy."""
    profile = PROFILES["balanced"]
    plan = plan_model(MODEL, open_checkpoint(checkpoint), profile, shard_bytes=SHARD_MIB * MIB)
    for copy in range(copies):
        for index, tensors in enumerate(plan.shards):
            yield ShardTask(model=f"copy-{copy}", index=index, tensors=tensors, profile=profile, reuse="never")


def run(executor: RayExecutor, work: Sequence[ShardTask]) -> tuple[dict[int, str], Counter[str]]:
    """Run tasks to their end; blob digests by shard, and worker seconds by stage. Raises the first error."""
    blobs, stages = {}, Counter[str]()
    for outcome in executor.run(TaskQueue(work, budget=BUDGET)):
        if outcome.error is not None:
            raise outcome.error
        blobs[outcome.task.index] = outcome.result.record.blob
        stages.update(outcome.result.stages)
    return blobs, stages


def measure(checkpoint: Path, store: Path, copies: int, workers: int | None) -> dict[str, Any]:
    """One count of GPUs, in this process: worker and GPU counts, seconds and bytes of the timed pass, blobs' digest."""
    address = StoreAddress.parse(store.as_uri())
    with RayExecutor(address, workers=workers) as executor:
        blobs, _ = run(executor, list(tasks(checkpoint, 1)))
        work = list(tasks(checkpoint, copies))
        start = time.perf_counter()
        again, stages = run(executor, work)
        seconds = time.perf_counter() - start
        count = len(executor.workers)
    if again != blobs:
        raise RuntimeError("the timed pass made other blobs than the first one")
    return {
        "gpus": torch.cuda.device_count(),
        "workers": count,
        "shards": len(work),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "stages_worker_s": {name: round(value, 2) for name, value in stages.items()},
        "bytes": sum(task.nbytes for task in work),
        "blobs": hashlib.sha256("".join(blobs[index] for index in sorted(blobs)).encode()).hexdigest(),
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
    unit = "workers" if options.cpu else "GPUs"
    rates = {
        count: [one["bytes"] / one["seconds"] / 1e6 for one in found if one["asked"] == count] for count in options.gpus
    }
    base = statistics.median(rates[options.gpus[0]])
    rows = []
    for count, values in rates.items():
        one = next(one for one in found if one["asked"] == count)
        median = statistics.median(values)
        spread = f"{min(values):.0f}-{max(values):.0f}"
        rows.append(
            [
                str(count),
                str(one["cores"]),
                str(one["workers"]),
                str(one["shards"]),
                f"{median:.0f}",
                spread,
                f"{median / base:.2f}",
            ]
        )
    conditions = common.conditions("torch", "triton", "ray")
    if not options.cpu:
        conditions["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    head = [unit, "cores", "workers", "shards", "MB/s, median", "range", "times the first"]
    facts = ", ".join(f"{name} {value}" for name, value in conditions.items())
    page = (
        "# The encode stage on more GPUs\n\n"
        f"`python -m tests.benchmarks scaling`: {MODEL}'s tensors with drawn weights, {options.copies} times over, "
        f"sources and store in memory, {len(found) // len(options.gpus)} runs of each in turns; MB of source a second. "
        f"Every count made the same blobs. Two are to reach {LIMIT} times the first.\n\n"
        f"{common.table(head, rows)}\n\n{facts}\n"
    )
    return page, {"conditions": conditions, "runs": list(found)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks scaling", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gpus", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2], metavar="1,2")
    add("--repeats", type=int, default=2, help="runs of each count")
    add("--copies", type=int, default=3, help="times the model is made in the timed pass")
    add("--workers", type=int, default=12, help="to a GPU")
    add("--cores", type=int, metavar="N", help="to a GPU: what a host with fewer GPUs would have; all where left out")
    add("--cpu", action="store_true", help="workers on CPUs in the place of GPUs")
    add("--scale", type=float, default=1.0, help="of the drawn checkpoint")
    add("--memory", type=Path, default=Path("/dev/shm"), metavar="DIR", help="parent of the temporary folder")
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
