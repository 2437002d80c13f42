"""A few threads for work that releases the interpreter's lock: native functions, zstd."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import TypeVar

from birkhoff.codec.native.processors import processors

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 8
_FEW = 8
"""Number of items that are not worth sharing between threads."""


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work` of each item, in order. Several threads share the items if there are many."""
    if len(items) <= _FEW:
        return list(map(work, items))
    share = -(-len(items) // (2 * _MOST_THREADS))
    parts = [items[first : first + share] for first in range(0, len(items), share)]
    return list(chain.from_iterable(_pool(os.getpid()).map(lambda part: list(map(work, part)), parts)))


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # noqa: ARG001  a process that was forked has no threads of its parent's
    return ThreadPoolExecutor(min(_MOST_THREADS, processors()), "codec")
