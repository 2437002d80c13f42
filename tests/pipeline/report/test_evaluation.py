"""The page of an evaluation: the document's figures, and nothing of a stranger's text that a browser obeys."""

from html.parser import HTMLParser

import pytest

from birkhoff.pipeline.report.evaluation import page
from tests.pipeline.report.evaluations import evaluation
from tests.pipeline.report.reports import HOSTILE


class _Cells(HTMLParser):
    """Texts of the rows of every table, tags, and the page's policy."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._within = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._within = True

    def handle_endtag(self, tag: str) -> None:
        self._within &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._within:
            self.rows[-1][-1] += data.strip()


def read(text: str) -> _Cells:
    cells = _Cells()
    cells.feed(text)
    return cells


def test_the_page_has_the_figures() -> None:
    rows = read(page(evaluation())).rows
    assert ["AP", "0.4100", "0.4050", "-0.0050"] in rows
    assert ["APl", *["\u2013"] * 3] in rows
    assert ["box", "3", "0.9900", "0.9100", "0.8000", "0.7000", "0.7900", "0.6000"] in rows
    assert ["result", "no finite score", "2", f"{HOSTILE}, b.png: result #7"] in rows
    assert ["blocks.0", "31.25"] in rows
    assert [row[:2] for row in rows].count([HOSTILE, "box"]) == 1
    assert ["multimask", "best"] in rows
    assert not any(row[:1] == ["boxes"] for row in rows)


def test_without_truth_the_page_has_agreement_alone() -> None:
    text = page(evaluation(truth=False))
    assert ["box", "3", "0.9900", "0.9100"] in read(text).rows
    assert "Compared with the truth" not in text
    assert "Nothing: every picture, annotation and result was used." in text


@pytest.mark.parametrize("truth", [True, False])
def test_strangers_text_stays_text(truth: bool) -> None:
    text = page(evaluation(truth=truth))
    assert HOSTILE not in text
    assert not {"script", "img", "b", "iframe", "link"} & read(text).tags
    assert "default-src 'none'" in text
