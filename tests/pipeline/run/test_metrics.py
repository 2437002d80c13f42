"""Metrics of a real run, scraped from the endpoint of a real local Ray."""

import os
import re
import signal
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline import logs
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.shards import plan_model
from birkhoff.pipeline.run import metrics
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run.ray import RayExecutor
from birkhoff.pipeline.shard.task import ShardResult, ShardTask
from birkhoff.pipeline.store.base import StoreAddress
from tests.patience import PATIENT_SECONDS

_SAMPLE = re.compile(r"(ray_birkhoff_\w+)\{(.*)\} (\S+)")


def scrape(url: str) -> Counter[tuple[str, ...]]:
    """Values by name and the labels that are ours, workers added up."""
    found: Counter[tuple[str, ...]] = Counter()
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if sample := _SAMPLE.fullmatch(line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2]))
                ours = [labels[key] for key in ("model", "result", "stage", "kind", "reason", "le") if key in labels]
                found[sample[1], *ours] += float(sample[3])  # type: ignore[assignment]
    return found


def tasks(folder: Path, count: int) -> list[ShardTask]:
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"blocks.{n}.weight": torch.randn(64, 128, generator=generator) for n in range(count)},
        folder / "net.safetensors",
    )
    checkpoint, profile = open_checkpoint(folder / "net.safetensors"), PROFILES["balanced"]
    return plan_model("net", checkpoint, profile, shard_bytes=1).tasks("net")


@pytest.mark.slow
def test_the_endpoint_tells_what_the_workers_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    store = StoreAddress.parse((tmp_path / "store").as_uri())
    with logs.trace("20260102T030405.678Z-9abc") as folder, RayExecutor(store, workers=1) as executor:
        work = tasks(tmp_path, 6)
        results = [outcome.result for outcome in executor.run(TaskQueue(work, budget=1 << 30))]
        made = [result for result in results if isinstance(result, ShardResult)]
        victim = ray.get(executor.workers[0].identity.remote())["pid"]
        address = next(node for node in ray.nodes() if node["Alive"])
        url = f"http://{address['NodeManagerAddress']}:{address['MetricsExportPort']}/metrics"
        wanted = ("ray_birkhoff_shards_total", "net", "made")
        # The worker that counted them must be alive when Ray collects.
        first = _until(url, wanted, 6.0)
        assert folder is not None
        assert (folder / f"worker-{victim}.jsonl").read_text().count('"stage": "encode"') == 6
        os.kill(victim, signal.SIGKILL)
        list(executor.run(TaskQueue(work, budget=1 << 30)))
        second = _until(url, ("ray_birkhoff_shards_total", "net", "reused"), 6.0)
    assert len(made) == 6
    total = sum(task.nbytes for task in work)
    assert first["ray_birkhoff_source_bytes_total", "net", "made"] == total
    assert first["ray_birkhoff_stored_bytes_total", "net", "made"] == sum(result.record.bytes for result in made)
    for stage in ("read", "encode", "validate", "upload"):
        counted = first["ray_birkhoff_stage_seconds_total", stage]
        assert counted == pytest.approx(sum(result.stages[stage] for result in made), rel=1e-6)
    assert first["ray_birkhoff_sqnr_db_count", "net"] == 6
    assert (
        first["ray_birkhoff_sqnr_db_bucket", "net", "30.0"] <= first["ray_birkhoff_sqnr_db_bucket", "net", "31.0"] == 6
    )
    assert first["ray_birkhoff_shard_seconds_count", "made"] == 6
    assert first["ray_birkhoff_working_bytes",] == 0
    assert second["ray_birkhoff_source_bytes_total", "net", "reused"] == total
    assert second["ray_birkhoff_retries_total", "net", "worker died"] >= 1
    documented = set(re.findall(r"ray_birkhoff_\w+", metrics.__doc__ or ""))
    scraped = {re.sub(r"_(bucket|count|sum)$", "", key[0]) for key in {*first, *second}}
    assert scraped <= documented
    assert documented - scraped == {"ray_birkhoff_failures_total"}  # none failed


def _until(url: str, key: tuple[str, ...], value: float) -> Counter[tuple[str, ...]]:
    """Ray collects every 10 s: look until what was counted has arrived."""
    deadline = time.monotonic() + PATIENT_SECONDS
    found: Counter[tuple[str, ...]] = Counter()
    while time.monotonic() < deadline:
        found = scrape(url)
        if found[key] >= value:
            return found
        time.sleep(1)
    raise AssertionError(f"{key} is {found[key]}, not {value}; there are {sorted(found)}")


def test_without_ray_nothing_is_counted() -> None:
    import sys

    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        pytest.skip("another test's cluster is up in this process")
    assert metrics.metrics() is None
