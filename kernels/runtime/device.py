"""The capabilities of a device, and whether the kernels run under Triton's interpreter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

HAS_TRITON = find_spec("triton") is not None
"""Whether the Triton package is installed. Modules named `triton` may be imported only then."""

MINIMUM_CAPABILITY = (8, 0)
"""The first capability with bfloat16 arithmetic and asynchronous copies."""

_GPU_FILES = (Path("/dev"), "nvidia[0-9]*"), (Path("/dev"), "dxg"), (Path("/dev"), "kfd")
"""Device files of NVIDIA's driver, of Windows' driver for Linux guests, and of AMD's."""

_interpreting = False


def is_interpreting() -> bool:
    """Return whether the kernels also run for CPU tensors (see `interpreting`)."""
    return _interpreting


def indexed(device: torch.device) -> torch.device:
    """Return a device as its tensors report it: `cuda:0` for `cuda`."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@cache
def pdl(device: torch.device) -> bool:
    """Return whether a kernel can be launched while the previous one still runs (Hopper and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count`, which is positive."""
    return 1 << (count - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def interpreting() -> Iterator[None]:
    """Run the kernels for CPU tensors too, under Triton's interpreter (set `TRITON_INTERPRET=1` before the import)."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def gpu_in_sight() -> bool:
    """Return whether this machine has a GPU that is not hidden from the process, even if torch cannot use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(next(folder.glob(pattern), None) is not None for folder, pattern in _GPU_FILES)
