"""Measure the effect of compression on a model's outputs: masks for the same prompts, and the encoder block by block.

Agreement is the IoU of the compressed model's mask with the original's, mean and worst over all prompts: a good mean
can hide a single bad picture. With truth, both models' masks are compared with it too, by IoU or by average precision
with a detector's scores (`dataset.Protocol`).

A block's SQNR is `10*log10(sum x^2 / sum (x - x')^2)` in dB over its outputs for all pictures, with x the original's.
It includes the errors of earlier blocks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.codec.metrics import fidelity, sqnr_db
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.load.layer_forms import Compute
from birkhoff.pipeline.segment.adapters.base import PromptKind, Segmenter, ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.average_precision import Detections, check_metric
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.dataset import Case, Dataset
from birkhoff.pipeline.segment.masks import in_parts

EMBEDDING = "embedding"
"""Name of the last row of the blocks: the input of the mask decoder."""

ORIGINAL, COMPRESSED = "original", "compressed"
"""The two models in a table of scores."""

Blocks = dict[str, tuple[float, float]]
"""(sum x^2, sum (x - x')^2) by block."""


@dataclass(slots=True, kw_only=True)
class Scores:
    """IoUs of one kind of prompt, one number per prompt."""

    agreement: list[float] = field(default_factory=list)
    original: list[float] = field(default_factory=list)
    compressed: list[float] = field(default_factory=list)

    def add(self, other: "Scores") -> None:
        """Add another picture's scores."""
        self.agreement += other.agreement
        self.original += other.original
        self.compressed += other.compressed

    def record(self) -> dict[str, Any]:
        """Return mean and worst of each; None for IoUs with an unknown truth."""
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
    """All measurements. `detections` are set for average precision."""

    about: dict[str, Any]
    total: dict[PromptKind, Scores] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    blocks: Blocks = field(default_factory=dict)
    adapter: str = ""
    """The family that both models were run as."""
    detections: Detections | None = None
    data: Dataset | None = None

    def take(
        self, case: Case, scores: dict[PromptKind, Scores], blocks: Blocks, masks: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add one picture; `masks` by model, bool [K, H, W], are those of its detector's boxes."""
        if self.detections is not None and case.scored is not None:
            self.detections.add(case.scored, masks or {})
        self.images.append({"image": case.name, **{kind: found.record() for kind, found in scores.items()}})
        for kind, found in scores.items():
            self.total.setdefault(kind, Scores()).add(found)
        for name, sums in blocks.items():
            before = self.blocks.get(name, (0.0, 0.0))
            self.blocks[name] = before[0] + sums[0], before[1] + sums[1]

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints; its keys are stable."""
        return {
            **self.about,
            "images": len(self.images),
            "prompts": {kind: found.record() for kind, found in self.total.items()},
            "blocks": [{"block": name, "sqnr_db": _decibel(*sums)} for name, sums in self.blocks.items()],
            "per_image": self.images,
            "adapter": self.adapter,
            "scores": self._scores(),
            "skipped": [] if self.data is None else self.data.skipped.rows(),
            "protocol": {} if self.data is None else self.data.protocol.document(),
        }

    def _scores(self) -> list[dict[str, Any]]:
        """Return measures against the truth, 0 to 1: the original's, the compressed model's, and their difference."""
        pairs: dict[str, tuple[float | None, float | None]] = {
            f"mIoU, {kind}": (_mean(found.original), _mean(found.compressed))
            for kind, found in self.total.items()
            if found.original
        }
        if self.detections is not None:
            first, second = self.detections.scores(ORIGINAL), self.detections.scores(COMPRESSED)
            pairs |= {name: (value, second[name]) for name, value in first.items()}
        return [
            {
                "measure": name,
                "original": first,
                "compressed": second,
                "difference": None if first is None or second is None else second - first,
            }
            for name, (first, second) in pairs.items()
        ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _decibel(energy: float, error: float) -> float | None:
    """Return the SQNR in dB; None without error, because JSON has no infinity."""
    return round(sqnr_db(energy, error), 2) if error else None


def evaluate(
    reference: str,
    source: Path,
    data: Dataset,
    *,
    store: str | None = None,
    builder: str | None = None,
    upstream: Path | None = None,
    adapter: str | None = None,
    device: str = "cpu",
    compute: Compute = "float",
    advanced: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Compare an artifact with its source on pictures, one at a time; `advanced` is called after each.

    Memory holds both models, and the original's block outputs for one picture. `compute` is that of `load_into`, for
    the artifact. Unusable pictures and rows are skipped, and counted in the result.

    Raises:
        PictureError: Nothing is left to evaluate, or a package is missing.
        BuilderError, ModelMismatchError, SourceError, ArtifactNotFoundError, IntegrityError, StoreError: As in
            `builders`.
    """
    if data.protocol.metric == "ap":
        check_metric(data)
    with open_artifact(reference, store) as artifact:
        manifest = artifact.manifest
        about = {"model": manifest.model, "digest": manifest.digest, "profile": manifest.profile, "compute": compute}
        adapter = adapter or manifest.adapter
    compressed = compressed_segmenter(
        reference,
        store,
        builder=builder,
        upstream=upstream,
        near=source,
        adapter=adapter,
        device=device,
        compute=compute,
    )
    theirs = original_model(source, builder=builder, upstream=upstream, reference=reference, store=store, device=device)
    original = segmenter_of(theirs, adapter)
    return measure(original, compressed, data, about={**about, "source": str(source)}, advanced=advanced)


def measure(
    original: Segmenter,
    compressed: Segmenter,
    data: Dataset,
    *,
    about: dict[str, Any],
    advanced: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Compare two models on pictures, one at a time. Raises PictureError if nothing is left to evaluate."""
    found = Evaluation(about=about, adapter=compressed.family, data=data)
    if data.protocol.metric == "ap":
        found.detections = Detections(categories=[*data.categories.values()])
    for number in range(len(data.pictures)):
        with contextlib.suppress(PictureError):  # counted in `data.skipped`
            case = data.case(number)
            found.take(case, *compare(original, compressed, case, best=data.protocol.multimask == "best"))
        advanced()
    if not found.total:
        raise PictureError(
            f"{data.folder}: nothing is left to evaluate of {len(data.pictures)} pictures: {data.skipped}; "
            "correct what is wrong there, or name others"
        )
    return found


def compare(
    original: Segmenter, compressed: Segmenter, case: Case, *, best: bool = False
) -> tuple[dict[PromptKind, Scores], Blocks, dict[str, Tensor]]:
    """Compare one picture: return scores by kind of prompt, each block's sums, and the masks of detector boxes by
    model.

    With `best` a mask is the one of several with the highest predicted IoU.
    """
    if not case.asked:
        return {}, {}, {}
    outputs: dict[str, Tensor] = {}
    with hooked(original.blocks, outputs.__setitem__):
        view = original.look(case.pixels[None])
    blocks: dict[str, tuple[float, float]] = {}

    def account(name: str, output: Tensor) -> None:
        error = fidelity(outputs.pop(name), output)
        blocks[name] = error.energy, error.error

    with hooked(compressed.blocks, account):
        other = compressed.look(case.pixels[None])
    outputs[EMBEDDING] = view.embedding
    account(EMBEDDING, other.embedding)
    scores: dict[PromptKind, Scores] = {}
    masks: dict[str, list[Tensor]] = {ORIGINAL: [], COMPRESSED: []}
    for prompts in case.asked:
        found, start = scores.setdefault(prompts.kind, Scores()), 0
        for part in in_parts(prompts, view.size):
            first, second = (
                model.masks(seen, part.kind, part.values[None], best=best)[0].cpu()
                for model, seen in ((original, view), (compressed, other))
            )
            if case.scored is not None:
                masks[ORIGINAL].append(first)
                masks[COMPRESSED].append(second)
            found.agreement += ious(first, second).tolist()
            if case.truth is not None:
                truth = case.truth[start : start + len(part)]
                found.original += ious(first, truth).tolist()
                found.compressed += ious(second, truth).tolist()
            start += len(part)
    return scores, blocks, {model: torch.cat(own) for model, own in masks.items() if own}


@contextlib.contextmanager
def hooked(blocks: dict[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Pass the output of every block to `see` while the context is active."""

    def hook(name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        see(name, (output[0] if isinstance(output, tuple) else output).detach())

    handles = [block.register_forward_hook(partial(hook, name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def worst_first(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the table of pictures, worst agreement first."""
    lines = [
        {"image": image["image"], "kind": kind, **image[kind]}
        for image in document["per_image"]
        for kind in document["prompts"]
        if kind in image
    ]
    return sorted(lines, key=lambda line: float(line["agreement_worst"]))


def kind_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the table of prompts."""
    return [{"kind": kind, **record} for kind, record in document["prompts"].items()]
