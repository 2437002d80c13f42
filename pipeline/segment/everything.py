"""Segment every object of a picture: prompt with a grid of points, and keep good, distinct masks.

This is the family's published automatic mask generator (A. Kirillov et al., "Segment Anything", arXiv 2304.02643,
appendix B). It keeps masks with a high predicted IoU that hardly change with the threshold, and of masks with nearly
the same box the best one. It can repeat this on overlapping crops, and remove small holes and islands.

Two members publish another mode. TinySAM (arXiv 2312.13789) prompts with a coarse grid first, then only outside
confident masks. EfficientSAM keeps each point's best mask. MobileSAMv2 (arXiv 2312.09579) uses the boxes of a separate
detector, which is not part of the model: its boxes can be given as prompts; without them its decoder is prompted with
the grid.

Legend: P points, M masks per point, K masks that are kept, H x W the picture, h x w a crop of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from birkhoff.pipeline.segment.adapters.base import Segmenter, View
from birkhoff.pipeline.segment.masks import Masks, in_parts
from birkhoff.pipeline.segment.prompts import Prompts, box_ious, boxes_of
from birkhoff.pipeline.segment.regions import without_small_regions

EDGE = 20
"""Pixels from a crop's edge within which a mask's box counts as cut off."""

SURE = 8.5
"""Logit from which TinySAM considers a pixel found."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, with the last ones outside."""

