"""What the demo model learns: masks from boxes and from clicks, and how good each mask is.

Half of the pictures train the single mask, half the three alternatives, of which (as for the published models) the
best one counts most. Of each picture's objects the first half is asked for by box, the rest by a click, to which
sometimes a second click outside the object is added.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import SamModel

from model import pixel_values
from shapes import SIDE, Pictures

OBJECTS = 4
"""K, the objects asked for in a training picture: two by box and two by click."""

_BOXES = OBJECTS // 2
_BOX_JITTER = 1.5  # pixels; people do not draw exact boxes
_OUTSIDE_CLICKS = 0.25  # share of clicks with a second one, outside the object
_BCE_WEIGHT = 2.0  # beside a dice loss of weight 1
_ALL_MASKS = 0.1  # share of the loss that every alternative gets, so that none stays untrained


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's data. B pictures, K objects: K/2 asked for by box, K/2 by click.

    pixels: uint8 [B, 3, 128, 128]. cover: float32 [B, K, 64, 64], the share of each logit's 2 x 2 pixels in the mask.
    boxes: float32 [B, K/2, 4]. clicks: float32 [B, K/2, 2, 2]. labels: int64 [B, K/2], of the second click: 0 outside
    the object, -1 none. valid: bool [B, K].
    """

    pixels: Tensor
    cover: Tensor
    boxes: Tensor
    clicks: Tensor
    labels: Tensor
    valid: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors, in a fixed order."""
        return self.pixels, self.cover, self.boxes, self.clicks, self.labels, self.valid

    def copy_(self, other: "Batch") -> None:
        """Overwrites this batch's tensors with those of `other`."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(new)


def batch_of(pictures: Pictures) -> Batch:
    """A batch from pictures with `OBJECTS` objects each; jitter and second clicks come from torch's generator."""
    boxes, clicks = pictures.boxes[:, :_BOXES], pictures.clicks[:, _BOXES:]
    jitter = (torch.rand_like(boxes) * 2 - 1) * _BOX_JITTER
    second = torch.rand_like(clicks[:, :, 0, 0]) < _OUTSIDE_CLICKS
    return Batch(
        pixels=pictures.pixels,
        cover=functional.avg_pool2d(pictures.masks.to(torch.float32), 2),
        boxes=(boxes + jitter).clamp(0, SIDE - 1),
        clicks=clicks,
        labels=second.to(torch.int64) - 1,
        valid=pictures.valid,
    )


def loss_of(model: SamModel, batch: Batch) -> Tensor:
    """Mean loss of a batch, a float32 scalar.

    The image encoder and the mask decoder may be bfloat16; the prompt encoder stays float32, for exact positions.
    """
    dtype = model.vision_encoder.pos_embed.dtype
    images = model.vision_encoder(pixel_values(batch.pixels).to(dtype)).last_hidden_state
    sparse, dense = (embedding.to(dtype) for embedding in _prompts(model, batch))
    positions = model.get_image_wide_positional_embeddings().to(dtype)
    half = len(batch.pixels) // 2
    total = torch.zeros((), device=batch.pixels.device)
    for rows, multimask in ((slice(0, half), False), (slice(half, None), True)):
        masks, quality = model.mask_decoder(
            image_embeddings=images[rows],
            image_positional_embeddings=positions.repeat(half, 1, 1, 1),
            sparse_prompt_embeddings=sparse[rows],
            dense_prompt_embeddings=dense[rows],
            multimask_output=multimask,
        )[:2]
        total = total + _mask_loss(masks.float(), quality.float(), batch.cover[rows], batch.valid[rows])
    return total / 2


def _prompts(model: SamModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sparse [B, K, 2, C] and dense [B, C, 16, 16] prompt embeddings: two tokens per object, corners or clicks."""
    encoder = model.prompt_encoder
    corners, dense = encoder(None, None, batch.boxes, None)
    first, second = batch.clicks[:, :, :1], batch.clicks[:, :, 1:]
    # The encoder pads clicks with a "no point" token; the second click, where there is one, takes its place.
    inside, _ = encoder(first, torch.ones_like(first[..., 0]), None, None)
    outside, _ = encoder(second, batch.labels[..., None], None, None)
    clicks = torch.cat((inside[:, :, :1], outside[:, :, :1]), dim=2)
    return torch.cat((corners, clicks), dim=1), dense


def _mask_loss(logits: Tensor, quality: Tensor, cover: Tensor, valid: Tensor) -> Tensor:
    """Loss of M masks per object.

    logits: [B, K, M, 64, 64]; quality: predicted IoU [B, K, M]; cover: [B, K, 64, 64]; valid: [B, K].
    """
    target = cover[:, :, None].expand_as(logits)
    bce = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(-2, -1))
    share = logits.sigmoid()
    overlap = (share * target).sum(dim=(-2, -1))
    dice = 1 - (2 * overlap + 1) / (share.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)
    each = _BCE_WEIGHT * bce + dice
    masks = (1 - _ALL_MASKS) * each.amin(dim=-1) + _ALL_MASKS * each.mean(dim=-1)
    with torch.no_grad():
        drawn, true = logits > 0, target > 0.5
        union = (drawn | true).sum(dim=(-2, -1)).clamp(min=1)
        iou = (drawn & true).sum(dim=(-2, -1)) / union
    scores = (quality - iou).square().mean(dim=-1)
    weight = valid.to(masks.dtype)
    return ((masks + scores) * weight).sum() / weight.sum().clamp(min=1)
