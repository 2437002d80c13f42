"""Translate the names of published checkpoints to those of transformers' models.

The published SAM (github.com/facebookresearch/segment-anything) and `SamModel` hold the same tensors under different
names, one to one except for the positional matrix, which `SamModel` has twice. The rules follow transformers'
conversion script (models/sam/convert_sam_to_hf.py).

The published SAM 2 (github.com/facebookresearch/sam2) also has a memory for videos, which `Sam2Model` leaves out, and
four point embeddings, for which `Sam2Model` has one matrix of four rows (models/sam2/convert_sam2_to_hf.py). A row is
named `NAME[2]`.

Files of SAM 3 hold a detector and a tracker around one encoder. `Sam3TrackerModel` uses the encoder and the tracker
without its memory for videos (transformers' `conversion_mapping`, "sam3_tracker"). Files that this class saves have
both prefixes before the encoder's names.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

Rename = Callable[[str], tuple[str, ...]]
"""Maps a stored name to the model's names for the same tensor, or for a row of it; to none if the model lacks it."""

_SAM_MARK = "vision_encoder.patch_embed.projection.weight"
"""A tensor of every `SamModel` and of no published checkpoint."""
_SAM2_MARK = "vision_encoder.backbone.patch_embed.projection.weight"
"""A tensor of every `Sam2Model` and of no published checkpoint."""

_PUBLISHED_MARKS, _TRANSFORMERS_MARK = ("image_encoder.", "prompt_encoder.pe_layer."), "vision_encoder."
"""Beginnings of names that distinguish the two. Single names can mean different tensors in each."""
_SAM3_MARK = "vision_encoder.backbone.embeddings.patch_embeddings.projection.weight"
"""A tensor of every `Sam3TrackerModel`."""
_PUBLISHED_SAM3_MARKS = ("tracker_model.", "tracker_neck.", "detector_model.")
_PUBLISHED_SAM2_MARKS = ("image_encoder.trunk.", "sam_prompt_encoder.", "sam_mask_decoder.")

VIDEO_MEMORY = (
    *("memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "mask_downsample."),
    *("no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial", "obj_ptr_proj.", "obj_ptr_tpos_proj."),
)
"""Beginnings of the names in a published SAM 2 that only videos need. `Sam2Model` has none of these tensors."""

_NOT_IN_SAM3_TRACKER = (
    *("detector_model.", "memory_", "mask_downsample", "object_pointer_proj", "no_object_pointer"),
    *("temporal_positional_encoding_projection_layer", "no_memory_positional_encoding"),
    "occlusion_spatial_embedding_parameter",
)
"""Beginnings of the names that remain once the tracker's and the encoder's are translated."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel and DistributedDataParallel, torch.compile, and training loops put before names."""

_ROW = re.compile(r"(.+)\[(\d+)\]")
_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

# Layers that a Sequential numbers and transformers names.
_NECK = {"0": "conv1", "1": "layer_norm1", "2": "conv2", "3": "layer_norm2"}
_MASK_EMBED = {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"}
_UPSCALING = {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"}
_HEAD = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}
_MLP = {"0": "proj_in", "1": "proj_out"}

_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_SAM_RULES: _Rules = (
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

_SAM2_RULES: _Rules = (
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.mlp\.layers\.(\d)\.", lambda found: f".mlp.{_MLP[found[1]]}."),
    (r"^prompt_encoder\.point_embeddings\.(\d)\.weight$", r"prompt_encoder.point_embed.weight[\1]"),
    (r"^(mask_decoder\.pred_obj_score_head)\.layers\.(\d)\.", lambda found: f"{found[1]}.{_HEAD[found[2]]}."),
    (r"\.out_proj\.", ".o_proj."),
)
"""Applied before the rules of SAM, which then fit the prompt encoder, the mask decoder and every norm."""


_SAM3_RULES: _Rules = (
    (r"^tracker_model\.", ""),
    (r"^detector_model\.(vision_encoder\.backbone\.)", r"\1"),
    (r"^tracker_neck\.", "vision_encoder.neck."),
)


def renaming(model_names: Collection[str], stored_names: Iterable[str]) -> Rename:
    """Return the map from an artifact's names to a model's. It reads `stored_names` only until they decide.

    A wrapper's prefix of the stored names is dropped if no name of the model begins with it.
    """
    foreign = tuple(prefix for prefix in WRAPPER_PREFIXES if not any(name.startswith(prefix) for name in model_names))

    def bare(name: str) -> str:
        while prefix := next((prefix for prefix in foreign if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        return name

    rename = _translation(model_names, map(bare, stored_names))
    return lambda name: rename(bare(name))


def _translation(model_names: Collection[str], stored_names: Iterable[str]) -> Rename:
    for mark, published, rename in (
        (_SAM_MARK, _PUBLISHED_MARKS, sam_names),
        (_SAM2_MARK, _PUBLISHED_SAM2_MARKS, sam2_names),
        (_SAM3_MARK, _PUBLISHED_SAM3_MARKS, sam3_tracker_names),
    ):
        if mark in model_names:
            for name in stored_names:
                if name.startswith(published):
                    return rename
                if name.startswith(_TRANSFORMERS_MARK):
                    break
    return _same


def sam_names(name: str) -> tuple[str, ...]:
    """Return the names in `SamModel` of a tensor of a published SAM checkpoint. Other names stay unchanged."""
    return _POSITIONS if name == _GAUSSIAN else (_renamed(name, _SAM_RULES),)


def sam2_names(name: str) -> tuple[str, ...]:
    """Return the names in `Sam2Model` of a tensor of a published SAM 2 checkpoint; none for the memory for videos."""
    if name.startswith(VIDEO_MEMORY):
        return ()
    return sam_names(_renamed(name, _SAM2_RULES))


def sam3_tracker_names(name: str) -> tuple[str, ...]:
    """Return the names in `Sam3TrackerModel` of a tensor of a SAM 3 file; none for the detector and the memory."""
    own = _renamed(name, _SAM3_RULES)
    return () if own.startswith(_NOT_IN_SAM3_TRACKER) else (own,)


def owner(name: str) -> str:
    """Return the parameter that a name belongs to: the name itself, or `NAME` for its row `NAME[2]`."""
    found = _ROW.fullmatch(name)
    return found[1] if found else name


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by parameter: rows `NAME[0]`, `NAME[1]`, ..., each [1, ...], become `NAME`, in order."""
    rows = {name: (found[1], int(found[2])) for name in tensors if (found := _ROW.fullmatch(name))}
    whole = {name: tensor for name, tensor in tensors.items() if name not in rows}
    for parameter in dict.fromkeys(parameter for parameter, _ in rows.values()):
        own = sorted((row, name) for name, (of, row) in rows.items() if of == parameter)
        whole[parameter] = torch.cat([tensors[name] for _, name in own])
    return whole


def _renamed(name: str, rules: _Rules) -> str:
    with contextlib.suppress(KeyError):  # a numbered layer that no published model has
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
    return name


def _same(name: str) -> tuple[str, ...]:
    return (name,)
