"""Show a run's progress on standard error, live in a terminal and as plain lines elsewhere, and log its events."""

import logging
import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.live import Live

from birkhoff.pipeline.progress.state import FleetProgress
from birkhoff.pipeline.progress.view import FleetView
from birkhoff.pipeline.text import printable

log: logging.Logger = logging.getLogger("birkhoff.run")

LINE_SECONDS = 30.0
"""Seconds between two lines about the fleet outside a terminal."""


class Progress(AbstractContextManager["Progress"]):
    """Follows a fleet, counted in source bytes and shards. With `quiet` nothing is shown, but events are still logged.

    `downloaded` may be called from any thread, the other methods from one.
    """

    def __init__(self, console: Console, *, models: int, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self.state: FleetProgress = FleetProgress(models=models)
        self._downloads: dict[str, tuple[int, int | None]] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, get_renderable=self.view, refresh_per_second=6)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def view(self) -> FleetView:
        """Return the present view for the terminal."""
        with self._lock:
            return FleetView(self.state, dict(self._downloads))

    def downloaded(self, file: str, here: int, total: int | None) -> None:
        """Record how many bytes of a source file have arrived."""
        with self._lock:
            first = file not in self._downloads
            self._downloads[file] = (here, total)
        if first:
            log.info("download", extra={"file": file, "bytes": total})
            self._line(f"downloading {file}" + (f", {total} bytes" if total else ""))

    def planned(self, model: str, nbytes: int, status: str | None, *, shards: int = 0) -> None:
        """Record that a model was planned. `status` is set if there is nothing to do for it."""
        self.state.plan(model, nbytes, shards, status)
        log.info("planned", extra={"model": model, "bytes": nbytes, "shards": shards})
        if status is not None:
            self._ended(model, status)

    def advanced(self, model: str, nbytes: int, status: str | None, *, reused: bool = False) -> None:
        """Record that a shard of `nbytes` source bytes ended. `status` is set if that ended its model."""
        self.state.advance(model, nbytes, status, reused=reused)
        log.info("shard", extra={"model": model, "bytes": nbytes, "reused": reused})
        if status is not None:
            self._ended(model, status)
        elif time.monotonic() - self._said > LINE_SECONDS:
            self._line(self.state.summary())

    def _ended(self, model: str, status: str) -> None:
        log.info("model", extra={"model": model, "status": status, "seconds": round(self.state.seconds, 2)})
        self._line(f"{self.state.done}/{self.state.models} {model}: {status}")

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        if not self._quiet and self._live is None:
            self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
