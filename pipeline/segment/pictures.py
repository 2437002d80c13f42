"""Pictures segmented one by one, by one model or by two: what `birkhoff segment` does with a picture or a folder."""

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
    """A picture, uint8 [3, H, W], and what is asked of it; nothing for everything."""

    pixels: Tensor
    prompts: tuple[Prompts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """The masks of a model on one picture, and beside them those of the original, mask by mask."""

    masks: Masks
    original: Masks | None

    def rows(self) -> list[dict[str, Any]]:
        """Return a line for each mask."""
        return rows(self.masks, self.original)


def outputs_of(image: Path, out: Path) -> Mapping[Path, Path]:
    """Where each picture's masks are drawn: `out` for a file; in the folder `out`, as PNG, for those of a folder.

    Raises:
        PictureError: the folder holds no pictures.
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
    """Return what the first model finds on a picture, and beside it the second, which is the original.

    `how` says how everything is asked for; with None the prompts are asked. Of everything each mask of the original is
    paired with the nearest one. `advanced` is told how many points were asked.
    """

    def found(model: Segmenter) -> Masks:
        if how is not None:
            return everything(model, asked.pixels, how, advanced)
        return prompted(model, model.look(asked.pixels[None]), [*asked.prompts])

    first, *others = (found(model) for model in models)
    if not others:
        return Segmented(masks=first, original=None)
    return Segmented(masks=first if how is None else pair_up(others[0], first), original=others[0])
