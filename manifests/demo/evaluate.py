"""How well the demo model segments: mean IoU over held-out pictures, by box and by click.

    python manifests/demo/evaluate.py [WEIGHTS]

The held-out pictures have a seed of their own, so that training never draws them. IoU is taken at full resolution
(128 x 128) over the visible part of every object asked for. The box baseline fills the prompt's box.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import SamModel

from birkhoff.codec.errors import BirkhoffError

from model import WEIGHTS, load, pixel_values
from shapes import SIDE, Pictures, draw

HELD_OUT_SEED = 20_000_003
"""Seed of the held-out pictures; training refuses it."""

Prompt = Literal["box", "click"]
"""What a user gives for an object: its box, or one pixel of it."""


@cache
def held_out(count: int = 256, *, objects: int = 3, seed: int = HELD_OUT_SEED) -> Pictures:
    """The first `count` held-out pictures with up to `objects` objects each, drawn on the CPU; always the same."""
    return draw(torch.arange(count), seed=seed, objects=objects)


@torch.no_grad()
def predict_masks(model: SamModel, pictures: Pictures, *, prompt: Prompt = "box", batch: int = 64) -> Tensor:
    """The model's single mask for every object of `pictures`: bool [B, K, 128, 128] on the model's device.

    The 64 x 64 logits are interpolated to full resolution and cut at zero, as transformers' processor does.
    """
    device = next(model.parameters()).device
    masks = []
    for part in pictures.batches(batch):
        if prompt == "box":
            prompts = {"input_boxes": part.boxes.to(device)}
        else:
            prompts = {"input_points": part.clicks[:, :, :1].to(device)}
        pixels = pixel_values(part.pixels.to(device))
        logits: Tensor = model(pixel_values=pixels, multimask_output=False, **prompts).pred_masks
        full = functional.interpolate(logits[:, :, 0].float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        masks.append(full > 0)
    return torch.cat(masks)


def box_masks(boxes: Tensor) -> Tensor:
    """Masks that fill the boxes (x1, y1, x2, y2 inclusive): float32 [B, K, 4] -> bool [B, K, 128, 128]."""
    step = torch.arange(SIDE, device=boxes.device)
    x1, y1, x2, y2 = boxes[..., None].unbind(-2)
    columns = (step >= x1) & (step <= x2)
    rows = (step >= y1) & (step <= y2)
    return rows[..., :, None] & columns[..., None, :]


def ious(masks: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of two sets of masks: bool [..., H, W] twice -> float32 [...]; 1 where both are empty."""
    both = (masks & others).sum(dim=(-2, -1))
    either = (masks | others).sum(dim=(-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def mean_iou(masks: Tensor, pictures: Pictures) -> float:
    """Mean IoU of predicted masks (bool [B, K, 128, 128]) with the true ones, over the valid objects."""
    scores = ious(masks, pictures.masks.to(masks.device))
    return float(scores[pictures.valid.to(masks.device)].mean())


def mask_agreement(
    model_a: SamModel, model_b: SamModel, pictures: Pictures | None = None, *, prompt: Prompt = "box"
) -> float:
    """Mean IoU between the masks of two models for the same prompts (held-out pictures by default); 1 is identical."""
    pictures = held_out() if pictures is None else pictures
    masks = predict_masks(model_a, pictures, prompt=prompt)
    others = predict_masks(model_b, pictures, prompt=prompt).to(masks.device)
    return float(ious(masks, others)[pictures.valid.to(masks.device)].mean())


def report(model: SamModel, pictures: Pictures) -> dict[str, float]:
    """Mean IoU by prompt, and of the box baseline."""
    by_prompt = {
        f"mean IoU, {p} prompts": mean_iou(predict_masks(model, pictures, prompt=p), pictures) for p in _PROMPTS
    }
    return by_prompt | {"box baseline": mean_iou(box_masks(pictures.boxes), pictures)}


_PROMPTS: tuple[Prompt, ...] = ("box", "click")


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Mean IoU of the demo model on held-out pictures.")
    parser.add_argument("weights", nargs="?", type=Path, default=WEIGHTS, help="a .safetensors file")
    parser.add_argument("--pictures", type=int, default=256, help="how many held-out pictures (default 256)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        model = load(options.weights)
    except BirkhoffError as error:
        print(error, file=sys.stderr)
        return 1
    pictures = held_out(options.pictures)
    print(f"{int(pictures.valid.sum())} objects in {len(pictures)} held-out pictures")
    for name, value in report(model, pictures).items():
        print(f"{name:>24}  {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
