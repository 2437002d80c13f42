"""EfficientSAM in its publishers' code (B. Xiong et al., arXiv 2312.00863), Ti and S. Legend as in `base`."""

import torch
from torch import Tensor, nn

from birkhoff.pipeline.segment.adapters.base import Preprocessing, PromptKind, Segmenter, numbered


class EfficientSam(Segmenter):
    """Always gives three masks; the one with the highest predicted IoU is taken. A box is two points labelled 2 and
    3."""

    families: tuple[str, ...] = ("efficient_sam",)

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        self.side: int = int(self.model.image_encoder.img_size)
        self.blocks: dict[str, nn.Module] = numbered("image_encoder.blocks", self.model.image_encoder.blocks)

    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """As `Segmenter.embed`."""
        return (self.model.image_encoder(values),)  # its `get_image_embeddings` would normalise again

    def decode(
        self,
        features: tuple[Tensor, ...],
        kind: PromptKind,
        prompts: Tensor,
        multimask: bool,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """As `Segmenter.decode`; M is always 3."""
        corners = [2, 3] if kind == "box" else [1]
        points = prompts.unflatten(-1, (len(corners), 2))
        labels = torch.tensor(corners, device=prompts.device).expand(points.shape[:-1])
        logits, quality = self.model.predict_masks(
            features[-1], points, labels, multimask_output=True, input_h=self.side, input_w=self.side
        )
        return logits, quality


def efficient_sam(model: nn.Module) -> type[EfficientSam] | None:
    """Return the adapter of an EfficientSAM model; None for others."""
    whole = {"image_encoder", "prompt_encoder", "mask_decoder"} <= {name for name, _ in model.named_children()}
    return EfficientSam if whole and hasattr(model, "get_rescaled_pts") else None
