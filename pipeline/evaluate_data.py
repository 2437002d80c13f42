"""What models are compared on: a folder of pictures, and prompts from annotations or from a grid.

Annotations are a COCO file (`images`, `annotations` with polygons or run-length coding), or a folder of SA-1B's files,
one `<picture>.json` beside or apart from each picture. Without any, the prompts are the same grid for every picture.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.segment_input import Prompts, box_grid, boxes_of, pictures_in, point_grid, read_picture

GRID = 4
"""Points, and boxes, across and down a picture without annotations."""

Segmentation = Mapping[str, Any]
"""An annotation as its file has it: `segmentation`, perhaps `point_coords`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture: pixels uint8 [3, H, W], what is asked, and the true masks bool [K, H, W] where they are known.

    With truth, prompt k of every kind asks for object k.
    """

    name: str
    pixels: Tensor
    asked: tuple[Prompts, ...]
    truth: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Pictures to compare models on; `annotations` by the picture's file name, None for prompts from a grid."""

    pictures: tuple[Path, ...]
    annotations: Mapping[str, Sequence[Segmentation]] | None
    grid: int = GRID

    def case(self, number: int) -> Case:
        """Read one picture and make its prompts. Raises PictureError."""
        path = self.pictures[number]
        pixels = read_picture(path)
        size = int(pixels.shape[1]), int(pixels.shape[2])
        if self.annotations is None:
            asked = point_grid(size, self.grid), box_grid(size, self.grid)
            return Case(name=path.name, pixels=pixels, asked=asked, truth=None)
        objects = self.annotations[path.name]
        truth = torch.stack([_mask(path, found, size) for found in objects])
        boxes, points = boxes_of(truth), torch.stack([_point(f, m) for f, m in zip(objects, truth, strict=True)])
        asked = Prompts(kind="box", values=boxes), Prompts(kind="point", values=points)
        return Case(name=path.name, pixels=pixels, asked=asked, truth=truth)


def open_dataset(
    folder: Path, annotations: Path | None = None, *, limit: int | None = None, grid: int = GRID
) -> Dataset:
    """The pictures of a folder, the first `limit` by name; with annotations those that have any.

    Raises:
        PictureError: no pictures, annotations that cannot be read, or none of these pictures'.
    """
    pictures = pictures_in(folder)
    if annotations is None:
        return Dataset(pictures=tuple(pictures[:limit]), annotations=None, grid=grid)
    known = _sa1b(annotations, pictures) if annotations.is_dir() else _coco(annotations)
    annotated = [path for path in pictures if known.get(path.name)]
    if not annotated:
        raise PictureError(f"{annotations}: annotates none of the {len(pictures)} pictures of {folder}")
    return Dataset(pictures=tuple(annotated[:limit]), annotations=known, grid=grid)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{path}: expected annotations as JSON: {error}") from None


def _coco(path: Path) -> dict[str, list[Segmentation]]:
    document = _json(path)
    try:
        names = {image["id"]: Path(image["file_name"]).name for image in document["images"]}
        found: defaultdict[str, list[Segmentation]] = defaultdict(list)
        for entry in document["annotations"]:
            if not entry.get("iscrowd"):
                found[names[entry["image_id"]]].append(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise PictureError(
            f"{path}: expected COCO's images and annotations, got {type(error).__name__}: {error}; "
            "for SA-1B name the folder of its .json files"
        ) from None
    return dict(found)


def _sa1b(folder: Path, pictures: Sequence[Path]) -> dict[str, list[Segmentation]]:
    found: dict[str, list[Segmentation]] = {}
    for picture in pictures:
        path = folder / f"{picture.stem}.json"
        if path.is_file():
            document = _json(path)
            entries = document.get("annotations") if isinstance(document, dict) else None
            if not isinstance(entries, list):
                raise PictureError(f"{path}: expected SA-1B's annotations of one picture")
            found[picture.name] = entries
    return found


def _mask(path: Path, entry: Segmentation, size: tuple[int, int]) -> Tensor:
    """The mask of an annotation: bool [H, W]. Raises PictureError."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise PictureError("annotations need pycocotools: pip install 'birkhoff-compression[eval]'") from None
    where = f"{path.name}: annotation {entry.get('id', '?') if isinstance(entry, dict) else entry!r}"
    try:
        runs: Any = entry["segmentation"]
        if isinstance(runs, list):
            runs = coco.merge(coco.frPyObjects(runs, *size))
        elif isinstance(runs["counts"], list):
            runs = coco.frPyObjects(runs, *size)
        mask = torch.from_numpy(np.ascontiguousarray(coco.decode(runs))).to(torch.bool)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PictureError(f"{where}: not a polygon or run-length mask: {type(error).__name__}: {error}") from None
    if tuple(mask.shape) != size:
        raise PictureError(f"{where}: a mask of {list(mask.shape)} pixels on a picture of {list(size)} (height, width)")
    if not mask.any():
        raise PictureError(f"{where}: an empty mask")
    return mask


def _point(entry: Segmentation, mask: Tensor) -> Tensor:
    """The click for an object, (x, y): the annotation's own, else the mask's pixel nearest to its middle."""
    given = entry.get("point_coords")
    if given:
        return torch.tensor(given[0], dtype=torch.float32)
    pixels = mask.nonzero().to(torch.float32)
    nearest = pixels[(pixels - pixels.mean(dim=0)).square().sum(dim=1).argmin()]
    return nearest.flip(0)
