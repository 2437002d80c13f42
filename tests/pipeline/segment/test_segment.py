"""Segmenting a picture with a compressed model: prompts, both packages' models, what is drawn, one-line errors."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from birkhoff.pipeline.errors import BuilderError, ModelMismatchError, PictureError, exit_code
from birkhoff.pipeline.load import architectures, builders
from birkhoff.pipeline.segment import draw
from birkhoff.pipeline.segment.adapters.base import View, fitted_size, ious, resized
from birkhoff.pipeline.segment.adapters.families import FAMILIES, segmenter_of
from birkhoff.pipeline.segment.everything import Everything, distinct, everything
from birkhoff.pipeline.segment.masks import Masks, overlaps, pair_up, prompted
from birkhoff.pipeline.segment.prompts import Prompts, box_grid, boxes_of, parse_prompts, point_grid, read_picture
from birkhoff.pipeline.segment.statistics import outputs_of
from tests.pipeline.command import captured
from tests.pipeline.segment.official import tiny_official

# The demo's files are scripts beside their manifest, not a package.
sys.path.append(str(Path(__file__).parents[3] / "manifests" / "demo"))

import held_out
import shapes

DEMO = Path(held_out.__file__).parent
SOURCE = DEMO / "demo_sam.safetensors"
SIZE = (128, 128)


@pytest.fixture(scope="module")
def original():
    return segmenter_of(builders.original_model(SOURCE, device="cpu"))


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw(torch.arange(3), seed=20_000_003)


@pytest.fixture(scope="module")
def picture(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("pictures")
    held_out.write(folder, drawn)
    return folder / "0000.png"


@pytest.fixture
def run(demo_store, capsys):
    """Run `birkhoff segment` on the demo model: (exit code, standard output, standard error)."""

    def command(*arguments):
        words = ["segment", *map(str, arguments), "--store", demo_store]
        return captured(capsys, *words)

    return command


def test_iou_of_known_masks():
    left, right = torch.zeros(2, 4, 4, dtype=torch.bool).unbind(0)
    left[:, :2] = True
    right[:, 1:3] = True
    assert ious(left, right).item() == pytest.approx(1 / 3)
    assert ious(torch.zeros_like(left), torch.zeros_like(left)).item() == 1
    assert ious(left, torch.zeros_like(left)).item() == 0


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("point", "1", "expected X,Y in pixels"),
        ("point", "a,b", "expected X,Y in pixels"),
        ("point", "nan,1", "expected X,Y in pixels"),
        ("point", "128,0", "outside the picture, which is 128 x 96 pixels"),
        ("point", "0,96", "y 0 to 95"),
        ("point", "-1,0", "outside"),
        ("box", "1,2,3", "expected X0,Y0,X1,Y1"),
        ("box", "5,5,5,9", "X0 < X1"),
        ("box", "0,0,128,9", "outside"),
    ],
)
def test_prompts_that_cannot_be_are_refused(kind, text, complaint):
    with pytest.raises(PictureError, match=complaint):
        parse_prompts(kind, [text], (96, 128))


def test_prompts_are_read_as_given():
    assert parse_prompts("point", ["3,4", "0.5,95"], (96, 128)).values.tolist() == [[3, 4], [0.5, 95]]
    assert parse_prompts("box", ["0,1,127,95"], (96, 128)).values.tolist() == [[0, 1, 127, 95]]


def test_grids_cover_the_picture_evenly():
    points = point_grid((4, 8), 2).values.tolist()
    assert points == [[1.5, 0.5], [5.5, 0.5], [1.5, 2.5], [5.5, 2.5]]
    boxes = box_grid((40, 60), 3).values
    assert boxes.shape == (9, 4)
    assert boxes[0].tolist() == [0, 0, 29, 19]
    assert boxes[-1].tolist() == [30, 20, 59, 39]


def test_pictures_are_read_upright_and_in_colour(tmp_path):
    grey = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    grey.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png")[0].tolist() == [[3, 0], [4, 1], [5, 2]]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"text\.png: not a picture"):
        read_picture(tmp_path / "text.png")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(PictureError, match="cannot be read as a picture"):
        read_picture(whole)


def test_pictures_of_any_size_are_fitted_like_upstream_does():
    assert fitted_size((1500, 2250), 1024) == (683, 1024)
    assert fitted_size((128, 128), 128) == (128, 128)
    pixels = torch.randint(0, 255, (1, 3, 30, 40), dtype=torch.uint8)
    assert resized(pixels, (30, 40)) is pixels
    expected = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((20, 15), Image.Resampling.BILINEAR)
    assert np.array_equal(resized(pixels, (15, 20))[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_masks_do_not_depend_on_the_size_of_the_picture(original, drawn):
    boxes = drawn.boxes[:1]
    plain = original.masks(original.look(drawn.pixels[:1]), "box", boxes)
    large = drawn.pixels[:1].repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    wide = torch.cat((large, torch.full((1, 3, 384, 16), 128, dtype=torch.uint8)), dim=3)
    found = original.masks(original.look(wide), "box", boxes * 3 + 1)
    assert found.shape == (1, 3, 384, 400)
    assert ious(found[0, :, 1::3, 1:384:3], plain[0]).min() > 0.85


def test_the_model_sees_what_it_was_trained_on(original, drawn):
    from model import load, pixel_values

    with torch.no_grad():
        expected = load()(
            pixel_values=pixel_values(drawn.pixels), input_boxes=drawn.boxes, multimask_output=False
        ).pred_masks
        found, _ = original.decode(original.look(drawn.pixels).features, "box", drawn.boxes, False)
    assert torch.allclose(found, expected, atol=1e-3)


def test_everything_finds_objects_once(original, drawn):
    found = everything(original, drawn.pixels[0], Everything(across=8))
    assert len(found.masks) == len(found.labels) >= 2
    overlap = ious(found.masks[:, None], found.masks[None])
    assert (overlap - torch.eye(len(overlap))).max() <= 0.7
    assert ious(found.masks[:, None], drawn.masks[:1, drawn.valid[0]]).max(dim=1).values.max() > 0.8
    blank = everything(original, torch.full((3, 128, 128), 90, dtype=torch.uint8), Everything(across=2))
    assert blank.masks.shape[1:] == SIZE


def test_of_two_masks_alike_the_better_stays():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :5], masks[1, :4], masks[2, 5:] = True, True, True
    boxes = boxes_of(masks)
    assert distinct(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.7).tolist() == [0, 2]
    assert distinct(boxes, torch.tensor([0.7, 0.8, 0.9]), 0.7).tolist() == [2, 1]
    assert distinct(boxes, torch.tensor([0.5, 0.5, 0.5]), 0.75).tolist() == [0, 1, 2]
    assert len(distinct(boxes[:0], torch.zeros(0), 0.7)) == 0


def test_masks_are_paired_with_the_nearest():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, 4:] = True, True
    first, second = Masks(masks=masks, labels=("a", "b")), Masks(masks=masks.flip(0), labels=("x", "y"))
    assert torch.equal(pair_up(first, second).masks, masks)
    assert not pair_up(first, Masks(masks=masks[:0], labels=())).masks.any()
    many = torch.rand(9, 700, 900, generator=torch.Generator().manual_seed(0)) < 0.3
    many[3] = False
    expected = ious(many[:4, None], many[None, 4:])
    assert torch.allclose(overlaps(many[:4], many[4:]).float(), expected)


def test_segment_draws_and_compares(run, picture, tmp_path, original):
    out = tmp_path / "out.png"
    given = [picture, "--model", "demo-sam", "--against", SOURCE, "--point", "60,60", "--box", "20,20,90,100"]
    code, text, errors = run(*given, "-o", out, "--json")
    assert code == 0, errors
    rows = json.loads(text)
    assert [row["prompt"] for row in rows] == ["point 60,60", "box 20,20,90,100"]
    asked = [parse_prompts("point", ["60,60"], SIZE), parse_prompts("box", ["20,20,90,100"], SIZE)]
    expected = prompted(original, original.look(read_picture(picture)[None]), asked).masks
    assert [row["pixels_original"] for row in rows] == expected.sum(dim=(1, 2)).tolist()
    assert all(0.7 < row["iou"] <= 1 for row in rows)
    with Image.open(out) as image:
        assert image.width > 4 * 256
    code, text, _ = run(
        picture, "--model", "demo-sam", "--everything", "--grid", 6, "-o", out, "--builder", DEMO / "demo_sam.json"
    )
    assert code == 0
    assert "object 1" in text
    with Image.open(out) as image:
        assert image.size == (256, 256)
        assert not np.array_equal(np.asarray(image)[::2, ::2], read_picture(picture).permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("changed", "code", "complaint"),
    [
        ({"image": "absent.png"}, 19, "absent.png: no such picture"),
        ({"prompt": ["--point", "500,1"]}, 19, "outside the picture, which is 128 x 128 pixels"),
        ({"model": "demo-sam@v9"}, 10, "v9"),
        ({"builder": "nothing"}, 18, "expected module:function"),
        ({"builder": "no.such.package:build"}, 18, "cannot be imported"),
        ({"builder": "math:build"}, 18, "math has no function 'build'"),
        ({"builder": "os:getcwd"}, 18, "expected a torch.nn.Module, got str"),
        ({"builder": "torch.nn:Identity"}, 18, "no adapter knows this model"),
        ({"builder": "transformers:SamModel"}, 18, "missing 1 required positional argument"),
        ({"builder": "absent.py:build"}, 18, "no such file"),
        ({"out": "taken/out.png"}, 16, "taken"),
        ({"out": "out.gif"}, 16, "expected a name ending in .png"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, picture, tmp_path, changed, code, complaint):
    image = changed.get("image", picture)
    prompt = changed.get("prompt", ["--point", "5,5"])
    builder = changed.get("builder", str(DEMO / "demo_sam.json"))
    out = tmp_path / changed.get("out", "out.png")
    (tmp_path / "taken").write_text("a file where a folder should be")
    model = changed.get("model", "demo-sam")
    found, text, errors = run(image, "--model", model, *prompt, "--builder", builder, "-o", out)
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert (found, text, len(lines)) == (code, "", 1), errors
    assert complaint in lines[0]
    assert not out.exists()


def test_a_model_that_no_adapter_knows_is_refused_after_its_headers(run, picture, tmp_path):
    """Its weights stay where they are, and the line says how little was fetched."""
    (tmp_path / "mine.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(2, 3)\n")
    builder = f"{tmp_path}/mine.py:build"
    code, _, errors = run(
        picture, "--model", "demo-sam", "--point", "5,5", "-o", tmp_path / "x.png", "--builder", builder
    )
    assert code == exit_code(BuilderError())
    found = re.search(r"no adapter knows this model; .*; (\d+) of (\d+) bytes were fetched", errors)
    assert found, errors
    fetched, whole = map(int, found.groups())
    assert 0 < fetched < whole, "a header of a small shard is a good part of it"


def test_a_model_that_nothing_here_builds_says_what_to_do(run, picture, tmp_path):
    code, _, errors = run(picture, "--model", "demo-sam", "--point", "5,5", "-o", tmp_path / "out.png")
    if code:  # the artifact carries no configuration
        assert code == exit_code(BuilderError())
        assert "--builder module:function" in errors


def published_names(width):
    """Enough of SAM's tensors, in the names of segment-anything, to know it by."""
    names = {"image_encoder.patch_embed.proj.bias": (width,), "image_encoder.blocks.0.attn.rel_pos_h": (27, 64)}
    return {name: torch.zeros(shape) for name, shape in names.items()}


