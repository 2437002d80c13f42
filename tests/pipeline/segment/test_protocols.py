"""Evaluation as the field does it: a detector's boxes, average precision, LVIS, SA-1B, and rows that are wrong."""

import contextlib
import json
import random
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# The demo's files are scripts beside their manifest, not a package.
sys.path.append(str(Path(__file__).parents[3] / "manifests" / "demo"))

from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline.errors import PictureError
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.annotations import mask_of
from birkhoff.pipeline.segment.average_precision import COCO_MEASURES, Detections, check_metric
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.dataset import Protocol, Scored, names_of, open_dataset
from birkhoff.pipeline.segment.evaluate import measure
from birkhoff.pipeline.segment.prompts import box_ious
from tests.pipeline.command import captured

import evaluate as demo
import held_out
import model as demo_model

PICTURES = 20
SIDE = 128
SIZE = (20, 30)


@pytest.fixture(scope="module")
def models():
    """The demo's model and what rounding leaves of it, behind their adapters."""
    state = demo_model.load().state_dict()
    rounded = {n: t if t.ndim < 2 else torch.round(t / (0.3 * t.std())) * 0.3 * t.std() for n, t in state.items()}
    return segmenter_of(demo_model.load()), segmenter_of(demo_model.from_state(rounded))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """COCO in small: 20 pictures, three categories, a crowd, and a detector that misses, moves and makes up objects."""
    folder = tmp_path_factory.mktemp("coco")
    held_out.write(folder, demo.held_out(PICTURES))
    path = folder / "annotations.json"
    document = json.loads(path.read_text())
    document["categories"] = [{"id": number, "name": f"kind {number}"} for number in (1, 2, 5)]
    draw = random.Random(3)
    rows = []
    for entry in document["annotations"]:
        entry["category_id"] = (1, 2, 5)[entry["id"] % 3]
        x, y, width, height = entry["bbox"]
        x, y = x + draw.uniform(-0.1, 0.1) * width, y + draw.uniform(-0.1, 0.1) * height
        row = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": draw.random()}
        if draw.random() < 0.8:
            rows.append({**row, "bbox": [x, y, width, height], "segmentation": entry["segmentation"]})
        if draw.random() < 0.2:
            rows.append({**row, "category_id": 5, "score": draw.random(), "bbox": [20.0, 30.0, 40.0, 25.0]})
    crowd = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    crowd[:60, :70] = 1
    runs = {"size": [SIDE, SIDE], "counts": coco.encode(crowd)["counts"].decode()}
    common = {"image_id": 3, "category_id": 5, "iscrowd": 1, "area": int(crowd.sum()), "bbox": [0, 0, 70, 60]}
    document["annotations"].append({"id": 999, "segmentation": runs, **common})
    path.write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def opened(place, **protocol):
    boxes = place / "results.json"
    return open_dataset(place, place / "annotations.json", protocol=Protocol(boxes=boxes, **protocol))


def scored(document):
    return {row["measure"]: (row["original"], row["compressed"], row["difference"]) for row in document["scores"]}


def by_pycocotools(place, segmenter, best):
    """The same masks by the plain way: pycocotools on the files as they are."""
    truth = COCO(str(place / "annotations.json"))
    rows = json.loads((place / "results.json").read_text())
    found = []
    for number, image in truth.imgs.items():
        pixels = torch.from_numpy(np.array(Image.open(place / image["file_name"]))).permute(2, 0, 1)[None]
        own = [row for row in rows if row["image_id"] == number]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in own)]
        masks = segmenter.masks(segmenter.look(pixels), "box", torch.tensor([corners]), best=best)[0].numpy()
        for row, mask in zip(own, masks, strict=True):
            runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            kept = {key: row[key] for key in ("image_id", "category_id", "score")}
            found.append({**kept, "segmentation": {**runs, "counts": runs["counts"].decode()}})
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def check_average_precision(document, place, models, multimask):
    """Compare a document's AP of both models with pycocotools'; returns the line of the AP over all IoUs."""
    assert (document["images"], document["skipped"]) == (PICTURES, [])
    ours = scored(document)
    assert list(ours) == list(COCO_MEASURES)
    for side, model in enumerate(models):
        expected = by_pycocotools(place, model, multimask == "best")
        for value, theirs in zip(ours.values(), expected, strict=True):
            assert (value[side] is None) == (theirs < 0)
            assert value[side] is None or abs(value[side] - theirs) < 1e-6
    first, second, difference = ours["AP"]
    assert difference == second - first
    return first, second


