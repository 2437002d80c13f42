"""What a proof measures of masks, and how it tells a model that is run in a way it does not want."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from birkhoff.pipeline.errors import ProofError
from birkhoff.pipeline.proof import cases, masks
from birkhoff.pipeline.proof.prove import SHAPES_SOUND, _check_family
from birkhoff.pipeline.segment.adapters.base import Preprocessing, PromptKind, Segmenter
from birkhoff.pipeline.segment.adapters.families import FAMILIES

SIDE = 64


class Light(Segmenter):
    """Masks are the pixels of values in `band` that lie in the box; with points it finds nothing."""

    families = ("sam", "med_sam", "lite_med_sam")

    def __init__(self, preprocessing: Preprocessing, band: tuple[float, float] = (0.5, 1.01), noise: float = 0.0):
        super().__init__(nn.Linear(1, 1), preprocessing)
        self.side, self.blocks, self.band, self.noise = SIDE, {}, band, noise

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return (values + self.noise * torch.randn(values.shape, generator=generator),)

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        value = features[0].mean(dim=1)[:, None]
        logits = torch.minimum(value - self.band[0], self.band[1] - value).repeat(1, prompts.shape[1], 1, 1)
        y, x = torch.arange(float(SIDE))[:, None], torch.arange(float(SIDE))[None, :]
        if kind == "point":
            logits = logits - 10
        else:
            x0, y0, x1, y1 = prompts[..., None, None].unbind(dim=2)
            inside = (x >= x0 - 0.5) & (x <= x1 + 0.5) & (y >= y0 - 0.5) & (y <= y1 + 0.5)
            logits = torch.where(inside, logits, -1.0)
        return logits[:, :, None], torch.ones(*prompts.shape[:2], 1)


def test_a_model_agrees_with_itself_and_less_with_a_worse_one() -> None:
    model = Light(FAMILIES["lite_med_sam"])
    pictures = cases.synthetic(SIDE)
    first = masks.look(model, pictures)
    same = masks.agreement(model, first, masks.look(model, pictures))
    assert (same.agreement_mean, same.agreement_p5, same.embedding_db, same.output_db) == (1, 1, None, None)
    assert same.inputs == cases.PICTURES + cases.SHAPES
    found = [
        masks.agreement(model, first, masks.look(Light(FAMILIES["lite_med_sam"], noise=noise), pictures))
        for noise in (0.02, 0.2)
    ]
    assert 1 > found[0].agreement_mean > found[1].agreement_mean > 0
    assert 20 < found[0].embedding_db < 40
    assert found[0].embedding_db - found[1].embedding_db == pytest.approx(20, abs=0.2)


def test_masks_that_find_nothing_are_no_agreement() -> None:
    """Points find nothing here, so that no point counts; boxes without anything light in them neither."""
    model = Light(FAMILIES["lite_med_sam"])
    first = masks.look(model, cases.synthetic(SIDE))
    boxes = sum(len(one.case.asked[0]) for one in first)
    least = masks.LEAST_MASK * SIDE * SIDE
    seen = sum(
        int((mask.flatten(1).sum(dim=1) >= least).sum()) for one in first for mask in masks.masks(model, one)[:1]
    )
    found = masks.agreement(model, first, first)
    assert found.prompts == seen <= boxes
    nothing = masks.look(Light(FAMILIES["lite_med_sam"], band=(5, 6)), cases.synthetic(SIDE))
    assert masks.agreement(model, nothing, nothing).prompts == 0
    assert masks.agreement(model, first, nothing).agreement_mean == 0


def test_outputs_that_are_not_finite_are_a_figure_and_no_crash() -> None:
    model = Light(FAMILIES["lite_med_sam"])
    first = masks.look(model, cases.synthetic(SIDE))
    broken = masks.look(Light(FAMILIES["lite_med_sam"], noise=float("nan")), cases.synthetic(SIDE))
    found = masks.agreement(model, first, broken)
    assert (found.agreement_mean, found.embedding_db, found.output_db) == (0, -99, -99)


def checked(model: Light, family: str) -> str:
    """What is said of a model run as a member of the family; nothing if its masks are sound."""
    model.family, model.preprocessing = family, FAMILIES[family]
    pictures = [case for case in cases.synthetic(SIDE) if case.truth is not None]
    sound = masks.shapes_iou(model, masks.look(model, pictures))
    if sound >= SHAPES_SOUND:
        return ""
    _check_family(SimpleNamespace(label="the proof of m"), model, pictures, sound)  # type: ignore[arg-type]
    assert model.preprocessing == FAMILIES[family]
    return f"{sound:.2f}"


def test_the_right_member_passes_and_the_wrong_one_is_named() -> None:
    """As MedSAM's weights under SAM's preprocessing: values in another range than the model was trained on."""
    model = Light(Preprocessing())
    assert checked(model, "lite_med_sam") == ""
    with pytest.raises(
        ProofError, match=r"run as 'sam', the original itself finds drawn shapes .* as .*lite_med_sam at"
    ):
        checked(model, "sam")


def test_masks_that_have_nothing_to_do_with_the_prompts_prove_nothing() -> None:
    with pytest.raises(ProofError, match="agreement with it proves nothing"):
        checked(Light(Preprocessing(), band=(50, 60)), "sam")


def test_a_picture_of_the_worst_is_drawn() -> None:
    model = Light(FAMILIES["lite_med_sam"])
    first = masks.look(model, cases.synthetic(SIDE))
    body = masks.picture(model, first, masks.look(Light(FAMILIES["lite_med_sam"], noise=0.2), cases.synthetic(SIDE)))
    assert body[:4] == b"RIFF"
    assert body[8:12] == b"WEBP"
    assert len(body) < 100_000
