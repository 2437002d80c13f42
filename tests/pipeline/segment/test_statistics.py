"""Statistics of the demo's model behind its adapter, and what they are for: its masks at given steps."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from birkhoff.codec.metrics import sqnr_db
from birkhoff.codec.output.allocation import Felt, gains_db, root_mean_square
from birkhoff.codec.output.encode import encode
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.pictures import synthetic_sizes
from birkhoff.codec.output.statistics import HESSIAN_BYTES
from birkhoff.codec.output.targets import targets_db
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.load import architectures
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.segment import statistics as module
from birkhoff.pipeline.segment.adapters.base import Segmenter
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.statistics import BOXES, outputs_of, recomputed, statistics

DEMO = Path(__file__).parents[3] / "manifests" / "demo" / "demo_sam.safetensors"


@pytest.fixture(scope="module")
def demo() -> Segmenter:
    return segmenter_of(original_model(DEMO, device="cpu"))


@pytest.fixture(scope="module")
def found(demo: Segmenter) -> tuple[dict[str, float], dict[str, Hessian]]:
    hessians: dict[str, Hessian] = {}
    return statistics(demo, seed=0, keep=hessians.__setitem__, pictures=2, probes=2), hessians


def test_embedding_every_mask_token_and_ious_are_tapped(demo: Segmenter) -> None:
    outputs = outputs_of(demo, 1, seed=0)(0)
    weights = {name: weight for name, (weight, _) in outputs.items()}
    others = {f"other mask {number}": 0.5 for number in range(3)}
    assert weights == {"embedding": 0.3, "mask 0": 1.0, **others, "iou": 0.1}
    assert outputs["mask 0"][1].shape[:2] == (1, BOXES)
    assert outputs["other mask 0"][1].shape[:2] == (1, 1)
    assert outputs["iou"][1].shape == (BOXES + 3,)
    assert all(value.requires_grad for _, value in outputs.values())


def test_pictures_are_padded_as_real_ones_are_and_boxes_lie_in_them(
    demo: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded, asked = [], []
    embed, decode = demo.embed, demo.decode
    monkeypatch.setattr(demo, "embed", lambda values: (embedded.append(values), embed(values))[1])
    monkeypatch.setattr(demo, "decode", lambda *given: (asked.append(given[2]), decode(*given))[1])
    sizes = synthetic_sizes(6, demo.side, seed=3)
    assert {height == width for height, width in sizes} == {True, False}
    run = outputs_of(demo, 6, seed=0)
    for number, (height, width) in enumerate(sizes):
        run(number)
        values, boxes = embedded[-1], asked[-1]
        assert demo.preprocessing.fit == "pad"
        assert not values[..., height:, :].any()
        assert not values[..., :, width:].any()
        assert values[..., :height, :width].abs().mean() > 0.1
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()


def test_every_box_counts_alike_and_the_edge_of_its_mask_most(demo: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small object, a large one and none at all, of which each has a pixel on its edge."""
    logits = torch.full((1, 4, 1, 8, 8), -8.0)
    logits[0, 1, 0, :4], logits[0, 2, 0, 0], logits[0, :3, 0, 7, 7] = 6.0, 6.0, 0.5
    logits[0, 3] = -200.0
    logits.requires_grad_(True)
    monkeypatch.setattr(demo, "decode", lambda *_: (logits, torch.ones(1, 4, 1)))
    probabilities = outputs_of(demo, 1, seed=0)(0)["mask 0"][1]
    norms = probabilities.square().sum(dim=(0, 2, 3))
    assert torch.allclose(norms, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    probabilities.sum().backward()
    assert logits.grad is not None
    (moved,) = logits.grad.abs()
    assert moved.isfinite().all()
    assert (moved[:3, 0, 7, 7] > 90 * moved[:3, 0, :7].amax(dim=(1, 2))).all()  # far outside and far inside


def test_everything_that_makes_masks_is_felt(
    demo: Segmenter, found: tuple[dict[str, float], dict[str, Hessian]]
) -> None:
    sensitivity, hessians = found
    named = dict(demo.model.named_parameters())
    assert sensitivity.keys() == named.keys()
    unfelt = [name for name, value in sensitivity.items() if value == 0]
    assert all("prompt_encoder" in name for name in unfelt), unfelt
    for name, hessian in hessians.items():
        assert hessian.rows is not None
        assert len(hessian.columns) * len(hessian.rows) == named[name].numel()


def test_twice_the_same(demo: Segmenter, found: tuple[dict[str, float], dict[str, Hessian]]) -> None:
    again: dict[str, Hessian] = {}
    assert statistics(demo, seed=0, keep=again.__setitem__, pictures=2, probes=2) == found[0]
    for name, hessian in again.items():
        assert torch.equal(hessian.columns, found[1][name].columns)
        assert torch.equal(hessian.rows, found[1][name].rows)


def test_feedback_brings_the_outputs_nearer_at_equal_steps(
    demo: Segmenter, found: tuple[dict[str, float], dict[str, Hessian]]
) -> None:
    """On pictures that set no step, at 3 bits a weight."""
    sensitivity, hessians = found
    model, profile = demo.model, PROFILES["fast"]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    coded = [n for n, w in weights.items() if profile.decide(tuple(w.shape), "float32").action == "coded"]
    felt = {
        n: Felt(weights=weights[n].numel(), rms=root_mean_square(weights[n]), sensitivity=sensitivity[n]) for n in coded
    }
    targets = targets_db(gains_db(felt), 15.0)
    outputs = outputs_of(demo, 2, seed=77)
    with torch.no_grad():
        reference = [outputs(number) for number in range(2)]
        db = []
        for given in ({}, hessians):
            for name in coded:
                stored = encode(name, weights[name], targets[name], given.get(name), path=False).tensor
                model.get_parameter(name).copy_(decode_tensor(stored))
            energy = error = 0.0
            for number in range(2):
                before, after = reference[number]["mask 0"][1], outputs(number)["mask 0"][1]
                energy += float(before.square().sum())
                error += float((after - before).square().sum())
            db.append(sqnr_db(energy, error))
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    assert db[1] > db[0] + 1.0, db


def graph_bytes(segmenter: Segmenter, blocks: Iterable[nn.Module] = ()) -> int:
    """What backward passes through the outputs of one picture keep, the weights aside."""
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in segmenter.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with recomputed(blocks), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        outputs_of(segmenter, 1, seed=0)(0)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def test_a_large_members_blocks_keep_their_inputs_alone_and_the_statistics_are_the_same(
    demo: Segmenter, found: tuple[dict[str, float], dict[str, Hessian]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list(demo.blocks.values())
    assert len(blocks) > 2
    assert graph_bytes(demo, blocks) < graph_bytes(demo, blocks[1:]) < graph_bytes(demo)
    called = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    monkeypatch.setattr(module, "KEPT_SIDE", demo.side - 1)
    again: dict[str, Hessian] = {}
    sensitivity = statistics(demo, seed=0, keep=again.__setitem__, pictures=2, probes=2)
    assert not any("forward" in vars(block) for block in blocks)
    assert len(called) == 2 * len(blocks)
    assert sensitivity == pytest.approx(found[0], rel=1e-4)
    assert again.keys() == found[1].keys()
    for name, hessian in found[1].items():
        torch.testing.assert_close(again[name].columns, hessian.columns, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again[name].rows, hessian.rows, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_sam_h_at_1024_pixels_needs_less_than_16_gb() -> None:
    """Counted, not run: on the meta device tensors have sizes and no numbers. Of a GPU 40 GB may be taken."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        sam_h = segmenter_of(transformers.SamModel(transformers.SamConfig(vision_config=architectures._VISION["h"])))
    weights = sum(4 * parameter.numel() for parameter in sam_h.model.parameters())
    blocks = list(sam_h.blocks.values())
    rest = graph_bytes(sam_h, blocks)
    attends_to_all = graph_bytes(sam_h, [block for block in blocks if block is not blocks[7]]) - rest
    assert attends_to_all > rest / 2
    assert 2 * weights + HESSIAN_BYTES + rest + attends_to_all < 16 << 30
