"""Pictures whose objects are known: light ellipses on a dark ground, far apart, so that no segmenter should miss them.

What a model makes of them tells whether it is run as it wants to be: its masks against the truth, which needs no
second model. Seeded and the same on every machine, as those of `pictures` are.
"""

import math

import torch
from torch import Tensor

SHAPES_VERSION = 1
"""Raised when the same seed gives other shapes."""

_ACROSS = 2
"""Shapes across and down a picture."""


def drawn_shapes(count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [N, 3, H, W] of a size (H, W), and the pixels of the four shapes of each: bool [N, 4, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [_picture(size, generator) for _ in range(count)]
    return torch.stack([pixels for pixels, _ in drawn]), torch.stack([masks for _, masks in drawn])


def _picture(size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cell = size[0] / _ACROSS, size[1] / _ACROSS
    y, x = torch.arange(float(size[0]))[:, None], torch.arange(float(size[1]))[None, :]
    picture = (0.1 + 0.2 * torch.rand(3, 1, 1, generator=generator)).repeat(1, *size)
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
            picture[:, inside] = 0.65 + 0.3 * torch.rand(3, 1, generator=generator)
            masks.append(inside)
    picture += 0.01 * torch.randn(picture.shape, generator=generator)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), torch.stack(masks)


def _between(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
