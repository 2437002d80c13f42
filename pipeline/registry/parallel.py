"""Concurrent requests to a store, and pools of threads that end early."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

THREADS = 8
"""Requests at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def pool(threads: int, name: str, *, initializer: Callable[[], object] | None = None) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads. At the end what has begun is waited for, and what has not is dropped: if the block
    raises, or the user asks to stop, results are no longer wanted."""
    with ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=initializer) as made:
        try:
            yield made
        finally:
            made.shutdown(cancel_futures=True)


def each(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the result of `ask` for each item, in order. All calls have ended when it returns or raises."""
    todo = list(items)
    if THREADS == 1 or len(todo) < 2:
        return [ask(item) for item in todo]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, todo))
