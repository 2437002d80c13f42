"""The Ray cluster that shards run on: one of our own for as long as a run takes, or one that is joined.

Our own has no dashboard, is never an existing one by accident, and leaves no process and no file behind, however the
driver ends (see `reaper`); with --debug its logs stay. Ray binds its ports to every interface and asks for a token
(`RAY_AUTH_MODE=token`, its default).

A joined one gets this package along with the job, so that all nodes run the driver's code. Its nodes need the
dependencies, the store's credentials in their own environment, and the checkpoints under the driver's paths (a shared
file system), since workers read their own ranges.
"""

import contextlib
import io
import logging
import os
import re
import signal
import socket
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import birkhoff
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.reaper import Reaper
from birkhoff.pipeline.source_types import first_line

log = logging.getLogger("birkhoff.cluster")

OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster started here: descriptors and records pass through it, never tensors."""

_KNOCK_SECONDS = 15.0
_HOST_PORT = re.compile(r"(ray://)?\[?(?P<host>[^\[\]/]+?)\]?:(?P<port>[0-9]{1,5})")


class Cluster(AbstractContextManager["Cluster"]):
    """A connection to a Ray cluster; `ray` is the module. Raises WorkerError where none can be had."""

    def __init__(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self.ray: Any = ray
        self._address = address
        self._reaper: Reaper | None = None
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(contextlib.redirect_stdout(_ToLog()))
        self._open()

    def _open(self) -> None:
        ray, address = self.ray, self._address
        try:
            with _signals_kept():
                if address is None:
                    self._start_patiently()
                else:
                    _knock(address)
                    _quiet_init(ray, address=address, runtime_env={"py_modules": [str(Path(birkhoff.__file__).parent)]})
        except BaseException as error:
            self.close()
            if isinstance(error, SystemExit):  # what Ray's handler makes of SIGTERM
                interrupt.stop(signal.SIGTERM)
            if not isinstance(error, Exception):
                raise
            interrupt.check()  # Ray's compiled parts turn an exception of the signal's handler into another one
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise WorkerError(f"cannot reach {where}: {first_line(error)}; try --executor inline") from None

    def _start_patiently(self) -> None:
        """Ray gives its own start 30 s, which no setting changes; on a machine under load a second try helps."""
        try:
            self._start()
        except Exception as error:
            interrupt.check()
            log.warning("Ray did not start (%s); trying once more", first_line(error))
            self._end()
            self._start()

    def _start(self) -> None:
        # Sockets lie deep below this folder and a socket's path has at most 107 bytes, so not below TMPDIR.
        folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"), f"bf-ray-{uuid.uuid4().hex[:12]}")
        debug = log.isEnabledFor(logging.DEBUG)
        log.debug("Ray's logs are in %s", folder)
        self._reaper = Reaper(None if debug else folder)
        folder.mkdir(mode=0o700)  # only now that it is looked after
        # Our workers have environments of their own, so what Ray starts beforehand serves nobody; and if one of those
        # dies while it starts, the raylet never answers the driver.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 they starve beside anybody else's work
        with self._reaper.covering():
            _quiet_init(
                self.ray,
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )

    def lost(self) -> bool:
        """Whether the node that was started here has died. The nodes of a joined cluster are looked after there."""
        return self._address is None and not any(node["Alive"] for node in self.ray.nodes())

    def restart(self) -> None:
        """End what is left of the cluster that was started here, and start another one. Raises WorkerError."""
        self._end()
        self._open()

    def close(self) -> None:
        """Leave the cluster, or end it."""
        with self._quiet:
            self._end()

    def _end(self) -> None:
        try:
            self.ray.shutdown()
        finally:
            reaper, self._reaper = self._reaper, None
            if reaper is not None:
                reaper.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for ten minutes."""
    found = _HOST_PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found["host"], int(found["port"])), timeout=_KNOCK_SECONDS).close()


class _ToLog(io.TextIOBase):
    """Takes the place of standard output while Ray runs: it prints there what its nodes report, between our JSON."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("Ray: %s", text.strip())
        return len(text)


def _quiet_init(ray: Any, **settings: Any) -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts handlers of its own for SIGTERM: one that exits, then a compiled one that aborts, until this ends."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: Ray could not put one either
            signal.signal(signal.SIGTERM, before)
