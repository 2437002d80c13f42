"""SAM 3's tracker of transformers: its names in files, and artifacts of these."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Sam3TrackerConfig, Sam3TrackerModel

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.load.name_maps import renaming, sam3_tracker_names
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.publishing import publish_tensors

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    backbone = {"model_type": "sam3_vit_model", **SMALL, "global_attn_indexes": [1], "image_size": 112}
    return Sam3TrackerModel(Sam3TrackerConfig(vision_config={"backbone_config": backbone})).eval()


def test_what_transformers_saves_is_loaded_dense_and_compressed(tmp_path: Path) -> None:
    model = small(0)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    state = model.state_dict()
    assert len(stored) == len(state)
    assert not stored.keys() & state.keys(), "each is saved under another name"
    dense = original_model(tmp_path / "saved", device="cpu").state_dict()
    assert all(torch.equal(dense[name], tensor) for name, tensor in state.items())
    with open_store((tmp_path / "store").as_uri()) as store:
        publish_tensors(store, "tracker", stored)
        other = small(1)
        layers = birkhoff.load_into(other, "tracker", store.url)
    assert isinstance(other.vision_encoder.backbone.layers[0].mlp.fc1, HyperLinear)
    assert len(layers) > 20


def test_of_a_whole_file_the_detector_and_the_memory_are_left_out() -> None:
    """Names as in the published file, where the encoder is the detector's."""
    names = {
        "detector_model.vision_encoder.backbone.layer_norm.weight": ("vision_encoder.backbone.layer_norm.weight",),
        "tracker_neck.fpn_layers.0.proj1.bias": ("vision_encoder.neck.fpn_layers.0.proj1.bias",),
        "tracker_model.mask_decoder.conv_s0.bias": ("mask_decoder.conv_s0.bias",),
        "tracker_model.no_memory_embedding": ("no_memory_embedding",),
        "tracker_model.memory_attention.layer_norm.weight": (),
        "tracker_model.no_memory_positional_encoding": (),
        "detector_model.text_encoder.logit_scale": (),
        "detector_model.vision_encoder.neck.fpn_layers.0.proj1.bias": (),
    }
    own = small(0).state_dict().keys()
    rename = renaming(own, names)
    for stored, expected in names.items():
        assert rename(stored) == sam3_tracker_names(stored) == expected
        assert set(expected) <= own
    assert renaming(own, own)("mask_decoder.conv_s0.bias") == ("mask_decoder.conv_s0.bias",)
