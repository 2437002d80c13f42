"""How the encode stage grows with GPUs when storage is no limit: sources and store in memory, SAM-H's size.

    python -m tests.harness.benchmarks scaling [--gpus 1,2] [--repeats N]     # needs as many GPUs
    python -m tests.harness.benchmarks scaling --cpu  # workers on CPUs instead, for trying it out
    python -m tests.harness.benchmarks scaling --draw  # only the page, from the results there are

Each count runs in a process of its own that sees so many GPUs, in turns. A first pass over all shards starts workers,
CUDA and kernels, and its blobs must be the same for every count; then the same shards are made anew, more often, and
timed from the first task to the last result: reading, encoding, validating and writing, all of `compress_shard`.

What a lesser gain is due to, the page shows too: how much of the time workers were busy, how long the last tasks took
(fewer than there are workers), what each stage took of the workers' time, and of it the processors', in the program and
in the kernel, with the pages that the kernel had to map. And what the host itself can give: as many runs as GPUs, one
GPU each and processors of its own, at the same time, which share nothing else.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import MIB, plan_model
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard.run import ShardResult
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.store.base import StoreAddress
from tests.harness.benchmarks import common, family, scaling_report, synthetic

MODEL = "SAM-H"
SHARD_MIB = 32
FIRST_COPIES = 3
"""Times the model is made in the first pass: enough for each worker to meet each kind of shard."""

BUDGET = 64 << 30
"""Bytes in flight: no limit here."""

MEET_SECONDS = 120.0
"""How long runs side by side wait for each other."""


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
        total = Counter[str]()
        for used in self._ray.get([worker.usage.remote() for worker in self.workers]):
            total.update(used)
        return total


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
        yield from plan.tasks(f"copy-{copy}", reuse="never")


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


def measure(
    checkpoint: Path, store: Path, copies: int, workers: int | None, together: tuple[Path, int] | None = None
) -> dict[str, Any]:
    """One count of GPUs, in this process: worker and GPU counts, seconds and bytes of the timed pass, blobs' digest.

    `together` is a folder and how many processes meet there before the timed pass.
    """
    address = StoreAddress.parse(store.as_uri())
    work = list(tasks(checkpoint, copies))
    with MeasuredExecutor(address, workers=workers) as executor:
        first, before = run(executor, list(tasks(checkpoint, min(copies, FIRST_COPIES)))), executor.usage()
        if together is not None:
            meet(*together)
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


def meet(folder: Path, count: int) -> None:
    """Wait until so many processes have come here. Raises TimeoutError where they do not."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + MEET_SECONDS
    while len(list(folder.iterdir())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {count} processes came to {folder}")
        time.sleep(0.01)


def in_own_process(
    options: argparse.Namespace, checkpoint: Path, store: Path, gpus: Sequence[int], together: Sequence[str] = ()
) -> dict[str, Any]:
    """`measure` in a process that sees these GPUs, or has as many workers on CPUs."""
    count = len(gpus)
    command = [sys.executable, "-m", "tests.harness.benchmarks.bench_scaling", "--child", str(checkpoint), str(store)]
    command += ["--copies", str(options.copies), "--workers", str(count if options.cpu else options.workers * count)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if options.cpu else ",".join(map(str, gpus))}
    if options.cores:
        cores = f"{options.cores * gpus[0]}-{options.cores * (gpus[-1] + 1) - 1}"
        command = ["taskset", "-c", cores, *command]
    found = subprocess.run(
        [*command, *together], cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise RuntimeError(f"{count} GPUs: {' | '.join(found.stderr.strip().splitlines()[-3:])}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {"asked": str(count), **result}


def side_by_side(options: argparse.Namespace, checkpoint: Path, work: Path, count: int) -> dict[str, Any]:
    """As many runs of one GPU each, at the same time; their figures as those of one run."""
    with tempfile.TemporaryDirectory(dir=work) as name, ThreadPoolExecutor(count) as pool:
        together = ["--together", name, str(count)]
        futures = [
            pool.submit(in_own_process, options, checkpoint, work / f"store-{gpu}", [gpu], together)
            for gpu in range(count)
        ]
        parts = [future.result() for future in futures]
    if len({part["blobs"] for part in parts}) > 1:
        raise RuntimeError("runs side by side made different blobs")
    total = {key: sum(part[key] for part in parts) for key in ("gpus", "workers", "shards", "cores", "bytes")}
    if not options.cores:
        total["cores"] = parts[0]["cores"]  # which they share
    rate = sum(part["bytes"] / part["seconds"] for part in parts)
    mean = {key: statistics.mean(part[key] for part in parts) for key in ("first_pass_s", "tail_s", "busy")}
    sums = {
        key: {name: sum(part[key][name] for part in parts) for name in parts[0][key]}
        for key in ("stages_worker_s", "used")
    }
    label = " + ".join("1" * count)
    return {"asked": label, **total, **mean, **sums, "seconds": total["bytes"] / rate, "blobs": parts[0]["blobs"]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.benchmarks scaling", description=__doc__.split("\n")[0]
    )
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
    add("--draw", action="store_true", help="only draw the page, from the results there are")
    add("--together", nargs=2, metavar=("DIR", "N"), help=argparse.SUPPRESS)
    add("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.harness.benchmarks scaling`."""
    options = parse(argv)
    if options.child:
        together = (Path(options.together[0]), int(options.together[1])) if options.together else None
        print(json.dumps(measure(*options.child, options.copies, options.workers, together)))
        return 0
    if options.draw:
        data = json.loads((common.RESULTS / "scaling.json").read_text())
        common.write("scaling", scaling_report.page(data), data)
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
                found.append(in_own_process(options, checkpoint, Path(name) / "store", range(count)))
                print(json.dumps(found[-1]), flush=True)
            found.append(side_by_side(options, checkpoint, Path(name), max(options.gpus)))
            print(json.dumps(found[-1]), flush=True)
    if len({one["blobs"] for one in found}) > 1:
        print("scaling: the counts made different blobs", file=sys.stderr)
        return 1
    conditions = common.conditions("torch", "triton", "ray", commit_hash=options.commit)
    if not options.cpu:
        conditions["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    data = {"model": MODEL, "copies": options.copies, "conditions": conditions, "runs": found}
    if options.scale == 1.0 and not options.cpu:
        common.write("scaling", scaling_report.page(data), data)
    else:
        print(scaling_report.page(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
