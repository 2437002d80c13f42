"""Minimum throughput of network reads: a peer that trickles bytes never trips a read timeout.

A read time-out bounds the wait for the next byte. Here the bytes of a period are counted too: if a period as long as
the time-out brings less than 1 KiB a second, the answer ends with a SlowError and is retried like a broken connection
(the rule of curl's --speed-limit and --speed-time). It covers heads, bodies and listings, because it sits where
`http.client` reads from the socket, below urllib3, requests and botocore. Only waiting counts, not the time that the
reader takes; nor does the wait for the first byte, when the server may be working.

It cannot be a wrapper of a store, as retries are (`retry`): `get`, `read` and `list` return only when everything has
arrived, so a wrapper could bound their total time alone, and a large body on a slow line takes long by right. It could
not end them either, because a thread that waits in a socket's read returns with that read only. `copy_range` does show
bytes as they arrive, but its first piece is as late as the buffer is large.
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
    """The peer sends, but less than the minimum."""


class Pace:
    """The throughput of one answer, checked whenever `seconds` were spent waiting for it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waited, self._nbytes = 0.0, 0

    def took(self, nbytes: int, seconds: float) -> None:
        """Account for bytes that arrived after a wait. Raises SlowError."""
        self._waited += seconds
        self._nbytes += nbytes
        if self._waited < self._seconds:
            return
        if self._nbytes < LEAST_SPEED * self._waited:
            got, speed = f"only {self._nbytes} bytes came in {self._waited:.1f} s", self._nbytes / self._waited
            raise SlowError(f"{got}, {speed:.0f} bytes a second; the minimum is {LEAST_SPEED}")
        self._waited, self._nbytes = 0.0, 0


class PacedResponse(http.client.HTTPResponse):
    """An answer with a minimum throughput. Code that reads from the socket directly must use `pace` too."""

    def __init__(self, sock: socket.socket, *arguments: Any, seconds: float, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.pace: Pace = Pace(seconds)
        self.fp: io.BufferedReader = io.BufferedReader(_PacedReader(self.fp.detach(), self.pace))


class _PacedReader(io.RawIOBase):
    """A socket's reader that reports to `pace`."""

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
    """Return a class of urllib3 connection pools whose answers have a minimum throughput."""
    answer = staticmethod(partial(PacedResponse, seconds=seconds))
    connection = type(f"Paced{pool.ConnectionCls.__name__}", (pool.ConnectionCls,), {"response_class": answer})
    return type(f"Paced{pool.__name__}", (pool,), {"ConnectionCls": connection})


def pace_pools(classes: dict[str, Any], seconds: float) -> None:
    """Replace a pool manager's classes by `paced` ones."""
    classes.update({scheme: paced(pool, seconds) for scheme, pool in classes.items()})


def pace_session(session: "requests.Session", seconds: float, connections: int = 10) -> None:
    """Give all answers of a requests session a minimum throughput, proxied ones too."""
    from requests.adapters import HTTPAdapter  # takes 0.2 s, and S3 does not need it

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
            manager.pool_classes_by_scheme = dict(manager.pool_classes_by_scheme)  # all managers share one dict
            pace_pools(manager.pool_classes_by_scheme, seconds)
            return manager

    for scheme in ("https://", "http://"):
        session.mount(scheme, PacedAdapter(pool_maxsize=connections))


def slowness(error: BaseException) -> SlowError | None:
    """Return the SlowError behind a library's error; None if there is none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, SlowError):
        seen = seen.__cause__ or seen.__context__
    return seen
