"""The page of an evaluation, written by `birkhoff evaluate -o FILE.html`: one file, without network and script."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from birkhoff.pipeline.report.html import digest, environment
from birkhoff.pipeline.segment.evaluate import worst_first
from birkhoff.pipeline.text import fixed

WORST = 20
"""Maximum number of pictures shown, worst agreement first."""


def page(found: Mapping[str, Any]) -> str:
    """Return the page as HTML text; `found` is the document of `birkhoff evaluate --json`."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("report.evaluation.html.jinja")
        .render(
            found=found,
            worst=worst_first(found)[:WORST],
            protocol=[(key, value) for key, value in found["protocol"].items() if value is not None],
            with_truth=any(row["original_iou_mean"] is not None for row in found["prompts"].values()),
            four=fixed(4),
            two=fixed(2),
            signed="{:+.4f}".format,
            style=style,
            style_digest=digest(style),
        )
    )
