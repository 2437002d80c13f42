"""What compression did to a model's outputs: masks for the same prompts, and the image encoder block by block.

Agreement is the IoU of the compressed model's mask with the original's, mean and worst over all prompts: a good mean
can hide a picture that went wrong. A block's SQNR is `10*log10(sum x^2 / sum (x - x')^2)` over its outputs for all
pictures, x the original's, in dB: errors of the blocks before it included.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from birkhoff.codec.metrics import fidelity, sqnr_db
from birkhoff.pipeline.artifacts import open_artifact
from birkhoff.pipeline.builders import compressed_model, original_model
from birkhoff.pipeline.evaluate_data import Case, Dataset
from birkhoff.pipeline.segment import in_parts
from birkhoff.pipeline.segmenters import PromptKind, Segmenter, ious, segmenter_of

EMBEDDING = "embedding"
"""Name of the last row of the blocks: what the mask decoder gets."""


@dataclass(slots=True, kw_only=True)
class Scores:
    """IoUs of one kind of prompt, a number for each prompt."""

    agreement: list[float] = field(default_factory=list)
    original: list[float] = field(default_factory=list)
    compressed: list[float] = field(default_factory=list)

    def add(self, other: "Scores") -> None:
        """Take in another picture's."""
        self.agreement += other.agreement
        self.original += other.original
        self.compressed += other.compressed

    def record(self) -> dict[str, Any]:
        """Mean and worst of each; None for the IoU with the truth where that is not known."""
        record: dict[str, Any] = {"prompts": len(self.agreement)}
        for name, values in (
            ("agreement", self.agreement),
            ("original_iou", self.original),
            ("compressed_iou", self.compressed),
        ):
            record[f"{name}_mean"] = round(sum(values) / len(values), 4) if values else None
            record[f"{name}_worst"] = round(min(values), 4) if values else None
        return record


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Everything measured. `blocks` holds (sum x^2, sum (x - x')^2) by block."""

    about: dict[str, Any]
    total: dict[PromptKind, Scores] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, case: Case, scores: dict[PromptKind, Scores], blocks: dict[str, tuple[float, float]]) -> None:
        """Account for one picture."""
        self.images.append({"image": case.name, **{kind: found.record() for kind, found in scores.items()}})
        for kind, found in scores.items():
            self.total.setdefault(kind, Scores()).add(found)
        for name, sums in blocks.items():
            before = self.blocks.get(name, (0.0, 0.0))
            self.blocks[name] = before[0] + sums[0], before[1] + sums[1]

    def document(self) -> dict[str, Any]:
        """What `--json` prints; its keys are stable."""
        return {
            **self.about,
            "images": len(self.images),
            "prompts": {kind: found.record() for kind, found in self.total.items()},
            "blocks": [{"block": name, "sqnr_db": _decibel(*sums)} for name, sums in self.blocks.items()],
            "per_image": self.images,
        }


def _decibel(energy: float, error: float) -> float | None:
    """SQNR in dB; None for no error, as JSON has no infinity."""
    return round(sqnr_db(energy, error), 2) if error else None


def evaluate(
    reference: str,
    source: Path,
    data: Dataset,
    *,
    store: str | None = None,
    builder: str | None = None,
    device: str = "cpu",
    advanced: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Compare an artifact with its source on pictures, one at a time; `advanced` is called after each.

    Both models are in memory, and the original's block outputs of one picture.

    Raises:
        PictureError: a picture or its annotations cannot be used.
        BuilderError, ModelMismatchError, SourceError, ArtifactNotFoundError, IntegrityError, StoreError: as in
            `builders`.
    """
    with open_artifact(reference, store) as artifact:
        manifest = artifact.manifest
        about = {"model": manifest.model, "digest": manifest.digest, "profile": manifest.profile}
    compressed = segmenter_of(compressed_model(reference, store, builder=builder, near=source, device=device))
    theirs = original_model(source, builder=builder, reference=reference, store=store, device=device)
    original = segmenter_of(theirs)
    found = Evaluation(about={**about, "source": str(source)})
    for number in range(len(data.pictures)):
        case = data.case(number)
        found.take(case, *compare(original, compressed, case))
        advanced()
    return found


def compare(
    original: Segmenter, compressed: Segmenter, case: Case
) -> tuple[dict[PromptKind, Scores], dict[str, tuple[float, float]]]:
    """One picture: the scores by kind of prompt, and each block's (sum x^2, sum (x - x')^2)."""
    outputs: dict[str, Tensor] = {}
    with hooked(original.blocks, outputs.__setitem__):
        view = original.look(case.pixels[None])
    blocks: dict[str, tuple[float, float]] = {}

    def measure(name: str, output: Tensor) -> None:
        error = fidelity(outputs.pop(name), output)
        blocks[name] = error.energy, error.error

    with hooked(compressed.blocks, measure):
        other = compressed.look(case.pixels[None])
    outputs[EMBEDDING] = view.embedding
    measure(EMBEDDING, other.embedding)
    scores: dict[PromptKind, Scores] = {}
    for prompts in case.asked:
        found, start = scores.setdefault(prompts.kind, Scores()), 0
        for part in in_parts(prompts):
            first, second = (
                model.masks(seen, part.kind, part.values[None])[0].cpu()
                for model, seen in ((original, view), (compressed, other))
            )
            found.agreement += ious(first, second).tolist()
            if case.truth is not None:
                truth = case.truth[start : start + len(part)]
                found.original += ious(first, truth).tolist()
                found.compressed += ious(second, truth).tolist()
            start += len(part)
    return scores, blocks


@contextlib.contextmanager
def hooked(blocks: dict[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Show the output of every block to `see` while inside."""

    def hook(name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        see(name, (output[0] if isinstance(output, tuple) else output).detach())

    handles = [block.register_forward_hook(partial(hook, name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def worst_first(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table of pictures, that with the worst agreement first."""
    lines = [
        {"image": image["image"], "kind": kind, **image[kind]}
        for image in document["per_image"]
        for kind in document["prompts"]
    ]
    return sorted(lines, key=lambda line: float(line["agreement_worst"]))


def kind_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table of prompts."""
    return [{"kind": kind, **record} for kind, record in document["prompts"].items()]
