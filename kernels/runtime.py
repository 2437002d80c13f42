"""Which way an op runs: its Triton kernel, or the eager reference in `birkhoff.codec`.

Triton serves CUDA tensors on compute capability 8.0 and above, once a trial decode of all 65536 step numbers has
given the reference's bits on that very device. Everything else runs eagerly, and says so once in the log
`birkhoff.kernels`: for information where there is no GPU, as a warning where one stands idle. No op ever changes its
result for speed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

HAS_TRITON = find_spec("triton") is not None
"""Whether the Triton package is installed; the modules `*_triton` may only be imported if so."""

MINIMUM_CAPABILITY = (8, 0)
"""bfloat16 arithmetic and asynchronous copies begin here."""

_GPU_FILES = (Path("/dev"), "nvidia[0-9]*"), (Path("/dev"), "dxg"), (Path("/dev"), "kfd")
"""Device files of NVIDIA's driver, of Windows' for Linux guests, and of AMD's."""

_log = logging.getLogger("birkhoff.kernels")
_interpreting = False


def triton_serves(device: torch.device) -> bool:
    """Whether the Triton kernels run for tensors on `device`; logs the reason once where they do not."""
    if device.type == "cpu" and _interpreting:
        return True
    return _serves(device.type, device.index)


def is_interpreting() -> bool:
    """Whether the kernels run for CPU tensors too (see `interpreting`)."""
    return _interpreting


@cache
def pdl(device: torch.device) -> bool:
    """Whether kernels can be launched while the one before still runs (Hopper and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_two(count: int) -> int:
    """The least power of two that is no less than `count`, which is positive."""
    return 1 << (count - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def interpreting() -> Iterator[None]:
    """Run the kernels for CPU tensors too, under Triton's interpreter (`TRITON_INTERPRET=1` before the import)."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@cache
def _serves(kind: str, index: int | None) -> bool:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    reason = obstacle(device)
    if reason is not None:
        # Where there is no GPU nothing is amiss; where there is one, it stands idle.
        level = logging.WARNING if torch.cuda.is_available() or gpu_in_sight() else logging.INFO
        _log.log(level, "kernels on %s run eagerly: %s", device, reason)
    return reason is None


def gpu_in_sight() -> bool:
    """Whether this machine has a GPU that the process is not told to leave alone, whether or not torch can use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(next(folder.glob(pattern), None) is not None for folder, pattern in _GPU_FILES)


def obstacle(device: torch.device) -> str | None:
    """Why Triton does not serve `device`, or None."""
    if device.type != "cuda":
        if torch.cuda.is_available():
            return "the tensors are not on the GPU"
        if not gpu_in_sight():
            return "no CUDA device"
        return f"there is a GPU, but torch {torch.__version__} cannot use it; see that torch is built for its driver"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    return _trial(device)


def _trial(device: torch.device) -> str | None:
    """Decode every step number on `device` and compare with the reference."""
    from birkhoff.kernels import decode_triton, reference

    theta = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(64, 1024)
    step = torch.tensor(0.0123)
    expected = reference.decode(theta, step, 2048, torch.float32)
    try:
        theta, step = theta.to(device), step.to(device)
        # Twice: the second launch takes the short way of `prepared`.
        first, second = (decode_triton.decode(theta, step, 2048, torch.float32) for _ in range(2))
        same = torch.equal(first.cpu(), expected) and torch.equal(second.cpu(), expected)
    except Exception as error:  # a missing compiler, an old driver: whatever it is, the reference still works
        return f"Triton failed on a trial decode ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return None if same else "a trial decode differs from the reference"
