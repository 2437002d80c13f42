"""Recognise models by their tensors: the published SAM and SAM 2 in every size. `published` knows their relatives.

If the names are those of a published package, that package builds the model, or transformers if it is not installed. If
the names are those of transformers, transformers does.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.families import CONFIG_FILE
from birkhoff.pipeline.load.published import Shapes, is_member, member

if TYPE_CHECKING:
    from torch import nn

_SIZES = {768: "b", 1024: "l", 1280: "h"}
"""The published size by the width of the image encoder."""
_VISION: dict[str, dict[str, Any]] = {
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": [2, 5, 8, 11]},
    "l": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "h": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}
"""Vision configurations of the published SAM: facebookresearch/segment-anything, build_sam.py."""

_RELATIVE = {"image_encoder.blocks.0.attn.rel_pos_h", "vision_encoder.layers.0.attn.rel_pos_h"}
"""Relative positions, which SAM's published encoders have, by the names of both packages."""

_PATCH_BIASES = ("image_encoder.patch_embed.proj.bias", "vision_encoder.patch_embed.projection.bias")
"""Tensors that show the width of SAM's encoder, by the names of both packages."""

_SIZES_2 = {(96, 12): "t", (96, 16): "s", (112, 24): "b+", (144, 48): "l"}
"""The published size by the width and the number of blocks of SAM 2's encoder."""
_HIERA: dict[str, dict[str, Any]] = {
    "t": {"num_attention_heads": 1, "blocks_per_stage": [1, 2, 7, 2], "global_attention_blocks": [5, 7, 9]},
    "s": {"num_attention_heads": 1, "blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    "b+": {
        "num_attention_heads": 2,
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
    "l": {
        "num_attention_heads": 2,
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
    },
}
"""Differences between the published encoders of SAM 2 besides their width: facebookresearch/sam2, configs/sam2.1."""

_MEMORY_2_1 = "no_obj_embed_spatial"
"""A tensor of SAM 2.1's memory for videos, which SAM 2 lacks. Their image models are alike."""


def known(label: str, shapes: Shapes, upstream: Path | None = None) -> "nn.Module":
    """Return an untrained model of the architecture that has these tensors.

    Args:
        label: The tensors' origin, for messages.
        shapes: The tensors.
        upstream: A clone of the repository whose code builds the model, for members without a package.

    Raises:
        BuilderError: No known architecture has them, or its code is not installed.
    """
    model = member(label, shapes, upstream) or _sam(label, shapes) or _sam2(label, shapes)
    if model is None:
        raise BuilderError(
            f"{label}: no architecture known by these tensors, and no {CONFIG_FILE} with them; name what builds it: "
            "--builder module:function, FILE.py:function or a transformers configuration (.json)"
        )
    return model


def is_known(shapes: Shapes) -> bool:
    """Return whether `known` has an architecture for these tensors, even if its code is not installed."""
    sam = bool(_RELATIVE & shapes.keys()) and any(_width(shapes, bias) in _SIZES for bias in _PATCH_BIASES)
    encoders = (
        ("image_encoder.trunk", "patch_embed.proj.bias"),
        ("vision_encoder.backbone", "patch_embed.projection.bias"),
    )
    return is_member(shapes) or sam or any(_size_2(shapes, *encoder) for encoder in encoders)


def package(name: str, why: str) -> ModuleType:
    """Import the package that builds a model. `why` says in the message what needs it. Raises BuilderError."""
    wheel = name.partition(".")[0].replace("_", "-")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BuilderError(f"{why}, and {wheel} cannot be imported ({error}): pip install {wheel}") from None


def _sam(label: str, shapes: Shapes) -> "nn.Module | None":
    if not _RELATIVE & shapes.keys():
        return None
    published = _SIZES.get(_width(shapes, _PATCH_BIASES[0]))
    if published and importlib.util.find_spec("segment_anything"):
        module = package("segment_anything", f"{label} is SAM-{published.upper()} in the names of segment-anything")
        official: nn.Module = module.sam_model_registry[f"vit_{published}"]()
        return official
    size = published or _SIZES.get(_width(shapes, _PATCH_BIASES[1]))
    if size is None:
        return None
    transformers = package("transformers", f"{label} is SAM-{size.upper()}")
    theirs: nn.Module = transformers.SamModel(transformers.SamConfig(vision_config=_VISION[size]))
    return theirs


def _sam2(label: str, shapes: Shapes) -> "nn.Module | None":
    published = _size_2(shapes, "image_encoder.trunk", "patch_embed.proj.bias")
    if published and importlib.util.find_spec("sam2"):
        module = package("sam2.build_sam", f"{label} is SAM 2 ({published}) in the names of sam2")
        form = "sam2.1" if _MEMORY_2_1 in shapes else "sam2"
        official: nn.Module = module.build_sam2(f"configs/{form}/{form}_hiera_{published}.yaml", None, device="cpu")
        return official
    size = published or _size_2(shapes, "vision_encoder.backbone", "patch_embed.projection.bias")
    if size is None:
        return None
    transformers = package("transformers", f"{label} is SAM 2 ({size})")
    theirs: nn.Module = transformers.Sam2Model(transformers.Sam2Config(vision_config=hiera_settings(size)))
    return theirs


def hiera_settings(size: str) -> dict[str, Any]:
    """Return transformers' vision configuration for a published SAM 2 of size `t`, `s`, `b+` or `l`."""
    width = next(width for (width, _), name in _SIZES_2.items() if name == size)
    widths = [width << stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        **_HIERA[size],
        "hidden_size": width,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [_HIERA[size]["num_attention_heads"] << stage for stage in range(4)],
    }
    return {"model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_channel_list": widths[::-1]}


def _size_2(shapes: Shapes, encoder: str, bias: str) -> str | None:
    start = f"{encoder}.blocks."
    blocks = {name.removeprefix(start).partition(".")[0] for name in shapes if name.startswith(start)}
    return _SIZES_2.get((_width(shapes, f"{encoder}.{bias}"), len(blocks)))


def _width(shapes: Shapes, bias: str) -> int:
    """Return the channels of a layer, by its bias; 0 without one."""
    return next(iter(shapes.get(bias, ())), 0)
