"""Budgets on the demo model: one dB for every tensor beside allocation by size, at equal bytes, judged by its masks.

Every version is made by the pipeline itself, in a store of its own, and is checked to fit before it is judged.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from birkhoff.pipeline.artifacts import StoredArtifact
from birkhoff.pipeline.compress import compress
from birkhoff.pipeline.execute import InlineExecutor
from birkhoff.pipeline.manifest import load_manifest
from birkhoff.pipeline.model_run import ModelRun
from birkhoff.pipeline.progress import Progress
from birkhoff.pipeline.store import Store, open_store
from tests.benchmarks import common
from tests.benchmarks.measure import WrongResultError

DEMO = common.ROOT / "manifests" / "demo"
RATIOS = (5.5, 6.0, 6.5, 7.0, 7.5, 8.0)
ALLOCATIONS = ("uniform", "size")


def main(arguments: list[str]) -> int:
    """Measure, print and store `results/budget.md` and `.json`."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks budget", description=__doc__)
    parser.add_argument("--pictures", type=int, default=256, help="held-out pictures (default 256)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    results = {"conditions": common.conditions("torch", "transformers", "zstandard"), "rows": measure(options.pictures)}
    common.write("budget", markdown(results), results)
    return 0


def measure(pictures: int) -> list[dict[str, Any]]:
    """One row for each ratio and allocation."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "budgets.yaml"
        source = DEMO / "demo_sam.safetensors"
        models = [
            f"  - {{name: {name(ratio, way)}, source: {source}, target_ratio: {ratio}, allocation: {way}}}"
            for ratio in RATIOS
            for way in ALLOCATIONS
        ]
        manifest.write_text("\n".join(["models:", *models]))
        with open_store((Path(folder) / "store").as_uri()) as store:
            progress = Progress(Console(stderr=True), models=len(models), quiet=True)
            runs = compress(load_manifest(manifest), store, lambda: InlineExecutor(store.address), progress)
            return judge({run.name: run for run in runs}, store, pictures)


def name(ratio: float, allocation: str) -> str:
    """Of a model."""
    return f"demo-{ratio:g}-{allocation}"


def judge(runs: dict[str, ModelRun], store: Store, count: int) -> list[dict[str, Any]]:
    """Masks of every version beside the original's: mean IoU by prompt."""
    sys.path.append(str(DEMO))
    import evaluate
    from model import from_state, load

    pictures = evaluate.held_out(count)
    prompts = ("box", "click")
    original = {prompt: evaluate.predict_masks(load(), pictures, prompt=prompt) for prompt in prompts}
    rows = []
    for ratio in RATIOS:
        for allocation in ALLOCATIONS:
            run = runs[name(ratio, allocation)]
            if run.version is None or run.source_bytes / run.version.stored_bytes < ratio:
                raise WrongResultError(f"{run.name}: {run.error or 'the version does not fit its budget'}")
            model = from_state(dict(StoredArtifact(store, run.version).tensors()))
            row: dict[str, Any] = {"ratio": ratio, "allocation": allocation, "bytes": run.version.stored_bytes}
            row |= {key: run.row()[key] for key in ("target_db", "sqnr_db_min", "sqnr_db_median", "passes")}
            for prompt in prompts:
                masks = evaluate.predict_masks(model, pictures, prompt=prompt)
                row[prompt] = float(evaluate.ious(masks, original[prompt])[pictures.valid].mean())
                row[f"{prompt}_truth"] = evaluate.mean_iou(masks, pictures)
            rows.append(row)
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    lines = [f"- {key}: {value}" for key, value in results["conditions"].items()]
    cells = [
        [
            f"{row['ratio']:g}, {row['allocation']}",
            str(row["bytes"]),
            f"{row['target_db']:.2f}",
            f"{row['sqnr_db_min']:.1f} / {row['sqnr_db_median']:.1f}",
            f"{row['box']:.4f}",
            f"{row['click']:.4f}",
            f"{row['box_truth']:.4f}",
            str(row["passes"]),
        ]
        for row in results["rows"]
    ]
    head = ["budget, allocation", "bytes", "target dB", "SQNR min / median", "box", "click", "box, truth", "passes"]
    note = (
        "`python -m tests.benchmarks budget`: the demo model under `target_ratio`, every byte counted. `box` and\n"
        "`click`: mean IoU of its masks with the original model's, by prompt; `truth`: with the true masks. `passes`:\n"
        "times it was encoded until it fitted."
    )
    return "\n\n".join(("# Budgets", "\n".join(lines), note, common.table(head, cells))) + "\n"
