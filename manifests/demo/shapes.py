"""Pictures of overlapping shapes, drawn from a seed: the data of the demo model.

Every number comes from an integer hash of (seed, picture, purpose), and pixels from +, -, *, /, sqrt and comparisons
alone, which IEEE 754 rounds the same everywhere: picture 7 of a seed is the same bytes on any processor, in a batch of
any size. (A compiled drawing may fuse multiplications and differ in a last bit; only training draws that way.)

Legend: B pictures, N objects drawn per picture, K objects asked for, H = W = 128 pixels; x runs right, y down.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from birkhoff.pipeline.segment.prompts import boxes_of

SIDE = 128
"""Height and width of a picture in pixels."""

OBJECTS = 6
"""Most objects in a picture; at least four are drawn."""

MIN_AREA = 120
"""Visible pixels below which an object is not asked for."""

MIN_VISIBLE = 0.3
"""Visible share of its own area below which an object is not asked for: slivers are not objects."""

P = ParamSpec("P")
R = TypeVar("R")

_PARAMETERS = 32  # uniform numbers per object
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Pictures and the objects to segment in them.

    pixels: uint8 [B, 3, 128, 128], RGB.
    masks: bool [B, K, 128, 128], the visible part of each object.
    boxes: float32 [B, K, 4], its first and last pixel as x1, y1, x2, y2.
    clicks: float32 [B, K, 2, 2], (x, y) of a pixel of the object and of a pixel outside it.
    valid: bool [B, K]; false where a picture has fewer objects to ask for than K.
    """

    pixels: Tensor
    masks: Tensor
    boxes: Tensor
    clicks: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def part(self, start: int, stop: int) -> "Pictures":
        """Pictures `start` to `stop - 1`, as views."""
        names = ("pixels", "masks", "boxes", "clicks", "valid")
        return Pictures(**{name: getattr(self, name)[start:stop] for name in names})

    def batches(self, size: int) -> Iterator["Pictures"]:
        """Consecutive parts of `size` pictures; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self.part(start, start + size)


def draw(index_B: Tensor, *, seed: int, objects: int = 3, compiled: bool = False) -> Pictures:
    """Draws pictures number `index_B` (int64 [B]) of `seed` on the device of `index_B`.

    `objects` is K, at most 6: how many objects are asked for per picture, drawn at random among those that show.
    `compiled` runs the steps through torch.compile, for training on a GPU.
    """
    run = _compile if compiled else _as_it_is
    picture_B = _key(torch.full_like(index_B, seed), index_B)
    noise_BHW = run(_noise)(picture_B)
    pixels_BCHW, owner_BHW, area_BN = _paint(picture_B, noise_BHW, run)
    masks_BKHW, boxes_BK4, clicks_BK22, valid_BK = run(_targets)(picture_B, noise_BHW, owner_BHW, area_BN, objects)
    return Pictures(pixels=pixels_BCHW, masks=masks_BKHW, boxes=boxes_BK4, clicks=clicks_BK22, valid=valid_BK)


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) that looks random; products stay below 2**59, so none overflows."""
    for _ in range(2):
        word = (((word >> 16) ^ word) * 0x45D9F3B) & _WORD
    return (word >> 16) ^ word


def _key(parent: Tensor, child: Tensor | int) -> Tensor:
    """The key of `child` below the key `parent`."""
    return _mix((_mix(parent) * 31 + child * 0x632BE5AB + 1) & _WORD)


def _uniform(key: Tensor) -> Tensor:
    """The float32 in [0, 1) that belongs to a key; exact."""
    return (key >> 8).to(torch.float32) * 2.0**-24


@cache
def _compile(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, dynamic=False)


class _Run(Protocol):
    """A step of the drawing, as it is or compiled."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


def _as_it_is(function: Callable[P, R]) -> Callable[P, R]:
    return function


class _Numbers:
    """The uniform numbers [B, P] of one object of every picture, handed out one per purpose, each [B, 1, 1]."""

    def __init__(self, table_BP: Tensor) -> None:
        self._columns = iter(table_BP[:, :, None, None].unbind(1))

    def take(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return next(self._columns) * (high - low) + low

    def direction(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) of an angle between -90 and 90 degrees, without trigonometry."""
        t = self.take(-1.0, 1.0)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


