"""A least speed for what comes over the network: a byte now and then keeps time-outs quiet, and a caller for days.

A read time-out bounds the wait for the next byte. Here the bytes of a stretch are counted as well: one as long as the
time-out that brings less than 1 KiB a second ends the answer with a SlowError, and is tried again as a broken
connection is (the rule of curl's --speed-limit and --speed-time). It holds for heads, bodies and listings alike, where
`http.client` reads them from the socket, below urllib3, requests and botocore. Only waiting counts, not what the reader
does meanwhile; nor does the wait for the first byte, in which a server may work.

It is no wrapper of a store, as retries are (`retry`). A call of a store is whole: `get`, `read` and `list` return when
all is there, so a wrapper could bound their time alone, and a large body over a slow line takes long by right. Nor can
it end them: a thread that waits in a socket's read comes back with that read alone. Only `copy_range` shows bytes as
they come, and its first piece comes as late as the buffer is large.
"""

import http.client
import io
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from urllib3 import HTTPConnectionPool

if TYPE_CHECKING:
    import requests

LEAST_SPEED = 1024
"""Bytes a second."""


class SlowError(OSError):
    """The other side sends, but next to nothing."""


class Pace:
    """The speed of one answer, looked at whenever `seconds` were spent waiting for it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waited, self._nbytes = 0.0, 0

    def took(self, nbytes: int, seconds: float) -> None:
        """So many bytes came after a wait of so long. Raises SlowError."""
        self._waited += seconds
        self._nbytes += nbytes
        if self._waited < self._seconds:
            return
        if self._nbytes < LEAST_SPEED * self._waited:
            got, speed = f"only {self._nbytes} bytes came in {self._waited:.1f} s", self._nbytes / self._waited
            raise SlowError(f"{got}, {speed:.0f} bytes a second where {LEAST_SPEED} are the least")
        self._waited, self._nbytes = 0.0, 0


class PacedResponse(http.client.HTTPResponse):
    """An answer that is held to its pace; `pace` goes on for who reads from the socket itself."""

    def __init__(self, sock: socket.socket, *arguments: Any, seconds: float, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.pace: Pace = Pace(seconds)
        self.fp: io.BufferedReader = io.BufferedReader(_PacedReader(self.fp.detach(), self.pace))


class _PacedReader(io.RawIOBase):
    """A socket's reader that tells `pace` what came."""

    def __init__(self, inner: io.RawIOBase, pace: Pace) -> None:
        self._inner, self._pace = inner, pace
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """See io.RawIOBase. Raises SlowError."""
        since = time.monotonic()
        count: int | None = self._inner.readinto(buffer)
        if self._begun and count:
            self._pace.took(count, time.monotonic() - since)
        self._begun = True
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()


def paced(pool: type[HTTPConnectionPool], seconds: float) -> type[HTTPConnectionPool]:
    """The class of urllib3's connection pools whose answers are held to their pace."""
    answer = staticmethod(partial(PacedResponse, seconds=seconds))
    connection = type(f"Paced{pool.ConnectionCls.__name__}", (pool.ConnectionCls,), {"response_class": answer})
    return type(f"Paced{pool.__name__}", (pool,), {"ConnectionCls": connection})


def pace_pools(classes: dict[str, Any], seconds: float) -> None:
    """Put them in the place of a pool manager's classes by scheme."""
    classes.update({scheme: paced(pool, seconds) for scheme, pool in classes.items()})


def pace_session(session: "requests.Session", seconds: float, connections: int = 10) -> None:
    """Hold all answers to a session of requests to their pace, also those by way of proxies."""
    from requests.adapters import HTTPAdapter  # takes 0.2 s, and S3 needs none of it

    class PacedAdapter(HTTPAdapter):
        def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
            super().init_poolmanager(*arguments, **options)
            self._pace(self.poolmanager)

        def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
            known = proxy in self.proxy_manager
            manager = super().proxy_manager_for(proxy, **options)
            return manager if known else self._pace(manager)

        @staticmethod
        def _pace(manager: Any) -> Any:
            manager.pool_classes_by_scheme = dict(manager.pool_classes_by_scheme)  # the library's own is everybody's
            pace_pools(manager.pool_classes_by_scheme, seconds)
            return manager

    for scheme in ("https://", "http://"):
        session.mount(scheme, PacedAdapter(pool_maxsize=connections))


def slowness(error: BaseException) -> SlowError | None:
    """The SlowError that a library made another error of."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, SlowError):
        seen = seen.__cause__ or seen.__context__
    return seen
