"""Masks of one picture: for prompts, or for everything in it; and how much two models' masks agree.

"Everything" asks by a grid of points and keeps, as the published mask generator does, the masks that the model itself
trusts and that hardly change with the threshold, the better of any two that cover the same (A. Kirillov et al.,
"Segment Anything", arXiv 2304.02643, appendix B).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from birkhoff.pipeline.segment_input import Prompts, point_grid
from birkhoff.pipeline.segmenters import Segmenter, View, ious

TRUSTED_IOU = 0.88
"""Predicted IoU below which a mask of `everything` is dropped."""
STABLE = 0.95
"""IoU of the masks at logits +1 and -1 below which a mask is dropped."""
SAME = 0.7
"""IoU above which two masks are the same object."""
_AT_ONCE = 32
"""Prompts decoded together: bounds the logits at full resolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """K masks of one picture, bool [K, H, W] on the CPU, and what each is called in a table."""

    masks: Tensor
    labels: tuple[str, ...]


def in_parts(prompts: Prompts) -> Iterator[Prompts]:
    """A few prompts at a time, so that a picture's logits stay small."""
    for values in prompts.values.split(_AT_ONCE):
        yield Prompts(kind=prompts.kind, values=values)


def masks_of(segmenter: Segmenter, view: View, prompts: Prompts) -> Tensor:
    """The single mask for every prompt of one picture: bool [K, H, W] on the CPU."""
    parts = [segmenter.masks(view, part.kind, part.values[None])[0].cpu() for part in in_parts(prompts)]
    return torch.cat(parts)


def prompted(segmenter: Segmenter, view: View, asked: list[Prompts]) -> Masks:
    """A mask for every prompt, in the order given."""
    found = [masks_of(segmenter, view, prompts) for prompts in asked]
    labels = [f"{p.kind} {','.join(f'{v:g}' for v in row)}" for p in asked for row in p.values.tolist()]
    return Masks(masks=torch.cat(found), labels=tuple(labels))


def everything(segmenter: Segmenter, view: View, across: int) -> Masks:
    """The objects that a grid of `across` x `across` points finds, most trusted first."""
    masks: list[Tensor] = []
    scores: list[Tensor] = []
    for part in in_parts(point_grid(view.size, across)):
        logits, quality = (
            t[0].flatten(0, 1) for t in segmenter.logits(view, "point", part.values[None], multimask=True)
        )
        stability = ious(logits > 1, logits > -1)
        kept = (quality >= TRUSTED_IOU) & (stability >= STABLE) & (logits > 0).flatten(1).any(dim=1)
        masks.append((logits[kept] > 0).cpu())
        scores.append(quality[kept].cpu())
    order = torch.cat(scores).argsort(descending=True, stable=True)
    chosen = distinct(torch.cat(masks)[order])
    return Masks(masks=chosen, labels=tuple(f"object {n}" for n in range(1, len(chosen) + 1)))


def distinct(masks: Tensor) -> Tensor:
    """Masks [K, H, W], best first, without those that cover nearly the same as a better one."""
    kept: list[int] = []
    for number in range(len(masks)):
        if not kept or float(ious(masks[number], masks[kept]).max()) <= SAME:
            kept.append(number)
    return masks[kept]


def pair_up(original: Masks, compressed: Masks) -> Masks:
    """For each mask of the original model the compressed one's that is nearest: an empty one where it has none."""
    if not len(compressed.masks):
        return Masks(masks=torch.zeros_like(original.masks), labels=original.labels)
    nearest = [int(ious(mask, compressed.masks).argmax()) for mask in original.masks]
    return Masks(masks=compressed.masks[nearest], labels=original.labels)


def rows(found: Masks, original: Masks | None) -> list[dict[str, Any]]:
    """A line for each mask: its pixels, and beside the original model's mask their IoU."""
    lines: list[dict[str, Any]] = []
    for number, (label, mask) in enumerate(zip(found.labels, found.masks, strict=True)):
        line: dict[str, Any] = {"prompt": label, "pixels": int(mask.sum())}
        if original is not None:
            line["pixels_original"] = int(original.masks[number].sum())
            line["iou"] = round(float(ious(mask, original.masks[number])), 4)
        lines.append(line)
    return lines
