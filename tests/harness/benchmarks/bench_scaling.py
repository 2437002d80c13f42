"""How the encode stage grows with GPUs and their cores when storage is no limit: sources and store in memory.

    python -m tests.harness.benchmarks scaling [--profiles balanced,paper] [--gpus 1,2] [--repeats N]
    python -m tests.harness.benchmarks scaling --cpu --scale 0.3  # without GPUs, for trying it out
    python -m tests.harness.benchmarks scaling --draw  # only the page, from the results there are

A share of the host is one GPU and as many cores as the host has for each. A run has one share or several, in a process
that sees only their GPUs and is bound to their cores. It starts the workers that `compress` would start there for the
same tasks. A profile that searches uses the GPUs; any other uses only cores, and shows how the stage grows with these.

Runs of each count take turns. A first pass over all shards starts workers, CUDA and kernels. Then the same shards are
made anew, more often, and timed from the first task to the last result: reading, encoding, validating and writing, all
of `compress_shard`. The blobs must be the same in every pass of every run.

The page also shows why a gain is smaller: how much of the time workers were busy, how long the last tasks took (fewer
than there are workers), the workers' seconds in each stage, their processor time in the program and in the kernel, and
the pages that the kernel mapped. A control shows what the host itself can give: one run per share, at the same time,
which share nothing else. Results go to `results/scaling.json` and `scaling.md`, each profile in place of its earlier
result. Exit code 1: a run failed, blobs differ, or the host has too few GPUs or cores.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from birkhoff.codec.native.processors import processors
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.plan.manifest import manifest_of
from birkhoff.pipeline.plan.models import plan_entry
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.run.choice import Choice
from birkhoff.pipeline.run.demand import Demand
from birkhoff.pipeline.run.outcome import Executor
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.shard.task import ShardResult, ShardTask
from birkhoff.pipeline.store.base import StoreAddress
from tests.harness.benchmarks import common, family, scaling_report, synthetic

MODEL = "SAM-H"
COPIES = {"balanced": 6, "paper": 2}
"""How often a profile makes the model in the timed pass. 6 are as much as the fleet. `paper` is slower; with 1 the
product would use threads (`demand.START_BYTES`). The first pass makes half as many."""

BUDGET = 64 << 30
"""Bytes in flight: no limit here."""

MEET_SECONDS = 120.0
"""How long runs side by side wait for each other."""

TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(slots=True, kw_only=True)
class Pass:
    """The result of a pass over tasks: blob digests by shard, worker seconds by stage, when each task ended."""

    blobs: dict[int, str] = field(default_factory=dict)
    stages: Counter[str] = field(default_factory=Counter)
    ended: list[float] = field(default_factory=list)
    """Seconds from the start, rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the runs of one profile have in common."""

    profile: str
    copies: int
    checkpoint: Path
    work: Path
    """Folder of the stores."""
    cores: Sequence[int]
    """Processors of all shares."""
    each: int
    """Processors of one share."""
    gpu: bool
    """Whether runs see the GPUs of their shares."""


def plan(checkpoint: Path, profile: str) -> ModelPlan:
    """The model's plan, as `compress` makes it."""
    manifest = manifest_of({"models": [{"name": MODEL, "source": str(checkpoint), "profile": profile}]})
    return plan_entry(manifest, manifest.models[0]).scaled().plan


def tasks(planned: ModelPlan, copies: int) -> list[ShardTask]:
    """Every shard as a task that is made anew, once for each copy."""
    return [task for copy in range(copies) for task in planned.tasks(f"copy-{copy}", reuse="never")]


def run(executor: Executor, work: Sequence[ShardTask]) -> Pass:
    """Run tasks to their end. Raises the first error, and RuntimeError if copies of a shard have different blobs."""
    found = Pass()
    start = time.perf_counter()
    for outcome in executor.run(TaskQueue(work, budget=BUDGET)):
        if not isinstance(outcome.result, ShardResult):
            raise outcome.error or RuntimeError(f"{outcome.task.label}: no result")
        found.ended.append(time.perf_counter() - start)
        blob = outcome.result.record.blob
        if found.blobs.setdefault(outcome.task.index, blob) != blob:
            raise RuntimeError(f"{outcome.task.label}: another blob than in the copy before")
        found.stages.update(outcome.result.stages)
    return found


