"""The fleet benchmark: the real command on full-size synthetic checkpoints, from its start to the last published model.

    python -m tests.harness.benchmarks fleet [--data DIR] [--store file|embedded|URL] [--time-limit S]
    python -m tests.harness.benchmarks fleet --one SAM-H [--one ...] --cpu  # models by themselves

The fleet form runs `birkhoff compress manifests/all_sams.yaml --mirror DATA` into an empty store, verifies a sample of
what it published, runs the command again, and writes as many bytes to the store without the pipeline for comparison.
`--one MODEL` (or `--one all`) does the same for each model with a store of its own; the figures for two cores are taken
on a machine that has two. Memory is sampled over all processes of a command (see `process_tree`).

Needs no network. Everything is written below one temporary folder and removed. Results of a form and machine replace
theirs in `results/fleet.json`, and `results/fleet.md` is drawn from it. Exit code 1: something failed, or did not fit
into the time limit; a criterion that is missed is only shown.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks import family, fleet_report, synthetic
from tests.harness.benchmarks.common import RESULTS, ROOT
from tests.harness.benchmarks.process_tree import Measured, measure

RAW_PREFIX = "raw-bandwidth"


class BenchmarkError(Exception):
    """A step that failed, so that its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every step needs to know. `home` is where the pipeline keeps its own things."""

    command: Path
    manifest: Path
    data: Path
    work: Path
    store: str
    environment: dict[str, str]
    deadline: float
    """In seconds of `time.monotonic`."""

    def left(self) -> float:
        """Seconds before the limit; raises BenchmarkError where none are."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise BenchmarkError("time limit reached; raise --time-limit")
        return seconds


@dataclass(slots=True, kw_only=True)
class Run:
    """What is known about one run of a manifest; keys as in the JSON."""

    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def bench(setting: Setting, only: Sequence[str]) -> Run:
    """All steps on the models of `only`, all where empty; a step that fails ends the run with what is known by then."""
    run = Run()
    try:
        _compress(setting, only, run)
        with open_store(setting.store) as store:
            sizes = {found.key: found.size for found in store.list()}
        run.figures |= sharing(run.rows, sizes)
        _verify(setting, run)
        _repeat(setting, only, run, sizes)
        _bandwidth(setting, run, [size for key, size in sizes.items() if key.startswith("blobs/")])
    except BenchmarkError as error:
        run.problems.append(str(error))
    return run


def _birkhoff(setting: Setting, *arguments: str) -> Measured:
    """Run one command to its end. Raises BenchmarkError where it fails or takes too long."""
    found = measure([str(setting.command), *arguments], environment=setting.environment, limit_s=setting.left())
    if found.returncode != 0:
        what = "did not end within the time limit" if found.returncode is None else f"ended with {found.returncode}"
        last = " | ".join(found.errors.strip().splitlines()[-3:])
        raise BenchmarkError(f"birkhoff {' '.join(arguments[:2])} {what} after {found.wall_s:.1f} s: {last}")
    return found


def _run_manifest(setting: Setting, only: Sequence[str]) -> tuple[Measured, list[dict[str, Any]]]:
    chosen = [word for name in only for word in ("--only", name)]
    places = ("--mirror", str(setting.data), "--store", setting.store)
    found = _birkhoff(setting, "compress", str(setting.manifest), *places, *chosen, "--json")
    return found, json.loads(found.output)


def _compress(setting: Setting, only: Sequence[str], run: Run) -> None:
    """The first run: into an empty store."""
    load = os.getloadavg()[0]
    found, run.rows = _run_manifest(setting, only)
    unpublished = [row["model"] for row in run.rows if row["status"] != "published"]
    if unpublished:
        raise BenchmarkError(f"not published: {', '.join(unpublished)}; the store was to be empty")
    stages: dict[str, float] = {}
    for row in run.rows:
        for stage, seconds in row.get("stages", {}).items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    run.figures |= {
        "wall_s": found.wall_s,
        "load_before": load,
        "commit": fleet_report.commit(),
        "source_bytes": sum(row["source_bytes"] for row in run.rows),
        "shards": sum(row["shards"] for row in run.rows),
        "shards_reused": sum(row["shards_reused"] for row in run.rows),
        "stages_worker_s": stages,
        "driver_and_workers_peak_bytes": found.job_peak,
        "all_processes_peak_bytes": found.peak,
        "peak_bytes_by_role": found.peaks,
        "memory_samples": found.samples,
    }


