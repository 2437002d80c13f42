"""Draws what compression did to the masks: a PNG to look at.

Each row is one held-out object: the picture with its prompt, the mask of the original model, the mask of the compressed
one, and where the two differ. Blue stands for the original and vermilion for the compressed model, which readers with
any colour vision tell apart.

    python manifests/demo/picture.py COMPRESSED_WEIGHTS OUTPUT.png
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from transformers import SamModel

from birkhoff.codec.errors import BirkhoffError

import shapes
from evaluate import HELD_OUT_SEED, Prompt, ious, predict_masks
from model import load
from shapes import SIDE, Pictures

ROWS: tuple[Prompt, ...] = ("box", "box", "click", "click")
"""The prompt of every row."""

ZOOM = 2
PANEL = SIDE * ZOOM
GAP = 14
HEAD = 34  # height of the column titles
FOOT = 24  # height of the line below a panel

Colour = tuple[int, int, int]
BLUE: Colour = (0, 114, 178)  # blue and vermilion of Okabe and Ito's palette
VERMILION: Colour = (213, 94, 0)
WHITE: Colour = (255, 255, 255)
INK: Colour = (40, 40, 40)
GREY: Colour = (170, 170, 170)

TITLES: tuple[tuple[tuple[str, Colour], ...], ...] = (
    (("picture and prompt", INK),),
    (("original", BLUE),),
    (("compressed", VERMILION),),
    (("only original", BLUE), (" / ", INK), ("only compressed", VERMILION)),
)
"""What stands above each column, in pieces of one colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One object: pixels uint8 [3, 128, 128]; true mask and those of the two models, bool [128, 128]."""

    prompt: Prompt
    pixels: Tensor
    box: list[float]
    click: list[float]
    true: Tensor
    original: Tensor
    compressed: Tensor


def draw(original: SamModel, compressed: SamModel, path: Path | str, *, seed: int = HELD_OUT_SEED) -> None:
    """Writes a PNG that compares the masks of two models on the first pictures of `seed`, one object in each.

    The models may live on any device. An existing file is overwritten.
    """
    pictures = shapes.draw(torch.arange(len(ROWS)), seed=seed, objects=1)
    rows = [_row(original, compressed, pictures.part(i, i + 1), prompt) for i, prompt in enumerate(ROWS)]
    width = len(TITLES) * (PANEL + GAP) + GAP
    height = HEAD + len(rows) * (PANEL + FOOT + GAP)
    sheet = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        left = GAP + column * (PANEL + GAP)
        for text, ink in title:
            left += _write(pen, text, left=left, top=9, ink=ink, size=16)
    for number, row in enumerate(rows):
        _lay(sheet, row, top=HEAD + number * (PANEL + FOOT + GAP))
    sheet.save(path, format="PNG")


def _row(original: SamModel, compressed: SamModel, picture: Pictures, prompt: Prompt) -> _Row:
    masks = [predict_masks(model, picture, prompt=prompt)[0, 0].cpu() for model in (original, compressed)]
    return _Row(
        prompt=prompt,
        pixels=picture.pixels[0],
        box=picture.boxes[0, 0].tolist(),
        click=picture.clicks[0, 0, 0].tolist(),
        true=picture.masks[0, 0],
        original=masks[0],
        compressed=masks[1],
    )


def _lay(sheet: Image.Image, row: _Row, *, top: int) -> None:
    """Puts the four panels of a row, and the line below each, on the sheet."""
    same = float(ious(row.original, row.compressed))
    differ = int((row.original ^ row.compressed).sum())
    panels = (
        (_prompted(row), f"prompt: {'a box' if row.prompt == 'box' else 'one click'}"),
        (_masked(row, row.original, BLUE), f"IoU with the truth {float(ious(row.original, row.true)):.3f}"),
        (_masked(row, row.compressed, VERMILION), f"IoU with the truth {float(ious(row.compressed, row.true)):.3f}"),
        (_difference(row), f"IoU of the two {same:.3f}, {differ} pixels differ"),
    )
    pen = ImageDraw.Draw(sheet)
    for column, (panel, line) in enumerate(panels):
        left = GAP + column * (PANEL + GAP)
        sheet.paste(panel, (left, top))
        _write(pen, line, left=left, top=top + PANEL + 5, ink=INK, size=14)


def _prompted(row: _Row) -> Image.Image:
    panel = _image(_zoom(row.pixels))
    pen = ImageDraw.Draw(panel)
    if row.prompt == "box":
        x1, y1, x2, y2 = (ZOOM * end for end in row.box)
        for grow, colour in ((3, INK), (2, WHITE), (1, WHITE), (0, INK)):  # a white line seen on any colour
            pen.rectangle((x1 - grow, y1 - grow, x2 + ZOOM - 1 + grow, y2 + ZOOM - 1 + grow), outline=colour)
    else:
        x, y = (ZOOM * (middle + 0.5) for middle in row.click)
        for radius, colour in ((8, INK), (6, WHITE), (3, INK)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return panel


def _masked(row: _Row, mask: Tensor, colour: Colour) -> Image.Image:
    """The picture, faded outside the mask, tinted within and with the mask's edge drawn."""
    large = _zoom(mask[None])[0]
    pixels = _blend(_zoom(row.pixels), WHITE, 0.55, where=~large)
    pixels = _blend(pixels, colour, 0.45, where=large)
    return _image(_blend(pixels, colour, 1.0, where=_edge(large)))


def _difference(row: _Row) -> Image.Image:
    """Grey where both models say object, blue or vermilion where one alone does, the faded picture elsewhere."""
    first, second = _zoom(row.original[None])[0], _zoom(row.compressed[None])[0]
    grey = row.pixels.float().mean(dim=0, keepdim=True).expand(3, -1, -1).to(torch.uint8)
    pixels = _blend(_zoom(grey), WHITE, 0.8)
    pixels = _blend(pixels, GREY, 0.9, where=first & second)
    pixels = _blend(pixels, BLUE, 1.0, where=first & ~second)
    return _image(_blend(pixels, VERMILION, 1.0, where=second & ~first))


def _zoom(image: Tensor) -> Tensor:
    """[C, H, W] -> [C, H ZOOM, W ZOOM], every pixel repeated."""
    return image.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)


def _blend(pixels: Tensor, colour: Colour, share: float, where: Tensor | None = None) -> Tensor:
    """Mixes `share` of a colour into uint8 [3, H, W], everywhere or where bool [H, W] says."""
    mixed = pixels.float() * (1 - share) + torch.tensor(colour)[:, None, None] * share
    return mixed.to(torch.uint8) if where is None else torch.where(where, mixed.to(torch.uint8), pixels)


def _edge(mask: Tensor) -> Tensor:
    """The pixels of a mask (bool [H, W]) within two of its border."""
    outside = functional.max_pool2d((~mask).float()[None], kernel_size=5, stride=1, padding=2)[0]
    return mask & (outside > 0)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _write(pen: ImageDraw.ImageDraw, text: str, *, left: int, top: int, ink: Colour, size: int) -> int:
    """Writes a line and returns its width in pixels."""
    font = ImageFont.load_default(size=size)
    pen.text((left, top), text, fill=ink, font=font)
    return round(pen.textlength(text, font=font))


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
