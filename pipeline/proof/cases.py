"""The inputs of a proof: synthetic pictures, drawn shapes whose masks are known, and the user's own pictures.

Synthetic pictures come from `codec.output`, with seeds that no allocation uses. Their boxes are random; those of shapes
are the shapes' own. Points are the centres of boxes.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures
from birkhoff.codec.output.shapes import drawn_shapes
from birkhoff.pipeline.segment.adapters.base import fitted_size, resized
from birkhoff.pipeline.segment.dataset import Case
from birkhoff.pipeline.segment.prompts import Prompts, box_grid, boxes_of, pictures_in, point_grid, read_picture

SEED = 0x9B00F
"""Seed of the proof's pictures; statistics use others."""

PICTURES = 3
SHAPES = 1
"""Pictures of each kind: four passes of each model's encoder, nearly the whole cost of a proof."""

BOXES, POINTS = 6, 2
"""Prompts per picture."""

MOST_SIDE = 512
"""Side of a synthetic picture in pixels, at most the model's input; a larger input enlarges it."""

OWN_PICTURES = 32
"""How many pictures of the user's folder are used, by name."""

OWN_SIDE = 1024
"""Longer side to which the user's pictures are reduced: the input of the largest models."""

_OWN_BOXES, _OWN_POINTS = 3, 2
"""Boxes and points across and down a user's picture."""


def synthetic(side: int) -> list[Case]:
    """Return pictures for a model whose input has `side` pixels; drawn shapes come with their masks as truth."""
    side = min(side, MOST_SIDE)
    pictures = synthetic_pictures(PICTURES, side, SEED)
    boxes = synthetic_boxes(PICTURES, BOXES, side, SEED + 1)
    cases = [
        _case(f"synthetic {number}", pixels, own)
        for number, (pixels, own) in enumerate(zip(pictures, boxes, strict=True))
    ]
    # Not square: whether a model pads or stretches shows only there.
    drawn, masks = drawn_shapes(SHAPES, (side * 3 // 4, side), SEED + 2)
    cases += [
        _case(f"shapes {number}", pixels, boxes_of(truth), truth)
        for number, (pixels, truth) in enumerate(zip(drawn, masks, strict=True))
    ]
    return cases


def own(folder: Path) -> Iterator[Case]:
    """Yield the user's pictures, one at a time, asked by grids. Raises PictureError."""
    for path in pictures_in(folder)[:OWN_PICTURES]:
        pixels = read_picture(path)
        size = int(pixels.shape[1]), int(pixels.shape[2])
        if max(size) > OWN_SIDE:
            pixels = resized(pixels[None], fitted_size(size, OWN_SIDE))[0]
            size = int(pixels.shape[1]), int(pixels.shape[2])
        asked = box_grid(size, _OWN_BOXES), point_grid(size, _OWN_POINTS)
        yield Case(name=path.name, pixels=pixels, asked=asked, truth=None)


def _case(name: str, pixels: Tensor, boxes: Tensor, truth: Tensor | None = None) -> Case:
    middles = (boxes[:POINTS, :2] + boxes[:POINTS, 2:]) / 2
    asked = Prompts(kind="box", values=boxes), Prompts(kind="point", values=middles.round())
    return Case(name=name, pixels=pixels, asked=asked, truth=truth)
