"""Trying again: a wrapper that repeats a call whose failure may pass, by the class of its error.

Every call of a store may be made twice (`store.base`), so a whole call is what is repeated: a write whose answer was
lost finds its own body and has succeeded. What may pass is a store that does not answer, two writers that met, and a
body that fails the store's own checksum; every other error is for good. The client below makes each request once
(`s3.connect`), so the attempts of the settings are all there are.

Listings are not repeated here: one is many requests, and only its store knows where it stopped. `S3Store` repeats each
page by `persist`, under the same policy.
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
"""Errors that may pass."""

T = TypeVar("T")


def persist(call: Callable[[], T], attempts: int) -> T:
    """What `call` returns, after at most so many attempts. Raises its last error, or at once one that will not pass."""
    backoff = Backoff(attempts)
    while True:
        try:
            return call()
        except TRANSIENT as error:
            _give_up_or_wait(backoff, error)


def _give_up_or_wait(backoff: Backoff, error: Exception) -> None:
    """Wait before the next try, or raise the error of the last one."""
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
        """See Store. Goes on from where it broke off: no byte is handed on twice."""
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
        """See Store. Under a permit it is sent once: who holds that knows what an answer that was lost may mean."""
        if permit is not None:
            self.inner.delete(key, permit=permit)
            return
        persist(lambda: self.inner.delete(key), self._attempts)

    def permit(self, now: datetime, *, witness: str) -> str:
        """See Store."""
        return persist(lambda: self.inner.permit(now, witness=witness), self._attempts)
