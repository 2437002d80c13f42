"""Draws what compression did to the masks of the demo model: a PNG to look at.

Each row is one held-out object, drawn as `birkhoff segment --against` draws it: the picture with its prompt, the mask
of the original model, the mask of the compressed one, and where the two differ.

    python manifests/demo/picture.py COMPRESSED_WEIGHTS OUTPUT.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import SamModel

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.segment import draw as segment_draw
from birkhoff.pipeline.segment.adapters.base import PromptKind, ious
from birkhoff.pipeline.segment.draw import Panel
from birkhoff.pipeline.segment.prompts import Prompts

import shapes
from evaluate import HELD_OUT_SEED, predict_masks
from model import load
from shapes import Pictures

ROWS: tuple[PromptKind, ...] = ("box", "box", "point", "point")
"""The prompt of every row."""


def draw(original: SamModel, compressed: SamModel, path: Path, *, seed: int = HELD_OUT_SEED) -> None:
    """Writes a PNG that compares the masks of two models on the first pictures of `seed`, one object in each.

    The models may live on any device. An existing file is overwritten.

    Raises:
        OutputError: the file cannot be written.
    """
    pictures = shapes.draw(torch.arange(len(ROWS)), seed=seed, objects=1)
    rows = [_row(original, compressed, pictures.part(i, i + 1), prompt) for i, prompt in enumerate(ROWS)]
    segment_draw.save(segment_draw.sheet(segment_draw.COMPARED, rows), path)


def _row(original: SamModel, compressed: SamModel, picture: Pictures, prompt: PromptKind) -> list[Panel]:
    first, second = (predict_masks(model, picture, prompt=prompt)[0, :1].cpu() for model in (original, compressed))
    values = picture.boxes[0, :1] if prompt == "box" else picture.clicks[0, :1, 0]
    lines = [f"prompt: {'a box' if prompt == 'box' else 'one click'}"]
    lines += [f"IoU with the truth {_iou(masks, picture):.3f}" for masks in (first, second)]
    return segment_draw.comparison(picture.pixels[0], [Prompts(kind=prompt, values=values)], first, second, lines=lines)


def _iou(masks: Tensor, picture: Pictures) -> float:
    return float(ious(masks[0], picture.masks[0, 0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare compressed weights with the demo model's own.")
    parser.add_argument("compressed", type=Path, help="decompressed weights, a .safetensors file")
    parser.add_argument("output", type=Path, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    options = parser.parse_args(arguments)
    try:
        draw(load(), load(options.compressed), options.output, seed=options.seed)
    except BirkhoffError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
