"""Members of the family are known by their tensors, each by one name; code that is not here is named."""

from pathlib import Path

import pytest

from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.families import ADAPTERS
from birkhoff.pipeline.load.architectures import known
from birkhoff.pipeline.load.published import MEMBERS
from birkhoff.pipeline.segment.adapters.families import FAMILIES
from tests.harness.benchmarks.family import LAYOUTS, layout

TITLES = {
    "sam_hq_vit_b": "SAM-HQ-B",
    "sam_hq_vit_l": "SAM-HQ-L",
    "sam_hq_vit_h": "SAM-HQ-H",
    "sam_hq_vit_tiny": "SAM-HQ-Tiny",
    "mobile_sam": "MobileSAM or TinySAM",
    "tiny_sam": "MobileSAM or TinySAM",
    "edge_sam": "EdgeSAM",
    "efficient_sam_ti": "EfficientSAM-Ti",
    "efficient_sam_s": "EfficientSAM-S",
}
"""Of the published layouts; SAM, MedSAM and SAM 2 are known by other means."""


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in layout(name)}


NAMES = sorted(path.stem for path in LAYOUTS.glob("*.json") if path.stem != "family")


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_one_member_s_or_none(name: str) -> None:
    found = [member.title for member in MEMBERS if member.fits(shapes_of(name))]
    assert found == [TITLES[name]] if name in TITLES else found == []


@pytest.mark.parametrize("name", ["edge_sam", "efficient_sam_ti", "efficient_sam_s"])
def test_a_member_of_a_repository_names_what_to_clone(name: str) -> None:
    with pytest.raises(BuilderError, match=rf"is {TITLES[name]}, .*--upstream DIR with a clone of \w+/\w+"):
        known(name, shapes_of(name))


def test_a_clone_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match=r"--upstream .*no such folder"):
        known("net", shapes_of("edge_sam"), tmp_path / "none")


def test_a_clone_of_something_else_is_no_silent_success(tmp_path: Path) -> None:
    (tmp_path / "efficient_sam").mkdir()
    (tmp_path / "efficient_sam" / "efficient_sam.py").write_text("raise RuntimeError('half a clone')\n")
    with pytest.raises(BuilderError, match=r"EfficientSAM-Ti, and .* fails: RuntimeError: half a clone"):
        known("net", shapes_of("efficient_sam_ti"), tmp_path)


def test_lite_medsam_is_told_from_mobile_sam_by_its_patches() -> None:
    shapes = shapes_of("mobile_sam")
    patch = "image_encoder.patch_embed.seq.0.c.weight"
    shapes[patch] = (*shapes[patch][:2], 1, 1)
    assert [member.title for member in MEMBERS if member.fits(shapes)] == ["LiteMedSAM"]


@pytest.mark.parametrize(
    ("size", "width", "layers"), [("L0", 512, 4), ("L1", 512, 8), ("L2", 512, 12), ("XL0", 1024, 6), ("XL1", 1024, 12)]
)
def test_sizes_of_efficientvit_sam_are_told_by_their_necks(size: str, width: int, layers: int) -> None:
    neck = "image_encoder.neck"
    shapes = {f"{neck}.input_ops.0.op_list.0.conv.weight": (256, width, 1, 1)}
    shapes |= {f"{neck}.middle.op_list.{layer}.main.point_conv.norm.bias": (256,) for layer in range(layers)}
    assert [member.title for member in MEMBERS if member.fits(shapes)] == [f"EfficientViT-SAM-{size}"]
    with pytest.raises(
        BuilderError, match=rf"is EfficientViT-SAM-{size}, .*--upstream DIR with a clone of mit-han-lab/"
    ):
        known("net", shapes)


def test_sam_hq_2_is_not_taken_for_sam_2() -> None:
    shapes = shapes_of("sam2_hiera_large") | {"sam_mask_decoder.hf_token.weight": (1, 256)}
    with pytest.raises(BuilderError, match=r"is SAM-HQ 2, .*--upstream DIR with a clone of SysCV/sam-hq, its folder"):
        known("net", shapes)


def test_manifests_and_adapters_know_the_same_families() -> None:
    assert tuple(FAMILIES) == ADAPTERS
