"""How a multiprocessor's memory is divided between its L1 cache and shared memory, kernel by kernel.

The driver divides it by what a kernel asks for, and a kernel that wants another division waits until the last program
of the one before has left. Matrix products want nearly all as shared memory; small kernels between them, left to
themselves, little. Where all ask for the same, the next kernel's programs come up while the last ones of this finish.
"""

import ctypes
import logging
from functools import cache

_log = logging.getLogger("birkhoff.kernels")

_PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver API (cuda.h)."""

_ALL = 100
"""Percent of what can be shared memory."""


def prefer_shared(function: int) -> None:
    """Ask for as much shared memory as there is while a kernel runs, by its CUfunction.

    A hint: a driver that does not take it is named in the log, and divides as it always did.
    """
    driver = _driver()
    if driver is None:
        return
    status = driver.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, _ALL)
    if status:
        _log.warning("the driver takes no preference for shared memory (CUresult %d)", status)


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None  # ROCm, or a system that calls it otherwise
