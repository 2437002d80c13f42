"""Segmenting everything: the published generator's masks, small regions, crops, and folders of pictures."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# The demo's files are scripts beside their manifest, not a package.
sys.path.append(str(Path(__file__).parents[3] / "manifests" / "demo"))

from birkhoff.pipeline.segment import draw
from birkhoff.pipeline.segment.adapters.base import View
from birkhoff.pipeline.segment.adapters.families import FAMILIES, segmenter_of
from birkhoff.pipeline.segment.everything import Everything, crop_boxes, everything, points_asked, published
from birkhoff.pipeline.segment.regions import without_small_regions
from tests.pipeline.command import captured
from tests.pipeline.load.upstream import upstream
from tests.pipeline.segment.official import tiny_official

import evaluate as demo
import held_out


def nms(boxes, scores, _categories, iou_threshold):
    """torchvision's, box by box."""
    kept = []
    for number in scores.argsort(descending=True, stable=True).tolist():
        x0, y0, x1, y1 = boxes[number].tolist()
        for other in kept:
            a0, b0, a1, b1 = boxes[other].tolist()
            both = max(0.0, min(x1, a1) - max(x0, a0)) * max(0.0, min(y1, b1) - max(y0, b0))
            either = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - both
            if either and both / either > iou_threshold:
                break
        else:
            kept.append(number)
    return torch.tensor(kept, dtype=torch.int64)


def flooded(pixels):
    """Regions of set pixels, eight neighbours, pixel by pixel: a list of boolean masks."""
    left, found = pixels.copy(), []
    while left.any():
        region, waiting = np.zeros_like(left), [tuple(np.argwhere(left)[0])]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < left.shape[0] and 0 <= x < left.shape[1] and left[y, x]:
                left[y, x], region[y, x] = False, True
                waiting += [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        found.append(region)
    return found


def removed(mask, smallest, mode):
    """`remove_small_regions` of segment-anything, which needs OpenCV, by flooding."""
    regions = flooded(~mask if mode == "holes" else mask)
    small = [region for region in regions if region.sum() < smallest]
    if not small:
        return mask, False
    if mode == "holes":
        return mask | np.any(small, axis=0), True
    large = [region for region in regions if region.sum() >= smallest]
    return np.any(large, axis=0) if large else max(regions, key=lambda region: region.sum()), True


@pytest.fixture
def generator(official, monkeypatch):
    """segment-anything's `SamAutomaticMaskGenerator`; what torchvision or OpenCV would do is done here if missing."""
    module = upstream("segment_anything.automatic_mask_generator")
    if module.batched_nms is object:
        monkeypatch.setattr(module, "batched_nms", nms)
        monkeypatch.setattr(module, "box_area", lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]))
    if importlib.util.find_spec("cv2") is None:
        monkeypatch.setattr(module, "remove_small_regions", removed)
    return module.SamAutomaticMaskGenerator


def picture(height=60, width=90):
    values = np.random.default_rng(1).integers(0, 60, (height, width, 3), dtype=np.uint8)
    for number, (y, x) in enumerate([(5, 8), (20, 50), (35, 20), (40, 70)]):
        values[y : y + 14, x : x + 16] = 60 * number + np.array([40, 10, 0])
    return values


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stability": 0.0},
        {"crop_layers": 1, "crop_thinning": 2},
        {"smallest": 30},
        {"crop_layers": 1, "smallest": 12, "same_box": 0.4},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_masks_are_those_of_segment_anything_s_generator(generator, settings, monkeypatch):
    model, pixels = tiny_official(), picture()
    segmenter, shown = segmenter_of(model), torch.from_numpy(pixels).permute(2, 0, 1)
    view = segmenter.look(shown[None])
    points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([90.0, 60.0])
    logits, quality = segmenter.logits(view, "point", points, multimask=True)
    offset = 0.05 * float(logits.std())
    lasting = (logits > offset).sum(dim=(-2, -1)) / (logits > -offset).sum(dim=(-2, -1))
    common = {"across": 8, "predicted_iou": float(quality.quantile(0.3)), "offset": offset}
    how = Everything(**{**common, "stability": float(lasting.nanquantile(0.3)), **settings})
    monkeypatch.setattr(type(model), "mask_threshold", 0.0)
    theirs = generator(
        model,
        points_per_side=how.across,
        pred_iou_thresh=how.predicted_iou,
        stability_score_thresh=how.stability,
        stability_score_offset=how.offset,
        box_nms_thresh=how.same_box,
        crop_nms_thresh=how.same_box,
        crop_n_layers=how.crop_layers,
        crop_overlap_ratio=how.crop_overlap,
        crop_n_points_downscale_factor=how.crop_thinning,
    )
    theirs.min_mask_region_area = how.smallest  # its constructor would ask for OpenCV
    asked = []
    found = everything(segmenter, shown, how, asked.append)
    expected = [record["segmentation"] for record in theirs.generate(pixels)]
    assert 4 <= len(expected) < 8 * 8 * 3
    assert sorted(mask.numpy().tobytes() for mask in found.masks) == sorted(mask.tobytes() for mask in expected)
    assert found.labels[:2] == ("object 1", "object 2")
    assert sum(asked) == points_asked(how)