@pytest.mark.parametrize("multimask", ["single", "best"])
def test_average_precision_is_pycocotools_own(place, models, multimask):
    data = opened(place, metric="ap", multimask=multimask)
    first, second = check_average_precision(measure(*models, data, about={}).document(), place, models, multimask)
    assert first > 0.3
    assert second < first


@pytest.mark.parametrize("multimask", ["single", "best"])
def test_average_precision_of_a_published_artifact_is_pycocotools_own(place, demo_store, multimask, capsys):
    """From the command, against the masks of the artifact that this test loads by itself."""
    words = ["evaluate", "demo-sam", "--against", str(demo_model.WEIGHTS), "--images", str(place)]
    words += ["--annotations", str(place / "annotations.json"), "--boxes", str(place / "results.json")]
    code, out, err = captured(
        capsys, *words, "--metric", "ap", "--multimask", multimask, "--store", demo_store, "--json"
    )
    assert code == 0, err
    compressed = compressed_segmenter("demo-sam", demo_store, near=demo_model.WEIGHTS, device="cpu")
    modules = compressed.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, CompressedLinear)}
    assert len(layers) >= 24, "the encoder's matrices stay compressed"
    original = segmenter_of(demo_model.load())
    for name, layer in layers.items():
        inputs = torch.eye(layer.in_features)[:4]
        moved = (layer(inputs) - original.model.get_submodule(name)(inputs)).abs().max()
        assert 0 < moved < 0.2, f"{name} is compressed, and close to the original"
    first, second = check_average_precision(json.loads(out), place, (original, compressed), multimask)
    assert first > 0.3
    assert abs(second - first) < 0.02


def test_a_detector_s_masks_or_the_annotations_are_the_truth(place, models):
    rows = json.loads((place / "results.json").read_text())
    with_masks = sum("segmentation" in row for row in rows)
    found = measure(*models, opened(place, truth="results", multimask="best"), about={}).document()
    assert found["prompts"]["box"]["prompts"] == with_masks < len(rows)
    (skipped,) = found["skipped"]
    assert (skipped["what"], skipped["count"]) == ("result", len(rows) - with_masks)
    assert skipped["reason"] == "not a polygon or run-length mask"
    assert found["protocol"]["truth"] == "results"
    first, second, difference = scored(found)["mIoU, box"]
    assert 0.85 < second < first
    assert difference == second - first
    assert found["prompts"]["box"]["original_iou_mean"] == round(first, 4)
    # Made-up boxes lie on no object of their category; the masks of the others are the annotations' own.
    matched = measure(*models, opened(place, multimask="best"), about={}).document()
    reasons = {row["reason"]: row["count"] for row in matched["skipped"]}
    assert reasons.pop("a crowd") == 1
    (missed,) = reasons.values()
    assert matched["prompts"]["box"]["prompts"] == len(rows) - missed
    assert with_masks - 3 <= len(rows) - missed <= with_masks + 3
    assert scored(matched)["mIoU, box"][0] == pytest.approx(first, abs=0.02)


