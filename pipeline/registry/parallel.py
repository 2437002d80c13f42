"""Concurrent requests to a store."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8
"""Requests at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the result of `ask` for each item, in order. All calls have ended when it returns or raises."""
    todo = list(items)
    if THREADS == 1 or len(todo) < 2:
        return [ask(item) for item in todo]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, todo))