def test_the_defaults_are_each_publisher_s():
    assert set(FAMILIES) >= {"sam2", "tiny_sam", "efficient_sam"}
    assert published("sam") == published("mobile_sam") == published("lite_med_sam") == Everything()
    assert published("sam2", across=None, stability=0.5) == Everything(predicted_iou=0.8, stability=0.5)
    generator = upstream("segment_anything.automatic_mask_generator").SamAutomaticMaskGenerator
    theirs = {name: value.default for name, value in inspect.signature(generator).parameters.items()}
    ours = Everything()
    assert (ours.across, ours.predicted_iou, ours.stability, ours.offset) == (
        theirs["points_per_side"],
        theirs["pred_iou_thresh"],
        theirs["stability_score_thresh"],
        theirs["stability_score_offset"],
    )
    assert ours.same_box == theirs["box_nms_thresh"] == theirs["crop_nms_thresh"]
    assert (ours.crop_layers, ours.crop_overlap) == (theirs["crop_n_layers"], theirs["crop_overlap_ratio"])
    assert (ours.crop_thinning, ours.smallest) == (
        theirs["crop_n_points_downscale_factor"],
        theirs["min_mask_region_area"],
    )


class Discs:
    """A model that finds a disc of nine pixels around each point, sure of a smaller one, and remembers the points."""

    family = "tiny_sam"

    def __init__(self):
        self.asked = []

    def look(self, pixels):
        size = tuple(pixels.shape[-2:])
        return View(features=(), size=size, fitted=size)

    def logits(self, view, kind, points, *, multimask):
        assert (kind, multimask) == ("point", True)
        self.asked += points[0].tolist()
        y, x = torch.meshgrid(*(torch.arange(length).float() for length in view.size), indexing="ij")
        distance = ((x - points[0, :, 0, None, None]) ** 2 + (y - points[0, :, 1, None, None]) ** 2).sqrt()
        logits = (9 - distance) * 100
        # The second mask is less trusted, the third is trusted and does not last.
        masks = torch.stack((logits, logits - 400, logits / 1000), dim=1)[None]
        quality = torch.tensor([0.95, 0.9, 0.99]).expand(1, len(points[0]), 3)
        return masks, quality


def test_tiny_sam_asks_finely_only_where_nothing_is_sure():
    model, advanced = Discs(), []
    found = everything(model, torch.zeros(3, 64, 64, dtype=torch.uint8), advanced=advanced.append)
    first, second = model.asked[:64], model.asked[64:]
    assert sorted(first) == [[4.0 + 8 * x, 4.0 + 8 * y] for x in range(8) for y in range(8)]
    assert not second, "every pixel is in a disc"
    assert sum(advanced) == points_asked(published("tiny_sam")) == 1024
    sparse = Discs()
    everything(sparse, torch.zeros(3, 128, 128, dtype=torch.uint8))
    left = sparse.asked[64:]
    assert 0 < len(left) < 960
    centres = torch.tensor(sparse.asked[:64])
    assert torch.cdist(torch.tensor(left), centres).min() > 8, "not where a mask was sure"
    assert {(x % 4, y % 4) for x, y in left} == {(0.0, 0.0)}, "on the fine grid"
    assert len(found.masks) > 8


def test_efficient_sam_takes_the_most_trusted_stable_mask_of_each_point():
    model = Discs()
    model.family = "efficient_sam"
    assert not len(everything(model, torch.zeros(3, 64, 64, dtype=torch.uint8)).masks), "the most trusted do not last"
    assert model.asked[:3] == [[0.5, 0.5], [0.5, 2.5], [0.5, 4.5]], "from the corner, column by column"
    how = published("efficient_sam", stability=0.0, across=4)
    found = everything(model, torch.zeros(3, 64, 64, dtype=torch.uint8), how)
    assert len(found.masks) == 16
    assert found.masks.sum(dim=(1, 2)).min() >= 81 * 3.1 / 4 - 9


@pytest.mark.parametrize("share", [0.15, 0.4, 0.55, 0.8])
def test_small_regions_go_as_by_flooding(share):
    pixels = np.random.default_rng(int(share * 100)).random((40, 53)) < share
    for smallest in (2, 6, 40, 5000):
        expected, holes = removed(pixels, smallest, "holes")
        expected, islands = removed(expected, smallest, "islands")
        found, changed = without_small_regions(torch.from_numpy(pixels), smallest)
        assert np.array_equal(found.numpy(), expected)
        assert changed == (holes or islands)


