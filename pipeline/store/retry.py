"""A wrapper that repeats calls after transient errors, told by their class.

Every call of a store may be made twice (`store.base`), so whole calls are repeated: a write whose answer was lost finds
its own body and has succeeded. Transient are: no answer, a conflict of two writers, and a body that fails the store's
own checksum. All other errors are permanent. The clients below send each request once (`s3.connect`), so `attempts` of
the settings is the total number of tries.

Listings are not repeated here: a listing takes many requests, and only its store knows where it stopped. So stores
call `persist` for each page, which applies the same policy.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from birkhoff.pipeline.backoff import Backoff
from birkhoff.pipeline.errors import IntegrityError, StoreConflictError, StoreUnreachableError
from birkhoff.pipeline.store.base import ObjectInfo, Store
from birkhoff.pipeline.store.wrapper import StoreWrapper

log: logging.Logger = logging.getLogger("birkhoff.store")

TRANSIENT = (StoreUnreachableError, StoreConflictError, IntegrityError)
"""Errors worth a retry."""

T = TypeVar("T")


def persist(call: Callable[[], T], attempts: int) -> T:
    """Return what `call` returns, after at most `attempts` tries. Raises its last error, or a permanent one at once."""
    backoff = Backoff(attempts)
    while True:
        try:
            return call()
        except TRANSIENT as error:
            _give_up_or_wait(backoff, error)


def _give_up_or_wait(backoff: Backoff, error: Exception) -> None:
    """Wait before the next try, or raise the error if it was the last."""
    log.debug("%s", error)
    if backoff.again(getattr(error, "retry_after", None)):
        return
    if backoff.failures > 1:
        error.args = (f"{error} ({backoff.failures} attempts)", *error.args[1:])
    raise error


class RetryingStore(StoreWrapper):
    """Makes each call of `inner` up to `attempts` times."""

    def __init__(self, inner: Store, attempts: int) -> None:
        super().__init__(inner)
        self._attempts = attempts

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        return persist(lambda: self.inner.get(key, start=start, length=length), self._attempts)

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """See Store. Continues where it broke off: no byte is handed on twice."""
        backoff, done, ours = Backoff(self._attempts), 0, False

        def count(piece: memoryview) -> None:
            nonlocal done, ours
            ours = True  # an error of the sink is the caller's, whatever its class
            sink(piece)
            ours = False
            done += len(piece)

        while True:
            try:
                self.inner.copy_range(key, buffer, count, start=start + done, length=length - done)
            except TRANSIENT as error:
                if ours:
                    raise
                _give_up_or_wait(backoff, error)
            else:
                return done

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        return persist(lambda: self.inner.read(key, length=length), self._attempts)

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        return persist(lambda: self.inner.put(key, body), self._attempts)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        return persist(lambda: self.inner.create(key, body), self._attempts)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        return persist(lambda: self.inner.replace(key, body, tag=tag), self._attempts)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return persist(lambda: self.inner.head(key), self._attempts)

    def touch(self, key: str) -> None:
        """See Store."""
        persist(lambda: self.inner.touch(key), self._attempts)

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store. Under a permit it is sent once: the caller knows what a lost answer may mean."""
        if permit is not None:
            self.inner.delete(key, permit=permit)
            return
        persist(lambda: self.inner.delete(key), self._attempts)

    def permit(self, now: datetime, *, witness: str) -> str:
        """See Store."""
        return persist(lambda: self.inner.permit(now, witness=witness), self._attempts)
