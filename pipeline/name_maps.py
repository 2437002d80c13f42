"""Names of published checkpoints in the models of transformers.

The published SAM (github.com/facebookresearch/segment-anything) and `SamModel` hold the same tensors under different
names, one to one but for the positional matrix, which `SamModel` has twice. The facts are those of transformers'
conversion script (models/sam/convert_sam_to_hf.py).
"""

import re
from collections.abc import Callable, Collection, Iterable

Rename = Callable[[str], tuple[str, ...]]
"""From a stored name to the model's names for the same tensor."""

_SAM_MARK = "vision_encoder.patch_embed.projection.weight"
"""In every `SamModel`, in no published checkpoint."""

_PUBLISHED_MARKS, _TRANSFORMERS_MARK = ("image_encoder.", "prompt_encoder.pe_layer."), "vision_encoder."
"""Beginnings of names by which the two are told apart: single names can mean different tensors in each."""

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

# Layers that have a number where they were made in a Sequential, and a name in transformers.
_NECK = {"0": "conv1", "1": "layer_norm1", "2": "conv2", "3": "layer_norm2"}
_MASK_EMBED = {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"}
_UPSCALING = {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"}
_HEAD = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}

_SAM_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"^vision_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^vision_encoder\.neck\.(\d)\.", lambda found: f"vision_encoder.neck.{_NECK[found[1]]}."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.(\d)\.", lambda found: f"prompt_encoder.mask_embed.{_MASK_EMBED[found[1]]}."),
    (r"^mask_decoder\.output_upscaling\.(\d)\.", lambda found: f"mask_decoder.{_UPSCALING[found[1]]}."),
    (r"^(mask_decoder\.iou_prediction_head)\.layers\.(\d)\.", lambda found: f"{found[1]}.{_HEAD[found[2]]}."),
    (r"^(mask_decoder\.output_hypernetworks_mlps\.\d+)\.layers\.(\d)\.", lambda f: f"{f[1]}.{_HEAD[f[2]]}."),
    (r"\.norm(\d?)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
)


def renaming(model_names: Collection[str], stored_names: Iterable[str]) -> Rename:
    """How the names of an artifact become those of a model; `stored_names` are looked at until they tell."""
    if _SAM_MARK in model_names:
        for name in stored_names:
            if name.startswith(_PUBLISHED_MARKS):
                return sam_names
            if name.startswith(_TRANSFORMERS_MARK):
                break
    return _same


def sam_names(name: str) -> tuple[str, ...]:
    """Names in `SamModel` of a tensor of a published SAM checkpoint; other names stay as they are."""
    if name == _GAUSSIAN:
        return _POSITIONS
    try:
        for pattern, replacement in _SAM_RULES:
            name = re.sub(pattern, replacement, name)
    except KeyError:  # a numbered layer that no published model has
        pass
    return (name,)


def _same(name: str) -> tuple[str, ...]:
    return (name,)
