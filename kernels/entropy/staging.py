"""Copy bytes from host memory to a GPU through a few pieces of pinned memory that are kept.

A copy from memory that is not pinned waits for all kernels before it and runs at a seventh of the speed. Pinning the
memory takes longer than either. So bytes go through pinned pieces: several threads fill some of them while the GPU
copies others.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.native.library import pointer
from birkhoff.kernels.entropy.plan import Run, bytes_of

_PIECE = 4 << 20
_PIECES = 8

Part = tuple[int, Tensor]
"""A position, and the bytes that go there: uint8 [n] on the CPU."""

_Piece = tuple[Tensor, torch.cuda.Event]
"""Pinned memory, and the event after which nothing reads it."""


class Stage:
    """The pinned pieces of one device. Any thread may use it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: SimpleQueue[_Piece] = SimpleQueue()
        self._made = 0

    def send(self, parts: Sequence[Part], out: Tensor) -> None:
        """Copy parts, in the order of their places, to `out` (uint8) on the device. Bytes between them are undefined.

        The parts can be freed as soon as this returns. The copies are ordered in the current stream.
        """
        with torch.cuda.device(self._device):
            first = 0
            for begin in range(0, out.numel(), _PIECE):
                end = min(begin + _PIECE, out.numel())
                piece, sent = self._take()
                try:
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
                finally:
                    self._free.put((piece, sent))

    def _take(self) -> _Piece:
        """Return a piece that nothing reads any more and that no other thread has."""
        with self._lock:
            new = self._made < _PIECES
            self._made += new
        if new:
            try:
                return torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
            except BaseException:
                with self._lock:
                    self._made -= 1
                raise
        piece = self._free.get()
        piece[1].synchronize()
        return piece


@cache
def _stage(device: torch.device) -> Stage:
    return Stage(device)


def send(parts: Sequence[Part], size: int, device: torch.device) -> Tensor:
    """Place parts at their offsets in uint8 [size] on a device. Offsets must increase. Bytes between are undefined.

    On a GPU the copies are queued. Pinned parts are copied directly and must not change until then.
    """
    out = torch.empty(size, dtype=torch.uint8, device=device)
    send_into(out, parts)
    return out


def send_into(out: Tensor, parts: Sequence[Part]) -> None:
    """Place parts as `send` does, in memory that exists already."""
    if out.device.type != "cuda":
        for place, part in parts:
            out[place : place + part.numel()] = part
        return
    straight = [part.is_pinned() for _, part in parts]
    if not any(straight):
        _stage(out.device).send(parts, out)
        return
    for (place, part), pinned in zip(parts, straight, strict=True):
        there = out[place : place + part.numel()]
        if pinned:
            there.copy_(part, non_blocking=True)
        else:
            _stage(out.device).send([(0, part)], there)


class Upload:
    """Containers that threads send to a device, each to its place in one piece of memory there.

    They are sent beside what the device computes, and decoded beside it too, on a stream for each.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.data: Tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.runs: list[Run] = []
        """The containers: host memory whose bytes are in `data`."""
        self._sent: list[torch.cuda.Event] = []
        self._streams = _streams(self.data.device) if self.data.is_cuda else None
        if self._streams is not None:
            _stage(self.data.device)  # threads would make several
            for stream in self._streams:  # the memory may still be in use for what was computed before
                stream.wait_stream(torch.cuda.current_stream(self.data.device))
                self.data.record_stream(stream)

    def send(self, blob: bytes, to: int) -> None:
        """Send a container to the offset `to`. For any thread; it must stay in memory as long as its tensors do."""
        run = Run(address=pointer(np.frombuffer(blob, np.uint8)), size=len(blob), to=to)
        parts = [(0, torch.from_numpy(bytes_of(run)))]
        there = self.data[to : to + len(blob)]
        if self._streams is None:
            send_into(there, parts)
        else:
            with torch.cuda.stream(self._streams[0]):
                send_into(there, parts)
                event = torch.cuda.Event()
                event.record()
            self._sent.append(event)
        self.runs.append(run)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside the block kernels are queued on the stream for decoding, after all that was sent."""
        if self._streams is None:
            yield
            return
        with torch.cuda.stream(self._streams[1]):
            for event in self._sent:
                event.wait()
            yield


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies, and for decoding."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
