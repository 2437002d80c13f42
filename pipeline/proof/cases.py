"""The inputs of a proof: synthetic pictures, drawn shapes with known masks, and the user's own pictures.

Synthetic pictures come from `codec.output`, with seeds that no allocation uses, and random boxes. Drawn shapes use
their own boxes. Point prompts are the centres of boxes.
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
"""Seed of a proof's pictures. Statistics use other seeds."""

PICTURES = 3
SHAPES = 1
"""Pictures of each kind. Each model's encoder runs on all four, which is nearly the whole cost of a proof."""

BOXES, POINTS = 6, 2
"""Prompts per picture."""

MOST_SIDE = 512
"""Side of a synthetic picture in pixels, or the side of the model's input if that is smaller. A larger input
enlarges the picture."""

OWN_PICTURES = 32
"""Maximum number of pictures taken from the user's folder, in order of their names."""

OWN_SIDE = 1024
"""Longer side in pixels to which the user's pictures are reduced: the input of the largest models."""

_OWN_BOXES, _OWN_POINTS = 3, 2
"""Boxes and points across and down a user's picture."""


def synthetic(side: int) -> list[Case]:
    """Return pictures for a model whose input has `side` pixels. Drawn shapes carry their masks as the truth."""
    side = min(side, MOST_SIDE)
    pictures = synthetic_pictures(PICTURES, side, SEED)
    boxes = synthetic_boxes(PICTURES, BOXES, side, SEED + 1)
    cases = [
        _case(f"synthetic {number}", pixels, own)
        for number, (pixels, own) in enumerate(zip(pictures, boxes, strict=True))
    ]
    # A picture that is not square shows whether a model pads or stretches it.
    drawn, masks = drawn_shapes(SHAPES, (side * 3 // 4, side), SEED + 2)
    cases += [
        _case(f"shapes {number}", pixels, boxes_of(truth), truth)
        for number, (pixels, truth) in enumerate(zip(drawn, masks, strict=True))
    ]
    return cases


def own(folder: Path) -> Iterator[Case]:
    """Yield the user's pictures one at a time, prompted by a grid of boxes and points. Raises PictureError."""
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
