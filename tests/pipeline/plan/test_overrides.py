"""From globs to what each tensor gets."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from birkhoff.codec.profiles import PROFILES, Override, Profile
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor, contiguous_stride
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.overrides import check_matches, said
from birkhoff.pipeline.plan.quality import OverrideRule
from birkhoff.pipeline.plan.shards import plan_model


def stored(name: str, shape: tuple[int, ...], dtype: str = "float32") -> StoredTensor:
    return StoredTensor(
        name=name, dtype=dtype, shape=shape, stride=contiguous_stride(shape), offset=0, nbytes=0, path="/none"
    )


TENSORS = (
    stored("image_encoder.pos_embed", (1, 64, 64)),
    stored("image_encoder.blocks.0.qkv.weight", (192, 64)),
    stored("image_encoder.blocks.0.qkv.bias", (192,)),
    stored("mask_decoder.out.weight", (64, 64)),
    stored("mask_decoder.out.bias", (64,)),
)


def resolve(rules: Sequence[OverrideRule], tensors: tuple[StoredTensor, ...], profile: Profile) -> dict[str, Override]:
    """What single tensors get over a profile."""
    plan = plan_model("sam", checkpoint(*tensors), profile, shard_bytes=1 << 20, overrides=said(rules, tensors))
    return plan.overrides


def finer(glob: str, target_db: float = 36.0) -> OverrideRule:
    return OverrideRule(tensors=glob, target_db=target_db)


def lossless(glob: str) -> OverrideRule:
    return OverrideRule(tensors=glob, lossless=True)


def test_only_tensors_that_get_something_else_are_listed() -> None:
    found = resolve([finer("mask_decoder.*"), lossless("*.pos_embed"), lossless("*.bias")], TENSORS, PROFILES["fast"])
    assert found == {"image_encoder.pos_embed": "lossless", "mask_decoder.out.weight": 36.0}


def test_the_last_rule_that_matches_holds() -> None:
    rules = [finer("*"), lossless("mask*"), finer("*.out.*", 40)]
    assert resolve(rules, TENSORS, PROFILES["balanced"]) == {
        "image_encoder.pos_embed": 36.0,
        "image_encoder.blocks.0.qkv.weight": 36.0,
        "mask_decoder.out.weight": 40.0,
    }


def test_what_the_published_codec_would_take_becomes_lossless_where_ours_would_not() -> None:
    found = resolve([finer("*.bias")], TENSORS, PROFILES["paper"])
    assert found == {"image_encoder.blocks.0.qkv.bias": "lossless", "mask_decoder.out.bias": "lossless"}


def checkpoint(*tensors: StoredTensor) -> Checkpoint:
    return Checkpoint(path=Path("/none"), files=(), nbytes=1, format="safetensors", tensors=tensors)


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("mask_decodr.*", "near it are 'mask_decoder.*'"),
        ("*.pos_embd", "near it are '*.pos_embed'"),
        ("image_encoder.blocks.0.qkv.wieght", "image_encoder.blocks.0.qkv.weight"),
        ("zzz", "they are called 'image_encoder.pos_embed', 'image_encoder.blocks.0.qkv.weight', '"),
    ],
)
def test_a_glob_that_matches_nothing_names_its_place_and_what_is_near(glob: str, hint: str) -> None:
    rule = lossless(glob).at("m.yaml, line 7: overrides[0].tensors")
    with pytest.raises(ManifestError) as caught:
        check_matches([finer("*"), rule], [("sam", checkpoint(*TENSORS))])
    text = str(caught.value)
    assert text.startswith(f"m.yaml, line 7: overrides[0].tensors: {glob!r} matches none of the 5 tensors of 'sam'")
    assert hint in text
    for found in re.findall("'([^']+)'", text.split("; ")[-1]):  # each can be pasted
        check_matches([lossless(found)], [("sam", checkpoint(*TENSORS))])


def test_one_of_several_models_is_enough() -> None:
    models = [("a", checkpoint(TENSORS[0])), ("b", checkpoint(TENSORS[3]))]
    check_matches([finer("mask_decoder.*"), lossless("*.pos_embed")], models)
    with pytest.raises(ManifestError, match="none of the 2 tensors of 2 models"):
        check_matches([finer("neck.*")], models)