def test_published_architectures_are_known_by_their_tensors(monkeypatch, tmp_path):
    built = []
    registry = {f"vit_{size}": lambda size=size: built.append(size) or nn.Identity() for size in "blh"}
    package = SimpleNamespace(sam_model_registry=registry, __spec__=object())
    monkeypatch.setitem(sys.modules, "segment_anything", package)
    for width in (768, 1024, 1280):
        save_file(published_names(width), tmp_path / "sam.safetensors")
        with pytest.raises(ModelMismatchError, match="patch_embed"):
            builders.original_model(tmp_path / "sam.safetensors", device="cpu")
    assert built == ["b", "l", "h"]
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    widths = []
    package = SimpleNamespace(SamConfig=lambda vision_config: vision_config["hidden_size"])
    package.SamModel = lambda width: widths.append(width) or nn.Identity()
    with monkeypatch.context() as patched:
        patched.setattr(architectures, "package", lambda name, why: {"transformers": package}[name])
        with pytest.raises(ModelMismatchError, match="does not fit the model"):
            builders.original_model(tmp_path / "sam.safetensors", device="cpu")
    assert widths == [1280]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BuilderError, match=r"is SAM-H, and transformers cannot be imported .*pip install transformers"):
        builders.original_model(tmp_path / "sam.safetensors", device="cpu")


