"""Choose how an op runs: by its Triton kernel, or by the eager reference in `birkhoff.codec`.

Triton is used for CUDA tensors on compute capability 8.0 and above, once a trial decode of all 65536 step numbers on
that device has matched the reference bit for bit. Everything else runs eagerly, which the log `birkhoff.kernels` says
once: as information on a machine without GPU, as a warning if a GPU is unused. No op changes its result for speed.
"""

import logging
import threading
from functools import cache

import torch

from birkhoff.kernels.runtime import device as runtime

_LOCK = threading.Lock()
_log = logging.getLogger("birkhoff.kernels")


def triton_serves(device: torch.device) -> bool:
    """Return whether the Triton kernels run for tensors on `device`. If not, the reason is logged once."""
    if device.type == "cpu" and runtime.is_interpreting():
        return True
    with _LOCK:  # threads would run the trial several times
        return _serves(runtime.indexed(device))


@cache
def _serves(device: torch.device) -> bool:
    reason = obstacle(device)
    if reason is not None:
        # A machine without GPU is fine. An unused GPU is worth a warning.
        level = logging.WARNING if torch.cuda.is_available() or runtime.gpu_in_sight() else logging.INFO
        _log.log(level, "kernels on %s run eagerly: %s", device, reason)
    return reason is None


def obstacle(device: torch.device) -> str | None:
    """Return why Triton does not support `device`, or None."""
    if device.type != "cuda":
        if torch.cuda.is_available():
            return "the tensors are not on the GPU"
        if not runtime.gpu_in_sight():
            return "no CUDA device"
        return f"there is a GPU, but torch {torch.__version__} cannot use it; see that torch is built for its driver"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    if not runtime.HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < runtime.MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    return _trial(device)


def _trial(device: torch.device) -> str | None:
    """Decode every step number on `device` and compare with the reference. Returns the difference, or None."""
    from birkhoff.codec import reference
    from birkhoff.kernels.decode import triton as decode_triton
    from birkhoff.kernels.runtime.triton_key import keep_triton_key

    keep_triton_key()
    theta = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(64, 1024)
    step = torch.tensor(0.0123, dtype=torch.float32)
    expected = reference.decode(theta, step, 2048, torch.float32)
    try:
        theta, step = theta.to(device), step.to(device)
        # Twice, because the second launch takes the fast path of `prepared`.
        first, second = (decode_triton.decode(theta, step, 2048, torch.float32) for _ in range(2))
        same = torch.equal(first.cpu(), expected) and torch.equal(second.cpu(), expected)
    except Exception as error:  # a missing compiler, an old driver: the reference still works
        return f"Triton failed on a trial decode ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return None if same else "a trial decode differs from the reference"
