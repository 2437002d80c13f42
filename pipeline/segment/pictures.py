"""Segment pictures one by one with one model or two: what `birkhoff segment` does with a picture or a folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from birkhoff.pipeline.segment.adapters.base import PromptKind, Segmenter
from birkhoff.pipeline.segment.everything import Advanced, Everything, everything
from birkhoff.pipeline.segment.masks import Masks, pair_up, prompted, rows
from birkhoff.pipeline.segment.prompts import Prompts, parse_prompts, pictures_in, read_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A picture, uint8 [3, H, W], and its prompts; none to segment everything."""

    pixels: Tensor
    prompts: tuple[Prompts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """A model's masks on one picture and, mask by mask, the original's."""

    masks: Masks
    original: Masks | None

    def rows(self) -> list[dict[str, Any]]:
        """Return a line for each mask."""
        return rows(self.masks, self.original)


def outputs_of(image: Path, out: Path) -> Mapping[Path, Path]:
    """Return the output path of each picture: `out` for a file; PNG files in the folder `out` for a folder's pictures.

    Raises:
        PictureError: The folder has no pictures.
    """
    if not image.is_dir():
        return {image: out}
    pictures = pictures_in(image)
    stems = Counter(path.stem for path in pictures)
    return {path: out / f"{path.stem if stems[path.stem] == 1 else path.name}.png" for path in pictures}


def read_asked(path: Path, points: Sequence[str] | None, boxes: Sequence[str] | None) -> Asked:
    """Return a picture and its prompts, given as in `parse_prompts`. Raises PictureError."""
    pixels = read_picture(path)
    size = int(pixels.shape[1]), int(pixels.shape[2])
    given: tuple[tuple[PromptKind, Sequence[str] | None], ...] = (("point", points), ("box", boxes))
    return Asked(pixels=pixels, prompts=tuple(parse_prompts(kind, texts, size) for kind, texts in given if texts))


def segmented(
    models: Sequence[Segmenter], asked: Asked, how: Everything | None, advanced: Advanced = lambda _: None
) -> Segmented:
    """Segment a picture with the first model, and with the second, the original, if there is one.

    `how` is for segmenting everything; if it is None, the prompts are used. Of everything, each of the original's masks
    is paired with the nearest one. `advanced` receives the number of points prompted.
    """

    def found(model: Segmenter) -> Masks:
        if how is not None:
            return everything(model, asked.pixels, how, advanced)
        return prompted(model, model.look(asked.pixels[None]), [*asked.prompts])

    first, *others = (found(model) for model in models)
    if not others:
        return Segmented(masks=first, original=None)
    return Segmented(masks=first if how is None else pair_up(others[0], first), original=others[0])