def test_a_transformers_folder_builds_itself(tmp_path, original, drawn):
    original.model.save_pretrained(tmp_path)
    assert "prompt_encoder.shared_embedding.positional_embedding" not in load_file(tmp_path / "model.safetensors")
    again = segmenter_of(builders.original_model(tmp_path, device="cpu"))
    same = [s.masks(s.look(drawn.pixels[:1]), "box", drawn.boxes[:1]) for s in (original, again)]
    assert torch.equal(*same)


def test_a_builder_may_be_a_script(tmp_path):
    (tmp_path / "beside_it.py").write_text("from torch import nn\n\ndef layer():\n    return nn.Linear(2, 3)\n")
    (tmp_path / "my_builder.py").write_text("import beside_it\n\nbuild = beside_it.layer\n")
    save_file(nn.Linear(2, 3).state_dict(), tmp_path / "w.safetensors")
    model = builders.original_model(tmp_path / "w.safetensors", builder=f"{tmp_path}/my_builder.py:build", device="cpu")
    assert torch.equal(model.weight, load_file(tmp_path / "w.safetensors")["weight"])
    with pytest.raises(BuilderError, match="no adapter knows this model"):
        segmenter_of(model)


@pytest.mark.parametrize("asks", ["image_embeddings, points", "image_embeddings, image_pe, sparse_prompt_embeddings"])
def test_a_decoder_that_asks_for_something_else_is_refused(asks):
    """It has the parts of a published model, and would fail inside."""
    scope = {}
    exec(f"def forward(self, {asks}): raise AssertionError", scope)
    model = nn.ModuleDict({name: nn.Module() for name in ("image_encoder", "prompt_encoder")})
    model["mask_decoder"] = type("MaskDecoder", (nn.Module,), {"forward": scope["forward"]})()
    model["prompt_encoder"].input_image_size = (64, 64)
    model.mask_threshold = 0.0
    with pytest.raises(BuilderError, match="no adapter knows this model"):
        segmenter_of(model)


