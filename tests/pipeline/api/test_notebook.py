"""In a notebook: progress is drawn over itself, and versions are tables."""

import os
import sys
from pathlib import Path

import pytest

from birkhoff.pipeline.notebook import facts_html, in_notebook, rows_html
from tests.pipeline.api.notebooks import execute, shown

COMPRESS = """
import torch
import birkhoff
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
version = birkhoff.compress(model, "net", profile="fast")
version
"""
PULL = 'birkhoff.pull("net", "pulled")'
LIST = "birkhoff.list()"
QUIET = 'birkhoff.compress(model, "quiet", progress=False); None'


def test_a_notebook_shows_progress_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cells = [nbformat.v4.new_code_cell(source) for source in (COMPRESS, PULL, LIST, QUIET)]
    compress, pull, listed, quiet = execute(nbformat.v4.new_notebook(cells=cells), tmp_path)["cells"]
    progress, version = shown(compress, "text/html")
    assert "1/1" in progress
    assert "published" in progress
    assert "<caption>net@v1</caption>" in version
    assert ">SQNR min dB</th>" in version
    bar, pulled = shown(pull, "text/html")
    assert bar.startswith("<progress")
    here, most = (int(part.split("'")[1]) for part in bar.split(">")[0].split()[1:])
    assert here == most > 0
    assert "net@v1 in pulled" in pulled
    assert (tmp_path / "pulled" / "manifest.json").is_file()
    (table,) = shown(listed, "text/html")
    assert "<td>net@v1</td>" in table
    assert "<td>latest</td>" in table
    assert shown(quiet, "text/html") == []


def test_this_process_is_none() -> None:
    assert not in_notebook()


def test_strangers_texts_stay_texts() -> None:
    assert "<script>" not in facts_html("<script>", {"<script>": "<script>\x1b[31m"})
    assert "&lt;script&gt;\\x1b[31m" in facts_html("t", {"k": "<script>\x1b[31m"})
    assert "<i>" not in rows_html(["<i>"], [["<i>"]])
    assert "k" not in facts_html("t", {"k": ""})
