"""SAM 2 of both packages: names, masks, and the commands that run it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError
from birkhoff.pipeline.load.architectures import hiera_settings, known
from birkhoff.pipeline.load.name_maps import VIDEO_MEMORY, joined, renaming, sam2_names
from birkhoff.pipeline.segment.adapters.base import IMAGENET_MEAN, IMAGENET_STD
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks import family
from tests.pipeline.command import execute
from tests.pipeline.load.upstream import drawn, upstream
from tests.pipeline.publishing import publish_tensors

SIDE = 128
SMALL = (
    f"++model.image_size={SIDE}",
    "model.image_encoder.trunk.embed_dim=16",
    "model.image_encoder.trunk.stages=[1,1,2,1]",
    "model.image_encoder.trunk.global_att_blocks=[3]",
    "model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
    "model.memory_attention.num_layers=1",
)
"""The published architecture at a size for tests."""


def small_official() -> nn.Module:
    build = upstream("sam2.build_sam").build_sam2
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    return build(config, None, device="cpu", hydra_overrides_extra=list(SMALL))  # type: ignore[no-any-return]


def small_transformers() -> nn.Module:
    """The same as `Sam2Model`."""
    from transformers import Sam2Config, Sam2Model

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "image_size": [SIDE, SIDE],
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[SIDE // part] * 2 for part in (4, 8, 16)],
    }
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": SIDE})).eval()


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in the names of `Sam2Model`."""
    return joined({name: tensor for key, tensor in state.items() for name in sam2_names(key)})


@pytest.fixture(scope="module")
def official() -> nn.Module:
    return drawn(small_official())


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 48, 80), dtype=np.uint8))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, official: nn.Module) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("sam2")
    with pytest.MonkeyPatch.context() as patch, open_store((folder / "store").as_uri()) as opened:
        patch.setenv("BIRKHOFF_HOME", str(folder / "home"))
        patch.setenv("BIRKHOFF_STORE", opened.url)
        publish_tensors(opened, "small", official.state_dict(), profile="fine", nesting=("model",))
        yield opened


