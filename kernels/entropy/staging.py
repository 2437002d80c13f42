"""Copy bytes from host memory to a GPU.

A copy from memory that is not pinned waits for the kernels before it and runs at a seventh of the speed. Making new
pinned memory takes longer than either, because one thread clears it: 3 ms for a piece, in which the driver copies 16 MB
by itself. So a few megabytes are left to the driver. Memory that threads have just filled is pinned in a tenth of that
time (11 GB/s on a host with an H200) and copied from where it is. Where the system refuses that, many bytes go through
pinned pieces that are kept: threads fill some of them while the GPU copies others.
"""

import contextlib
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec.native.library import pointer
from birkhoff.kernels.entropy.plan import Run
from birkhoff.kernels.runtime.device import indexed

_PIECE = 4 << 20
_PIECES = 8

_FEW_BYTES = 16 << 20
"""Bytes up to which a copy from where they are takes less time than new pinned memory, which is made at 1.5 GB/s."""

_ONE_COPY = 100_000
"""Bytes that are copied within host memory in the time that one more copy to a GPU takes to begin."""

_LOCK = threading.Lock()
"""Held while something is made for a device, so that threads make it once."""

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


def _stage(device: torch.device) -> Stage:
    with _LOCK:
        return _stage_of(device)


@cache
def _stage_of(device: torch.device) -> Stage:
    return Stage(device)


def send(parts: Sequence[Part], size: int, device: torch.device, *, kept: bool = False) -> Tensor:
    """Place parts at their offsets in uint8 [size] on a device. Offsets must increase. Bytes between are undefined.

    On a GPU copies from pinned memory are queued, so such parts must not change until then. With `kept`, no part may
    change or be freed until then, and no copy is waited for.
    """
    out = torch.empty(size, dtype=torch.uint8, device=device)
    send_into(out, parts, kept=kept)
    return out


def send_into(out: Tensor, parts: Sequence[Part], *, kept: bool = False) -> None:
    """Place parts as `send` does, in memory that exists already."""
    if out.device.type != "cuda":
        for place, part in parts:
            out[place : place + part.numel()] = part
        return
    few = out.numel() <= _FEW_BYTES
    if few and out.numel() < _ONE_COPY * len(parts):
        whole = torch.empty(out.numel(), dtype=torch.uint8)
        for place, part in parts:
            whole[place : place + part.numel()] = part
        parts, kept = [(0, whole)], False
    pinned = [part.is_pinned() for _, part in parts]
    if not few and not any(pinned):
        _stage(out.device).send(parts, out)
        return
    for (place, part), is_pinned in zip(parts, pinned, strict=True):
        there = out[place : place + part.numel()]
        if few or is_pinned:
            # The driver of a GPU that reads the host's memory by itself need not be done with it when this returns.
            there.copy_(part, non_blocking=is_pinned or kept)
        else:
            _stage(out.device).send([(0, part)], there)


class Upload:
    """Containers in one piece of host memory, and its copy on a device.

    Any threads fill `host`, then one calls `send`. The bytes are copied beside what the device computes, and decoded
    beside it too, on a stream for each.
    """

    def __init__(self, size: int, device: torch.device, ready: Callable[[], object] = lambda: None) -> None:
        """Make room for `size` bytes in host memory. `ready` is called before kernels are queued."""
        self.device: torch.device = indexed(device)
        # Whole pages are pinned, so nothing else may be in them.
        self._pages: npt.NDArray[np.uint8] = np.empty(size + 2 * mmap.PAGESIZE, dtype=np.uint8)
        first = -pointer(self._pages) % mmap.PAGESIZE
        self.host: npt.NDArray[np.uint8] = self._pages[first : first + size]
        """uint8 [size]; tensors of the containers are views of it."""
        self.data: Tensor = torch.from_numpy(self.host)
        """uint8 [size], on the device once they are sent."""
        self._ready = ready
        self._sent: torch.cuda.Event | None = None
        self._pinned: weakref.finalize[..., Any] | None = None

    @property
    def runs(self) -> list[Run]:
        """Host memory whose bytes are in `data`."""
        return [Run(address=pointer(self.host), size=self.host.nbytes, to=0)]

    def send(self) -> None:
        """Begin to copy `host`, which may not change any more, to the device."""
        if self.device.type != "cuda":
            return
        with torch.cuda.device(self.device):
            self.data = torch.empty(self.host.nbytes, dtype=torch.uint8, device=self.device)
            for stream in _streams(self.device):  # the memory may still be in use for what was computed before
                stream.wait_stream(torch.cuda.current_stream(self.device))
                self.data.record_stream(stream)
            self._sent = torch.cuda.Event()
            if self.host.nbytes >= _PIECE and _pin(self.host):
                self._pinned = weakref.finalize(self._pages, _unpin, pointer(self.host), self.device, self._sent)
                self._pinned.atexit = False
            part = torch.from_numpy(self.host)
            with torch.cuda.stream(_streams(self.device)[0]):
                if self._pinned is not None:
                    self.data.copy_(part, non_blocking=True)
                else:
                    send_into(self.data, [(0, part)])
                self._sent.record()

    def end(self) -> None:
        """Wait until all is copied, and unpin `host`. Without this call that happens when `host` is freed."""
        if self._pinned is not None:
            self._pinned()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside the block kernels are queued on the stream for decoding, after all that was sent."""
        self._ready()
        if self._sent is None:
            yield
            return
        with torch.cuda.stream(_streams(self.device)[1]):
            self._sent.wait()
            yield


def _pin(memory: npt.NDArray[np.uint8]) -> bool:
    """Pin memory that exists. Where the system refuses that, return False: then many bytes go through the pieces."""
    return _succeeded(torch.cuda.cudart().cudaHostRegister(pointer(memory), memory.nbytes, 0))


def _unpin(address: int, device: torch.device, copied: torch.cuda.Event) -> None:
    with torch.cuda.device(device):
        copied.synchronize()
        _succeeded(torch.cuda.cudart().cudaHostUnregister(address))


def _succeeded(error: object) -> bool:
    """Return whether a call of CUDA's succeeded. If not, the next kernel would be told of that error, so one is."""
    if int(error) == 0:  # type: ignore[call-overload]
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies, and for decoding."""
    with _LOCK:
        return _streams_of(device)


@cache
def _streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
