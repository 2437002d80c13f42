"""Bytes from host memory to a GPU, through a little pinned memory that is kept.

A copy from memory that is not pinned waits for all kernels before it, and runs at a seventh of the speed; pinning
memory takes longer than either. So bytes go through a ring of pinned pieces: one is filled while those before it are
under way.
"""

import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_PIECE = 8 << 20
_PIECES = 4

Part = tuple[int, Tensor]
"""Where bytes go, and they: uint8 [n] on the CPU."""


class Stage:
    """The ring of a device. For any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._pieces: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def send(self, parts: Sequence[Part], out: Tensor) -> None:
        """Copy parts, in the order of their places, to `out` (uint8) on the device; what is between is undefined.

        The parts can go as soon as this returns; the copies are in the order of the current stream.
        """
        with self._lock, torch.cuda.device(self._device):
            first = 0
            for begin in range(0, out.numel(), _PIECE):
                end = min(begin + _PIECE, out.numel())
                piece, sent = self._next()
                for place, part in parts[first:]:
                    if place >= end:
                        break
                    low, high = max(place, begin), min(place + part.numel(), end)
                    if low < high:
                        piece[low - begin : high - begin].copy_(part[low - place : high - place])
                    if place + part.numel() > end:
                        break
                    first += 1
                out[begin:end].copy_(piece[: end - begin], non_blocking=True)
                sent.record()

    def _next(self) -> tuple[Tensor, torch.cuda.Event]:
        """A piece that nothing is read from any more."""
        if len(self._pieces) < _PIECES:
            self._pieces.append((torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
            return self._pieces[-1]
        self._turn = (self._turn + 1) % _PIECES
        piece = self._pieces[self._turn]
        piece[1].synchronize()
        return piece


@cache
def _stage(device: torch.device) -> Stage:
    return Stage(device)


def send(parts: Sequence[Part], size: int, device: torch.device) -> Tensor:
    """Place parts at their offsets in uint8 [size] on a device. Offsets must increase; bytes between are undefined.

    On a GPU the copies are queued; parts that are pinned go straight, and must stay as they are until then.
    """
    out = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        for place, part in parts:
            out[place : place + part.numel()] = part
        return out
    straight = [part.is_pinned() for _, part in parts]
    if not any(straight):
        _stage(out.device).send(parts, out)
        return out
    for (place, part), pinned in zip(parts, straight, strict=True):
        there = out[place : place + part.numel()]
        if pinned:
            there.copy_(part, non_blocking=True)
        else:
            _stage(out.device).send([(0, part)], there)
    return out
