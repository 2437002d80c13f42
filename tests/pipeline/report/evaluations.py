"""The document of an evaluation whose names are hostile text."""

from typing import Any

from tests.pipeline.report.reports import HOSTILE

_SCORES = {
    "prompts": 3,
    "agreement_mean": 0.99,
    "agreement_worst": 0.91,
    "original_iou_mean": 0.8,
    "original_iou_worst": 0.7,
    "compressed_iou_mean": 0.79,
    "compressed_iou_worst": 0.6,
}


def evaluation(*, truth: bool = True) -> dict[str, Any]:
    """As `birkhoff evaluate --json` prints it, with and without a truth."""
    scores = _SCORES if truth else {key: None if "_iou_" in key else value for key, value in _SCORES.items()}
    measured = [
        {"measure": "AP", "original": 0.41, "compressed": 0.405, "difference": -0.005},
        {"measure": "APl", "original": None, "compressed": None, "difference": None},
    ]
    skipped = [{"what": "result", "reason": "no finite score", "count": 2, "first": [HOSTILE, "b.png: result #7"]}]
    return {
        "model": HOSTILE,
        "digest": "sha256:" + "5" * 64,
        "profile": "balanced",
        "source": f"/weights/{HOSTILE}.pth",
        "images": 2,
        "prompts": {"box": scores},
        "blocks": [{"block": "blocks.0", "sqnr_db": 31.25}, {"block": "embedding", "sqnr_db": None}],
        "per_image": [{"image": HOSTILE, "box": scores}, {"image": "without prompts.png"}],
        "adapter": "sam",
        "scores": measured if truth else [],
        "skipped": skipped if truth else [],
        "protocol": {"annotations": HOSTILE, "boxes": None, "truth": "results", "multimask": "best"},
    }
