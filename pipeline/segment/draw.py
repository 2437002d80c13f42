"""Draw masks on pictures with Pillow: overlays, comparisons side by side, and differences.

Blue is the original and vermilion the compressed model, which people with any colour vision can distinguish. Pictures
are uint8 [3, H, W], masks bool [H, W]. A panel is a picture whose pixels are repeated until it is large enough to see.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.files import atomic_output
from birkhoff.pipeline.segment.adapters.base import ious
from birkhoff.pipeline.segment.masks import Masks
from birkhoff.pipeline.segment.prompts import Prompts, boxes_of

GAP = 14
HEAD = 34
"""Height of the column titles."""
FOOT = 24
"""Height of the line below a panel."""
_EDGE = 2
"""Width of a mask's drawn border in pixels."""
_SMALLEST = 256
"""Least length of the longer side of a panel in pixels."""

WRITTEN = (".png", ".jpg", ".jpeg")
"""File names that a drawn picture may have."""

Colour = tuple[int, int, int]
BLUE: Colour = (0, 114, 178)
VERMILION: Colour = (213, 94, 0)
_OBJECTS: tuple[Colour, ...] = (VERMILION, (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), BLUE)
"""The palette of M. Okabe and K. Ito, "Color universal design", without black and yellow."""
WHITE: Colour = (255, 255, 255)
INK: Colour = (40, 40, 40)
GREY: Colour = (170, 170, 170)

Title = tuple[tuple[str, Colour], ...]
COMPARED: tuple[Title, ...] = (
    (("picture and prompt", INK),),
    (("original", BLUE),),
    (("compressed", VERMILION),),
    (("only original", BLUE), (" / ", INK), ("only compressed", VERMILION)),
)
"""Titles of a comparison's columns, in pieces of one colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A picture on a sheet, and the line below it."""

    image: Image.Image
    line: str = ""


