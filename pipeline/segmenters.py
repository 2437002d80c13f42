"""Segment Anything models behind one interface: pictures in, masks out, whichever package a model comes from.

A picture is fitted to the model's square and embedded once; each prompt is decoded into masks at a quarter of the
model's resolution. SAM (A. Kirillov et al., "Segment Anything", arXiv 2304.02643) resizes the longer side and pads the
rest; SAM 2 (N. Ravi et al., arXiv 2408.00714) resizes both sides, and its decoder also sees two finer maps of features.

Legend: B pictures of one size, K prompts for each, M masks a prompt, H x W a picture, S the side of the model's input.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from birkhoff.pipeline.errors import BuilderError

PromptKind = Literal["box", "point"]
"""What a user gives for an object: its box, or one pixel of it."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in 0 to 1; the published models are trained on pictures normalised by these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Pictures as a model has seen them: maps of features, their size (H, W), and that size inside the model.

    features: what the mask decoder gets, each [B, C, h, w], finest first.
    """

    features: tuple[Tensor, ...]
    size: tuple[int, int]
    fitted: tuple[int, int]

    @property
    def embedding(self) -> Tensor:
        """The coarsest map, which prompts attend to."""
        return self.features[-1]


class Segmenter(ABC):
    """A model that segments.

    `side` is S in pixels; `blocks` are the layers of its image encoder by their names in the model, in order. Pictures
    are stretched to the square, or fitted with their proportions, the rest padding.
    """

    stretches: bool = False
    side: int
    blocks: dict[str, nn.Module]

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model = model.eval()
        self._mean, self._std = tuple(mean), tuple(std)

    @abstractmethod
    def _embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Normalised pixels [B, 3, S, S] to the features of a `View`."""

    @abstractmethod
    def _decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Prompts in model pixels ([B, K, 4] or [B, K, 2]) to logits [B, K, M, s, s] and predicted IoU [B, K, M]."""

    def _enlarge(self, low: Tensor, view: View) -> Tensor:
        """Logits [N, M, s, s] of the whole square at full resolution, [N, M, H, W]: the padding goes."""
        full = functional.interpolate(low, size=(self.side, self.side), mode="bilinear", align_corners=False)
        full = full[..., : view.fitted[0], : view.fitted[1]]
        if view.size == view.fitted:
            return full
        return functional.interpolate(full, size=view.size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> View:
        """Embed pictures: uint8 RGB [B, 3, H, W]."""
        size = int(pixels.shape[-2]), int(pixels.shape[-1])
        fitted = (self.side, self.side) if self.stretches else fitted_size(size, self.side)
        parameter = next(self.model.parameters())
        values = resized(pixels, fitted).to(parameter.device, torch.float32)
        mean, std = (torch.tensor(v, device=values.device).view(3, 1, 1) * 255 for v in (self._mean, self._std))
        padding = (0, self.side - fitted[1], 0, self.side - fitted[0])
        values = functional.pad((values - mean) / std, padding).to(parameter.dtype)
        return View(features=self._embed(values), size=size, fitted=fitted)

    @torch.no_grad()
    def logits(
        self, view: View, kind: PromptKind, prompts: Tensor, *, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mask logits at full resolution, float32 [B, K, M, H, W], and predicted IoU [B, K, M].

        `prompts` are in pixels of the picture, counted from its first: boxes float32 [B, K, 4] as x0, y0, x1, y1 with
        the last pixel inside, or points [B, K, 2] as x, y.
        """
        (height, width), (h, w) = view.size, view.fitted
        scale = torch.tensor((w / width, h / height) * (2 if kind == "box" else 1), device=view.embedding.device)
        low, quality = self._decode(view.features, kind, prompts.to(scale.device, torch.float32) * scale, multimask)
        return self._enlarge(low.flatten(0, 1).float(), view).unflatten(0, low.shape[:2]), quality.float()

    def masks(self, view: View, kind: PromptKind, prompts: Tensor) -> Tensor:
        """The model's single mask for every prompt, bool [B, K, H, W]; `prompts` as in `logits`."""
        return self.logits(view, kind, prompts)[0][:, :, 0] > 0


