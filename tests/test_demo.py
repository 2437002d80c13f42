"""The demo model: its pictures are the same everywhere, its weights load strictly and segment held-out pictures."""

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.segment.prompts import boxes_of

# The demo's files are scripts beside their manifest, not a package.
sys.path.append(str(Path(__file__).parents[1] / "manifests" / "demo"))

import evaluate
import model
import picture
import rate
import shapes
import train


@pytest.fixture(scope="module")
def demo():
    return model.load()


@pytest.fixture(scope="module")
def pictures():
    return evaluate.held_out(40)


def coarse(original, *, step):
    """The model with matrices rounded to multiples of `step` times their standard deviation."""
    tensors = {
        name: t if t.ndim < 2 else torch.round(t / (step * t.std())) * step * t.std()
        for name, t in original.state_dict().items()
    }
    return model.from_state(tensors)


def test_held_out_pictures_are_the_same_bytes_on_every_machine():
    drawn = shapes.draw(torch.arange(4), seed=evaluate.HELD_OUT_SEED)
    digest = hashlib.sha256()
    for tensor in (drawn.pixels, drawn.masks, drawn.boxes, drawn.clicks, drawn.valid):
        digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "ce1578dadf7601f94a1a6ef6a056c41ebb63ef4c7a08871a6239c39b5f0467e4"


def test_a_picture_does_not_depend_on_its_batch():
    whole = shapes.draw(torch.arange(5), seed=7)
    alone = shapes.draw(torch.tensor([3]), seed=7)
    for name in ("pixels", "masks", "boxes", "clicks", "valid"):
        assert torch.equal(getattr(alone, name), getattr(whole.part(3, 4), name)), name
    assert not torch.equal(whole.pixels, shapes.draw(torch.arange(5), seed=8).pixels)


def test_prompts_belong_to_their_objects(pictures):
    filled = evaluate.box_masks(pictures.boxes)
    assert pictures.valid.sum() > 100
    assert (pictures.masks.sum(dim=(2, 3))[pictures.valid] >= shapes.MIN_AREA).all()
    assert not (pictures.masks & ~filled).any()
    assert torch.equal(boxes_of(filled), pictures.boxes)
    x, y = pictures.clicks.long().unbind(-1)
    b, k = torch.meshgrid(torch.arange(40), torch.arange(3), indexing="ij")
    assert pictures.masks[b, k, y[..., 0], x[..., 0]][pictures.valid].all()
    assert not pictures.masks[b, k, y[..., 1], x[..., 1]].any()


def test_committed_weights_are_float32_small_and_load_strictly(demo):
    assert model.WEIGHTS.stat().st_size <= 6_000_000
    with safe_open(model.WEIGHTS, framework="pt") as stored:
        assert set(stored.keys()) == set(demo.state_dict())
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F32"}  # noqa: SIM118
    assert type(demo).__name__ == "SamModel"
    assert all(torch.isfinite(t).all() for t in demo.state_dict().values())


def test_weights_that_do_not_fit_are_refused(tmp_path, demo):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(SourceError, match=r"broken\.safetensors"):
        model.load(broken)
    with pytest.raises(SourceError, match=r"absent\.safetensors"):
        model.load(tmp_path / "absent.safetensors")
    tensors = dict(demo.state_dict())
    del tensors["vision_encoder.pos_embed"]
    model.save(tensors, broken)
    with pytest.raises(SourceError, match=r"vision_encoder\.pos_embed"):
        model.load(broken)


def test_the_model_segments_held_out_pictures(demo, pictures):
    scores = evaluate.report(demo, pictures)
    assert scores["mean IoU, box prompts"] > 0.94
    assert scores["mean IoU, point prompts"] > 0.89
    assert scores["box baseline"] < 0.7


def test_the_estimate_knows_the_gaussian(demo):
    # At high resolution H = h(X) - log2(step), with step^2 / 12 = sigma^2 / 1000.
    expected = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(math.sqrt(12 / 1000))
    drawn = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert rate.entropy(drawn) == pytest.approx(expected, abs=0.01)
    assert rate.entropy(torch.zeros(8)) == 0
    assert rate.estimated_ratio(demo.state_dict()) > 6.5


def test_the_picture_shows_both_models(tmp_path, demo):
    same, different = tmp_path / "same.png", tmp_path / "different.png"
    picture.draw(demo, demo, same)
    picture.draw(demo, coarse(demo, step=0.5), different)
    with Image.open(same) as first, Image.open(different) as second:
        assert first.size == second.size
        assert first.width > 4 * 2 * shapes.SIDE
        assert first.height > len(picture.ROWS) * 2 * shapes.SIDE
        assert first.tobytes() != second.tobytes()


def test_training_lowers_the_loss_and_moves_the_average(tmp_path):
    settings = train._settings(["--batch", "2", "--device", "cpu", "--output", str(tmp_path / "w.safetensors")])
    batch = next(train.batches(settings))
    trainer = train.Trainer(settings, batch)
    before = trainer.averaged.vision_encoder.pos_embed.clone()
    losses = []
    for _ in range(4):
        trainer.step(batch, 1e-3)
        losses.append(float(trainer.loss))
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(trainer.averaged.vision_encoder.pos_embed, before)


def test_the_learning_rate_warms_up_and_ends_at_zero(tmp_path):
    settings = train._settings(["--rate", "2.0", "--output", str(tmp_path / "w.safetensors")])
    assert train.learning_rate(settings, 0, 0.0) == pytest.approx(2.0 / train.WARMUP_STEPS)
    assert train.learning_rate(settings, 10_000, 0.5) == pytest.approx(1.0)
    assert train.learning_rate(settings, 20_000, 1.0) == pytest.approx(0.0)
