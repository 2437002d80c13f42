"""The members of the family by name, how each one's pictures are prepared, and how members are recognised.

Weights alone do not distinguish SAM-B from MedSAM, or MobileSAM from TinySAM: their tensors have equal names and
shapes, but the models need other pictures or give other masks. So the family is part of a published version (`adapter:`
in the manifest). If it was not named, the usual one is taken, with a remark.

Sources: the publishers' predictors; facebookresearch/segment-anything and /sam2, bowang-lab/MedSAM (and its LiteMedSAM
branch), SysCV/sam-hq, ChaoningZhang/MobileSAM, xinghaochen/TinySAM, chongzhou96/EdgeSAM, mit-han-lab/efficientvit,
yformer/EfficientSAM.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.segment.adapters.base import Preprocessing, Segmenter
from birkhoff.pipeline.segment.adapters.efficient_sam import efficient_sam
from birkhoff.pipeline.segment.adapters.hugging_face import of_transformers
from birkhoff.pipeline.segment.adapters.published import published
from birkhoff.pipeline.segment.adapters.sam2 import published_sam2
from birkhoff.pipeline.text import suggestion

_SAM = Preprocessing()
_SAM2 = Preprocessing(fit="stretch", filter="smooth")

FAMILIES: Mapping[str, Preprocessing] = {
    "sam": _SAM,
    "med_sam": Preprocessing(fit="stretch", scale="range", enlarged="probabilities"),
    "lite_med_sam": Preprocessing(scale="range"),
    "sam_hq": _SAM,
    "mobile_sam": _SAM,
    "mobile_sam_v2": _SAM,
    "tiny_sam": Preprocessing(best=True),
    "edge_sam": _SAM,
    "efficient_vit_sam": _SAM,
    "efficient_sam": Preprocessing(fit="stretch", filter="torch", enlarge="bicubic", best=True),
    "sam2": _SAM2,
    "sam_hq2": _SAM2,
    "med_sam2": _SAM2,
    "efficient_tam": _SAM2,
    "edge_tam": _SAM2,
    "sam3": replace(_SAM2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}
"""The preprocessing of each member, by the name that `adapter:` takes."""

_KINDS = (efficient_sam, published, of_transformers, published_sam2)
_BY_CLASS = {"EdgeTamModel": "edge_tam", "Sam3TrackerModel": "sam3"}


def segmenter_of(model: nn.Module, adapter: str | None = None) -> Segmenter:
    """Return the adapter of a model; `adapter` names its family if its code runs several.

    Raises:
        BuilderError: No adapter runs it, or it is not of the named family.
    """
    kind = next(filter(None, (find(model) for find in _KINDS)), None)
    shown = f"{type(model).__module__}.{type(model).__name__}"
    if kind is None:
        raise BuilderError(
            f"{shown}: no adapter knows this model; expected a member of the Segment Anything family in its "
            f"publishers' code or transformers' ({', '.join(FAMILIES)}); load_into takes any model"
        )
    if adapter is None:
        adapter = _usual(model, kind)
    elif adapter not in FAMILIES:
        raise BuilderError(f"adapter:{suggestion(adapter, FAMILIES)}; there are: {', '.join(FAMILIES)}")
    elif adapter not in kind.families:
        raise BuilderError(f"adapter: {shown} cannot be {adapter!r}; its code runs: {', '.join(kind.families)}")
    segmenter = kind(model, _of_config(model, FAMILIES[adapter]))
    segmenter.family = adapter
    return segmenter


def _usual(model: Any, kind: type[Segmenter]) -> str:
    """Return the usual family of a model: by its class, its encoder or its side, else the code's first."""
    if type(model).__name__ in _BY_CLASS:
        return _BY_CLASS[type(model).__name__]
    if kind.families[0] != "sam" or not hasattr(model, "image_encoder"):
        return kind.families[0]
    if not hasattr(model.image_encoder, "layers"):  # not TinyViT
        return "sam"
    return "lite_med_sam" if int(model.prompt_encoder.input_image_size[0]) == 256 else "mobile_sam"


def _of_config(model: Any, preprocessing: Preprocessing) -> Preprocessing:
    """Return preprocessing with the normalisation of the model's configuration, if it states one."""
    config = getattr(model, "config", None)
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    return replace(preprocessing, mean=tuple(mean), std=tuple(std)) if mean and std else preprocessing