class TransformersSam(Segmenter):
    """transformers' SamModel. Normalisation is the config's `image_mean` and `image_std` where it names them."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        mean, std = getattr(config, "image_mean", IMAGENET_MEAN), getattr(config, "image_std", IMAGENET_STD)
        super().__init__(model, mean=mean, std=std)
        self.side = config.vision_config.image_size
        self.blocks = _numbered("vision_encoder.layers", self.model.vision_encoder.layers)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.model.get_image_embeddings(pixels),)

    def _decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        given = {"input_boxes": prompts} if kind == "box" else {"input_points": prompts[:, :, None]}
        found = self.model(image_embeddings=features[0], multimask_output=multimask, **given)
        return found.pred_masks, found.iou_scores


class OfficialSam(Segmenter):
    """`Sam` of the segment-anything package."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.side = self.model.image_encoder.img_size
        self.blocks = _numbered("image_encoder.blocks", self.model.image_encoder.blocks)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.model.image_encoder(pixels),)

    def _decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        encoder, found = self.model.prompt_encoder, []
        for picture, asked in zip(features[0], prompts, strict=True):
            points = None if kind == "box" else (asked[:, None], torch.ones(len(asked), 1, device=asked.device))
            sparse, dense = encoder(points=points, boxes=asked if kind == "box" else None, masks=None)
            found.append(
                self.model.mask_decoder(
                    image_embeddings=picture[None],
                    image_pe=encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask,
                )
            )
        return torch.stack([logits for logits, _ in found]), torch.stack([quality for _, quality in found])


class _Sam2(Segmenter):
    """What both packages of SAM 2 share: pictures are stretched to the square, and logits back to the picture."""

    stretches = True
    model: Any

    def __init__(self, model: nn.Module, side: int, blocks: dict[str, nn.Module]) -> None:
        super().__init__(model, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.side, self.blocks = side, blocks

    def _enlarge(self, low: Tensor, view: View) -> Tensor:
        return functional.interpolate(low, size=view.size, mode="bilinear", align_corners=False)


class TransformersSam2(_Sam2):
    """transformers' Sam2Model."""

    def __init__(self, model: nn.Module) -> None:
        sam: Any = model
        blocks = _numbered("vision_encoder.backbone.blocks", sam.vision_encoder.backbone.blocks)
        super().__init__(model, sam.prompt_encoder.input_image_size, blocks)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.get_image_embeddings(pixels))

    def _decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        given = {"input_boxes": prompts} if kind == "box" else {"input_points": prompts[:, :, None]}
        found = self.model(image_embeddings=list(features), multimask_output=multimask, **given)
        return found.pred_masks, found.iou_scores


class OfficialSam2(_Sam2):
    """`SAM2Base` of the sam2 package and its predictors of videos, on single pictures: memory takes no part."""

    def __init__(self, model: nn.Module) -> None:
        sam: Any = model
        blocks = _numbered("image_encoder.trunk.blocks", sam.image_encoder.trunk.blocks)
        super().__init__(model, sam.image_size, blocks)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_image(pixels)["backbone_fpn"][-self.model.num_feature_levels :]
        if self.model.directly_add_no_mem_embed:
            maps[-1] = maps[-1] + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return tuple(maps)

    def _decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
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
            )
            found.append((logits, quality))
        return torch.stack([logits for logits, _ in found]), torch.stack([quality for _, quality in found])


def segmenter_of(model: nn.Module) -> Segmenter:
    """The adapter of a model.

    Raises:
        BuilderError: it is none of those that there are adapters for.
    """
    parts = {name for name, _ in model.named_children()}
    if {"vision_encoder", "prompt_encoder", "mask_decoder"} <= parts and type(model).__name__ == "SamModel":
        return TransformersSam(model)
    if {"image_encoder", "prompt_encoder", "mask_decoder"} <= parts and _is_published(model):
        return OfficialSam(model)
    if {"vision_encoder", "prompt_encoder", "mask_decoder"} <= parts and type(model).__name__ == "Sam2Model":
        return TransformersSam2(model)
    if {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder"} <= parts:
        return OfficialSam2(model)
    raise BuilderError(
        f"{type(model).__module__}.{type(model).__name__}: expected transformers' SamModel or Sam2Model, or Sam of "
        "segment-anything or sam2's SAM2Base; load_into takes any model, segment and evaluate these four"
    )


def _is_published(model: Any) -> bool:
    """Whether it is the published `Sam`: SAM-HQ's has another decoder, MobileSAM's an encoder without blocks."""
    decoder, encoder = model.mask_decoder, model.image_encoder
    return hasattr(model, "mask_threshold") and type(decoder).__name__ == "MaskDecoder" and hasattr(encoder, "blocks")


def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(H, W) scaled so that the longer side has `side` pixels, rounded to whole pixels."""
    scale = side / max(size)
    height, width = (max(1, int(length * scale + 0.5)) for length in size)
    return height, width


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] at another size (h, w), by Pillow's bilinear filter; the very same where the size is that."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    pictures = (Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy()) for p in pixels)
    arrays = [np.asarray(p.resize(size[::-1], Image.Resampling.BILINEAR)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def ious(masks: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of two sets of masks: bool [..., H, W] twice -> float32 [...]; 1 where both are empty."""
    both = (masks & others).sum(dim=(-2, -1))
    either = (masks | others).sum(dim=(-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _numbered(prefix: str, layers: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{prefix}.{number}": layer for number, layer in enumerate(layers)}