def test_the_command_writes_one_table_for_people_programs_and_the_page(place, demo_store, tmp_path, capsys):
    page = tmp_path / "found.html"
    words = ["evaluate", "demo-sam", "--against", str(demo_model.WEIGHTS), "--images", str(place), "--limit", "3"]
    words += ["--annotations", str(place / "annotations.json"), "--boxes", str(place / "results.json")]
    words += ["--metric", "ap", "--multimask", "best", "--store", demo_store]
    code, out, err = captured(capsys, *words, "--json", "-o", str(page))
    assert code == 0, err
    found = json.loads(out)
    assert [row["measure"] for row in found["scores"]] == list(COCO_MEASURES)
    assert found["protocol"] == {
        "annotations": str(place / "annotations.json"),
        "boxes": str(place / "results.json"),
        "truth": "annotations",
        "multimask": "best",
        "metric": "ap",
        "random": None,
        "seed": 0,
    }
    text = page.read_text()
    known = [row for row in found["scores"] if row["original"] is not None]
    assert len(known) > 6
    for row in known:
        cells = (f"{row['original']:.4f}", f"{row['compressed']:.4f}", f"{row['difference']:+.4f}")
        assert '</td><td class="number">'.join(cells) in text
    assert "script" not in text.split("<footer>")[0].replace("script-src", "")
    code, out, _ = captured(capsys, *words)
    assert code == 0
    assert "difference" in out
    assert f"{found['scores'][0]['difference']:+.4f}" in out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--boxes r.json", "--annotations"),
        ("--annotations a.json --truth results", "--boxes"),
        ("--annotations a.json --metric ap", "the detector's rows have the scores"),
        ("--annotations . --boxes r.json --metric ap", "a file of COCO's or LVIS' annotations"),
        ("--annotations a.json --boxes r.json --metric ap --truth results", "--metric iou"),
        ("--random 3", "--annotations"),
        ("--annotations a.json --boxes r.json --random 3", "no --boxes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, complaint, capsys):
    code, _, err = captured(capsys, "evaluate", "m", "--against", "s", "--images", "i", *words.split())
    assert code == 2
    assert complaint in " ".join(err.split())


# What is wrong with rows, on pictures of one colour and without models.


def half(value=1):
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[4:12, 6:20] = value
    return mask


def runs():
    return {"size": list(SIZE), "counts": coco.encode(half())["counts"].decode()}


GOOD = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": runs(), "bbox": [6, 4, 14, 8], "score": 0.5}
NAN = float("nan")
MASKS = [
    ({"segmentation": []}, "not a polygon or run-length mask"),
    ({"segmentation": [[1, 2, 3, 4]]}, "not a polygon or run-length mask"),
    ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "not a polygon or run-length mask"),
    ({"segmentation": [[1, 2, 3, 4, 5, NAN]]}, "not a polygon or run-length mask"),
    ({"segmentation": [[1, 2, 3, 4, 5, 1e12]]}, "not a polygon or run-length mask"),
    ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "not a polygon or run-length mask"),
    ({"segmentation": [7]}, "not a polygon or run-length mask"),
    ({"segmentation": None}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": [0, 70]}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": [700, -100]}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": [0.5, 599.5]}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": "04"}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": "zz~~"}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": "oooooooooo0"}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": "é"}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [20, 30], "counts": ""}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": "20", "counts": [600]}}, "not a polygon or run-length mask"),
    ({"segmentation": {"size": [30, 20], "counts": [0, 600]}}, "a mask of another size"),
    ({"segmentation": {"size": [20, 30], "counts": [600]}}, "an empty mask"),
    ({"segmentation": [[2, 2, 2, 2, 2, 2]]}, "an empty mask"),
]
BOXES = [
    ({"bbox": None}, "no box of four numbers"),
    ({"bbox": [1, 2, 3]}, "no box of four numbers"),
    ({"bbox": [1, 2, NAN, 4]}, "no box of four numbers"),
    ({"bbox": [1, 2, True, 4]}, "no box of four numbers"),
    ({"bbox": [1, 2, 10**400, 4]}, "no box of four numbers"),
    ({"bbox": [1, 2, 0, 4]}, "a box without area"),
    ({"bbox": [1, 2, 4, -1]}, "a box without area"),
    ({"bbox": [30, 2, 4, 4]}, "a box outside the picture"),
    ({"bbox": [3, -9, 4, 9]}, "a box outside the picture"),
    ({"score": NAN}, "no finite score"),
    ({"score": float("inf")}, "no finite score"),
    ({"score": None}, "no finite score"),
    ({"score": 10**400}, "no finite score"),
    ({"score": "high"}, "no finite score"),
    ({"category_id": 77}, "an unknown category"),
    ({"category_id": [1]}, "an unknown category"),
    ({"image_id": 99}, "an unknown picture"),
    ({"image_id": {}}, "an unknown picture"),
]


@pytest.fixture
def one(tmp_path):
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png")

    def write(annotations=(GOOD,), results=(GOOD,), images=({"id": 1, "file_name": "a.png"},), **protocol):
        document = {"images": images, "annotations": annotations, "categories": [{"id": 1}, "odd", {"name": "no id"}]}
        (tmp_path / "annotations.json").write_text(json.dumps(document))
        (tmp_path / "results.json").write_text(json.dumps(results))
        boxes = tmp_path / "results.json" if protocol else None
        return open_dataset(tmp_path, tmp_path / "annotations.json", protocol=Protocol(boxes=boxes, **protocol))

    return write