def sharing(rows: Sequence[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    """Stored bytes of the fleet against the sum of its models, each taken by itself."""
    stored, single = sum(sizes.values()), sum(row["stored_bytes"] for row in rows)
    return {"stored_bytes": stored, "sum_of_single_bytes": single, "stored_share": stored / single}


def sample(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The models to verify: the smallest, the median, and the one that took most from others."""
    by_size = sorted(rows, key=lambda row: row["source_bytes"])
    reuse = max(rows, key=lambda row: row["shards_reused"] / row["shards"])
    return list(dict.fromkeys(row["model"] for row in (by_size[0], by_size[len(by_size) // 2], reuse)))


def _verify(setting: Setting, run: Run) -> None:
    """Every byte of a sample, against its checkpoint where that is one file."""
    known = {member.name: member for member in family.members()}
    verified = []
    for name in sample(run.rows):
        files = known[name].files
        against = ["--against", str(setting.data / files[0])] if len(files) == 1 else []
        found = _birkhoff(setting, "verify", name, "--store", setting.store, *against, "--json")
        verified.append({"model": name, "seconds": found.wall_s, **json.loads(found.output)})
    run.figures["verified"] = verified


def _repeat(setting: Setting, only: Sequence[str], run: Run, before: dict[str, int]) -> None:
    """The same command again: nothing may be made or stored."""
    found, rows = _run_manifest(setting, only)
    with open_store(setting.store) as store:
        after = {found.key: found.size for found in store.list()}
    run.figures["second_run_s"] = found.wall_s
    run.figures["second_run_new_blobs"] = sum(key.startswith("blobs/") for key in after.keys() - before.keys())
    changed = [row["model"] for row in rows if row["status"] != "up to date"]
    if changed:
        run.problems.append(f"second run: not up to date: {', '.join(changed)}")


def _bandwidth(setting: Setting, run: Run, sizes: Sequence[int]) -> None:
    """Write objects of the blobs' sizes to the same store, and nothing else: what the store could take."""
    setting.left()
    with open_store(setting.store) as store:
        seconds = write_raw(store, sizes)
    raw = sum(sizes) / seconds
    run.figures["raw_bytes_per_s"] = raw
    run.figures["storage_share"] = sum(sizes) / run.figures["wall_s"] / raw


def write_raw(store: Store, sizes: Sequence[int]) -> float:
    """Seconds to put objects of these sizes, one thread per CPU; they are removed again."""
    filler = memoryview(os.urandom(max(sizes, default=0)))
    keys = [f"{RAW_PREFIX}/{index}" for index in range(len(sizes))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.perf_counter()
        list(pool.map(lambda pair: store.put(pair[0], bytes(filler[: pair[1]])), zip(keys, sizes, strict=True)))
        seconds = time.perf_counter() - start
        list(pool.map(store.delete, keys))
    return seconds


@contextmanager
def checkpoints(folder: Path | None, work: Path, only: Sequence[str], scale: float) -> Iterator[tuple[Path, float]]:
    """The folder that holds the models' files, and the seconds it took to write them; theirs end with the block."""
    specs = family.wanted_files(only)
    if folder is not None:
        missing = [spec.file for spec in specs if not (folder / spec.file).is_file()]
        if missing:
            raise BenchmarkError(
                f"{folder}: lacks {', '.join(missing)}; write them with tests.harness.benchmarks.synthetic"
            )
        yield folder, 0.0
        return
    target, start = work / "data", time.perf_counter()
    try:
        synthetic.write_files(target, specs, scale=scale)
        yield target, time.perf_counter() - start
    finally:
        shutil.rmtree(target, ignore_errors=True)


@contextmanager
def workplace(parent: Path | None) -> Iterator[tuple[Path, dict[str, str]]]:
    """A temporary folder, and an environment in which the pipeline and Ray write nowhere else."""
    # Ray's sockets lie deep below its folder, and a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="bf-", dir=parent) as name,
        tempfile.TemporaryDirectory(prefix="bf-") as ray,
    ):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("BIRKHOFF_")}
        yield Path(name), {**inherited, "BIRKHOFF_HOME": f"{name}/home", "RAY_TMPDIR": ray}


def store_url(form: str, work: Path, label: str) -> str:
    """URL of a store that holds nothing yet: `file` lies in the work folder, `embedded` in the pipeline's home."""
    return (work / "store" / label).as_uri() if form == "file" else form


@contextmanager
def serving(options: argparse.Namespace, environment: dict[str, str]) -> Iterator[None]:
    """Keep the embedded server up inside the block, as one that serves many commands is."""
    if options.store != "embedded":
        yield
        return

    def store(*command: str) -> None:
        found = measure([str(options.command), "store", *command], environment=environment, limit_s=options.time_limit)
        if found.returncode != 0:
            raise BenchmarkError(f"birkhoff store {' '.join(command)}: {found.errors.strip()}")

    store("up")
    try:
        yield
    finally:
        store("down")


def _settle() -> None:
    """Bring written checkpoints to the disk before the clock runs."""
    os.sync()


def _one_by_one(options: argparse.Namespace, work: Path, environment: dict[str, str], deadline: float) -> list[Run]:
    names = [member.name for member in family.members()] if "all" in options.one else options.one
    runs = []
    for index, name in enumerate(names):
        runs.append(_single(options, work, environment, deadline, only=[name], label=str(index)))
        shutil.rmtree(work / "store", ignore_errors=True)
        print(fleet_report.progress_line(name, runs[-1].figures, runs[-1].problems), flush=True)
    return runs


def _single(
    options: argparse.Namespace,
    work: Path,
    environment: dict[str, str],
    deadline: float,
    *,
    only: Sequence[str],
    label: str,
) -> Run:
    """Checkpoints and a server, then every step."""
    try:
        with checkpoints(options.data, work, only, options.scale) as (data, seconds), serving(options, environment):
            _settle()
            setting = Setting(
                command=options.command,
                manifest=options.manifest,
                data=data.resolve(),
                work=work,
                store=store_url(options.store, work, label),
                environment=environment,
                deadline=deadline,
            )
            run = bench(setting, only)
            run.figures["data_s"] = seconds
            return run
    except (BenchmarkError, OSError) as error:
        return Run(problems=[str(error)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.benchmarks fleet", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="checkpoints written before; otherwise they are written and removed")
    add("--store", default="file", help="file (the default), embedded (an S3 server here), or an empty store's URL")
    add("--only", action="append", default=[], metavar="NAME", help="these models of the manifest; repeatable")
    add("--one", action="append", default=[], metavar="NAME", help="each by itself, `all` for every model; repeatable")
    add("--cpu", action="store_true", help="hide the GPUs")
    add("--scale", type=float, default=1.0, help="of written checkpoints; below 1 no criterion is judged")
    add("--time-limit", type=float, default=540.0, metavar="S", help="for everything, checkpoints included (540)")
    add("--manifest", type=Path, default=ROOT / "manifests" / "all_sams.yaml")
    add("--command", type=Path, default=Path(sys.executable).with_name("birkhoff"), help="the command to measure")
    add("--work", type=Path, metavar="DIR", help="parent of the temporary folder")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of fleet.json and fleet.md")
    options = parser.parse_args(argv)
    if options.one and options.store != "file":
        parser.error("--one needs an empty store for each model: leave --store at file")
    return options


def unproven(manifest: Path, folder: Path) -> Path:
    """The manifest without proofs: masks of made-up weights are no masks, and the original's are refused as such."""
    path = folder / manifest.name
    path.write_text(f"proof: false\n{manifest.read_text()}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.harness.benchmarks fleet`."""
    options = parse(argv)
    deadline = time.monotonic() + options.time_limit
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with workplace(options.work) as (work, environment):
        os.environ["BIRKHOFF_HOME"] = environment["BIRKHOFF_HOME"]  # where this process looks for the embedded store
        options.manifest = unproven(options.manifest, work)
        if options.one:
            runs = _one_by_one(options, work, environment, deadline)
        else:
            runs = [_single(options, work, environment, deadline, only=options.only, label="fleet")]
    record = fleet_report.record(
        form="one by one" if options.one else "fleet",
        store=options.store,
        scale=options.scale,
        runs=[{"figures": run.figures, "models": run.rows, "problems": run.problems} for run in runs],
    )
    fleet_report.save(record, options.out)
    print(fleet_report.table(record))
    return 1 if any(run.problems for run in runs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
