"""Pictures and prompts from users: files, `X,Y`, `X0,Y0,X1,Y1`, or a grid over the whole picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.segment.adapters.base import PromptKind

_NUMBERS: dict[PromptKind, tuple[str, int]] = {"point": ("X,Y", 2), "box": ("X0,Y0,X1,Y1", 4)}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""File names of pictures in a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompts for one picture: one object for each of K prompts of a kind, in its pixels.

    values: float32 [K, 4] as x0, y0, x1, y1 (the last pixel inside), or [K, 2] as x, y.
    """

    kind: PromptKind
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)


def read_picture(path: Path) -> Tensor:
    """Return an RGB picture, rotated as its file says: uint8 [3, H, W].

    Raises:
        PictureError: There is no such file, or it is not a picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"{path}: no such picture") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path}: not a picture that Pillow reads") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: cannot be read as a picture: {error}") from None
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, by name. Raises PictureError if it has none."""
    if not folder.is_dir():
        raise PictureError(f"{folder}: no such folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise PictureError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)})")
    return found


def parse_prompts(kind: PromptKind, texts: Sequence[str], size: tuple[int, int]) -> Prompts:
    """Return prompts from the command line for a picture of size (H, W).

    Raises:
        PictureError: They are not the expected numbers, are outside the picture, or a box has no area.
    """
    return Prompts(kind=kind, values=torch.tensor([_parse(kind, text, size) for text in texts], dtype=torch.float32))


def _parse(kind: PromptKind, text: str, size: tuple[int, int]) -> list[float]:
    form, count = _NUMBERS[kind]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(np.isfinite(numbers)):
        raise PictureError(f"--{kind} {text}: expected {form} in pixels")
    height, width = size
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            raise PictureError(
                f"--{kind} {text}: outside the picture, which is {width} x {height} pixels: x 0 to {width - 1}, "
                f"y 0 to {height - 1}"
            )
    if kind == "box" and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise PictureError(f"--box {text}: expected {form} with X0 < X1 and Y0 < Y1")
    return numbers


def point_grid(size: tuple[int, int], across: int) -> Prompts:
    """Return `across` x `across` points, each in the middle of its cell of a picture of size (H, W), row by row."""
    height, width = size
    middles = (torch.arange(across, dtype=torch.float32) + 0.5) / across
    y, x = torch.meshgrid(middles * height - 0.5, middles * width - 0.5, indexing="ij")
    return Prompts(kind="point", values=torch.stack((x, y), dim=-1).reshape(-1, 2))


def box_grid(size: tuple[int, int], across: int) -> Prompts:
    """Return `across` x `across` boxes of two cells' side that tile a picture of size (H, W), overlapping by half."""
    height, width = size
    start = torch.arange(across, dtype=torch.float32) / (across + 1)
    y, x = torch.meshgrid(start * height, start * width, indexing="ij")
    w, h = 2 * width / (across + 1) - 1, 2 * height / (across + 1) - 1
    return Prompts(kind="box", values=torch.stack((x, y, x + w, y + h), dim=-1).reshape(-1, 4))


def boxes_of(masks: Tensor) -> Tensor:
    """Return the first and last pixel (x0, y0, x1, y1) of each mask: bool [..., H, W] -> float32 [..., 4].

    An empty mask has the box of the whole picture.
    """
    ends = []
    for over in (-2, -1):  # any over y gives the columns, any over x the rows
        line = masks.any(dim=over).to(torch.int32)
        last = line.shape[-1] - 1 - line.flip(-1).argmax(dim=-1)
        ends.append((line.argmax(dim=-1), last))
    (x0, x1), (y0, y1) = ends
    return torch.stack((x0, y0, x1, y1), dim=-1).to(torch.float32)


def box_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of every box with every other: float32 [K, 4] and [L, 4] as x0, y0, x1, y1 -> [K, L]."""
    first, second = boxes[:, None], others[None]
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (first, second)]
    return both / (areas[0] + areas[1] - both)
