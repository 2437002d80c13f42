"""How well the demo model segments while it is trained: mean IoU over held-out pictures, by box and by click.

The held-out pictures have a seed of their own, so that training never draws them. IoU is taken at full resolution
(128 x 128) over the visible part of every object asked for. The box baseline fills the prompt's box. What compression
does to the masks `birkhoff evaluate` tells, from the same pictures as files (`held_out.py`) and by the same code.
"""

from functools import cache

import torch
from torch import Tensor
from transformers import SamModel

from birkhoff.pipeline.segment.adapters.base import PromptKind, ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of

from shapes import SIDE, Pictures, draw

HELD_OUT_SEED = 20_000_003
"""Seed of the held-out pictures; training refuses it."""


@cache
def held_out(count: int = 256, *, objects: int = 3, seed: int = HELD_OUT_SEED) -> Pictures:
    """The first `count` held-out pictures with up to `objects` objects each, drawn on the CPU; always the same."""
    return draw(torch.arange(count), seed=seed, objects=objects)


def predict_masks(model: SamModel, pictures: Pictures, *, prompt: PromptKind = "box", batch: int = 64) -> Tensor:
    """The model's single mask for every object of `pictures`: bool [B, K, 128, 128] on the model's device."""
    segmenter = segmenter_of(model)
    masks = []
    for part in pictures.batches(batch):
        prompts = part.boxes if prompt == "box" else part.clicks[:, :, 0]
        masks.append(segmenter.masks(segmenter.look(part.pixels), prompt, prompts))
    return torch.cat(masks)


def box_masks(boxes: Tensor) -> Tensor:
    """Masks that fill the boxes (x1, y1, x2, y2 inclusive): float32 [B, K, 4] -> bool [B, K, 128, 128]."""
    step = torch.arange(SIDE, device=boxes.device)
    x1, y1, x2, y2 = boxes[..., None].unbind(-2)
    columns = (step >= x1) & (step <= x2)
    rows = (step >= y1) & (step <= y2)
    return rows[..., :, None] & columns[..., None, :]


def mean_iou(masks: Tensor, pictures: Pictures) -> float:
    """Mean IoU of predicted masks (bool [B, K, 128, 128]) with the true ones, over the valid objects."""
    scores = ious(masks, pictures.masks.to(masks.device))
    return float(scores[pictures.valid.to(masks.device)].mean())


def report(model: SamModel, pictures: Pictures) -> dict[str, float]:
    """Mean IoU by prompt, and of the box baseline."""
    by_prompt = {
        f"mean IoU, {p} prompts": mean_iou(predict_masks(model, pictures, prompt=p), pictures) for p in _PROMPTS
    }
    return by_prompt | {"box baseline": mean_iou(box_masks(pictures.boxes), pictures)}


_PROMPTS: tuple[PromptKind, ...] = ("box", "point")