class _Place(NamedTuple):
    """Pixels in an object's own coordinates, [B, H, W]: rotated offsets in units of its half axes, and their radius."""

    u: Tensor
    v: Tensor
    radius: Tensor


def _noise(picture_B: Tensor) -> Tensor:
    """A random 32-bit word for every pixel: int64 [B, H, W]."""
    pixel_HW = torch.arange(SIDE * SIDE, device=picture_B.device).reshape(SIDE, SIDE)
    return _key(_key(picture_B, 1)[:, None, None], pixel_HW)


def _paint(picture_B: Tensor, noise_BHW: Tensor, run: _Run) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels uint8 [B, 3, H, W], owner uint8 [B, H, W] (0: background), each object's own area int64 [B, N]."""
    child = torch.arange((OBJECTS + 1) * _PARAMETERS, device=picture_B.device)
    table_BNP = _uniform(_key(picture_B[:, None], child)).reshape(-1, OBJECTS + 1, _PARAMETERS)
    canvas_BCHW, count, grain = run(_background)(table_BNP[:, OBJECTS])
    owner_BHW = torch.zeros_like(noise_BHW, dtype=torch.uint8)
    areas = []
    for number in range(OBJECTS):
        inside_BHW, colours_BCHW = run(_render)(table_BNP[:, number])
        inside_BHW &= number < count
        canvas_BCHW = torch.where(inside_BHW[:, None], colours_BCHW, canvas_BCHW)
        owner_BHW.masked_fill_(inside_BHW, number + 1)
        areas.append(inside_BHW.sum(dim=(1, 2)))
    return run(_develop)(canvas_BCHW, noise_BHW, grain), owner_BHW, torch.stack(areas, dim=1)


def _develop(canvas_BCHW: Tensor, noise_BHW: Tensor, grain: Tensor) -> Tensor:
    """Colours in about [0, 1], made grainy and rounded to bytes."""
    grainy = canvas_BCHW + ((_uniform(noise_BHW) - 0.5) * grain)[:, None]
    return (grainy.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)


