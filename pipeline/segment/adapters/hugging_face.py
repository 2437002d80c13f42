"""Models of transformers: SamModel, SamHQModel, Sam2Model, EdgeTamModel and Sam3TrackerModel.

All embed with `get_image_embeddings` and decode with `forward(image_embeddings=...)`. Legend as in `base`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.pipeline.segment.adapters.base import Preprocessing, PromptKind, Segmenter, numbered


class _Transformers(Segmenter):
    """The part that all of them share."""

    def _given(self, kind: PromptKind, prompts: Tensor) -> dict[str, Tensor]:
        return {"input_boxes": prompts} if kind == "box" else {"input_points": prompts[:, :, None]}


class TransformersSam(_Transformers):
    """SamModel."""

    families: tuple[str, ...] = ("sam", "med_sam")

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        self.side: int = int(self.model.config.vision_config.image_size)
        self.blocks: dict[str, nn.Module] = numbered("vision_encoder.layers", self.model.vision_encoder.layers)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """As `Segmenter.embed`."""
        # `get_image_embeddings` does this without gradients.
        return (self.model.vision_encoder(values)[0],)

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`."""
        given = self._given(kind, prompts)
        found = self.model(image_embeddings=features[-1], multimask_output=multimask, **given)
        return found.pred_masks, found.iou_scores


class TransformersSamHq(TransformersSam):
    """SamHQModel, with `hq_token_only` off, as its publishers evaluate it."""

    families: tuple[str, ...] = ("sam_hq",)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the first global block's map [B, h, w, C'], then the embedding [B, C, h, w]."""
        found = self.model.vision_encoder(values)
        return found[1][0], found[0]

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`."""
        found = self.model(
            image_embeddings=features[-1],
            intermediate_embeddings=[features[0]],
            multimask_output=multimask,
            hq_token_only=False,
            **self._given(kind, prompts),
        )
        return found.pred_masks, found.iou_scores


class TransformersSam2(_Transformers):
    """Sam2Model and models with its interface: three maps of features, finest first."""

    families: tuple[str, ...] = ("sam2", "med_sam2", "edge_tam", "sam3")

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        self.side: int = int(self.model.prompt_encoder.input_image_size)
        backbone: Any = self.model.vision_encoder.backbone
        layers = getattr(backbone, "blocks", None) or getattr(backbone, "layers", None)
        name = "blocks" if hasattr(backbone, "blocks") else "layers"
        self.blocks: dict[str, nn.Module] = (
            numbered(f"vision_encoder.backbone.{name}", layers)
            if isinstance(layers, nn.ModuleList)
            else {"vision_encoder.backbone": backbone}
        )

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """As `Segmenter.embed`."""
        # The method turns gradients off; the function that it wraps does not.
        embed = getattr(type(self.model).get_image_embeddings, "__wrapped__", None)
        if torch.is_grad_enabled() and embed is not None:
            return tuple(embed(self.model, values))
        return tuple(self.model.get_image_embeddings(values))

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`."""
        given = self._given(kind, prompts)
        found = self.model(image_embeddings=list(features), multimask_output=multimask, **given)
        return found.pred_masks, found.iou_scores


_KINDS: dict[str, type[TransformersSam] | type[TransformersSam2]] = {
    "SamModel": TransformersSam,
    "SamHQModel": TransformersSamHq,
    "Sam2Model": TransformersSam2,
    "EdgeTamModel": TransformersSam2,
    "Sam3TrackerModel": TransformersSam2,
}


def of_transformers(model: nn.Module) -> type[TransformersSam] | type[TransformersSam2] | None:
    """Return the adapter of a transformers model; None for others."""
    if not {"vision_encoder", "prompt_encoder", "mask_decoder"} <= {name for name, _ in model.named_children()}:
        return None
    return _KINDS.get(type(model).__name__)