def test_small_regions_at_the_ends_of_rows_stay_apart():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, 5] = mask[2, 0] = True  # neighbours in memory, not on the picture
    mask[3, 2:4] = True
    found, changed = without_small_regions(mask, 2)
    assert changed
    assert found.nonzero().tolist() == [[3, 2], [3, 3]]
    assert without_small_regions(torch.ones(1, 1, dtype=torch.bool), 1) == (torch.ones(1, 1, dtype=torch.bool), False)


def test_crops_cover_the_picture():
    boxes = [box for _, box in crop_boxes((60, 91), Everything(crop_layers=2))]
    assert len(boxes) == 1 + 4 + 16
    for layer in (boxes[1:5], boxes[5:]):
        covered = np.zeros((60, 91), dtype=bool)
        for x0, y0, x1, y1 in layer:
            covered[y0:y1, x0:x1] = True
        assert covered.all()


def test_masks_are_drawn_the_same_by_parts():
    """The part that holds a mask is drawn alone; on the whole picture it is the same."""
    pixels = torch.full((3, 70, 90), 120, dtype=torch.uint8)
    masks = torch.zeros(3, 70, 90, dtype=torch.bool)
    masks[0, 0:9, 0:12], masks[1, 30:50, 40:90] = True, True
    image = np.asarray(draw.overlay(pixels, masks))
    zoom = draw.zoom_of((70, 90))
    inside = masks.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    assert (image[~inside.any(axis=0)] == 120).all()
    edge = image[inside[1]]
    assert (edge == np.array(draw._OBJECTS[1])).all(axis=1).any()
    assert tuple(image[30 * zoom, 60 * zoom]) == draw._OBJECTS[1]
    assert tuple(image[40 * zoom, 90 * zoom - 1]) != draw._OBJECTS[1], "the picture's border is no edge"


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    held_out.write(place, demo.held_out(3))
    (place / "0001.png").write_text("no picture")
    Image.open(place / "0002.png").convert("RGB").save(place / "0000.jpg")
    return place


def test_a_folder_is_segmented_picture_by_picture(folder, demo_store, tmp_path, capsys):
    words = ["segment", str(folder), "--model", "demo-sam", "--store", demo_store, "--builder"]
    words += [str(Path(held_out.__file__).parent / "demo_sam.json"), "--everything", "--grid", "5"]
    code, out, err = captured(capsys, *words, "--json", "-o", str(tmp_path / "drawn"))
    assert code == 0, err
    assert err.startswith("warning: 1 of 4 pictures skipped: ")
    assert "0001.png: not a picture" in err
    rows = json.loads(out)
    assert {row["image"] for row in rows} == {"0000.jpg", "0000.png", "0002.png"}
    assert set(rows[0]) == {"image", "prompt", "pixels"}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0000.jpg.png", "0000.png.png", "0002.png"]
    alone = [*words]
    alone[1] = str(folder / "0002.png")
    code, out, _ = captured(capsys, *alone, "--json", "-o", str(tmp_path / "one.png"))
    assert code == 0
    assert json.loads(out) == [
        {key: row[key] for key in ("prompt", "pixels")} for row in rows if row["image"] == "0002.png"
    ]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "drawn" / "0002.png").read_bytes()
    code, out, _ = captured(capsys, *alone, "--predicted-iou", "0.97", "--json", "-o", str(tmp_path / "few.png"))
    assert code == 0
    assert len(json.loads(out)) < sum(row["image"] == "0002.png" for row in rows)


def test_a_folder_of_which_nothing_can_be_segmented_fails(folder, demo_store, tmp_path, capsys):
    words = ["segment", str(folder), "--model", "demo-sam", "--store", demo_store, "--builder"]
    words += [str(Path(held_out.__file__).parent / "demo_sam.json"), "--point", "500,500", "-o", str(tmp_path / "out")]
    code, out, err = captured(capsys, *words)
    assert (code, out) == (19, "")
    assert "none of its 4 pictures can be segmented" in err
    (tmp_path / "taken").write_text("a file")
    assert captured(capsys, *words[:-1], str(tmp_path / "taken"))[0] == 16


def test_everything_beside_the_original_pairs_masks(folder, demo_store, tmp_path, capsys):
    words = ["segment", str(folder / "0000.png"), "--model", "demo-sam", "--store", demo_store, "--everything"]
    words += ["--against", str(Path(held_out.__file__).parent / "demo_sam.safetensors"), "--grid", "5"]
    code, out, err = captured(capsys, *words, "--min-region", "4", "--json", "-o", str(tmp_path / "out.png"))
    assert code == 0, err
    rows = json.loads(out)
    assert len(rows) >= 2
    assert sum(row["iou"] > 0.8 for row in rows) >= len(rows) / 2
