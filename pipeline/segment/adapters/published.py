"""Models in the layout of the segment-anything package: `image_encoder`, `prompt_encoder`, `mask_decoder`.

SAM and MedSAM are its own `Sam`. MobileSAM (arXiv 2306.14289), TinySAM (arXiv 2312.13789), LiteMedSAM, EdgeSAM (arXiv
2312.06660), SAM-HQ (arXiv 2306.01567) and EfficientViT-SAM (arXiv 2402.05008) keep the layout and change a part. The
arguments of a mask decoder's `forward` distinguish them, which is safer than a class's name.

Legend as in `base`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.pipeline.segment.adapters.base import Preprocessing, PromptKind, Segmenter, decoder_asks, numbered

_COMMON = {"image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings"}


class PublishedSam(Segmenter):
    """`Sam` of segment-anything, and models with its decoder: SAM, MedSAM, MobileSAM, MobileSAMv2, LiteMedSAM."""

    families: tuple[str, ...] = ("sam", "med_sam", "mobile_sam", "mobile_sam_v2", "lite_med_sam")

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        self.side: int = int(self.model.prompt_encoder.input_image_size[0])
        self.blocks: dict[str, nn.Module] = encoder_blocks(self.model.image_encoder)
        self._asks = decoder_asks(model.mask_decoder)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """Convert preprocessed pictures [B, 3, S, S] to one map of features [B, C, h, w]."""
        return (self.model.image_encoder(values),)

    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`; the published decoders take one picture at a time."""
        encoder, found = self.model.prompt_encoder, []
        for number, asked in enumerate(prompts):
            points = None if kind == "box" else (asked[:, None], torch.ones(len(asked), 1, device=asked.device))
            sparse, dense = encoder(points=points, boxes=asked if kind == "box" else None, masks=None)
            own = tuple(level[number : number + 1] for level in features)
            found.append(
                self.model.mask_decoder(
                    image_embeddings=own[-1],
                    image_pe=encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    **self._options(own, multimask),
                )
            )
        return torch.stack([logits for logits, _ in found]), torch.stack([quality for _, quality in found])

    def _options(self, features: tuple[Tensor, ...], multimask: bool) -> dict[str, Any]:  # noqa: ARG002 for others
        """Return the decoder's arguments besides embeddings."""
        # MobileSAMv2's decoder takes the standard path only with this argument.
        return {"multimask_output": multimask} | ({"simple_type": False} if "simple_type" in self._asks else {})


class TinySam(PublishedSam):
    """TinySAM. Its decoder always gives three masks; the one with the highest predicted IoU is taken."""

    families: tuple[str, ...] = ("tiny_sam",)

    def _options(self, features: tuple[Tensor, ...], multimask: bool) -> dict[str, Any]:  # noqa: ARG002
        return {}


class EdgeSam(PublishedSam):
    """EdgeSAM. Its decoder has an argument for the number of masks, one or three."""

    families: tuple[str, ...] = ("edge_sam",)

    def _options(self, features: tuple[Tensor, ...], multimask: bool) -> dict[str, Any]:  # noqa: ARG002
        return {"num_multimask_outputs": 3 if multimask else 1}


class EfficientVitSam(PublishedSam):
    """EfficientViT-SAM. Prompts and masks are in a square of 1024, pictures in one of 512 (L) or 1024 (XL)."""

    families: tuple[str, ...] = ("efficient_vit_sam",)

    @property
    def encoder_side(self) -> int:
        """As `Segmenter.encoder_side`."""
        return int(self.model.image_size[1])


class SamHq(PublishedSam):
    """SAM-HQ. Its decoder also takes the output of the encoder's first global block, and refines one mask.

    With `multimask` it still gives one mask: the best of three, corrected by the refined token.
    """

    families: tuple[str, ...] = ("sam_hq",)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return an early block's map [B, h, w, C'], then the embedding [B, C, h, w]."""
        embedding, early = self.model.image_encoder(values)
        return early[0], embedding

    def _options(self, features: tuple[Tensor, ...], multimask: bool) -> dict[str, Any]:
        return {"multimask_output": multimask, "hq_token_only": False, "interm_embeddings": [features[0]]}


def published(model: Any) -> type[PublishedSam] | None:
    """Return the adapter of a model with this layout, by its decoder's arguments; None for others."""
    if not {"image_encoder", "prompt_encoder", "mask_decoder"} <= {name for name, _ in model.named_children()}:
        return None
    asks = decoder_asks(model.mask_decoder)
    if not asks >= _COMMON or not hasattr(model.prompt_encoder, "input_image_size"):
        return None
    if "interm_embeddings" in asks:
        return SamHq
    if "num_multimask_outputs" in asks:
        return EdgeSam
    if "multimask_output" in asks:
        return EfficientVitSam if hasattr(model.image_encoder, "backbone") else PublishedSam
    return TinySam if asks == _COMMON else None


def encoder_blocks(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of an image encoder by name.

    ViT's `blocks`, TinyViT's blocks of `layers`, RepViT's `features`, or those of each stage of EfficientViT's
    `backbone`.
    """
    parts: dict[str, Any] = dict(encoder.named_children())
    if "blocks" in parts:
        return numbered("image_encoder.blocks", parts["blocks"])
    if "layers" in parts:
        return {
            f"image_encoder.layers.{stage}.blocks.{number}": block
            for stage, layer in enumerate(parts["layers"])
            for number, block in enumerate(layer.blocks)
        }
    if "features" in parts:
        return numbered("image_encoder.features", parts["features"])
    if "backbone" in parts:
        return {
            f"image_encoder.backbone.stages.{stage}.op_list.{number}": block
            for stage, layer in enumerate(parts["backbone"].stages)
            for number, block in enumerate(layer.op_list)
        }
    return {"image_encoder": encoder}