def test_a_model_may_take_pictures_of_another_size_than_its_prompts_and_masks(official):
    """EfficientViT-SAM's L sizes, whose squares of 512 are decoded as if they had 1024 pixels."""
    seen = []

    class Halved(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.stages = nn.ModuleList([nn.Module()])
            self.backbone.stages[0].op_list = nn.ModuleList([encoder])

        def forward(self, values):
            seen.append(tuple(values.shape))
            return self.backbone.stages[0].op_list[0](torch.nn.functional.interpolate(values, scale_factor=2))

    whole = tiny_official()
    plain = segmenter_of(whole)
    encoder, whole.image_encoder = whole.image_encoder, Halved(whole.image_encoder)
    whole.image_size = (64, 32)
    segmenter = segmenter_of(whole)
    assert (segmenter.family, segmenter.side, segmenter.encoder_side) == ("efficient_vit_sam", 64, 32)
    assert segmenter.blocks == {"image_encoder.backbone.stages.0.op_list.0": encoder}
    pixels = torch.randint(0, 256, (1, 3, 20, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = segmenter.look(pixels)
    assert (seen, view.fitted, view.size) == ([(1, 3, 32, 32)], (32, 64), (20, 40))
    values = FAMILIES["efficient_vit_sam"].values(pixels, 32, torch.device("cpu"))
    with torch.no_grad():
        features = encoder(torch.nn.functional.interpolate(values, scale_factor=2))
    same = View(features=(features,), size=(20, 40), fitted=(32, 64))
    boxes = torch.tensor([[[4.0, 3.0, 30.0, 15.0]]])
    assert torch.equal(segmenter.logits(view, "box", boxes)[0], plain.logits(same, "box", boxes)[0])
    outputs_of(segmenter, 1, 0)(0)
    assert seen[1:] == [(1, 3, 32, 32)], "statistics are of such squares too"


def test_sam_hq_2_is_known_by_what_its_decoder_asks():
    asked = []

    class Decoder(nn.Module):
        def forward(self, image_embeddings, multimask_output, hq_token_only=True, **others):
            asked.append((hq_token_only, sorted(others)))
            return torch.zeros(1, 1, 4, 4), torch.zeros(1, 1)

    model = nn.Module()
    model.image_encoder, model.sam_prompt_encoder, model.sam_mask_decoder = nn.Module(), nn.Module(), Decoder()
    model.image_encoder.trunk = nn.Module()
    model.image_encoder.trunk.blocks = nn.ModuleList()
    model.sam_prompt_encoder.forward = lambda **_: (None, None)
    model.sam_prompt_encoder.get_dense_pe = lambda: None
    model.image_size, model.forward_image, model.use_high_res_features_in_sam = 16, None, False
    segmenter = segmenter_of(model)
    assert segmenter.family == "sam_hq2"
    segmenter.decode((torch.zeros(1, 8, 2, 2),), "box", torch.zeros(1, 1, 4), False)
    ((token_only, others),) = asked
    assert token_only is False, "the refined mask is added to the others"
    assert "high_res_features" in others


def test_a_family_is_named_where_the_tensors_fit_several(original):
    assert original.family == "sam"
    medical = segmenter_of(original.model, "med_sam")
    assert medical.preprocessing.fit == "stretch"
    assert medical.preprocessing.scale == "range"
    with pytest.raises(BuilderError, match="cannot be 'tiny_sam'; its code runs: sam, med_sam"):
        segmenter_of(original.model, "tiny_sam")
    with pytest.raises(BuilderError, match="'med_sm', did you mean 'med_sam'"):
        segmenter_of(original.model, "med_sm")


def test_pictures_are_prepared_as_each_family_wants():
    pixels = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    pixels[..., :20], pixels[..., 20:] = 50, 150
    medical = FAMILIES["med_sam"].values(pixels, 64, torch.device("cpu"))
    assert medical.shape == (1, 3, 64, 64)
    assert (medical.min(), medical.max()) == (0, 1)
    assert medical[0, 0, -1, -1] == 1, "stretched, not padded"
    lite = FAMILIES["lite_med_sam"].values(pixels, 64, torch.device("cpu"))
    assert lite[0, 0, 31, -1] == 1
    assert not lite[0, :, 32:].any(), "padded below"
    flat = FAMILIES["med_sam"].values(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8), 8, torch.device("cpu"))
    assert not flat.any(), "a picture of one colour has no range"
    plain = FAMILIES["sam"].values(pixels, 64, torch.device("cpu"))
    assert plain[0, 0, 0, 0] == pytest.approx((50 / 255 - 0.485) / 0.229, abs=1e-5)


def test_med_sam_s_masks_are_of_interpolated_probabilities(official):
    """As its script; interpolated logits give other masks wherever a model is sure."""
    model = tiny_official()
    model.mask_decoder.register_forward_hook(lambda _module, _inputs, found: (found[0] * 50, found[1]))
    pixels = torch.randint(0, 256, (1, 3, 200, 150), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    segmenter = segmenter_of(model, "med_sam")
    view, boxes = segmenter.look(pixels), torch.tensor([[[20.0, 30.0, 120.0, 150.0]]])
    low = segmenter.chosen(view, "box", boxes)
    expected, other = (
        torch.nn.functional.interpolate(values, size=(200, 150), mode="bilinear", align_corners=False) > cut
        for values, cut in ((low.sigmoid(), 0.5), (low, 0))
    )
    assert torch.equal(segmenter.masks(view, "box", boxes), expected)
    assert (expected != other).sum() > 100
    assert segmenter.logits(view, "box", boxes)[0].isfinite().all()


def test_panels_show_what_differs():
    pixels = torch.full((3, 64, 96), 120, dtype=torch.uint8)
    first, second = torch.zeros(2, 1, 64, 96, dtype=torch.bool).unbind(0)
    first[0, 8:40, 8:40], second[0, 8:40, 16:48] = True, True
    image = np.asarray(draw.difference(pixels, first, second))
    assert tuple(image[3 * 20, 3 * 12]) == draw.BLUE
    assert tuple(image[3 * 20, 3 * 44]) == draw.VERMILION
    panels = draw.comparison(pixels, [Prompts(kind="box", values=boxes_of(first))], first, second)
    assert panels[3].line == "IoU of the two 0.600, 512 pixels differ"
    sheet = draw.sheet(draw.COMPARED, [panels, panels])
    assert sheet.width == 4 * (96 * 3 + draw.GAP) + draw.GAP


@pytest.mark.parametrize("kind", ["box", "point"])
def test_the_official_model_gives_its_own_predictor_s_masks(official, kind):
    model = tiny_official()
    predictor, ours = official.SamPredictor(model), segmenter_of(model)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    predictor.set_image(pixels)
    given = (
        {"box": np.array([8, 6, 60, 40])}
        if kind == "box"
        else {"point_coords": np.array([[30, 20]]), "point_labels": np.array([1])}
    )
    expected, scores, _ = predictor.predict(multimask_output=True, **given)
    values = torch.tensor([[[8.0, 6, 60, 40]]] if kind == "box" else [[[30.0, 20]]])
    logits, quality = ours.logits(
        ours.look(torch.from_numpy(pixels).permute(2, 0, 1)[None]), kind, values, multimask=True
    )
    assert torch.equal(logits[0, 0] > 0, torch.from_numpy(expected))
    assert np.allclose(quality[0, 0], scores, atol=1e-5)
