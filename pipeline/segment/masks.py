"""Masks of one picture for prompts, and the agreement of two models' masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from birkhoff.pipeline.segment.adapters.base import Segmenter, View, ious
from birkhoff.pipeline.segment.prompts import Prompts

_AT_ONCE = 32
"""Most prompts decoded together."""
_LOGITS = 1 << 26
"""Most full-resolution logits of prompts decoded together, with three masks each: 256 MiB."""
_PIXELS = 1 << 18
"""Pixels of masks multiplied at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """K masks of one picture, bool [K, H, W] on the CPU, and their labels in a table."""

    masks: Tensor
    labels: tuple[str, ...]


def in_parts(prompts: Prompts, size: tuple[int, int]) -> Iterator[Prompts]:
    """Yield a few prompts at a time, so that the logits of a picture of size (H, W) stay small."""
    for values in prompts.values.split(min(_AT_ONCE, max(1, _LOGITS // (3 * size[0] * size[1])))):
        yield Prompts(kind=prompts.kind, values=values)


def masks_of(segmenter: Segmenter, view: View, prompts: Prompts) -> Tensor:
    """Return the single mask for every prompt of one picture: bool [K, H, W] on the CPU."""
    parts = [segmenter.masks(view, part.kind, part.values[None])[0].cpu() for part in in_parts(prompts, view.size)]
    return torch.cat(parts)


def prompted(segmenter: Segmenter, view: View, asked: list[Prompts]) -> Masks:
    """Return a mask for every prompt, in the order given."""
    found = [masks_of(segmenter, view, prompts) for prompts in asked]
    labels = [f"{p.kind} {','.join(f'{v:g}' for v in row)}" for p in asked for row in p.values.tolist()]
    return Masks(masks=torch.cat(found), labels=tuple(labels))


def pair_up(original: Masks, compressed: Masks) -> Masks:
    """Return the nearest compressed mask for each of the original's; empty masks if there are none."""
    if not len(compressed.masks):
        return Masks(masks=torch.zeros_like(original.masks), labels=original.labels)
    nearest = overlaps(original.masks, compressed.masks).argmax(dim=1)
    return Masks(masks=compressed.masks[nearest], labels=original.labels)


def overlaps(masks: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of every mask with every other, bool [K, H, W] and [L, H, W] -> float64 [K, L]; 0 if both are
    empty."""
    both = torch.zeros(len(masks), len(others), dtype=torch.float64)
    for first, second in zip(masks.flatten(1).split(_PIXELS, 1), others.flatten(1).split(_PIXELS, 1), strict=True):
        both += first.float() @ second.float().T  # counts below 2^24 are exact
    areas = [m.sum(dim=(1, 2)).double() for m in (masks, others)]
    return both / (areas[0][:, None] + areas[1] - both).clamp(min=1)


def rows(found: Masks, original: Masks | None) -> list[dict[str, Any]]:
    """Return a line per mask: its pixels and, with an original, its mask's pixels and the IoU."""
    lines: list[dict[str, Any]] = []
    for number, (label, mask) in enumerate(zip(found.labels, found.masks, strict=True)):
        line: dict[str, Any] = {"prompt": label, "pixels": int(mask.sum())}
        if original is not None:
            line["pixels_original"] = int(original.masks[number].sum())
            line["iou"] = round(float(ious(mask, original.masks[number])), 4)
        lines.append(line)
    return lines
