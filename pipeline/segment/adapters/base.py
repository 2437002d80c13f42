"""What every adapter shares: pictures in, masks out, whichever code a model of the family comes from.

A picture is fitted to the model's square and embedded once; each prompt is decoded into masks at a quarter of the
model's resolution. SAM (A. Kirillov et al., "Segment Anything", arXiv 2304.02643) resizes the longer side and pads the
rest; SAM 2 (N. Ravi et al., arXiv 2408.00714) and EfficientSAM (arXiv 2312.00863) resize both sides.

Legend: B pictures of one size, K prompts for each, M masks a prompt, H x W a picture, S the side of what the encoder
takes.
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
"""What a user gives for an object: its box, or one pixel of it."""

Filter = Literal["pillow", "torch", "smooth"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in 0 to 1; most published models are trained on pictures normalised by these."""

LEAST_PROBABILITY = 1e-7
"""Probabilities stay so far from 0 and 1 that their logits are finite."""

LEAST_RANGE = 1e-8
"""Divides a picture of one colour, whose values have no range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a model wants its pictures.

    fit: `pad` scales the longer side to S and pads right and below with zeros; `stretch` scales both sides to S.
    scale: `imagenet` subtracts `mean` and divides by `std`, both of RGB in 0 to 1; `range` maps each picture's least
        and greatest value to 0 and 1.
    filter: who resizes: Pillow's bilinear filter, which averages when it shrinks and rounds to whole levels; torch's,
        `torch` without averaging, `smooth` with it; neither rounds.
    enlarged: what is interpolated to the picture's pixels: logits, or the probabilities of them (MedSAM).
    best: the model has no single mask of its own; of its three the one with the greatest predicted IoU is meant.
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
        """Size (h, w) of a picture of size (H, W) inside the square of `side`."""
        return (side, side) if self.fit == "stretch" else fitted_size(size, side)

    def values(self, pixels: Tensor, side: int, device: torch.device) -> Tensor:
        """uint8 RGB [B, 3, H, W] to what the image encoder takes: float32 [B, 3, S, S]."""
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

    `side` is that of the square which prompts and masks lie in, in pixels; `blocks` are the layers of its image encoder
    by their names in the model, in order.
    `families` are the names (keys of `families.FAMILIES`) of the models that this code runs, the usual one first.
    """

    families: tuple[str, ...]
    side: int
    blocks: dict[str, nn.Module]
    preprocessing: Preprocessing
    family: str = ""
    """The one of `families` that this model is."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        self.model: Any = model.eval()
        self.preprocessing = preprocessing

    @property
    def encoder_side(self) -> int:
        """S: the side of the squares that the image encoder takes, in pixels; `side` where a model has one alone."""
        return self.side

    @abstractmethod
    def embed(self, values: Tensor) -> tuple[Tensor, ...]:
        """Preprocessed pictures [B, 3, S, S] to the features of a `View`; differentiable."""

    @abstractmethod
    def decode(
        self, features: tuple[Tensor, ...], kind: PromptKind, prompts: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Prompts in model pixels ([B, K, 4] or [B, K, 2]) to logits [B, K, M, s, s] and predicted IoU [B, K, M].

        Differentiable. With `multimask` off M is 1, but for models that always give three.
        """

    def _enlarge(self, low: Tensor, view: View) -> Tensor:
        """Logits [N, M, s, s] of the whole square at full resolution, [N, M, H, W]: the padding goes."""
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
        """Mask logits at full resolution, float32 [B, K, M, H, W], and predicted IoU [B, K, M].

        `prompts` are in pixels of the picture, counted from its first: boxes float32 [B, K, 4] as x0, y0, x1, y1 with
        the last pixel inside, or points [B, K, 2] as x, y.
        """
        low, quality = self._low(view, kind, prompts, multimask)
        return self._enlarge(low.flatten(0, 1).float(), view).unflatten(0, low.shape[:2]), quality.float()

    @torch.no_grad()
    def chosen(self, view: View, kind: PromptKind, prompts: Tensor, *, best: bool = False) -> Tensor:
        """Logits of the model's mask for every prompt as the decoder gives them, float32 [B, K, s, s].

        `prompts` are those of `logits`. The mask is the model's single one, or with `best` the one of several that it
        trusts most. `full` makes logits of the picture's pixels of them.
        """
        best = best or self.preprocessing.best
        low, quality = self._low(view, kind, prompts, best)
        number = quality.argmax(dim=-1) if best else torch.zeros_like(quality[..., 0], dtype=torch.int64)
        index = number[..., None, None, None].expand(*number.shape, 1, *low.shape[-2:])
        found: Tensor = low.gather(2, index)[:, :, 0].float()
        return found

    def full(self, low: Tensor, view: View) -> Tensor:
        """Logits of `chosen`, [B, K, s, s], at the picture's resolution: float32 [B, K, H, W]."""
        found: Tensor = self._enlarge(low.flatten(0, 1)[:, None], view)[:, 0].unflatten(0, low.shape[:2])
        return found

    def masks(self, view: View, kind: PromptKind, prompts: Tensor, *, best: bool = False) -> Tensor:
        """Return the model's mask for every prompt, bool [B, K, H, W]; prompts and `best` as in `chosen`."""
        return self.full(self.chosen(view, kind, prompts, best=best), view) > 0

    def _low(self, view: View, kind: PromptKind, prompts: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """`decode` for prompts in pixels of the picture."""
        (height, width), (h, w) = view.size, view.fitted
        scale = torch.tensor((w / width, h / height) * (2 if kind == "box" else 1), device=view.embedding.device)
        return self.decode(view.features, kind, prompts.to(scale.device, torch.float32) * scale, multimask)


def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (H, W) scaled so that the longer side has `side` pixels, rounded to whole pixels."""
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


def decoder_asks(decoder: Any) -> set[str]:
    """Return names of the arguments of a mask decoder."""
    return set(inspect.signature(decoder.forward).parameters)


def numbered(prefix: str, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Layers by their names in the model."""
    return {f"{prefix}.{number}": layer for number, layer in enumerate(layers)}
