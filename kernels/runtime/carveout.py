"""Set how each kernel divides a multiprocessor's memory between L1 cache and shared memory.

The driver divides it by what a kernel requests. A kernel that needs another division waits until the last program of
the previous kernel has finished. Matrix products need nearly all of it as shared memory; by default the small kernels
between them request little. If all request the same, programs of the next kernel start while the last ones of this
kernel finish.
"""

import ctypes
import logging
from functools import cache

_log = logging.getLogger("birkhoff.kernels")

_PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver API (cuda.h)."""

_ALL = 100
"""Percent of the memory that can be shared."""


def prefer_shared(function: int) -> None:
    """Request the maximum of shared memory while a kernel runs. `function` is its CUfunction.

    This is a hint. If the driver does not accept it, we log that, and the driver's own division applies.
    """
    driver = _driver()
    if driver is None:
        return
    status = driver.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, _ALL)
    if status:
        _log.warning("the driver rejected the preference for shared memory (CUresult %d)", status)


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None  # ROCm, or a system with another name for the driver
