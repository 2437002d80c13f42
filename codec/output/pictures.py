"""Synthetic pictures for taking a model's statistics without data, seeded and versioned.

There are three kinds: noise whose spectrum falls with 1/f, like that of photographs; dead leaves, discs that hide each
other (A. B. Lee, D. Mumford, J. Huang, "Occlusion models for natural images", IJCV 41, 2001); and flat pictures with
strokes, like text and drawings. The CPU's generator draws them and they are rounded to bytes, so they do not depend on
the model's device.

Shapes: N = pictures, Q = boxes per picture, S = side of a picture.
"""

import torch
from torch import Tensor

PICTURES_VERSION = 1
"""Raised when the same seed gives other pictures or boxes, so that older statistics are not reused."""

_REFERENCE = 256
"""Side in pixels of a picture to which the sizes below refer."""

_LEAVES = 40
_STROKES = 30
_LEAST_BOX = 20
_SQUARE = 0.3
"""Share of square pictures."""

_NARROWEST = 0.55
"""Least ratio of the shorter to the longer side in the other pictures."""

_KINDS = 8
"""Period of the kinds of pictures, see `synthetic_pictures`."""


def synthetic_pictures(count: int, side: int, seed: int) -> Tensor:
    """Return pictures uint8 [N, 3, S, S], each stretched to 0..255.

    Every second picture has dead leaves, one in four is nearly flat with strokes, and the last four of eight are grey.
    A smaller count gives the first pictures of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(side, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    down, across = torch.fft.fftfreq(side, dtype=torch.float32), torch.fft.rfftfreq(side, dtype=torch.float32)
    frequency = torch.hypot(down[:, None], across[None]).clamp_min(1 / side)
    drawn = [_picture(number, x, y, frequency, generator) for number in range(count)]
    return torch.stack(drawn) if drawn else torch.empty(0, 3, side, side, dtype=torch.uint8)


def synthetic_sizes(count: int, side: int, seed: int) -> list[tuple[int, int]]:
    """Return sizes (H, W) of pictures with this longer side in pixels: portrait, landscape, and some square.

    Real pictures are seldom square, and a model that pads them has edges there that square pictures lack.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 3, generator=generator, dtype=torch.float32).tolist()
    return [_size(side, *numbers) for numbers in drawn]


def _size(side: int, square: float, lying: float, narrow: float) -> tuple[int, int]:
    if square < _SQUARE:
        return side, side
    shorter = int(side * (_NARROWEST + (1 - _NARROWEST) * narrow))
    return (shorter, side) if lying < 1 / 2 else (side, shorter)


def synthetic_boxes(count: int, boxes: int, side: int, seed: int) -> Tensor:
    """Return boxes float32 [N, Q, 4] as x0, y0, x1, y1 in pixels, uniform over the picture, few of them very narrow."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, boxes, 2, 2, generator=generator, dtype=torch.float32) * (side - 1)
    low, high = corners.amin(2), corners.amax(2)
    high = torch.maximum(high, low + _LEAST_BOX * side / _REFERENCE)
    return torch.cat((low, high), -1).clamp(0, side - 1)


def _picture(number: int, x: Tensor, y: Tensor, frequency: Tensor, generator: torch.Generator) -> Tensor:
    side = len(x)
    noise = torch.randn(3, side, side, generator=generator, dtype=torch.float32)
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(side, side))
    picture = noise / noise.std() * 0.12 + 0.45
    flat = number % 4 == 3
    if flat:
        picture = picture * 0.1 + torch.rand(3, 1, 1, generator=generator, dtype=torch.float32)
    if number % 2 == 0:
        _add_leaves(picture, x, y, generator)
    if flat:
        _add_strokes(picture, x, y, generator)
    if number % _KINDS >= _KINDS // 2:
        picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = torch.aminmax(picture)
    stretched: Tensor = (picture - low) / (high - low).clamp_min(1e-6) * 255
    return stretched.round().to(torch.uint8)


def _add_leaves(picture: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Add ellipses of one colour with a little noise, most of them small, each on top of the earlier ones."""
    side = len(x)
    for _ in range(_LEAVES):
        centre_y, centre_x = (torch.rand(2, generator=generator, dtype=torch.float32) * side).tolist()
        radius = side / _REFERENCE * (4 + 60 * torch.rand((), generator=generator, dtype=torch.float32).item() ** 3)
        colour = torch.rand(3, 1, generator=generator, dtype=torch.float32)
        squeeze = 0.5 + torch.rand((), generator=generator, dtype=torch.float32).item()
        inside = (y - centre_y) ** 2 + (x - centre_x) ** 2 * squeeze < radius**2
        picture[:, inside] = colour + 0.03 * torch.randn(3, int(inside.sum()), generator=generator, dtype=torch.float32)


def _add_strokes(picture: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Add straight strokes with a half width of one to four pixels, each of one colour."""
    side = len(x)
    for _ in range(_STROKES):
        start, end = torch.rand(2, 2, generator=generator, dtype=torch.float32) * side
        width = side / _REFERENCE * (1 + 3 * torch.rand((), generator=generator, dtype=torch.float32).item())
        along = end - start
        t = (((y - start[0]) * along[0] + (x - start[1]) * along[1]) / along.square().sum()).clamp(0, 1)
        inside = (y - start[0] - t * along[0]) ** 2 + (x - start[1] - t * along[1]) ** 2 < width**2
        picture[:, inside] = torch.rand(3, 1, generator=generator, dtype=torch.float32)
