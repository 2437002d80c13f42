"""What `allocation: output` takes: seconds of each stage and memory of the GPU, for members at full size.

    python -m tests.harness.benchmarks by_output [--only SAM-B,SAM-H] [--work DIR]

transformers' SamModel in the layout of each, with random weights: they decide neither time nor memory, and nothing is
said of masks. A member is compressed twice by the pipeline, in this process: the second run must change nothing. A run
is the wall time from the manifest to the published version, digests included, but not Python's and CUDA's start. Stages
are the pipeline's own: statistics run alone, the seconds of encoding and validation are those of all threads together.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from birkhoff.pipeline.plan.manifest import load_manifest
from tests.harness.benchmarks import common
from tests.harness.benchmarks.encoders import ENCODERS
from tests.harness.benchmarks.measure import WrongResultError
from tests.harness.benchmarks.publishing import compress_here

MODEL = "member"
RATIO = 6.1
STAGES = ("estimate", "encode", "validate")
"""Those that a table shows by name, beside `statistics`."""

PACKAGES = ("torch", "transformers")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STD = 0.02


def build(name: str, folder: Path) -> Path:
    """Save a member with matrices from N(0, STD), as transformers does; the file of its weights."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = SamModel(SamConfig(vision_config=ENCODERS[name]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=STD)
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def measure(name: str, work: Path) -> dict[str, Any]:
    """The record of a member.

    Raises:
        WrongResultError: it was not published, misses its ratio, or a second run published again.
    """
    source = build(name, work / name)
    manifest = work / f"{name}.yaml"
    entry = {"name": MODEL, "source": str(source), "allocation": "output", "target_ratio": RATIO}
    manifest.write_text(yaml.safe_dump({"proof": False, "models": [entry]}))
    store = (work / "store").absolute().as_uri()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    runs = []
    for _ in range(2):
        begin = time.perf_counter()
        runs.append(compress_here(load_manifest(manifest), store))
        seconds.append(round(time.perf_counter() - begin, 1))
        print(name, seconds[-1], dict(runs[-1].stages), flush=True)
    first, second = runs
    if first.version is None or second.version is None:
        raise WrongResultError(f"{name}: {first.error or second.error}")
    ratio = source.stat().st_size / first.version.stored_bytes
    if ratio < RATIO or second.version.digest != first.version.digest or second.status == "published":
        raise WrongResultError(f"{name}: ratio {ratio:.3f}, then {second.status} as {second.version.digest}")
    return {
        "weights": source.stat().st_size // 4,
        "stages": {stage: round(value, 1) for stage, value in first.stages.items()},
        "run_s": seconds[0],
        "second_run_s": seconds[1],
        "encodings": first.passes.count if first.passes else 0,
        "ratio": round(ratio, 2),
        "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE == "cuda" else None,
    }


def markdown(records: dict[str, Any]) -> str:
    """The page."""
    head = ["member", "weights, M", "run, s", "of it statistics, s", "encodings"]
    head += [*(f"{stage}, s of threads" for stage in STAGES), "second run, s", "GPU memory, GB"]
    lines = []
    for name, one in sorted(records.items(), key=lambda item: item[1]["weights"]):
        stages = one["stages"]
        memory = "" if one["gpu_gb"] is None else f"{one['gpu_gb']:.1f}"
        shown = [f"{stages.get(stage, 0.0):.1f}" for stage in STAGES]
        about = [name, f"{one['weights'] / 1e6:.0f}", str(one["run_s"]), f"{stages.get('statistics', 0.0):.1f}"]
        lines.append([*about, str(one["encodings"]), *shown, str(one["second_run_s"]), memory])
    return f"""# `allocation: output`: time and memory

`python -m tests.harness.benchmarks by_output`: each member in its published layout with random weights, at a
`target_ratio` of {RATIO:g}, in one process. Random weights say nothing of masks: see [masks](masks.md).

{common.table(head, lines)}

{common.facts(records)}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write `results/by_output.*`; members that are not asked for stay as they are."""
    parser = argparse.ArgumentParser(prog="bench by_output", description=__doc__)
    parser.add_argument("--only", default="SAM-B,SAM-H", metavar="NAMES", help=f"of {', '.join(ENCODERS)}, by commas")
    parser.add_argument("--work", type=Path, help="where models and stores lie meanwhile; a temporary folder else")
    parser.add_argument("--commit", metavar="HASH", help="of this code, where there is no git")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        print("by_output: left out, transformers is not here; make setup")
        return 0
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in ENCODERS]:
        parser.error(f"no member {unknown[0]!r}; there are: {', '.join(ENCODERS)}")
    if DEVICE == "cpu" and not argv:
        print("by_output: left out, there is no GPU; --only NAMES measures on this CPU")
        return 0
    records: dict[str, Any] = {}
    for name in wanted:
        conditions = common.conditions(*PACKAGES, commit_hash=options.commit)
        if DEVICE == "cuda":
            conditions["gpu"] = torch.cuda.get_device_name()
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            record = measure(name, Path(folder)) | {"conditions": conditions}
        print(name, record, flush=True)
        records = common.keep(common.RESULTS, "by_output", name, record)
    (common.RESULTS / "by_output.md").write_text(markdown(records))
    print(markdown(records))
    return 0
