"""Connected regions of a mask; small ones are filled or removed.

Neighbours are the eight surrounding pixels, as in segment-anything's mask generator, which uses OpenCV.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def without_small_regions(mask: Tensor, smallest: int) -> tuple[Tensor, bool]:
    """Return a mask (bool [H, W]) without holes and islands smaller than `smallest` pixels, and whether it changed.

    If all islands are small, the largest is kept.
    """
    pixels = mask.numpy()
    filled, had_holes = _without(~pixels, smallest)
    pixels = ~filled if had_holes else pixels
    kept, had_islands = _without(pixels, smallest, one_stays=True)
    changed = had_holes or had_islands
    return (torch.from_numpy(np.ascontiguousarray(kept)) if changed else mask), changed


def _without(pixels: Any, smallest: int, *, one_stays: bool = False) -> tuple[Any, bool]:
    """Return pixels (bool [H, W]) without their small regions, and whether there were any."""
    starts, ends, region = _runs(pixels)
    sizes = np.bincount(region, weights=ends - starts, minlength=1)
    small = (sizes < smallest) & (sizes > 0)
    if not small.any():
        return pixels, False
    if one_stays and (sizes[~small] == 0).all():
        small[sizes.argmax()] = False
    gone = small[region]
    width = pixels.shape[1] + 1  # one column more, so that no run reaches into the next row
    steps = np.zeros(pixels.shape[0] * width + 1, dtype=np.int32)
    np.add.at(steps, starts[gone], 1)
    np.add.at(steps, ends[gone], -1)
    within = steps.cumsum()[:-1].reshape(-1, width)[:, :-1] > 0
    return pixels & ~within, True


def _runs(pixels: Any) -> tuple[Any, Any, Any]:
    """Return every run of set pixels in a row: first and past-the-last index in rows of W + 1, and its region's number.

    A region's number is the index of one of its runs.
    """
    padded = np.pad(pixels, ((0, 0), (0, 1))).ravel().astype(np.int8)
    edges = np.diff(padded, prepend=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    # A run touches runs of the next row that begin at most one pixel after its end and end at most one before its
    # start.
    width = pixels.shape[1] + 1
    first = np.searchsorted(ends, starts + width, side="left")
    past = np.searchsorted(starts, ends + width, side="right")
    count = np.maximum(past - first, 0)
    above = np.repeat(np.arange(len(starts)), count)
    offset = np.arange(len(above)) - np.repeat(count.cumsum() - count, count)
    return starts, ends, _joined(len(starts), above, np.repeat(first, count) + offset)


def _joined(count: int, first: Any, second: Any) -> Any:
    """Return the component of each of `count` nodes, given edges first - second: its least node."""
    least = np.arange(count)
    while True:
        low = np.minimum(least[first], least[second])
        if (low == least[first]).all() and (low == least[second]).all():
            return least
        np.minimum.at(least, least[first], low)
        np.minimum.at(least, least[second], low)
        while (least[least] != least).any():
            least = least[least]
