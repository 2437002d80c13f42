"""Run a segmenter on the pictures of a proof, and compare the outputs of two models.

Only outputs are kept: each picture's embedding, and the decoder's logits for every prompt, from which masks are
computed when needed. So the original and the compressed model are never in memory together.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from birkhoff.codec.metrics import compare
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.proof.decibel import decibel
from birkhoff.pipeline.registry.documents import Agreement
from birkhoff.pipeline.segment import draw
from birkhoff.pipeline.segment.adapters.base import Segmenter, View, ious
from birkhoff.pipeline.segment.dataset import Case
from birkhoff.pipeline.segment.masks import in_parts

LEAST_MASK = 0.001
"""Share of a picture below which the original's mask counts as empty and is skipped, as the IoU of empty masks means
nothing."""

PERCENTILE = 0.05

_ROWS = 2
_WIDEST = 1120
"""Rows, and width in pixels, of the picture in a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A model's outputs for one picture: its view without high-resolution features, and logits [K, s, s] by kind of
    prompt."""

    case: Case
    view: View
    logits: tuple[Tensor, ...]


def look(segmenter: Segmenter, cases: Iterable[Case]) -> list[Seen]:
    """Run a model on pictures one at a time. The results are on the CPU."""
    found = []
    for case in cases:
        interrupt.check()
        view = segmenter.look(case.pixels[None])
        logits = [
            [segmenter.chosen(view, part.kind, part.values[None])[0].cpu() for part in in_parts(prompts, view.size)]
            for prompts in case.asked
        ]
        kept = replace(view, features=(view.embedding.float().cpu(),))
        found.append(Seen(case=case, view=kept, logits=tuple(map(torch.cat, logits))))
    return found


def masks(segmenter: Segmenter, seen: Seen) -> tuple[Tensor, ...]:
    """Return masks at the picture's resolution, bool [K, H, W] by kind of prompt."""
    return tuple(segmenter.full(low[None], seen.view)[0] > 0 for low in seen.logits)


def shapes_iou(segmenter: Segmenter, seen: Sequence[Seen]) -> float:
    """Return the mean IoU of box masks with the true masks, over the pictures that have them."""
    values = [
        float(value)
        for one in seen
        if one.case.truth is not None
        for value in ious(masks(segmenter, one)[0], one.case.truth)
    ]
    return sum(values) / max(1, len(values))


def agreement(segmenter: Segmenter, original: Sequence[Seen], compressed: Sequence[Seen]) -> Agreement:
    """Compare two models' outputs on the same pictures. `segmenter` may be either model's."""
    values: list[float] = []
    sums = {"embedding": [0.0, 0.0], "logits": [0.0, 0.0]}
    for first, second in zip(original, compressed, strict=True):
        _add(sums["embedding"], first.view.embedding, second.view.embedding)
        for before, after in zip(first.logits, second.logits, strict=True):
            _add(sums["logits"], before, after)
        for before, after in zip(masks(segmenter, first), masks(segmenter, second), strict=True):
            found = before.flatten(1).float().mean(dim=1) >= LEAST_MASK
            values += ious(before[found], after[found]).tolist()
    values.sort()
    return Agreement(
        inputs=len(original),
        prompts=len(values),
        agreement_mean=round(sum(values) / len(values), 3) if values else None,
        agreement_p5=round(values[int(PERCENTILE * len(values))], 3) if values else None,
        embedding_db=decibel(*sums["embedding"]),
        output_db=decibel(*sums["logits"]),
    )


def picture(segmenter: Segmenter, original: Sequence[Seen], compressed: Sequence[Seen]) -> bytes:
    """Return a WebP of both models' masks side by side, for the pictures on which they agree least."""
    rows = []
    for first, second in zip(original, compressed, strict=True):
        before, after = masks(segmenter, first)[0], masks(segmenter, second)[0]
        rows.append((float(ious(before, after).mean()), first.case, before, after))
    rows.sort(key=lambda row: row[0])
    panels = [
        draw.comparison(case.pixels, case.asked[:1], before, after, (case.name, "", ""))
        for _, case, before, after in rows[:_ROWS]
    ]
    sheet = draw.sheet(draw.COMPARED, panels)
    if sheet.width > _WIDEST:
        sheet = sheet.resize((_WIDEST, round(sheet.height * _WIDEST / sheet.width)), Image.Resampling.LANCZOS)
    body = io.BytesIO()
    sheet.save(body, "WEBP", quality=70)
    return body.getvalue()


def _add(sums: list[float], reference: Tensor, other: Tensor) -> None:
    found = compare(reference, other)
    sums[0] += found.energy
    sums[1] += found.error
