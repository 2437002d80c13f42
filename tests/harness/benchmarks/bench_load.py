"""From a stored SAM-H to a model that is ready: empty cache, warm cache, and the dense file for comparison.

    python -m tests.harness.benchmarks load [--device cuda] [--repeats 5] [--profile balanced] [--work DIR]

Writes a SAM-H of drawn weights into a store in a directory (its size is a result, its ratio is none), loads it into a
model on the meta device, and checks layers against the eager decoder before anything is timed. Each load runs in a
process of its own; timed is what comes after imports, the device's start and the empty model, with their time beside
it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import birkhoff
from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES, Profile
from birkhoff.codec.tensor import decode_tensor
from birkhoff.kernels.entropy import op as entropy  # noqa: F401  registers the GPU's packing
from birkhoff.kernels.trellis import op as trellis  # noqa: F401  registers the GPU's search
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.registry.documents import ShardRecord, SourceRecord, VersionManifest, blob_key, sha256
from birkhoff.pipeline.registry.versions import publish
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.codec.by_profile import encode_tensor
from tests.harness.benchmarks.common import ROOT, conditions, table, write
from tests.harness.benchmarks.family import TensorSpec, layout
from tests.harness.benchmarks.load_worker import LAYOUT, MODEL, skeleton
from tests.harness.benchmarks.synthetic import draw
from tests.pipeline.publishing import unmeasured

SHARD_BYTES = 32 << 20
CHECKED = 5
"""Tensors compared before timing."""


def main(arguments: list[str]) -> int:
    """Run, print and store the result; 1 where a loaded layer is not what the eager decoder gives."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.benchmarks load")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", default="balanced", choices=sorted(PROFILES))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--commit", help="what to record where there is no git")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        os.environ["BIRKHOFF_HOME"] = str(work / "home")
        with open_store((work / "store").as_uri()) as store:
            stored = fill(store, work / "dense.safetensors", PROFILES[options.profile], torch.device(options.device))
        bad = wrong((work / "store").as_uri(), options.device)
        if bad:
            print(f"loaded otherwise than decoded: {', '.join(bad)}", file=sys.stderr)
            return 1
        runs: dict[str, dict[str, Any]] = {
            "ours, empty cache": {"what": "ours", "cold": True},
            "ours, warm cache": {"what": "ours"},
            "ours, warm cache, kernels started before": {"what": "ours", "kernels": True},
            "dense bfloat16, safetensors": {"what": "baseline"},
        }
        if options.device == "cpu":
            del runs["ours, warm cache, kernels started before"]
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for run, order in runs.items():
                figures[run].append(_measure(work, options.device, **order))
    _report(figures, stored, options)
    return 0