def reasons(data):
    return {(row["what"], row["reason"]): row["count"] for row in data.skipped.rows()}


@pytest.mark.parametrize(("wrong", "reason"), [*MASKS, ({"iscrowd": 1}, "a crowd"), BOXES[-1]])
def test_wrong_annotations_are_skipped_and_counted(one, wrong, reason):
    data = one([{**GOOD, **wrong, "id": 7}, GOOD, "no object", {**GOOD, **wrong, "id": 7}])
    case = data.case(0)
    assert torch.equal(case.truth, torch.from_numpy(half()).bool()[None])
    assert reasons(data) == {("annotation", reason): 2, ("annotation", "no object of JSON"): 1}
    assert all("annotation 7" in name for row in data.skipped.rows() for name in row["first"][:1] if row["count"] == 2)
    data.case(0)
    assert reasons(data)["annotation", reason] == 2, "counted once, however often it is read"


@pytest.mark.parametrize("wrong", [[[40, 1]], [[-1, 5]], [[1, NAN]], [[1]], {"x": 1}, 7])
def test_a_click_outside_the_picture_is_skipped(one, wrong):
    data = one([{**GOOD, "point_coords": wrong}, GOOD])
    assert len(data.case(0).asked[1]) == 1
    assert reasons(data) == {("annotation", "a click outside the picture"): 1}


@pytest.mark.parametrize(("wrong", "reason"), BOXES)
def test_wrong_results_are_skipped_and_counted(one, wrong, reason):
    data = one(results=[{**GOOD, **wrong}, GOOD, 5], metric="ap")
    case = data.case(0)
    assert case.asked[0].values.tolist() == [[6, 4, 20, 12]]
    assert [row["score"] for row in case.scored.rows] == [0.5]
    assert reasons(data) == {("result", reason): 1, ("result", "no object of JSON"): 1}


@pytest.mark.parametrize(("wrong", "reason"), MASKS)
def test_wrong_masks_of_a_detector_are_skipped_and_counted(one, wrong, reason):
    data = one(results=[{**GOOD, **wrong}, GOOD], truth="results")
    assert len(data.case(0).truth) == 1
    assert reasons(data) == {("result", reason): 1}


def test_wrong_annotations_do_not_reach_average_precision(one):
    wrong = [{**GOOD, "id": 2 + n, **entry} for n, (entry, _) in enumerate(MASKS)]
    crowd = {**GOOD, "iscrowd": 1, "area": 0}
    data = one([*wrong, {**GOOD, "category_id": 9}, GOOD, crowd], metric="ap")
    kept = data.case(0).scored.annotations
    assert [(row["iscrowd"], row["area"]) for row in kept] == [(0, 112), (1, 112)]
    assert sum(reasons(data).values()) == len(wrong) + 1
    overhanging = one(results=[{**GOOD, "bbox": [-3, -2, 40, 10]}], metric="ap").case(0)
    assert overhanging.asked[0].values.tolist() == [[-3, -2, 37, 8]], "as the detector gave it"


