"""`SAM2Base` of the sam2 package and its video predictors, on single pictures and without memory.

SAM-HQ 2 (its publishers' `SAM2HQBase`) adds the refined mask of SAM-HQ (arXiv 2306.01567) to the decoder's.

Legend as in `base`; maps of features are ordered finest first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.pipeline.segment.adapters.base import Preprocessing, PromptKind, Segmenter, decoder_asks, numbered


class PublishedSam2(Segmenter):
    """SAM 2 and 2.1, and models with their code: MedSAM2, EfficientTAM."""

    families: tuple[str, ...] = ("sam2", "med_sam2", "efficient_tam")

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        self.side: int = int(self.model.image_size)
        trunk: Any = self.model.image_encoder.trunk
        self.blocks: dict[str, nn.Module] = numbered("image_encoder.trunk.blocks", trunk.blocks)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """As `Segmenter.embed`."""
        maps = self.model.forward_image(values)["backbone_fpn"][-self.model.num_feature_levels :]
        if self.model.directly_add_no_mem_embed:
            maps[-1] = maps[-1] + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return tuple(maps)

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`."""
        encoder, found = self.model.sam_prompt_encoder, []
        corners = [2, 3] if kind == "box" else [1]  # labels: a box's first and last corner, or a point of the object
        for number, asked in enumerate(prompts):
            points = asked.reshape(len(asked), len(corners), 2)
            labels = torch.tensor([corners], dtype=torch.int, device=asked.device).expand(len(asked), -1)
            sparse, dense = encoder(points=(points, labels), boxes=None, masks=None)
            *fine, coarse = (level[number][None] for level in features)
            logits, quality, *_ = self.model.sam_mask_decoder(
                image_embeddings=coarse,
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
                repeat_image=True,
                high_res_features=fine if self.model.use_high_res_features_in_sam else None,
                **self._options(),
            )
            found.append((logits, quality))
        return torch.stack([logits for logits, _ in found]), torch.stack([quality for _, quality in found])

    def _options(self) -> dict[str, Any]:
        """Return further arguments of the decoder."""
        return {}


class SamHq2(PublishedSam2):
    """SAM-HQ 2: the masks of SAM 2's decoder, with the refined one added to each."""

    families: tuple[str, ...] = ("sam_hq2",)

    def _options(self) -> dict[str, Any]:
        return {"hq_token_only": False}


def published_sam2(model: Any) -> type[PublishedSam2] | None:
    """Return the adapter of a sam2 model, by its decoder's arguments; None for others."""
    parts = {name for name, _ in model.named_children()}
    if not {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder"} <= parts or not hasattr(model, "forward_image"):
        return None
    return SamHq2 if "hq_token_only" in decoder_asks(model.sam_mask_decoder) else PublishedSam2