PROMPTS = {"point": torch.tensor([[[30.0, 20], [70, 5]]]), "box": torch.tensor([[[8.0, 6, 60, 40], [0, 0, 79, 47]]])}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["point", "box"])
def test_the_official_model_gives_its_own_predictor_s_masks(
    official: Any, picture: Tensor, kind: Any, multimask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = upstream("sam2.sam2_image_predictor")

    def without_torchvision(self: Any, resolution: int, mask_threshold: float, **areas: float) -> None:
        nn.Module.__init__(self)
        self.resolution, self.mask_threshold = resolution, mask_threshold
        self.max_hole_area, self.max_sprinkle_area = areas["max_hole_area"], areas["max_sprinkle_area"]
        self.transforms = nn.Identity()

    def to_tensor(image: np.ndarray) -> Tensor:
        # torchvision's Resize, which does not round floats; tests/family has the real one.
        whole = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        (values,) = functional.interpolate(whole, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return (values - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)

    monkeypatch.setattr(module.SAM2Transforms, "__init__", without_torchvision)
    predictor = module.SAM2ImagePredictor(official)
    predictor._transforms.to_tensor = to_tensor
    predictor._bb_feat_sizes = [(SIDE // part, SIDE // part) for part in (4, 8, 16)]
    predictor.set_image(picture.permute(1, 2, 0).numpy())
    ours = segmenter_of(official)
    logits, quality = ours.logits(ours.look(picture[None]), kind, PROMPTS[kind], multimask=multimask)
    for number, prompt in enumerate(PROMPTS[kind][0].numpy()):
        asked = {"box": prompt} if kind == "box" else {"point_coords": prompt[None], "point_labels": np.array([1])}
        expected, scores, _ = predictor.predict(multimask_output=multimask, return_logits=True, **asked)
        assert logits[0, number].shape == expected.shape == (3 if multimask else 1, 48, 80)
        assert np.allclose(logits[0, number].numpy(), expected, atol=1e-3 * expected.std())
        assert np.allclose(quality[0, number].numpy(), scores, atol=1e-5)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", ["point", "box"])
def test_both_packages_give_the_same_masks_by_translated_names(
    official: nn.Module, picture: Tensor, kind: Any, multimask: bool
) -> None:
    theirs = small_transformers()
    theirs.load_state_dict(translated(official.state_dict()), strict=True)
    found = []
    for model in (official, theirs):
        segmenter = segmenter_of(model)
        view = segmenter.look(picture[None])
        found.append((*segmenter.logits(view, kind, PROMPTS[kind], multimask=multimask), *view.features))
        assert (view.fitted, view.size, segmenter.side) == ((SIDE, SIDE), (48, 80), SIDE)
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=2e-4 * float(one.std()))


def test_published_weights_at_full_size_give_the_same_features() -> None:
    """All of SAM 2.1 Tiny, on a picture of a quarter of its pixels."""
    from transformers import Sam2Config, Sam2Model

    config, halved = "configs/sam2.1/sam2.1_hiera_t.yaml", ["++model.image_size=512"]
    build = upstream("sam2.build_sam").build_sam2
    official: Any = drawn(build(config, None, device="cpu", hydra_overrides_extra=halved))
    vision = hiera_settings("t") | {"backbone_feature_sizes": [[128, 128], [64, 64], [32, 32]]}
    vision["backbone_config"] |= {"image_size": [512, 512]}
    theirs = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": 512})).eval()
    theirs.load_state_dict(translated(official.state_dict()), strict=True)
    picture = torch.randint(0, 255, (1, 3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = [segmenter_of(model).look(picture).features for model in (official, theirs)]
    assert [tuple(level.shape[1:]) for level in features[0]] == [(32, 128, 128), (64, 64, 64), (256, 32, 32)]
    for one, other in zip(*features, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * float(one.std()))


SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_is_known_in_both_names(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {spec.name: spec.shape for spec in family.layout(f"sam2_hiera_{SIZES[size]}")}
    built = []
    package = SimpleNamespace(build_sam2=lambda config, checkpoint, device: built.append(config) or nn.Identity())
    monkeypatch.setitem(sys.modules, "sam2.build_sam", package)
    monkeypatch.setitem(sys.modules, "sam2", SimpleNamespace(__spec__=object(), build_sam=package))
    known("w", published)
    known("w", published | {"no_obj_embed_spatial": (1, 64)})
    assert built == [f"configs/{form}/{form}_hiera_{size}.yaml" for form in ("sam2", "sam2.1")]
    monkeypatch.setitem(sys.modules, "sam2", None)  # not installed
    with torch.device("meta"):
        theirs = known("w", published)
        wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        again = known("w", wanted)
    assert type(theirs).__name__ == type(again).__name__ == "Sam2Model"
    empty = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert {name: tensor.shape for name, tensor in translated(empty).items()} == wanted
    assert {name for name in published if not sam2_names(name)} == {n for n in published if n.startswith(VIDEO_MEMORY)}


def test_artifacts_of_the_published_model_load_into_both(store: Store, official: nn.Module, picture: Tensor) -> None:
    ours, theirs = small_official(), small_transformers()
    layers = birkhoff.load_into(ours, "small")
    found = birkhoff.load_into(theirs, "small")
    assert len(found) == len([name for name in layers if sam2_names(f"{name}.weight")]) > 30
    assert isinstance(theirs.vision_encoder.backbone.blocks[1].attn.qkv, HyperLinear)
    logits = []
    for model in (official, ours, theirs):
        segmenter = segmenter_of(model)
        logits.append(segmenter.logits(segmenter.look(picture[None]), "point", PROMPTS["point"], multimask=True)[0])
    original, one, other = logits
    assert torch.allclose(one, other, atol=1e-3 * float(one.std()))
    assert 0 < float((one - original).norm() / original.norm()) < 0.1


def test_a_missing_row_of_the_points_is_named(store: Store, official: nn.Module) -> None:
    state = {name: tensor for name, tensor in official.state_dict().items() if "point_embeddings.3" not in name}
    publish_tensors(store, "short", state)
    with pytest.raises(ModelMismatchError, match=r"prompt_encoder\.point_embed\.weight is \[3, 256\]"):
        birkhoff.load_into(small_transformers(), "short", strict=False)


def test_names_of_transformers_stay() -> None:
    theirs = small_transformers().state_dict()
    published = "image_encoder.trunk.pos_embed"
    assert sam2_names(published) != (published,)
    assert renaming(theirs, theirs)(published) == (published,)
    assert renaming(theirs, ["maskmem_tpos_enc", published])(published) == sam2_names(published)
    assert renaming([published], [published])(published) == (published,)


@pytest.mark.parametrize("build", ["small_official", "small_transformers"])
def test_the_commands_run_it(
    store: Store, official: nn.Module, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], build: str
) -> None:
    source, image = tmp_path / "small.pth", tmp_path / "pictures" / "one.png"
    torch.save({"model": official.state_dict()}, source)
    image.parent.mkdir()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(image)
    common = ["--against", str(source), "--builder", f"{__name__}:{build}", "--json"]

    def run(*words: object) -> Any:
        capsys.readouterr()
        arguments = [*map(str, words), *common]
        assert execute(*arguments) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    out = ("--model", "small", "-o", tmp_path / "out.png")
    rows = run("segment", image, *out, "--point", "30,20", "--box", "8,6,60,40")
    assert [row["prompt"] for row in rows] == ["point 30,20", "box 8,6,60,40"]
    assert all(0 <= row["iou"] <= 1 for row in rows)
    run("segment", image, *out, "--everything", "--grid", "3")
    assert (tmp_path / "out.png").is_file()
    found = run("evaluate", "small", "--images", image.parent)
    assert [row["block"].rpartition(".")[2] for row in found["blocks"]] == ["0", "1", "2", "3", "4", "embedding"]
    assert all(row["sqnr_db"] > 15 for row in found["blocks"])


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(BuilderError, match=r"no adapter knows this model; expected a member .*sam2"):
        segmenter_of(nn.Linear(2, 2))
