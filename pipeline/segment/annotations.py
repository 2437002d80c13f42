"""Annotations and detectors' results as in their files, and the reasons why parts of them cannot be used.

Annotation files contain invalid rows, and `pycocotools` trusts them: a polygon with NaN makes it allocate all memory,
and runs that end too early leave the rest of a mask undefined. So each row is checked here, and an invalid one is
skipped and counted.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from birkhoff.pipeline.errors import PictureError

Kind = Literal["picture", "annotation", "result"]
"""What may be skipped: a picture, an annotated object, a row of a detector's results."""

Row = Mapping[str, Any]
"""An annotation or a result as in its file."""

LISTED = 10
"""Number of skipped items listed per reason."""

_POLYGON = 6
"""Numbers of the smallest polygon: three corners."""


class UnusableError(Exception):
    """A row that cannot be used. It is counted under `reason`; `detail` describes the single case."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Skipped:
    """Collects the items that an evaluation skipped, by kind and reason. An item counts once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, str], dict[str, None]] = {}

    def add(self, what: Kind, reason: str, name: str) -> None:
        """Count an item; `name` is its unique place."""
        self._found.setdefault((what, reason), {})[name] = None

    def rows(self) -> list[dict[str, Any]]:
        """Return a line for each reason: `what`, `reason`, `count` and the `first` few names."""
        return [
            {"what": what, "reason": reason, "count": len(names), "first": list(names)[:LISTED]}
            for (what, reason), names in sorted(self._found.items())
        ]

    def __str__(self) -> str:
        return ", ".join(f"{row['count']} x {row['what']}: {row['reason']}" for row in self.rows()) or "nothing skipped"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises PictureError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PictureError(f"{path}: expected annotations as JSON: {error}") from None


def finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_id(value: object) -> bool:
    """Return whether a value can be the id of a picture, an object or a category."""
    return isinstance(value, int | str)


def numbers(value: object, count: int) -> list[float]:
    """Return a list of `count` finite numbers. Raises ValueError."""
    if not (isinstance(value, list) and len(value) == count and all(map(finite, value))):
        raise ValueError
    return [float(number) for number in value]


def mask_of(entry: object, size: tuple[int, int]) -> Tensor:
    """Return the mask of a row on a picture of size (H, W): bool [H, W].

    Raises:
        UnusableError: It is not a polygon or run-length mask, is for another size, or is empty.
        PictureError: pycocotools is missing.
    """
    try:
        found = cast("Any", entry)["segmentation"]
        mask = _of_polygons(found, size) if isinstance(found, list) else _of_runs(found, size)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        shown = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UnusableError("not a polygon or run-length mask", shown) from None
    if not mask.any():
        raise UnusableError("an empty mask")
    return torch.from_numpy(np.ascontiguousarray(mask))


def encoded(mask: Tensor) -> dict[str, Any]:
    """Return a mask (bool [H, W]) in COCO's run-length coding, ready for JSON. Raises PictureError."""
    runs = rasteriser().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(length) for length in runs["size"]], "counts": runs["counts"].decode()}


def box_of(row: Row, size: tuple[int, int]) -> list[float]:
    """Return a detector's box as x0, y0, x1, y1 in pixels, from x, y, width, height. It may extend beyond the picture.

    Raises:
        UnusableError: There is no box, it has no area, or it is outside the picture of size (H, W).
    """
    try:
        x, y, width, height = numbers(row.get("bbox"), 4)
    except ValueError:
        raise UnusableError("no box of four numbers", f"{row.get('bbox')!r:.80}") from None
    if width <= 0 or height <= 0:
        raise UnusableError("a box without area", f"{width:g} x {height:g}")
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        raise UnusableError("a box outside the picture")
    return [x, y, x + width, y + height]


def click_of(entry: Row, size: tuple[int, int]) -> list[float] | None:
    """Return an annotation's click x, y; None without one. Raises UnusableError."""
    given = entry.get("point_coords")
    if not given:
        return None
    try:
        x, y = numbers(given[0], 2)
    except (TypeError, KeyError, ValueError):
        raise UnusableError("a click outside the picture") from None
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise UnusableError("a click outside the picture", f"{x:g}, {y:g}")
    return [x, y]


def rasteriser() -> Any:
    """Return `pycocotools.mask`, which rasterises and codes masks. Raises PictureError if it is missing."""
    try:
        from pycocotools import mask
    except ImportError:
        raise PictureError("annotations need pycocotools: pip install 'birkhoff-compression[eval]'") from None
    return mask


def _of_polygons(polygons: list[Any], size: tuple[int, int]) -> Any:
    """Return the union of polygons x, y, x, y, ...; invalid ones are refused, because they make the rasteriser run
    wild."""
    if not polygons:
        raise ValueError("no polygon")
    reach = max(size)
    for polygon in polygons:
        corners = numbers(polygon, len(polygon))
        if len(corners) < _POLYGON or len(corners) % 2:
            raise ValueError(f"a polygon of {len(corners)} numbers")
        if min(corners) < -reach or max(corners) > 2 * reach:
            raise ValueError("a polygon far outside the picture")
    coco = rasteriser()
    runs = coco.merge(coco.frPyObjects(polygons, *size))
    return _of_runs({"size": list(size), "counts": runs["counts"].decode()}, size)


def _of_runs(runs: Mapping[str, Any], size: tuple[int, int]) -> Any:
    """Return a mask of run-length coding, compressed (a text) or plain (a list of lengths)."""
    given = numbers(runs["size"], 2)
    if given != [float(length) for length in size]:
        shown = f"a mask of {[int(length) for length in given]} pixels on a picture of {list(size)} (height, width)"
        raise UnusableError("a mask of another size", shown)
    counts = runs["counts"]
    lengths = _lengths(counts) if isinstance(counts, str) else np.array(numbers(counts, len(counts)))
    if (lengths < 0).any() or (lengths % 1).any() or lengths.sum() != size[0] * size[1]:
        raise ValueError("runs that do not add up to its pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return values.repeat(lengths.astype(np.int64)).reshape(size[::-1]).T  # column by column


def _lengths(text: str) -> Any:
    """Return the run lengths of COCO's compressed form, int64. From the fourth on they are stored as differences to the
    last but one.

    A length is written in groups of five bits, lowest first, one printable character each. Bit 5 says that more follow;
    bit 4 of the last group is the sign.
    """
    groups = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError("no compressed runs")
    last = groups & 32 == 0
    number = np.concatenate(([0], np.cumsum(last)[:-1]))  # the length that each group belongs to
    first = np.flatnonzero(np.concatenate(([True], last[:-1])))
    place = np.arange(len(groups)) - first[number]
    if place.max() > 7:
        raise ValueError("a run of too many pixels")
    found = np.zeros(int(last.sum()), dtype=np.int64)
    np.add.at(found, number, (groups & 31) << (5 * place))
    negative = groups[last] & 16 != 0
    found[negative] -= 1 << (5 * (place[last][negative] + 1))
    found[1::2] = found[1::2].cumsum()
    found[2::2] = found[2::2].cumsum()
    return found