def zoom_of(size: tuple[int, int]) -> int:
    """Return how often to repeat a pixel of a picture of size (H, W)."""
    return max(1, -(-_SMALLEST // max(size)))


def sheet(titles: Sequence[Title], rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Return rows of panels under column titles. All panels have the first one's width; rows may differ in height."""
    width = len(titles) * (rows[0][0].image.width + GAP) + GAP
    heights = [max(panel.image.height for panel in row) + FOOT + GAP for row in rows]
    paper = Image.new("RGB", (width, HEAD + sum(heights)), WHITE)
    pen = ImageDraw.Draw(paper)
    step = rows[0][0].image.width + GAP
    for column, title in enumerate(titles):
        left = GAP + column * step
        for text, ink in title:
            left += _write(pen, text, left=left, top=9, ink=ink, size=16)
    top = HEAD
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            paper.paste(panel.image, (GAP + column * step, top))
            place = {"left": GAP + column * step, "top": top + panel.image.height + 5}
            _write(pen, panel.line, **place, ink=INK, size=14)
        top += height
    return paper


def with_prompts(pixels: Tensor, asked: Sequence[Prompts]) -> Image.Image:
    """Return the picture with its prompts: boxes, and dots for points."""
    zoom = zoom_of((pixels.shape[1], pixels.shape[2]))
    image = _image(_zoom(pixels, zoom))
    _mark(image, asked, zoom)
    return image


def overlay(pixels: Tensor, masks: Tensor, asked: Sequence[Prompts] = ()) -> Image.Image:
    """Return the picture with every mask [K, H, W] tinted and edged in its own colour, and the prompts."""
    zoom = zoom_of((pixels.shape[1], pixels.shape[2]))
    shown = _zoom(pixels, zoom)
    for number in masks.sum(dim=(1, 2)).argsort(descending=True, stable=True).tolist():  # small masks over large ones
        colour = _OBJECTS[number % len(_OBJECTS)]
        for part, inside in _framed(masks[number], shown, zoom):
            part[:] = _blend(_blend(part, colour, 0.45, where=inside), colour, 1.0, where=_edge(inside))
    image = _image(shown)
    _mark(image, asked, zoom)
    return image


def masked(pixels: Tensor, masks: Tensor, colour: Colour) -> Image.Image:
    """Return the picture faded outside the masks [K, H, W] and tinted within, with each mask's edge."""
    zoom = zoom_of((pixels.shape[1], pixels.shape[2]))
    inside = _zoom(masks.any(dim=0, keepdim=True), zoom)[0]
    shown = _blend(_zoom(pixels, zoom), WHITE, 0.55, where=~inside)
    shown = _blend(shown, colour, 0.45, where=inside)
    for mask in masks:
        for part, own in _framed(mask, shown, zoom):
            part[:] = _blend(part, colour, 1.0, where=_edge(own))
    return _image(shown)


def difference(pixels: Tensor, original: Tensor, compressed: Tensor) -> Image.Image:
    """Return a picture of two models' masks [K, H, W]: grey where both agree, blue or vermilion where only one has a
    mask."""
    zoom = zoom_of((pixels.shape[1], pixels.shape[2]))
    first, second, only_first, only_second = (
        _zoom(m.any(dim=0, keepdim=True), zoom)[0]
        for m in (original, compressed, original & ~compressed, compressed & ~original)
    )
    grey = pixels.float().mean(dim=0, keepdim=True).expand(3, -1, -1).to(torch.uint8)
    shown = _blend(_zoom(grey, zoom), WHITE, 0.8)
    shown = _blend(shown, GREY, 0.9, where=first & second)
    shown = _blend(shown, BLUE, 1.0, where=only_first)
    return _image(_blend(shown, VERMILION, 1.0, where=only_second))


def picture(pixels: Tensor, asked: Sequence[Prompts], found: Masks, original: Masks | None) -> Image.Image:
    """Return the picture that `segment` writes: the overlay, or with an original the four panels of a comparison."""
    if original is None:
        return overlay(pixels, found.masks, asked)
    return sheet(COMPARED, [comparison(pixels, asked, original.masks, found.masks)])


def comparison(
    pixels: Tensor, asked: Sequence[Prompts], original: Tensor, compressed: Tensor, lines: Sequence[str] = ("", "", "")
) -> list[Panel]:
    """Return the panels of one picture, masks bool [K, H, W]: prompts, original, compressed, difference.

    `lines` go below the first three panels. Below the last are the IoU of the two and the number of differing pixels.
    """
    same = ious(original, compressed)
    differ = int((original ^ compressed).sum())
    mean = f"IoU of the two {float(same.mean()):.3f}" if len(same) else "nothing found"
    return [
        Panel(image=with_prompts(pixels, asked), line=lines[0]),
        Panel(image=masked(pixels, original, BLUE), line=lines[1]),
        Panel(image=masked(pixels, compressed, VERMILION), line=lines[2]),
        Panel(image=difference(pixels, original, compressed), line=f"{mean}, {differ} pixels differ"),
    ]


def check_writable(path: Path) -> None:
    """Check before the work that a picture can be written. Raises OutputError."""
    if path.suffix.lower() not in WRITTEN:
        raise OutputError(f"{path}: expected a name ending in {', '.join(WRITTEN)}")
    parent = next(place for place in path.absolute().parents if place.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise OutputError(f"{path}: {parent} cannot be written; name a place that can be written")


def save(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all. Raises OutputError."""
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    with atomic_output(path) as file:
        image.save(file, format=kind)


def _mark(image: Image.Image, asked: Sequence[Prompts], zoom: int) -> None:
    """Draw prompts in black and white, visible on any colour."""
    pen = ImageDraw.Draw(image)
    for prompts in asked:
        for row in prompts.values.tolist():
            if prompts.kind == "box":
                x0, y0, x1, y1 = (zoom * end for end in row)
                for grow, colour in ((3, INK), (2, WHITE), (1, WHITE), (0, INK)):
                    pen.rectangle((x0 - grow, y0 - grow, x1 + zoom - 1 + grow, y1 + zoom - 1 + grow), outline=colour)
            else:
                x, y = (zoom * (middle + 0.5) for middle in row)
                for radius, colour in ((8, INK), (6, WHITE), (3, INK)):
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _framed(mask: Tensor, shown: Tensor, zoom: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the part of a zoomed picture [3, H zoom, W zoom] around a mask [H, W], and the mask there; none if it is
    empty.

    The part is a view. Its margin makes the mask's edge the same as on the whole picture.
    """
    if not mask.any():
        return
    x0, y0, x1, y1 = (int(end) for end in boxes_of(mask).tolist())
    rows, columns = (slice(max(0, start - _EDGE), stop + 1 + _EDGE) for start, stop in ((y0, y1), (x0, x1)))
    large = (slice(side.start * zoom, side.stop * zoom) for side in (rows, columns))
    yield shown[(slice(None), *large)], _zoom(mask[rows, columns][None], zoom)[0]


def _zoom(image: Tensor, zoom: int) -> Tensor:
    """[C, H, W] -> [C, H zoom, W zoom], every pixel repeated."""
    return image.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)


def _blend(pixels: Tensor, colour: Colour, share: float, where: Tensor | None = None) -> Tensor:
    """Mix `share` of a colour into uint8 [3, H, W], everywhere or where `where` (bool [H, W]) is set."""
    mixed = pixels.float() * (1 - share) + torch.tensor(colour)[:, None, None] * share
    return mixed.to(torch.uint8) if where is None else torch.where(where, mixed.to(torch.uint8), pixels)


def _edge(mask: Tensor) -> Tensor:
    """Return the pixels of a mask (bool [H, W]) within `_EDGE` of its border."""
    outside = functional.max_pool2d((~mask).float()[None], kernel_size=2 * _EDGE + 1, stride=1, padding=_EDGE)[0]
    return mask & (outside > 0)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _write(pen: ImageDraw.ImageDraw, text: str, *, left: int, top: int, ink: Colour, size: int) -> int:
    """Write a line and return its width in pixels."""
    font = ImageFont.load_default(size=size)
    pen.text((left, top), text, fill=ink, font=font)
    return round(pen.textlength(text, font=font))