Advanced = Callable[[int], object]
"""Receives the number of points prompted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """How objects are prompted for, and which masks are kept; the defaults are segment-anything's.

    across: Points across and down the picture.
    predicted_iou: Masks need a higher predicted IoU.
    stability: Least IoU of a mask at the logits `offset` and `-offset`.
    same_box: Box IoU above which two masks are the same object.
    crop_layers: Layers of crops, 4**n in the n-th, each treated like the picture.
    crop_overlap: Overlap of the first layer's crops, as a fraction of the shorter side.
    crop_thinning: Layer n's grid has 1 / crop_thinning**n of the points across.
    smallest: Least pixels of a hole or island of a mask.
    most_trusted: Keep only each point's mask with the highest predicted IoU, and compare boxes only after small regions
    are removed (EfficientSAM).
    from_corner: Place points from the picture's corner instead of in the middle of cells (EfficientSAM).
    coarse_first: Use a grid of a quarter first, then points outside confident masks (TinySAM); without crops.
    """

    across: int = 32
    predicted_iou: float = 0.88
    stability: float = 0.95
    offset: float = 1.0
    same_box: float = 0.7
    crop_layers: int = 0
    crop_overlap: float = 512 / 1500
    crop_thinning: int = 1
    smallest: int = 0
    most_trusted: bool = False
    from_corner: bool = False
    coarse_first: bool = False


_SAM2 = Everything(predicted_iou=0.8)
_PUBLISHED: Mapping[str, Everything] = {
    **dict.fromkeys(("sam2", "sam_hq2", "med_sam2", "efficient_tam", "edge_tam", "sam3"), _SAM2),
    "tiny_sam": Everything(coarse_first=True),
    "efficient_sam": Everything(predicted_iou=0.7, stability=0.9, smallest=100, most_trusted=True, from_corner=True),
}


def published(family: str, **changed: Any) -> Everything:
    """Return the settings that a family's publishers use; fields in `changed` that are set override them.

    Sources: the mask generators of segment-anything and sam2, TinySAM's hierarchical one, EfficientSAM's notebook.
    """
    given = {name: value for name, value in changed.items() if value is not None}
    return replace(_PUBLISHED.get(family, Everything()), **given)


def points_asked(how: Everything) -> int:
    """Return the most points that `everything` prompts with."""
    return sum(4**layer * _across(how, layer) ** 2 for layer in range(how.crop_layers + 1))


def everything(
    segmenter: Segmenter, pixels: Tensor, how: Everything | None = None, advanced: Advanced = lambda _: None
) -> Masks:
    """Return the objects of a picture (uint8 [3, H, W]), highest predicted IoU first; `how` defaults to `published`."""
    how = how or published(segmenter.family)
    size = int(pixels.shape[1]), int(pixels.shape[2])
    found = _Found.none()
    crops = [*crop_boxes(size, how)]
    for layer, crop in crops:
        x0, y0, x1, y1 = crop
        view = segmenter.look(pixels[None, :, y0:y1, x0:x1])
        asked = _coarse_first if how.coarse_first else _by_grid
        own = asked(segmenter, view, how, layer, advanced).outside(crop, size)
        found = found.joined(own if how.most_trusted else own.distinct(own.trust, how.same_box))
    if len(crops) > 1:
        found = found.distinct(1 / found.crop_area, how.same_box)  # keep the duplicate from the smaller crop
    if how.smallest:
        found = found.without_small_regions(how.smallest, how.same_box, size)
    found = found.at(found.trust.argsort(descending=True, stable=True))
    labels = tuple(f"object {number}" for number in range(1, len(found.masks) + 1))
    return Masks(masks=found.whole(size), labels=labels)


def crop_boxes(size: tuple[int, int], how: Everything) -> Iterator[tuple[int, Box]]:
    """Yield the whole picture of size (H, W) and its crops, each with its layer."""
    height, width = size
    yield 0, (0, 0, width, height)
    for layer in range(1, how.crop_layers + 1):
        count = 2**layer
        overlap = int(how.crop_overlap * min(size) * (2 / count))
        wide, high = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for column, row in product(range(count), range(count)):
            x0, y0 = (wide - overlap) * column, (high - overlap) * row
            yield layer, (x0, y0, min(x0 + wide, width), min(y0 + high, height))


def distinct(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Non-maximum suppression: return the indices of the boxes to keep, highest score first; ties go to the first.

    boxes: float32 [K, 4] as x0, y0, x1, y1. A box is dropped if its IoU with a better kept one exceeds `most`.
    """
    left = scores.argsort(descending=True, stable=True)
    kept: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[~(box_ious(boxes[best][None], boxes[left])[0] > most)]
    return torch.tensor(kept, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """A mask as the bits within its box; a thousand whole masks would not fit into memory."""

    box: Box
    bits: Any

    @classmethod
    def of(cls, mask: Tensor, box: Sequence[int]) -> "_Packed":
        """Pack a mask. `box` has the last pixels inside, and contains the whole mask."""
        x0, y0, x1, y1 = box[0], box[1], box[2] + 1, box[3] + 1
        return cls(box=(x0, y0, x1, y1), bits=np.packbits(mask[y0:y1, x0:x1].numpy()))

    def whole(self, size: tuple[int, int]) -> Tensor:
        """Return the mask on a picture of size (H, W)."""
        x0, y0, x1, y1 = self.box
        bits = np.unpackbits(self.bits, count=(y1 - y0) * (x1 - x0)).reshape(y1 - y0, x1 - x0)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[y0:y1, x0:x1] = torch.from_numpy(bits.astype(bool))
        return mask

    def moved(self, x: int, y: int) -> "_Packed":
        """Return the mask moved right and down."""
        x0, y0, x1, y1 = self.box
        return _Packed(box=(x0 + x, y0 + y, x1 + x, y1 + y), bits=self.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """K masks: boxes float32 [K, 4] with the last pixels inside, predicted IoU [K], areas of their crops [K]."""

    masks: list[_Packed]
    boxes: Tensor
    trust: Tensor
    crop_area: Tensor

    @classmethod
    def none(cls) -> "_Found":
        return cls(masks=[], boxes=torch.zeros(0, 4), trust=torch.zeros(0), crop_area=torch.zeros(0))

    @classmethod
    def of(cls, masks: Tensor, trust: Tensor) -> "_Found":
        """Pack masks bool [K, h, w], none of them empty."""
        boxes = boxes_of(masks)
        packed = [_Packed.of(mask, box) for mask, box in zip(masks, boxes.long().tolist(), strict=True)]
        return cls(masks=packed, boxes=boxes, trust=trust, crop_area=torch.zeros(len(packed)))

    def at(self, index: Tensor) -> "_Found":
        """Return the masks at an index, in its order."""
        return _Found(
            masks=[self.masks[number] for number in index.tolist()],
            boxes=self.boxes[index],
            trust=self.trust[index],
            crop_area=self.crop_area[index],
        )

    def joined(self, other: "_Found") -> "_Found":
        """Return these masks followed by others."""
        return _Found(
            masks=self.masks + other.masks,
            boxes=torch.cat((self.boxes, other.boxes)),
            trust=torch.cat((self.trust, other.trust)),
            crop_area=torch.cat((self.crop_area, other.crop_area)),
        )

    def distinct(self, scores: Tensor, most: float) -> "_Found":
        """Return the masks without near-duplicate boxes, keeping the highest score."""
        return self.at(distinct(self.boxes, scores, most))

    def outside(self, crop: Box, size: tuple[int, int]) -> "_Found":
        """Return masks of a crop on the picture of size (H, W), without those that the crop's edge cuts off."""
        ends, whole = torch.tensor(crop, dtype=torch.float32), torch.tensor((0, 0, size[1], size[0]))
        boxes = self.boxes + torch.tensor(crop[:2] * 2)
        cut = (((boxes - ends).abs() <= EDGE) & ((boxes - whole).abs() > EDGE)).any(dim=1)
        area = float((crop[2] - crop[0]) * (crop[3] - crop[1]))
        moved = _Found(
            masks=[mask.moved(crop[0], crop[1]) for mask in self.masks],
            boxes=boxes,
            trust=self.trust,
            crop_area=torch.full_like(self.trust, area),
        )
        return moved.at((~cut).nonzero()[:, 0])

    def without_small_regions(self, smallest: int, most: float, size: tuple[int, int]) -> "_Found":
        """Fill small holes and remove small islands; of masks whose boxes are then the same, an unchanged one is
        kept."""
        masks: list[_Packed] = []
        boxes: list[Tensor] = []
        same: list[float] = []
        for packed in self.masks:
            # In a frame this wide around the box, the region outside the mask is not small either.
            x0, y0 = (max(0, start - smallest) for start in packed.box[:2])
            x1, y1 = (min(end, stop + smallest) for end, stop in zip(size[::-1], packed.box[2:], strict=True))
            mask, changed = without_small_regions(packed.moved(-x0, -y0).whole((y1 - y0, x1 - x0)), smallest)
            box = boxes_of(mask)
            masks.append(_Packed.of(mask, box.long().tolist()).moved(x0, y0) if changed else packed)
            boxes.append(box + torch.tensor([x0, y0] * 2))
            same.append(float(not changed))
        if not masks:
            return self
        found = _Found(masks=masks, boxes=torch.stack(boxes), trust=self.trust, crop_area=self.crop_area)
        return found.distinct(torch.tensor(same), most)

    def whole(self, size: tuple[int, int]) -> Tensor:
        """Return all masks: bool [K, H, W]."""
        if not self.masks:
            return torch.zeros(0, *size, dtype=torch.bool)
        return torch.stack([mask.whole(size) for mask in self.masks])


def _across(how: Everything, layer: int) -> int:
    return int(how.across / how.crop_thinning**layer)


def _grid(across: int, how: Everything) -> Tensor:
    """Return points x, y in 0 to 1, row by row: float64 [P, 2]."""
    places = torch.arange(across, dtype=torch.float64) / across
    if not how.from_corner:
        places = places + 0.5 / across
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def _scaled(grid: Tensor, view: View, how: Everything) -> Tensor:
    """Return points in pixels of the view: float64 [P, 2]."""
    points = grid * torch.tensor([view.size[1], view.size[0]], dtype=torch.float64)
    return points + 0.5 if how.from_corner else points


def _by_grid(segmenter: Segmenter, view: View, how: Everything, layer: int, advanced: Advanced) -> _Found:
    """Return the good masks of one grid, in pixels of the view."""
    grid = _grid(_across(how, layer), how)
    if how.from_corner:  # column by column, which decides between masks of equal score
        grid = grid.flip(-1)
    return _asked(segmenter, view, _scaled(grid, view, how), how, advanced)[0]


def _coarse_first(segmenter: Segmenter, view: View, how: Everything, _layer: int, advanced: Advanced) -> _Found:
    """Return the masks of a coarse grid, and of the fine grid's points outside its confident masks."""
    height, width = view.size
    points = _scaled(_grid(max(1, how.across // 4), how), view, how)
    coarse, sure = _asked(segmenter, view, points, how, advanced)
    step_x, step_y = width // how.across, height // how.across
    fine = [
        (x + column * step_x, y + row * step_y)
        for x, y in points.tolist()
        for column, row in product((-1, 0, 1, 2), repeat=2)
        if (column, row) != (0, 0)
    ]
    left = [(x, y) for x, y in fine if x < width and y < height and not sure[int(y), int(x)]]
    advanced(points_asked(how) - len(points) - len(left))
    if not left:
        return coarse
    return _asked(segmenter, view, torch.tensor(left), how, advanced)[0].joined(coarse)


def _asked(
    segmenter: Segmenter, view: View, points: Tensor, how: Everything, advanced: Advanced
) -> tuple[_Found, Tensor]:
    """Return the good masks of points [P, 2] in pixels, and the confident pixels: bool [h, w]."""
    found, sure = _Found.none(), torch.zeros(view.size, dtype=torch.bool)
    for part in in_parts(Prompts(kind="point", values=points.to(torch.float32)), view.size):
        logits, trust = (t[0] for t in segmenter.logits(view, "point", part.values[None], multimask=True))
        if how.most_trusted:
            best = trust.argmax(dim=1, keepdim=True)
            logits, trust = logits.take_along_dim(best[..., None, None], dim=1), trust.gather(1, best)
        logits, trust = logits.flatten(0, 1), trust.flatten()
        if how.predicted_iou > 0:  # at 0 there is no condition
            kept = trust > how.predicted_iou
            logits, trust = logits[kept], trust[kept]
        inner, outer = ((logits > cut).sum(dim=(1, 2)) for cut in (how.offset, -how.offset))
        masks = logits > 0
        kept = masks.flatten(1).any(dim=1) & ((inner / outer >= how.stability) | (how.stability <= 0))
        if how.coarse_first:
            sure |= (logits[kept] > SURE).any(dim=0).cpu()
        found = found.joined(_Found.of(masks[kept].cpu(), trust[kept].cpu()))
        advanced(len(part))
    return found, sure