def test_wrong_pictures_are_skipped_and_counted(one, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    images = [
        {"id": 1, "file_name": "a.png"},
        {"id": 1, "file_name": "b.png"},
        {"id": 2, "file_name": "broken.png"},
        {"id": 3, "file_name": "small.png", "height": 20, "width": 30},
        {"id": 4, "file_name": "gone.png"},
        {"id": 5},
        {"file_name": "a.png"},
        {"id": 6, "file_name": "x" * 5000},
        {"id": 7, "file_name": "a\0.png"},
        "a.png",
    ]
    data = one([{**GOOD, "id": n, "image_id": n} for n in range(1, 8)], images=images)
    cases = []
    for number in range(len(data.pictures)):
        with contextlib.suppress(PictureError):
            cases.append(data.case(number).name)
    assert cases == ["a.png"]
    assert reasons(data) == {
        ("annotation", "an unknown picture"): 1,
        ("picture", "its id is another picture's"): 1,
        ("picture", "cannot be read as a picture"): 1,
        ("picture", "of another size than its annotations say"): 1,
        ("picture", "not in the folder"): 3,
        ("picture", "its row has no id or no file name"): 3,
    }


def test_an_evaluation_in_which_nothing_is_left_fails_by_name(one, models, tmp_path):
    data = one([{**GOOD, "segmentation": []}])
    with pytest.raises(PictureError, match=r"nothing is left to evaluate of 1 pictures: 1 x annotation: not a polygon"):
        measure(*models, data, about={})
    data = one(results=[{**GOOD, "score": NAN}], metric="ap")
    with pytest.raises(PictureError, match=r"nothing is left .* 1 x result: no finite score"):
        measure(*models, data, about={})
    with pytest.raises(PictureError, match=r"annotates none of the 1 pictures .*skipped: 1 x result: an unknown"):
        one(results=[{**GOOD, "image_id": 5}], truth="results")
    with pytest.raises(PictureError, match=r"results\.json: expected COCO's results"):
        one(results={"annotations": []}, truth="results")
    (tmp_path / "annotations.json").write_text(json.dumps({"images": [], "annotations": []}))
    (tmp_path / "results.json").write_text("[]")
    protocol = Protocol(boxes=tmp_path / "results.json", metric="ap")
    with pytest.raises(PictureError, match="has no categories"):
        open_dataset(tmp_path, tmp_path / "annotations.json", protocol=protocol)


def test_one_bad_picture_does_not_end_an_evaluation(place, models, tmp_path):
    for name in ("0000.png", "0001.png"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    (tmp_path / "0000.png").write_bytes(b"no picture")
    found = measure(*models, open_dataset(tmp_path, grid=1), about={}).document()
    assert (found["images"], found["skipped"][0]["first"]) == (1, ["0000.png"])


# LVIS


def test_pictures_lie_where_their_annotations_say(tmp_path):
    lvis = {"id": 1, "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg"}
    assert names_of(lvis) == ["000000000139.jpg", "val2017/000000000139.jpg"]
    assert names_of({"file_name": "../../etc/passwd"}) == ["passwd", "etc/passwd"]
    assert names_of({"file_name": "/passwd"}) == ["passwd"]
    assert names_of({"file_name": "x/.."}) == names_of({"file_name": ""}) == names_of({}) == []
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "val2017" / "000000000139.jpg")
    document = {"images": [lvis], "annotations": [GOOD], "categories": [{"id": 1, "frequency": "r"}]}
    (tmp_path / "lvis.json").write_text(json.dumps(document))
    data = open_dataset(tmp_path, tmp_path / "lvis.json")
    assert data.case(0).name == "000000000139.jpg"


def test_average_precision_on_lvis_names_the_package_that_is_missing(one, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    data = one(images=[{"id": 1, "file_name": "a.png", "neg_category_ids": []}], metric="ap")
    data.categories[1]["frequency"] = "r"
    with pytest.raises(PictureError, match=r"needs faster-coco-eval: pip install 'birkhoff-compression\[lvis\]'"):
        check_metric(data)


def federated_truth():
    """Annotations that say what was looked for, and a detector's masks: discs drawn by Python's own generator."""
    draw = random.Random(7)
    y, x = np.mgrid[:90, :130]

    def disc(cx, cy, r):
        return (x - cx) ** 2 + (y - cy) ** 2 < r * r

    categories = [{"id": number, "frequency": "rcf"[number % 3]} for number in range(1, 7)]
    images, annotations, rows = [], [], []
    for image in range(1, 13):
        looked_for = draw.sample(range(1, 7), 3)
        told = {"neg_category_ids": looked_for[:2], "not_exhaustive_category_ids": looked_for[2:]}
        images.append({"id": image, "height": 90, "width": 130, **told})
        for _ in range(5):
            place, radius = (draw.uniform(15, 110), draw.uniform(15, 75)), draw.uniform(3, 55)
            category = draw.randint(1, 6)
            annotations.append({"image_id": image, "category_id": category, "mask": disc(*place, radius)})
            for _ in range(2):
                moved = (place[0] + draw.uniform(-0.3, 0.3) * radius, place[1] + draw.uniform(-0.3, 0.3) * radius)
                found = category if draw.random() < 0.75 else draw.randint(1, 6)
                row = {"image_id": image, "category_id": found, "score": draw.random()}
                rows.append({**row, "mask": disc(*moved, radius * draw.uniform(0.75, 1.25))})
    return images, annotations, categories, rows


BY_LVIS = {"AP": 0.401568795, "AP50": 0.819551804, "AP75": 0.247746481, "APs": 0.385208864, "APm": 0.460694495,
           "APl": None, "APr": 0.436712572, "APc": 0.369739885, "APf": 0.398253927, "AR300": 0.559814815,
           "ARs": 0.491333333, "ARm": 0.594232804, "ARl": None}  # fmt: skip
"""What lvis 0.5.3 gives for them (with `float` put back for the `numpy.float` that it asks for)."""


def test_average_precision_on_lvis_is_its_authors(one):
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: the extra [lvis]")
    images, annotations, categories, rows = federated_truth()
    detections = Detections(categories=categories)
    for image in images:
        own = [row for row in rows if row["image_id"] == image["id"]]
        truth = []
        for entry in annotations:
            if entry["image_id"] == image["id"]:
                runs = coco.encode(np.asfortranarray(entry["mask"].astype(np.uint8)))
                runs["counts"] = runs["counts"].decode()
                kept = {"image_id": image["id"], "category_id": entry["category_id"], "iscrowd": 0}
                truth.append({**kept, "area": int(entry["mask"].sum()), "segmentation": runs})
        masks = torch.from_numpy(np.stack([row["mask"] for row in own]))
        detections.add(Scored(record=image, annotations=tuple(truth), rows=tuple(own)), {"original": masks})
    before = deepcopy(detections.annotations)
    found = detections.scores("original")
    assert list(found) == list(BY_LVIS)
    for name, expected in BY_LVIS.items():
        assert found[name] == (None if expected is None else pytest.approx(expected, abs=1e-6)), name
    assert detections.annotations == before


# SA-1B


def test_random_prompts_depend_on_the_seed_and_the_picture_alone(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"{name}.jpg")
        entries = []
        for number in range(9):
            mask = np.zeros(SIZE, dtype=np.uint8, order="F")
            x, y = generator.integers(0, 10, 2)
            mask[y : y + 6, x : x + 9] = 1
            packed = coco.encode(mask)
            own = {"size": list(SIZE), "counts": packed["counts"].decode()}
            entries.append({"id": number, "segmentation": own, "point_coords": [[1, 1]]})
        entries[4]["segmentation"] = {"size": list(SIZE), "counts": [600]}
        document = {"image": {"image_id": 5, "file_name": f"{name}.jpg"}, "annotations": entries}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "c.jpg")
    for name, text in (("d", "["), ("e", "[]")):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.json").write_text(text)

    def asked(number, **protocol):
        data = open_dataset(tmp_path, tmp_path, protocol=Protocol(**protocol))
        assert len(data.pictures) == 2
        return data, data.case(number)

    data, case = asked(1, random=4, seed=1)
    boxes, points = case.asked
    assert len(boxes) == len(points) == len(case.truth) == 4
    for (x, y), mask in zip(points.values.long().tolist(), case.truth, strict=True):
        assert mask[y, x]
    assert {key[1] for key in reasons(data)} >= {
        "has no annotations",
        "its annotations cannot be read",
        "its annotations are not SA-1B's",
    }
    again, other = asked(1, random=4, seed=1)[1], asked(1, random=4, seed=2)[1]
    assert torch.equal(points.values, again.asked[1].values)
    assert not torch.equal(points.values, other.asked[1].values)
    assert len(asked(0, random=64)[1].truth) == 8, "all that can be used"
    whole = asked(0)[1]
    assert whole.asked[1].values.tolist() == [[1, 1]] * 8


def test_boxes_overlap_as_drawn():
    boxes = torch.tensor([[0.0, 0, 2, 2], [10, 10, 11, 11]])
    assert torch.allclose(
        box_ious(boxes, torch.tensor([[1.0, 0, 3, 2], [10, 10, 11, 11]])), torch.tensor([[1 / 3, 0], [0, 1]])
    )


def test_compressed_runs_are_read_as_pycocotools_reads_them():
    generator = np.random.default_rng(0)
    for share in (0.01, 0.3, 0.99):
        for size in ((1, 1), (3, 70), (200, 150)):
            mask = (generator.random(size) < share).astype(np.uint8, order="F")
            mask[0, 0] = 1
            packed = coco.encode(mask)
            entry = {"segmentation": {"size": list(size), "counts": packed["counts"].decode()}}
            assert np.array_equal(mask_of(entry, size).numpy(), mask)