def measure(
    checkpoint: Path, store: Path, profile: str, copies: int, together: tuple[Path, int] | None = None
) -> dict[str, Any]:
    """Measure one run in this process: workers, seconds and bytes of the timed pass, the blobs' digest.

    `together` is a folder and how many processes meet there before the timed pass.
    """
    planned = plan(checkpoint, profile)
    work = tasks(planned, copies)
    demand = Demand(nbytes=sum(task.nbytes for task in work), gpu=any(task.on_gpu for task in work))
    choice = Choice(
        StoreAddress.parse(store.as_uri()), ray=True, address=None, workers=None, shard_seconds=None, told=print
    )
    with choice, choice.start(demand) as executor:
        first = run(executor, tasks(planned, (copies + 1) // 2))
        workers = identities(executor)
        if together is not None:
            meet(*together)
        before = usage(workers)
        timed = run(executor, work)
        after = usage(workers)
    if timed.blobs != first.blobs:
        raise RuntimeError("the timed pass made other blobs than the first one")
    on_gpus = sum(worker["cuda"] for worker in workers)
    count = on_gpus or len(workers)  # alone get the tasks
    seconds = timed.ended[-1]
    return {
        "gpus": torch.cuda.device_count(),
        "workers": len(workers),
        "on_gpus": on_gpus,
        "shards": len(work),
        "cores": processors(),
        "first_pass_s": round(first.ended[-1], 3),
        "seconds": seconds,
        "tail_s": round(seconds - timed.ended[-count], 3) if len(work) >= count else seconds,
        "busy": round(timed.stages.total() / (count * seconds), 4),
        "stages_worker_s": {name: round(value, 3) for name, value in timed.stages.items()},
        "used": {name: round(after[name] - before[name], 2) for name in after},
        "bytes": demand.nbytes,
        "blobs": hashlib.sha256("".join(first.blobs[index] for index in sorted(first.blobs)).encode()).hexdigest(),
    }


def identities(executor: Executor) -> list[dict[str, Any]]:
    """What each worker says about itself, once all have started."""
    import ray  # only once the executor has made its settings

    assert isinstance(executor, RayExecutor)
    found: list[dict[str, Any]] = ray.get([worker.identity.remote() for worker in executor.workers])
    return found


def usage(workers: Sequence[dict[str, Any]]) -> Counter[str]:
    """Processor seconds of all workers so far, in the program and in the kernel, and pages mapped."""
    total, tick = Counter[str](), 1 / os.sysconf("SC_CLK_TCK")
    for worker in workers:
        # proc_pid_stat(5), without the first two fields: the second may contain anything.
        fields = Path(f"/proc/{worker['pid']}/stat").read_text().rpartition(")")[2].split()
        total.update(user_s=int(fields[11]) * tick, system_s=int(fields[12]) * tick, pages=int(fields[7]))
    return total


def meet(folder: Path, count: int) -> None:
    """Wait until so many processes have come here. Raises TimeoutError if they do not."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + MEET_SECONDS
    while len(list(folder.iterdir())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {count} processes came to {folder}")
        time.sleep(0.01)


def neighbours_first(cores: Sequence[int], topology: Path = TOPOLOGY) -> list[int]:
    """Sort processors by package and core: a share then has whole cores, not one thread each of twice as many."""

    def place(core: int) -> tuple[int, ...]:
        try:
            names = ("physical_package_id", "core_id")
            return (*(int((topology / f"cpu{core}/topology" / name).read_text()) for name in names), core)
        except OSError:
            return (0, 0, core)

    return sorted(cores, key=place)


def in_own_process(case: Case, shares: Sequence[int], store: str, together: Sequence[str] = ()) -> dict[str, Any]:
    """`measure` in a process that has these shares of the host, which follow each other."""
    cores = case.cores[case.each * shares[0] : case.each * (shares[-1] + 1)]
    command = [
        "taskset",
        "-c",
        ",".join(map(str, cores)),
        sys.executable,
        "-m",
        "tests.harness.benchmarks.bench_scaling",
    ]
    command += ["--child", str(case.checkpoint), str(case.work / store)]
    command += ["--profiles", case.profile, "--copies", str(case.copies), *together]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, shares)) if case.gpu else ""}
    found = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        last = " | ".join(found.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{case.profile} on {len(shares)} shares of the host: {last}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {"name": str(len(shares)), **result}


def side_by_side(case: Case, count: int) -> dict[str, Any]:
    """As many runs of one share each, at the same time; their figures as those of one run."""
    with tempfile.TemporaryDirectory(dir=case.work) as name, ThreadPoolExecutor(count) as pool:
        together = ["--together", name, str(count)]
        futures = [pool.submit(in_own_process, case, [share], f"store-{share}", together) for share in range(count)]
        return merged([future.result() for future in futures])


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of runs side by side as those of one run. Raises RuntimeError if their blobs differ."""
    if len({part["blobs"] for part in parts}) > 1:
        raise RuntimeError("runs side by side made different blobs")
    counts = ("gpus", "workers", "on_gpus", "shards", "cores", "bytes")
    total = {key: sum(part[key] for part in parts) for key in counts}
    rate = sum(part["bytes"] / part["seconds"] for part in parts)
    mean = {key: statistics.mean(part[key] for part in parts) for key in ("first_pass_s", "tail_s", "busy")}
    sums = {
        key: {name: sum(part[key][name] for part in parts) for name in parts[0][key]}
        for key in ("stages_worker_s", "used")
    }
    label = " + ".join(part["name"] for part in parts)
    return {"name": label, **total, **mean, **sums, "seconds": total["bytes"] / rate, "blobs": parts[0]["blobs"]}


def runs(case: Case, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """All runs of a profile, in turns. Raises RuntimeError if a run fails, or made other blobs."""
    found: list[dict[str, Any]] = []
    for _ in range(repeats):
        turn = [partial(in_own_process, case, range(count), "store") for count in counts]
        for measured in (*turn, partial(side_by_side, case, max(counts))):
            found.append(measured())
            print(json.dumps({"profile": case.profile, **found[-1]}), flush=True)
    if len({one["blobs"] for one in found}) > 1:
        raise RuntimeError(f"{case.profile}: the counts made different blobs")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.benchmarks scaling", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--profiles", type=lambda text: text.split(","), default=list(COPIES), metavar="balanced,paper")
    add("--gpus", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2], metavar="1,2")
    add("--repeats", type=int, default=2, help="runs of each count")
    add("--copies", type=int, help="times the model is made in the timed pass (default: by profile, for a minute)")
    add("--cores", type=int, metavar="N", help="to a GPU (default: what the host has for each)")
    add("--cpu", action="store_true", help="need and show no GPUs")
    add("--scale", type=float, default=1.0, help="of the drawn checkpoint")
    add("--memory", type=Path, default=Path("/dev/shm"), metavar="DIR", help="parent of the temporary folder")
    add("--commit", metavar="HASH", help="what is measured, if there is no git")
    add("--draw", action="store_true", help="only draw the page, from the results there are")
    add("--together", nargs=2, metavar=("DIR", "N"), help=argparse.SUPPRESS)
    add("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := [name for name in options.profiles if name not in PROFILES]:
        parser.error(f"--profiles: no profile {unknown[0]!r}; there are {', '.join(PROFILES)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.harness.benchmarks scaling`."""
    options = parse(argv)
    if options.child:
        together = (Path(options.together[0]), int(options.together[1])) if options.together else None
        print(json.dumps(measure(*options.child, options.profiles[0], options.copies, together)))
        return 0
    kept = common.RESULTS / "scaling.json"
    data: dict[str, Any] = {"cases": json.loads(kept.read_text()).get("cases", {}) if kept.is_file() else {}}
    if options.draw and not data["cases"]:
        print(f"scaling: {kept} has no results by profile", file=sys.stderr)
        return 1
    if options.draw:
        common.write("scaling", scaling_report.page(data), data)
        return 0
    most = max(options.gpus)
    each = options.cores or processors() // most
    if not 1 <= each <= processors() // most or (not options.cpu and torch.cuda.device_count() < most):
        print(f"scaling: {torch.cuda.device_count()} GPUs and {processors()} cores are too few", file=sys.stderr)
        return 1
    conditions = common.conditions("torch", "triton", "ray", commit_hash=options.commit)
    if not options.cpu:
        conditions["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(most))
    trial = options.cpu or options.scale != 1.0
    if trial:
        data = {"cases": {}}
    with tempfile.TemporaryDirectory(prefix="bf-scaling-", dir=options.memory) as name:
        (spec,) = family.wanted_files([MODEL])
        (checkpoint,) = synthetic.write_files(Path(name), [spec], scale=options.scale)
        for profile in options.profiles:
            case = Case(
                profile=profile,
                copies=options.copies or COPIES.get(profile, 2),
                checkpoint=checkpoint,
                work=Path(name),
                cores=neighbours_first(list(os.sched_getaffinity(0))),
                each=each,
                gpu=not options.cpu,
            )
            try:
                found = runs(case, options.gpus, options.repeats)
            except RuntimeError as error:
                print(f"scaling: {error}", file=sys.stderr)
                return 1
            data["cases"][profile] = {"model": MODEL, "copies": case.copies, "conditions": conditions, "runs": found}
            if not trial:
                common.write("scaling", scaling_report.page(data), data)
    if trial:
        print(scaling_report.page(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
