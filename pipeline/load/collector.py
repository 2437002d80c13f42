"""Pause Python's cyclic garbage collector while a model is loaded."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_paused = 0
_was_enabled = False


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep the collector from running inside the block; blocks of several threads may overlap.

    A load makes tens of thousands of objects that stay. They set off a search through everything that torch and Triton
    have made, which takes 0.1 s and finds nothing.
    """
    global _paused, _was_enabled
    with _LOCK:
        if not _paused:
            _was_enabled = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _LOCK:
            _paused -= 1
            if not _paused and _was_enabled:
                gc.enable()
