"""From a stored SAM-H to a model that is ready: empty cache, warm cache, and the dense file for comparison.

    python -m tests.harness.benchmarks load [--device cuda] [--repeats 5] [--profile balanced] [--work DIR]

Publishes a SAM-H of drawn weights to a store in a directory (its size is a result, its ratio is none), loads it into a
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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import birkhoff
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.plan.manifest import load_manifest
from tests.harness.benchmarks import family, synthetic
from tests.harness.benchmarks.common import ROOT, conditions, table, write
from tests.harness.benchmarks.load_worker import MODEL, skeleton
from tests.harness.benchmarks.publishing import compress_here

MEMBER = "SAM-H"
DENSE = "dense.safetensors"
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
        stored = fill((work / "store").as_uri(), work, options.profile)
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


def fill(store: str, work: Path, profile: str) -> dict[str, int]:
    """Publish the model, and write the same weights as bfloat16; returns stored, source and greatest shard."""
    (spec,) = family.wanted_files([MEMBER])
    (checkpoint,) = synthetic.write_files(work, [spec])
    manifest = work / "manifest.yaml"
    manifest.write_text(f"profile: {profile}\nproof: false\nmodels: [{{name: {MODEL}, source: {checkpoint.name}}}]\n")
    run = compress_here(load_manifest(manifest), store)
    if run.version is None:
        raise RuntimeError(f"not published: {run.error}")
    tensors = torch.load(checkpoint, mmap=True, weights_only=True)
    save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}, work / DENSE)
    checkpoint.unlink()
    shards = run.version.manifest.shards
    return {
        "stored_bytes": sum(shard.bytes for shard in shards),
        "source_bytes": sum(shard.source_bytes for shard in shards),
        "largest_shard_bytes": max(shard.source_bytes for shard in shards),
        "shards": len(shards),
    }


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
    os.sync()  # what the run before wrote is not this one's
    order: dict[str, Any] = {
        "what": what,
        "device": device,
        "kernels": kernels,
        "reference": MODEL,
        "store": (work / "store").as_uri(),
        "file": str(work / DENSE),
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
