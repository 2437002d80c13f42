"""The interface of all adapters: pictures in, masks out, whatever code a model of the family comes from.

A picture is fitted to the model's square and embedded once. Each prompt is decoded into masks at a quarter of the
model's resolution. SAM (A. Kirillov et al., "Segment Anything", arXiv 2304.02643) resizes the longer side and pads the
rest. SAM 2 (N. Ravi et al., arXiv 2408.00714) and EfficientSAM (arXiv 2312.00863) resize both sides.

Legend: B pictures of one size, K prompts per picture, M masks per prompt, H x W a picture, S the side of the encoder's
input.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

PromptKind = Literal["box", "point"]
"""A user's prompt for an object: its box, or one of its pixels."""

Filter = Literal["pillow", "torch", "smooth"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in 0 to 1; most published models were trained on pictures normalised with these."""

LEAST_PROBABILITY = 1e-7
"""Least distance of probabilities from 0 and 1, so that their logits are finite."""

LEAST_RANGE = 1e-8
"""Replaces the range of a picture of one colour, which is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a model's pictures are prepared.

    fit: `pad` scales the longer side to S and pads right and below with zeros; `stretch` scales both sides to S.
    scale: `imagenet` subtracts `mean` and divides by `std`, both of RGB in 0 to 1; `range` maps each picture's least
    and greatest value to 0 and 1.
    filter: How to resize: `pillow` is Pillow's bilinear filter, which averages when it shrinks and rounds to whole
    levels; `torch` neither averages nor rounds; `smooth` averages without rounding.
    enlarged: Interpolate logits to the picture's pixels, or their probabilities (MedSAM).
    best: The model has no single mask; take the one of its three with the greatest predicted IoU.
    """

    fit: Literal["pad", "stretch"] = "pad"
    scale: Literal["imagenet", "range"] = "imagenet"
    filter: Filter = "pillow"
    enlarge: Literal["bilinear", "bicubic"] = "bilinear"
    enlarged: Literal["logits", "probabilities"] = "logits"
    best: bool = False
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def fitted(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """Return the size (h, w) of a picture of size (H, W) inside the square of `side`."""
        return (side, side) if self.fit == "stretch" else fitted_size(size, side)

    def values(self, pixels: Tensor, side: int, device: torch.device) -> Tensor:
        """Convert uint8 RGB [B, 3, H, W] to the image encoder's input: float32 [B, 3, S, S]."""
        height, width = self.fitted((int(pixels.shape[-2]), int(pixels.shape[-1])), side)
        if self.filter == "pillow":
            values = resized(pixels, (height, width)).to(device, torch.float32)
        else:
            values = functional.interpolate(
                pixels.to(device, torch.float32),
                size=(height, width),
                mode="bilinear",
                align_corners=False,
                antialias=self.filter == "smooth",
            )
        if self.scale == "imagenet":
            mean, std = (torch.tensor(tuple(v), device=device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
            values = (values - mean) / std
        else:
            low, high = (end(dim=(1, 2, 3), keepdim=True) for end in (values.amin, values.amax))
            values = (values - low) / (high - low).clamp_min(LEAST_RANGE)
        return functional.pad(values, (0, side - width, 0, side - height))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Embedded pictures: maps of features, the pictures' size (H, W), and their size inside the model.

    features: Inputs of the mask decoder, each [B, C, h, w], finest first.
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

    `side` is the side in pixels of the square that prompts and masks are in. `blocks` are the layers of its image
    encoder, by name and in order. `families` are the names (keys of `families.FAMILIES`) of the models that this code
    runs, the usual one first.
    """

    families: tuple[str, ...]
    side: int
    blocks: dict[str, nn.Module]
    preprocessing: Preprocessing
    family: str = ""
    """This model's member of `families`."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        self.model: Any = model.eval()
        self.preprocessing = preprocessing

    @property
    def encoder_side(self) -> int:
        """S: the side of the image encoder's input, in pixels; the same as `side` for most models."""
        return self.side

    @abstractmethod
    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """Convert preprocessed pictures [B, 3, S, S] to the features of a `View`; differentiable."""

    @abstractmethod
    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Convert prompts in model pixels ([B, K, 4] or [B, K, 2]) to logits [B, K, M, s, s] and predicted IoU [B, K,
        M].

        Differentiable. Without `multimask` M is 1, except for models that always give three.
        """

    def _enlarge(self, low: Tensor, view: View) -> Tensor:
        """Enlarge logits [N, M, s, s] of the whole square to the picture, [N, M, H, W], without the padding."""
        if self.preprocessing.enlarged == "probabilities":
            return self._interpolated(low.sigmoid(), view).logit(LEAST_PROBABILITY)
        return self._interpolated(low, view)

    def _interpolated(self, low: Tensor, view: View) -> Tensor:
        mode = self.preprocessing.enlarge
        if self.preprocessing.fit == "stretch":
            return functional.interpolate(low, size=view.size, mode=mode, align_corners=False)
        full = functional.interpolate(low, size=(self.side, self.side), mode=mode, align_corners=False)
        full = full[..., : view.fitted[0], : view.fitted[1]]
        if view.size == view.fitted:
            return full
        return functional.interpolate(full, size=view.size, mode=mode, align_corners=False)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> View:
        """Embed pictures: uint8 RGB [B, 3, H, W]."""
        size = int(pixels.shape[-2]), int(pixels.shape[-1])
        parameter = next(self.model.parameters())
        values = self.preprocessing.values(pixels, self.encoder_side, parameter.device).to(parameter.dtype)
        fitted = self.preprocessing.fitted(size, self.side)
        return View(features=self.embed(values), size=size, fitted=fitted)

    @torch.no_grad()
    def logits(
        self, view: View, kind: PromptKind, prompts: Tensor, *, multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits at full resolution, float32 [B, K, M, H, W], and predicted IoU [B, K, M].

        `prompts` are in pixels of the picture, from 0: boxes float32 [B, K, 4] as x0, y0, x1, y1 with the last pixel
        inside, or points [B, K, 2] as x, y.
        """
        low, quality = self._low(view, kind, prompts, multimask)
        return self._enlarge(low.flatten(0, 1).float(), view).unflatten(0, low.shape[:2]), quality.float()

    @torch.no_grad()
    def chosen(self, view: View, kind: PromptKind, prompts: Tensor, *, best: bool = False) -> Tensor:
        """Return the decoder's logits of one mask per prompt, float32 [B, K, s, s].

        `prompts` as in `logits`. The mask is the model's single one, or with `best` the one of several with the highest
        predicted IoU. `full` enlarges the logits to the picture.
        """
        best = best or self.preprocessing.best
        low, quality = self._low(view, kind, prompts, best)
        number = quality.argmax(dim=-1) if best else torch.zeros_like(quality[..., 0], dtype=torch.int64)
        index = number[..., None, None, None].expand(*number.shape, 1, *low.shape[-2:])
        found: Tensor = low.gather(2, index)[:, :, 0].float()
        return found

    def full(self, low: Tensor, view: View) -> Tensor:
        """Enlarge logits of `chosen`, [B, K, s, s], to the picture's resolution: float32 [B, K, H, W]."""
        found: Tensor = self._enlarge(low.flatten(0, 1)[:, None], view)[:, 0].unflatten(0, low.shape[:2])
        return found

    def masks(self, view: View, kind: PromptKind, prompts: Tensor, *, best: bool = False) -> Tensor:
        """Return the model's mask for every prompt, bool [B, K, H, W]; prompts and `best` as in `chosen`."""
        return self.full(self.chosen(view, kind, prompts, best=best), view) > 0

    def _low(self, view: View, kind: PromptKind, prompts: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """Call `decode` for prompts in pixels of the picture."""
        (height, width), (h, w) = view.size, view.fitted
        scale = torch.tensor((w / width, h / height) * (2 if kind == "box" else 1), device=view.embedding.device)
        return self.decode(view.features, kind, prompts.to(scale.device, torch.float32) * scale, multimask)


def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (H, W) scaled so that the longer side has `side` pixels, rounded to whole pixels."""
    scale = side / max(size)
    height, width = (max(1, int(length * scale + 0.5)) for length in size)
    return height, width


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, 3, H, W] to (h, w) with Pillow's bilinear filter; pictures of that size are returned
    unchanged."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    pictures = (Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy()) for p in pixels)
    arrays = [np.asarray(p.resize(size[::-1], Image.Resampling.BILINEAR)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def ious(masks: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of two sets of masks: bool [..., H, W] twice -> float32 [...]; 1 if both are empty."""
    both = (masks & others).sum(dim=(-2, -1))
    either = (masks | others).sum(dim=(-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def decoder_asks(decoder: Any) -> set[str]:
    """Return the argument names of a mask decoder."""
    return set(inspect.signature(decoder.forward).parameters)


def numbered(prefix: str, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Return layers by their names in the model."""
    return {f"{prefix}.{number}": layer for number, layer in enumerate(layers)}
