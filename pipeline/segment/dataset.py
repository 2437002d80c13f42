"""The data that models are compared on: pictures, and prompts from annotations, from a detector's boxes or from a grid.

Annotations are a COCO file (`images`, `annotations` with polygons or run-length coding), an LVIS file (the same, with
pictures named by `coco_url`), or a folder of SA-1B's files, one `<picture>.json` beside or apart from each picture. A
detector's results are COCO's: a list of rows with `image_id`, `category_id`, `bbox`, `score` and optionally
`segmentation`, as YOLOX or ViTDet write them. Without any of these, every picture gets the same grid of prompts.

An unusable row or picture is skipped and counted in `Dataset.skipped`.
"""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.segment.annotations import (
    Row,
    Skipped,
    UnusableError,
    box_of,
    click_of,
    encoded,
    finite,
    is_id,
    mask_of,
    rasteriser,
    read_json,
)
from birkhoff.pipeline.segment.prompts import (
    Prompts,
    box_grid,
    box_ious,
    boxes_of,
    pictures_in,
    point_grid,
    read_picture,
)

GRID = 4
"""Points, and boxes, across and down a picture without annotations."""

MATCH = 0.5
"""Least box IoU at which an annotated object of the same category matches a detector's box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How masks are prompted for, and what they are compared with.

    annotations: The file of annotations, or SA-1B's folder; None for prompts from a grid.
    boxes: A detector's results, whose boxes are the prompts; None for prompts from the annotations.
    truth: Compare masks with the `annotations`, or with the masks of the detector's `results`.
    multimask: Take the model's `single` mask, or the `best` of several by predicted IoU.
    metric: `iou` with the truth, or `ap`: the average precision of the masks with the detector's scores.
    random: Number of annotated objects per picture, drawn by `seed`, each prompted by its box and by a random pixel of
    its mask. None: all objects, each prompted by its box, and by its annotated click or the pixel nearest to its
    middle.
    """

    annotations: Path | None = None
    boxes: Path | None = None
    truth: Literal["annotations", "results"] = "annotations"
    multimask: Literal["single", "best"] = "single"
    metric: Literal["iou", "ap"] = "iou"
    random: int | None = None
    seed: int = 0

    def document(self) -> dict[str, Any]:
        """Return the protocol for JSON."""
        return {
            "annotations": None if self.annotations is None else str(self.annotations),
            "boxes": None if self.boxes is None else str(self.boxes),
            "truth": self.truth,
            "multimask": self.multimask,
            "metric": self.metric,
            "random": self.random,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What average precision needs of one picture: its record, its annotations, and the row behind each box."""

    record: Row
    annotations: tuple[Row, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture: pixels uint8 [3, H, W], prompts, and the true masks bool [K, H, W] if known.

    With truth, prompt k of every kind is for object k.
    """

    name: str
    pixels: Tensor
    asked: tuple[Prompts, ...]
    truth: Tensor | None
    scored: Scored | None = None


Entries = tuple[tuple[str, Row], ...]
"""Rows, each with its place in its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture with its annotations. `record` is its own row in the annotations; empty without annotations."""

    path: Path
    record: Row = field(default_factory=dict)
    objects: Entries = ()
    results: Entries = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Pictures to compare models on; `annotated` unless prompts come from a grid.

    `categories` are the rows of the annotations' categories, for average precision.
    """

    pictures: tuple[Picture, ...]
    annotated: bool
    folder: Path
    grid: int = GRID
    protocol: Protocol = field(default_factory=Protocol)
    categories: Mapping[Any, Row] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)

    def case(self, number: int) -> Case:
        """Read one picture and make its prompts. Unusable parts are counted in `skipped`.

        Raises:
            PictureError: No part of the picture can be used, or pycocotools is missing.
        """
        picture = self.pictures[number]
        name = picture.path.name
        try:
            pixels = read_picture(picture.path)
        except PictureError:
            self.skipped.add("picture", "cannot be read as a picture", name)
            raise
        size = int(pixels.shape[1]), int(pixels.shape[2])
        if not self.annotated:
            asked = point_grid(size, self.grid), box_grid(size, self.grid)
            return Case(name=name, pixels=pixels, asked=asked, truth=None)
        said = picture.record.get("height"), picture.record.get("width")
        if None not in said and said != size:
            self.skipped.add("picture", "of another size than its annotations say", name)
            raise PictureError(f"{picture.path}: {size} pixels (height, width), its annotations say {said}")
        if self.protocol.boxes is None:
            return self._of_objects(picture, pixels)
        return self._of_results(picture, pixels)

    def _of_objects(self, picture: Picture, pixels: Tensor) -> Case:
        """Return a case with prompts and truth from the annotations."""
        size, name = (int(pixels.shape[1]), int(pixels.shape[2])), picture.path.name
        generator = self._generator(name)
        order = [*range(len(picture.objects))]
        if self.protocol.random is not None:
            order = torch.randperm(len(order), generator=generator).tolist()
        chosen: list[tuple[int, Tensor, Tensor]] = []
        problem: UnusableError | None = None
        for index in order:
            if len(chosen) == self.protocol.random:
                break
            place, entry = picture.objects[index]
            try:
                mask = mask_of(entry, size)
                if self.protocol.random is not None:
                    click = drawn_pixel(mask, generator)
                else:
                    given = click_of(entry, size)
                    click = middle_pixel(mask) if given is None else torch.tensor(given)
                chosen.append((index, mask, click))
            except UnusableError as error:
                self.skipped.add("annotation", error.reason, f"{name}: {place}")
                problem = problem or UnusableError(f"{place}: {error}")
        if not chosen:
            self.skipped.add("picture", "no annotation of it can be used", name)
            raise PictureError(f"{name}: {problem}")
        chosen.sort(key=lambda one: one[0])
        truth = torch.stack([mask for _, mask, _ in chosen])
        clicks = torch.stack([click for _, _, click in chosen]).to(torch.float32)
        asked = Prompts(kind="box", values=boxes_of(truth)), Prompts(kind="point", values=clicks)
        return Case(name=name, pixels=pixels, asked=asked, truth=truth)

    def _of_results(self, picture: Picture, pixels: Tensor) -> Case:
        """Return a case with a detector's boxes as prompts. For average precision it may have none, if objects were
        missed."""
        size, name = (int(pixels.shape[1]), int(pixels.shape[2])), picture.path.name
        protocol = self.protocol
        own = protocol.truth == "results"
        objects = [] if own else list(self._masks(picture, size))
        boxes: list[list[float]] = []
        rows: list[Row] = []
        truth: list[Tensor] = []
        for place, row in picture.results:
            try:
                box = box_of(row, size)
                self._check(row)
                if own:
                    truth.append(mask_of(row, size))
                elif protocol.metric == "iou":
                    truth.append(_meant(row, box, objects))
            except UnusableError as error:
                self.skipped.add("result", error.reason, f"{name}: {place}")
                continue
            boxes.append(box)
            rows.append(row)
        scored = None
        if protocol.metric == "ap":
            record = {**picture.record, "height": size[0], "width": size[1]}
            annotations = tuple(_cleaned(entry, mask) for entry, mask in objects)
            scored = Scored(record=record, annotations=annotations, rows=tuple(rows))
        elif not boxes:
            self.skipped.add("picture", "no result on it can be used", name)
            raise PictureError(f"{name}: no result on it can be used")
        asked = (Prompts(kind="box", values=torch.tensor(boxes)),) if boxes else ()
        return Case(name=name, pixels=pixels, asked=asked, truth=torch.stack(truth) if truth else None, scored=scored)

    def _masks(self, picture: Picture, size: tuple[int, int]) -> Iterator[tuple[Row, Tensor]]:
        """Yield the usable annotations of a picture with their masks; crowds only for average precision."""
        for place, entry in picture.objects:
            try:
                self._check_category(entry)
                yield entry, mask_of(entry, size)
            except UnusableError as error:
                self.skipped.add("annotation", error.reason, f"{picture.path.name}: {place}")

    def _check(self, row: Row) -> None:
        """Check the parts of a detector's row besides its box. Raises UnusableError."""
        if not finite(row.get("score")) and (self.protocol.metric == "ap" or "score" in row):
            raise UnusableError("no finite score", repr(row.get("score")))
        self._check_category(row)

    def _check_category(self, row: Row) -> None:
        found = row.get("category_id")
        if self.protocol.metric == "ap" and not (is_id(found) and found in self.categories):
            raise UnusableError("an unknown category", repr(found))

    def _generator(self, name: str) -> torch.Generator:
        """Return a generator that depends on the seed and the picture's name only, not on earlier pictures."""
        digest = hashlib.sha256(f"{self.protocol.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def middle_pixel(mask: Tensor) -> Tensor:
    """Return the pixel (x, y) of a mask (bool [H, W]) that is nearest to its middle."""
    pixels = mask.nonzero().to(torch.float32)
    nearest = pixels[(pixels - pixels.mean(dim=0)).square().sum(dim=1).argmin()]
    return nearest.flip(0)


def drawn_pixel(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random pixel (x, y) of a mask (bool [H, W]), uniformly."""
    pixels = mask.nonzero()
    return pixels[torch.randint(len(pixels), (), generator=generator)].flip(0)


def _meant(row: Row, box: Sequence[float], objects: Sequence[tuple[Row, Tensor]]) -> Tensor:
    """Return the mask of the annotated object that a detector's box overlaps most. Raises UnusableError."""
    rivals = [mask for entry, mask in objects if entry.get("category_id") == row.get("category_id")]
    if rivals:
        theirs = boxes_of(torch.stack(rivals)) + torch.tensor([0, 0, 1, 1])  # the last pixel's far edge
        overlaps = box_ious(torch.tensor([box]), theirs)[0]
        best = int(overlaps.argmax())
        if overlaps[best] >= MATCH:
            return rivals[best]
    raise UnusableError(f"no annotated object of its category under the box (IoU {MATCH:g})")


def _cleaned(entry: Row, mask: Tensor) -> Row:
    """Return an annotation as COCO's evaluation expects it, with its mask checked and coded again."""
    area = entry.get("area")
    return {
        "image_id": entry["image_id"],
        "category_id": entry["category_id"],
        "iscrowd": 1 if entry.get("iscrowd") else 0,
        "segmentation": encoded(mask),
        "area": area if finite(area) and area > 0 else int(mask.sum()),
    }


def open_dataset(
    folder: Path,
    annotations: Path | None = None,
    *,
    limit: int | None = None,
    grid: int = GRID,
    protocol: Protocol | None = None,
) -> Dataset:
    """Return the pictures of a folder, the first `limit` by name; with annotations only those that have any.

    A picture of COCO's or LVIS' annotations is found by its file name, or by the path in the annotations
    (`train2017/000000000009.jpg`). For average precision every annotated picture counts, even without objects or
    results.

    Raises:
        PictureError: There are no pictures, annotations or results cannot be read, or are for other pictures.
    """
    protocol = replace(protocol or Protocol(), annotations=annotations)
    if annotations is None:
        pictures = tuple(Picture(path=path) for path in pictures_in(folder))
        return Dataset(pictures=pictures[:limit], annotated=False, folder=folder, grid=grid, protocol=protocol)
    rasteriser()  # before the work
    skipped = Skipped()
    if annotations.is_dir():
        categories: Mapping[Any, Row] = {}
        found = _sa1b(annotations, pictures_in(folder), skipped)
    else:
        found, categories = _coco(annotations, folder, protocol, skipped)
    used = [picture for picture in found if protocol.metric == "ap" or picture.results or _asked(picture, protocol)]
    if not used:
        few = f" (skipped: {skipped})" if skipped.rows() else ""
        raise PictureError(
            f"{annotations}: annotates none of the {len(pictures_in(folder))} pictures of {folder}{few}; "
            "name the folder of its pictures"
        )
    used.sort(key=lambda picture: picture.path.name)
    return Dataset(
        pictures=tuple(used[:limit]),
        annotated=True,
        folder=folder,
        grid=grid,
        protocol=protocol,
        categories=categories,
        skipped=skipped,
    )


def _asked(picture: Picture, protocol: Protocol) -> bool:
    return protocol.boxes is None and bool(picture.objects)


def _coco(path: Path, folder: Path, protocol: Protocol, skipped: Skipped) -> tuple[list[Picture], Mapping[Any, Row]]:
    document = read_json(path)
    try:
        images, annotations = list(document["images"]), list(document["annotations"])
    except (KeyError, TypeError, AttributeError) as error:
        raise PictureError(
            f"{path}: expected COCO's images and annotations, got {type(error).__name__}: {error}; "
            "for SA-1B name the folder of its .json files"
        ) from None
    records = _records(images, skipped)
    objects = _by_picture(annotations, "annotation", records, skipped)
    results: Mapping[Any, Entries] = {}
    if protocol.boxes is not None:
        rows = read_json(protocol.boxes)
        if not isinstance(rows, list):
            raise PictureError(f"{protocol.boxes}: expected COCO's results: a list of rows with image_id and bbox")
        results = _by_picture(rows, "result", records, skipped)
    if protocol.metric == "iou" and protocol.truth == "annotations":
        objects = {number: _without_crowds(number, own, skipped) for number, own in objects.items()}
    found = []
    for number, record in records.items():
        place = _located(record, folder)
        if place is None:
            skipped.add("picture", "not in the folder", names_of(record)[0])
            continue
        own = objects.get(number, ()), results.get(number, ())
        found.append(Picture(path=place, record=record, objects=own[0], results=own[1]))
    categories = document.get("categories")
    rows = categories if isinstance(categories, list) else []
    valid = {row["id"]: row for row in rows if isinstance(row, dict) and is_id(row.get("id"))}
    if protocol.metric == "ap" and not valid:
        raise PictureError(f"{path}: has no categories, which average precision is the mean over; use --metric iou")
    return found, valid


def _records(images: Sequence[Any], skipped: Skipped) -> dict[Any, Row]:
    """Return the pictures' rows by id."""
    records: dict[Any, Row] = {}
    for index, image in enumerate(images):
        place = f"images[{index}]"
        if not (isinstance(image, dict) and is_id(image.get("id")) and names_of(image)):
            skipped.add("picture", "its row has no id or no file name", place)
        elif image["id"] in records:
            skipped.add("picture", "its id is another picture's", place)
        else:
            records[image["id"]] = image
    return records


def _by_picture(
    rows: Sequence[Any], what: Literal["annotation", "result"], records: Mapping[Any, Row], skipped: Skipped
) -> dict[Any, Entries]:
    """Return rows by their picture's id; rows without one are skipped."""
    found: defaultdict[Any, list[tuple[str, Row]]] = defaultdict(list)
    places: set[str] = set()
    for index, row in enumerate(rows):
        place = f"{what} {row['id']}" if isinstance(row, dict) and is_id(row.get("id")) else f"{what} #{index}"
        place = f"{place} #{index}" if place in places else place
        places.add(place)
        if not isinstance(row, dict):
            skipped.add(what, "no object of JSON", place)
        elif not is_id(row.get("image_id")) or row["image_id"] not in records:
            skipped.add(what, "an unknown picture", place)
        else:
            found[row["image_id"]].append((place, row))
    return {number: tuple(own) for number, own in found.items()}


def _without_crowds(number: object, own: Entries, skipped: Skipped) -> Entries:
    for place, entry in own:
        if entry.get("iscrowd"):
            skipped.add("annotation", "a crowd", f"image {number}: {place}")
    return tuple((place, entry) for place, entry in own if not entry.get("iscrowd"))


def names_of(record: Row) -> list[str]:
    """Return the paths that a picture may have in its folder: its own name, then parts of URLs.

    LVIS has no `file_name`; its `coco_url` ends in COCO's folder and the name: `val2017/000000000139.jpg`.
    """
    given = [PurePosixPath(name) for key in ("file_name", "coco_url") if isinstance(name := record.get(key), str)]
    tails = [path.parts[-length:] for path in given for length in (1, 2) if path.name]
    return ["/".join(tail) for tail in dict.fromkeys(tails) if not {"..", "/"} & {*tail}]


def _located(record: Row, folder: Path) -> Path | None:
    for name in names_of(record):
        with contextlib.suppress(OSError, ValueError):  # not a valid file name
            if (folder / name).is_file():
                return folder / name
    return None


def _sa1b(folder: Path, pictures: Sequence[Path], skipped: Skipped) -> list[Picture]:
    found = []
    for picture in pictures:
        path = folder / f"{picture.stem}.json"
        if not path.is_file():
            skipped.add("picture", "has no annotations", picture.name)
            continue
        try:
            document = read_json(path)
        except PictureError:
            skipped.add("picture", "its annotations cannot be read", picture.name)
            continue
        entries = document.get("annotations") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            skipped.add("picture", "its annotations are not SA-1B's", picture.name)
            continue
        own = _by_picture(
            [{**entry, "image_id": 0} if isinstance(entry, dict) else entry for entry in entries],
            "annotation",
            {0: {}},
            skipped,
        )
        found.append(Picture(path=picture, objects=_without_crowds(picture.name, own.get(0, ()), skipped)))
    return found
