"""Average precision of masks, as COCO and LVIS define it.

pycocotools computes COCO's. faster-coco-eval computes LVIS' (federated: a category counts on a picture only if it was
searched for), because the authors' `lvis` package needs a NumPy older than 1.24, OpenCV and Matplotlib. Both give the
same numbers.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.segment.annotations import Row, encoded
from birkhoff.pipeline.segment.dataset import Dataset, Scored

COCO_MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The results of `COCOeval.summarize`, in order: AP over IoU 0.50 to 0.95, by size of object, and recall by number."""

LVIS_MEASURES: Mapping[str, str] = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
    "AR300": "AR_all",
    "ARs": "AR_small",
    "ARm": "AR_medium",
    "ARl": "AR_large",
}
"""LVIS' measures by our name, and faster-coco-eval's names for them; r, c and f: rare, common and frequent
categories."""

LVIS_LIMIT = 300
"""Masks of one picture that LVIS considers, by highest score."""


@dataclass(slots=True, kw_only=True)
class Detections:
    """Annotated pictures, and each model's masks on them with the detector's scores."""

    categories: Sequence[Row]
    images: list[Row] = field(default_factory=list)
    annotations: list[Row] = field(default_factory=list)
    found: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def add(self, scored: Scored, masks: Mapping[str, Tensor]) -> None:
        """Add a picture: by model, the masks bool [K, H, W] of the K rows."""
        self.images.append(scored.record)
        for annotation in scored.annotations:
            self.annotations.append({**annotation, "id": len(self.annotations) + 1})  # 0 counts as no match
        for model, own in masks.items():
            for row, mask in zip(scored.rows, own, strict=True):
                kept = {key: row[key] for key in ("image_id", "category_id", "score")}
                self.found[model].append({**kept, "segmentation": encoded(mask)})

    def scores(self, model: str) -> dict[str, float | None]:
        """Return average precision and recall by name, 0 to 1; None if there is no object to find.

        Raises:
            PictureError: The annotations are LVIS' and faster-coco-eval is missing.
        """
        annotations = [dict(row) for row in self.annotations]  # both packages write into their rows
        truth = {"images": self.images, "annotations": annotations, "categories": list(self.categories)}
        measure = _of_lvis if federated(self.images, self.categories) else _of_coco
        found = measure(truth, [dict(row) for row in self.found[model]])
        return {name: None if value < 0 else float(value) for name, value in found.items()}


def federated(images: Iterable[Row], categories: Iterable[Row]) -> bool:
    """Return whether annotations are LVIS', which list the categories searched for on a picture and how frequent
    they are."""
    return any("neg_category_ids" in image for image in images) and all("frequency" in row for row in categories)


def check_metric(data: Dataset) -> None:
    """Check before the work that average precision can be computed. Raises PictureError."""
    if federated((picture.record for picture in data.pictures), data.categories.values()):
        _faster()


def _of_coco(truth: Mapping[str, Any], found: list[Any]) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        evaluation = COCOeval(annotated, annotated.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(COCO_MEASURES, evaluation.stats.tolist(), strict=True))


def _of_lvis(truth: Mapping[str, Any], found: list[Any]) -> dict[str, float]:
    faster = _faster()
    annotated = faster.COCO(truth)
    evaluation = faster.COCOeval_faster(annotated, annotated.loadRes(_highest(found)), "segm", lvis_style=True)
    evaluation.params.maxDets = [LVIS_LIMIT]
    evaluation.run()
    return {name: evaluation.stats_as_dict[theirs] for name, theirs in LVIS_MEASURES.items()}


def _highest(found: Sequence[Any]) -> list[Any]:
    """Return each picture's masks with the highest scores, as many as LVIS considers."""
    by_picture: defaultdict[Any, list[Any]] = defaultdict(list)
    for row in found:
        by_picture[row["image_id"]].append(row)
    ordered = (sorted(own, key=lambda row: row["score"], reverse=True)[:LVIS_LIMIT] for own in by_picture.values())
    return [row for own in ordered for row in own]


def _faster() -> Any:
    try:
        import faster_coco_eval
    except ImportError:
        raise PictureError(
            "average precision on LVIS needs faster-coco-eval: pip install 'birkhoff-compression[lvis]'"
        ) from None
    return faster_coco_eval
