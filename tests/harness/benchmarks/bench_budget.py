"""Budgets on two trained models: each way to share a target among tensors, at equal bytes, judged by the output.

The demo SAM by its masks, MiniLM-L6 by its embeddings of the sentences of the licence. Every version is made by the
pipeline itself, in a store of its own, and is checked to fit before it is judged.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from torch import Tensor

from birkhoff.codec.profiles import Allocation
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.run.compress import compress
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks import checkpoints, common
from tests.harness.benchmarks.measure import WrongResultError

DEMO = common.ROOT / "manifests" / "demo"
RATIOS = {"demo": (5.5, 6.0, 6.5, 7.0, 7.5, 8.0), "minilm": (5.0, 6.0, 7.0, 8.0)}
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
SENTENCE = 40
"""Characters of a line of the licence that counts as a sentence."""

Judge = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""From a model's decoded tensors to how well its outputs agree with the original's."""


def main(arguments: list[str]) -> int:
    """Measure, print and store `results/budget.md` and `.json`."""
    parser = argparse.ArgumentParser(prog="tests.harness.benchmarks budget", description=__doc__)
    parser.add_argument("--pictures", type=int, default=256, help="held-out pictures (default 256)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    conditions = common.conditions("torch", "transformers", "zstandard")
    sources = {"demo": DEMO / "demo_sam.safetensors", "minilm": checkpoints.minilm_path()}
    judges = {"demo": masks(options.pictures), "minilm": sentences(sources["minilm"].parent)}
    results = {"conditions": conditions, "rows": measure(sources, judges)}
    common.write("budget", markdown(results), results)
    return 0


def measure(sources: Mapping[str, Path], judges: Mapping[str, Judge]) -> list[dict[str, Any]]:
    """One row for each model, ratio and allocation."""
    cases = [(model, ratio, way) for model in sources for ratio in RATIOS[model] for way in ALLOCATIONS]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "budgets.yaml"
        models = [
            f"  - {{name: {name(*case)}, source: {sources[model]}, target_ratio: {ratio}, allocation: {way}}}"
            for case in cases
            for model, ratio, way in [case]
        ]
        manifest.write_text("\n".join(["proof: false", "models:", *models]))
        with open_store((Path(folder) / "store").as_uri()) as store:
            progress = Progress(Console(stderr=True), models=len(models), quiet=True)
            runs = compress(load_manifest(manifest), store, lambda _: InlineExecutor(store.address), progress)
            made = {run.name: run for run in runs}
            return [row(made[name(*case)], store, *case, judges[case[0]]) for case in cases]


def name(model: str, ratio: float, allocation: str) -> str:
    """Of a version's model."""
    return f"{model}-{ratio:g}-{allocation}"


def row(run: ModelRun, store: Store, model: str, ratio: float, allocation: str, judge: Judge) -> dict[str, Any]:
    """What a version takes, and how well it agrees with the original.

    Raises:
        WrongResultError: it does not fit its budget.
    """
    if run.version is None or run.source_bytes / run.version.stored_bytes < ratio:
        raise WrongResultError(f"{run.name}: {run.error or 'the version does not fit its budget'}")
    found: dict[str, Any] = {"model": model, "ratio": ratio, "allocation": allocation}
    found |= {"bytes": run.version.stored_bytes}
    found |= {key: run.row()[key] for key in ("target_db", "sqnr_db_min", "sqnr_db_median", "passes")}
    return found | judge(dict(StoredArtifact(store, run.version).tensors()))


def masks(count: int) -> Judge:
    """Mean IoU with the original's masks by prompt, its fifth percentile, and with the truth."""
    sys.path.append(str(DEMO))
    import evaluate
    from model import from_state, load

    pictures = evaluate.held_out(count)
    original = {prompt: evaluate.predict_masks(load(), pictures, prompt=prompt) for prompt in ("box", "click")}

    def judge(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        model, found = from_state(dict(tensors)), {}
        for prompt, wanted in original.items():
            predicted = evaluate.predict_masks(model, pictures, prompt=prompt)
            ious = evaluate.ious(predicted, wanted)[pictures.valid].float()
            found |= {prompt: float(ious.mean()), f"{prompt}_p5": float(ious.quantile(0.05))}
            found[f"{prompt}_truth"] = evaluate.mean_iou(predicted, pictures)
        return found

    return judge


def sentences(folder: Path) -> Judge:
    """Cosine of sentence embeddings with the original's: mean and fifth percentile."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    lines = map(str.strip, (common.ROOT / "LICENSE").read_text().splitlines())
    tokens = AutoTokenizer.from_pretrained(folder)(
        [line for line in lines if len(line) > SENTENCE], padding=True, truncation=True, return_tensors="pt"
    )

    @torch.inference_mode()
    def embed() -> Tensor:
        hidden, weight = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * weight).sum(dim=1), dim=1)

    original = embed()

    def judge(tensors: Mapping[str, Tensor]) -> dict[str, float]:
        model.load_state_dict(tensors, strict=False)
        cosine = (embed() * original).sum(dim=1)
        return {"cosine": float(cosine.mean()), "cosine_p5": float(cosine.quantile(0.05))}

    return judge


FIGURES = {"demo": ("box", "box_p5", "click", "click_p5", "box_truth"), "minilm": ("cosine", "cosine_p5")}


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    lines = [f"- {key}: {value}" for key, value in results["conditions"].items()]
    note = (
        "`python -m tests.harness.benchmarks budget`: two models under `target_ratio`, every byte counted. `box` and\n"
        "`click`: mean IoU of the demo's masks with the original's, by prompt, `p5` its fifth percentile; `truth`:\n"
        "with the true masks. `cosine`: of MiniLM-L6's embeddings of the licence's lines with the original's.\n"
        "`passes`: times a version was encoded until it fitted."
    )
    tables = (f"## {model}\n\n{_table(model, results['rows'])}" for model in RATIOS)
    return "\n\n".join(("# Budgets", "\n".join(lines), note, *tables)) + "\n"


def _table(model: str, rows: list[dict[str, Any]]) -> str:
    head = ["budget, allocation", "bytes", "target dB", "SQNR min / median"]
    cells = [
        [
            f"{row['ratio']:g}, {row['allocation']}",
            str(row["bytes"]),
            f"{row['target_db']:.2f}",
            f"{row['sqnr_db_min']:.1f} / {row['sqnr_db_median']:.1f}",
            *(f"{row[key]:.4f}" for key in FIGURES[model]),
            str(row["passes"]),
        ]
        for row in rows
        if row["model"] == model
    ]
    return common.table([*head, *(key.replace("_", ", ") for key in FIGURES[model]), "passes"], cells)
