"""Each adapter gives the masks of its publishers' own predictor: same weights, same picture, same prompts."""

import pytest
import torch

from birkhoff.pipeline.load.architectures import known
from birkhoff.pipeline.load.published import MEMBERS
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from tests.family.conftest import package, skipping
from tests.family.members import SMALL, Member, differences, member, picture, shrunk

DIFFERING = 1e-3
"""Share of pixels that may differ where rounding decides."""

LOGITS = 1e-2
"""Greatest difference of logits, by their standard deviation."""

ROUNDED = 3e-2
"""The same where the publishers' processor rounds a resized picture to whole levels by another library's filter."""


@pytest.mark.timeout(1800)  # MedSAM's script takes a ViT-B at 1024 alone; how long, on a busy machine, is no part of it
@pytest.mark.parametrize("one", SMALL, ids=lambda one: one.name)
def test_masks_are_those_of_the_publishers_predictor(one: Member) -> None:
    image = picture(*one.size)
    with skipping(), one.code():
        model = one.model()
        if one.side is not None:
            shrunk(model, one.side)
        expected = one.predict(model, image)
    segmenter = segmenter_of(model, one.adapter)
    view = segmenter.look(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous())
    found = differences(segmenter, view, expected)
    assert "box" in found
    for kind, told in found.items():
        least = 0.3 if one.drawn else 0.01
        assert least < told["inside"] < 1 - least, "logits without structure compare nothing"
        assert told["pixels"] <= DIFFERING * told["of"], kind
        if told["logits"] is not None:
            assert told["logits"] <= (ROUNDED if "transformers" in one.name else LOGITS), kind
    assert all(model.get_submodule(name) is block for name, block in segmenter.blocks.items())
    if "transformers" not in one.name:
        assert len(segmenter.blocks) >= 6


def test_lite_medsam_is_known_with_its_real_weights() -> None:
    """Its tensors tell it from MobileSAM, whose masks they would give with another preprocessing."""
    one = member("LiteMedSAM")
    with skipping(), one.code():
        assert segmenter_of(one.model()).family == "lite_med_sam"


def test_each_member_is_known_by_its_tensors() -> None:
    """No tensors fit two members."""
    for name in ("SAM-HQ-Tiny", "MobileSAM"):
        one = member(name)
        package(one.packages[0])
        shapes = {key: tuple(tensor.shape) for key, tensor in one.build().state_dict().items()}
        assert sum(fits.fits(shapes) for fits in MEMBERS) == 1, name
        assert {key: tuple(t.shape) for key, t in known(name, shapes).state_dict().items()} == shapes