def fill(store: Store, dense: Path, profile: Profile, device: torch.device) -> dict[str, int]:
    """Code and publish the model, and write the same weights as bfloat16; returns stored, source and greatest shard."""
    records: list[ShardRecord] = []
    halves: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in _groups():
            tensors = dict(zip([s.name for s in group], pool.map(_drawn, group), strict=True))
            halves |= {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
            blob = serialise([encode_tensor(key, t.to(device), profile).tensor for key, t in tensors.items()])
            store.put(blob_key(sha256(blob)), blob)
            size = sum(t.nbytes for t in tensors.values())
            records.append(unmeasured(blob, source_bytes=size, tensors=len(tensors)))
    save_file(halves, dense)
    source = SourceRecord(file="drawn", sha256=records[0].blob, bytes=1, format="none")
    manifest = VersionManifest(
        model=MODEL, source=source, profile=profile.name, recipe=profile.recipe(), code="0", shards=tuple(records)
    )
    publish(store, manifest)
    return {
        "stored_bytes": sum(record.bytes for record in records),
        "source_bytes": sum(record.source_bytes for record in records),
        "largest_shard_bytes": max(record.source_bytes for record in records),
        "shards": len(records),
    }


def _groups() -> Iterator[list[TensorSpec]]:
    group: list[TensorSpec] = []
    for spec in layout(LAYOUT):
        group.append(spec)
        if sum(one.nbytes for one in group) >= SHARD_BYTES:
            yield group
            group = []
    if group:
        yield group


def _drawn(spec: TensorSpec) -> torch.Tensor:
    return torch.from_numpy(draw("sam_vit_h_4b8939.pth", spec))


def wrong(store: str, device: str) -> list[str]:
    """Names of checked tensors that are loaded otherwise than the reference decodes them on the CPU."""
    model = skeleton()
    layers = set(birkhoff.load_into(model, MODEL, store, device=device))
    bad = []
    with open_artifact(MODEL, store) as artifact:
        shards = artifact.manifest.shards
        for shard in [shards[0], shards[len(shards) // 2], shards[-1]]:
            for coded in artifact.coded_of(shard)[:CHECKED]:
                owner, _, leaf = coded.name.rpartition(".")
                module = model.get_submodule(owner)
                found = (
                    module.dense_weight(torch.float32)
                    if owner in layers and leaf == "weight"
                    else getattr(module, leaf)
                )
                if not torch.equal(found.cpu(), decode_tensor(coded)):
                    bad.append(coded.name)
    return bad


def _measure(work: Path, device: str, *, what: str, cold: bool = False, kernels: bool = False) -> dict[str, float]:
    if cold:
        shutil.rmtree(work / "home" / "cache", ignore_errors=True)
    order: dict[str, Any] = {
        "what": what,
        "device": device,
        "kernels": kernels,
        "reference": MODEL,
        "store": (work / "store").as_uri(),
        "file": str(work / "dense.safetensors"),
        "spawned": time.time(),
    }
    program = [sys.executable, "-m", "tests.harness.benchmarks.load_worker", json.dumps(order)]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{what}: {ran.stderr.strip().splitlines()[-1:]}")
    figures: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return figures


def _report(figures: dict[str, list[dict[str, float]]], stored: dict[str, int], options: argparse.Namespace) -> None:
    facts = conditions("torch", "zstandard", "safetensors", commit_hash=options.commit)
    place = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    rows = []
    for run, taken in figures.items():
        middle = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        rows.append(
            [
                run,
                f"{middle['load_s']:.2f}",
                f"{min(one['load_s'] for one in taken):.2f}",
                f"{max(one['load_s'] for one in taken):.2f}",
                f"{middle['start_s']:.2f}",
                f"{middle['kernels_s']:.2f}" if middle["kernels_s"] > 0.01 else "",
                f"{middle['host_bytes'] / 1e6:.0f}" if "host_bytes" in middle else "not measured",
                f"{middle['model_bytes'] / 1e6:.0f}",
            ]
        )
    bound = stored["stored_bytes"] + stored["largest_shard_bytes"]
    head = ["", "load s, median", "least", "most", "start s", "of it kernels", "host MB more", "model MB"]
    text = [
        f"# Load benchmark, {options.device}",
        "",
        f"Drawn from `load_{options.device}.json` by `python -m tests.harness.benchmarks load`.",
        "",
        f"SAM-H of drawn weights, {stored['source_bytes'] / 1e6:.0f} MB in {stored['shards']} shards of "
        f"{stored['stored_bytes'] / 1e6:.0f} MB (`{options.profile}`), from a store in a directory to a model on "
        f"{place}; median of {options.repeats}, each in a process of its own. `start` is imports, the device's "
        f"start and the empty model, before what is timed; Triton's start, which a process needs once for any "
        f"kernel, is part of the load unless a row says otherwise. Host memory is the growth of the process's peak "
        f"during the load; largest shard and compressed model together are {bound / 1e6:.0f} MB.",
        "",
        table(head, rows),
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()) + ".",
        "",
    ]
    write(f"load_{options.device}", "\n".join(text), {"conditions": facts, "stored": stored, "figures": figures})
