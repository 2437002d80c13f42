"""Pictures with known objects: light ellipses on a dark ground, far apart, so that every segmenter should find them.

A model's masks on them show whether its preprocessing is right. They are compared with the true shapes, so no second
model is needed. The pictures are seeded and the same on every machine, like those of `pictures`.
"""

import math

import torch
from torch import Tensor

SHAPES_VERSION = 1
"""Raised when the same seed gives other shapes."""

_ACROSS = 2
"""Number of shapes across and down a picture."""


def drawn_shapes(count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Return pictures uint8 [N, 3, H, W] of size (H, W), and the pixels of each picture's four shapes.

    The pixels are bool [N, 4, H, W].
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [_picture(size, generator) for _ in range(count)]
    return torch.stack([pixels for pixels, _ in drawn]), torch.stack([masks for _, masks in drawn])


def _picture(size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cell = size[0] / _ACROSS, size[1] / _ACROSS
    y, x = (torch.arange(length, dtype=torch.float32) for length in size)
    y = y[:, None]
    picture = (0.1 + 0.2 * torch.rand(3, 1, 1, generator=generator, dtype=torch.float32)).repeat(1, *size)
    masks = []
    for row in range(_ACROSS):
        for column in range(_ACROSS):
            radius, squeeze, turn = (
                _between(generator, 0.22, 0.36),
                _between(generator, 0.6, 1),
                _between(generator, 0, 1),
            )
            down, right = y - (row + 0.5) * cell[0], x - (column + 0.5) * cell[1]
            sine, cosine = math.sin(math.pi * turn), math.cos(math.pi * turn)
            along, across = down * sine + right * cosine, (right * sine - down * cosine) / squeeze
            inside = along**2 + across**2 < (radius * min(cell)) ** 2
            picture[:, inside] = 0.65 + 0.3 * torch.rand(3, 1, generator=generator, dtype=torch.float32)
            masks.append(inside)
    picture += 0.01 * torch.randn(picture.shape, generator=generator, dtype=torch.float32)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), torch.stack(masks)


def _between(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float32))