def _background(table_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [B, 3, H, W], the number of objects [B, 1, 1] and the strength of the grain [B, 1, 1] of a picture."""
    numbers = _Numbers(table_BP)
    place = _place(numbers)
    unshaded = place._replace(radius=torch.zeros_like(place.radius))
    return _colours(numbers, unshaded), numbers.take(4, OBJECTS + 1).floor(), numbers.take(0.0, 0.12)


def _render(table_BP: Tensor) -> tuple[Tensor, Tensor]:
    """One object of every picture: where it lies, bool [B, H, W], and its colours, float32 [B, 3, H, W]."""
    numbers = _Numbers(table_BP)
    place = _place(numbers)
    return _inside(numbers, place), _colours(numbers, place)


def _place(numbers: _Numbers) -> _Place:
    """Where an object lies: centre, rotation and half axes of 9 to 38 pixels."""
    x, y = numbers.take(14, SIDE - 14), numbers.take(14, SIDE - 14)
    step = torch.arange(SIDE, device=x.device, dtype=torch.float32)
    dx, dy = step[None, None, :] - x, step[None, :, None] - y
    cos, sin = numbers.direction()
    long = numbers.take(13, 38)
    short = long * numbers.take(0.4, 1.0).clamp(min=9 / long)
    u = (dx * cos + dy * sin) / long
    v = (dy * cos - dx * sin) / short
    return _Place(u, v, (u * u + v * v).sqrt())


def _inside(numbers: _Numbers, place: _Place) -> Tensor:
    """True within the ellipse, rectangle or wobbly blob that the object is; bool [B, H, W]."""
    kind = numbers.take(0, 3)
    u, v, radius = place
    rectangle = torch.maximum(u.abs(), v.abs()) < 0.85
    # The blob's radius is 1 + sum_k (a_k cos(k phi) + b_k sin(k phi)): powers of the unit vector (cos phi, sin phi).
    cos = u / (radius + 1e-6)
    sin = v / (radius + 1e-6)
    re, im, wobble = cos, sin, torch.ones_like(u)
    for amplitude in (0.22, 0.16, 0.1, 0.07):
        re, im = re * cos - im * sin, re * sin + im * cos
        wobble = wobble + re * numbers.take(-amplitude, amplitude) + im * numbers.take(-amplitude, amplitude)
    round_limit = torch.where(kind < 2, wobble, torch.ones_like(wobble))
    return torch.where(kind < 1, rectangle, radius < round_limit)


def _colours(numbers: _Numbers, place: _Place) -> Tensor:
    """Float32 [B, 3, H, W] in about [0, 1]: two colours, plain or woven by stripes, checks or a gradient."""
    kind = numbers.take(0, 4)
    cos, sin = numbers.direction()
    pitch = numbers.take(1.0, 4.0)
    across = (place.u * cos + place.v * sin) * pitch + numbers.take()
    along = (place.v * cos - place.u * sin) * pitch + numbers.take()
    stripes = _wave(across)
    checks = (stripes - 0.5) * (_wave(along) - 0.5) * 2 + 0.5
    gradient = (across / pitch * 0.5 + 0.25).clamp(0, 1)
    weave = torch.where(kind < 1, stripes, torch.where(kind < 2, checks, torch.where(kind < 3, gradient, 0.0)))
    contrast = numbers.take(0.2, 0.6)
    shade = 1.06 - 0.14 * (place.radius * place.radius).clamp(max=1.0)
    colours = []
    for _ in range(3):
        base, other = numbers.take(0.08, 0.95), numbers.take(0.08, 0.95)
        colours.append((base + (other - base) * weave * contrast) * shade)
    return torch.stack(colours, dim=1)


def _wave(phase: Tensor) -> Tensor:
    """A steep triangle wave of period 1 between 0 and 1: bands with soft edges."""
    triangle = (phase - phase.floor() - 0.5).abs() * 2
    return ((triangle - 0.5) * 4 + 0.5).clamp(0, 1)


def _targets(
    picture_B: Tensor, noise_BHW: Tensor, owner_BHW: Tensor, area_BN: Tensor, objects: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks, boxes, clicks and validity of K objects that show, as in `Pictures`."""
    number_N = torch.arange(1, OBJECTS + 1, device=owner_BHW.device)
    chosen_BK, valid_BK = _choose(picture_B, owner_BHW[:, None] == number_N[:, None, None], area_BN, objects)
    masks_BKHW = owner_BHW[:, None] == (chosen_BK + 1)[:, :, None, None]
    clicks = (_pixel(masks_BKHW, noise_BHW), _pixel(~masks_BKHW, noise_BHW))
    return masks_BKHW, boxes_of(masks_BKHW), torch.stack(clicks, dim=2), valid_BK


def _choose(picture_B: Tensor, masks_BNHW: Tensor, area_BN: Tensor, objects: int) -> tuple[Tensor, Tensor]:
    """Numbers of K objects that show, in random order, int64 [B, K], and whether each is one, bool [B, K]."""
    visible_BN = masks_BNHW.sum(dim=(2, 3))
    shows_BN = (visible_BN >= MIN_AREA) & (visible_BN >= area_BN * MIN_VISIBLE)
    child = torch.arange(OBJECTS, device=picture_B.device)
    order_BN = torch.where(shows_BN, _key(_key(picture_B, 2)[:, None], child), -1)
    rank_BK, chosen_BK = order_BN.topk(objects, dim=1)
    return chosen_BK, rank_BK >= 0


def _pixel(masks_BKHW: Tensor, noise_BHW: Tensor) -> Tensor:
    """(x, y) of a random pixel of each mask, float32 [B, K, 2]; pixel 0 of an empty mask."""
    pixel_HW = torch.arange(SIDE * SIDE, device=noise_BHW.device).reshape(SIDE, SIDE)
    rank_BHW = (noise_BHW << 14) | pixel_HW  # the pixel number settles ties
    rank_BKP = torch.where(masks_BKHW, rank_BHW[:, None], -1).flatten(2)
    where_BK = rank_BKP.amax(dim=2).clamp(min=0) & (SIDE * SIDE - 1)
    return torch.stack((where_BK % SIDE, where_BK // SIDE), dim=2).to(torch.float32)
