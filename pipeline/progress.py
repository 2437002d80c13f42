"""Progress of a run: a live view in a terminal, plain lines elsewhere, on standard error; and its events to the log."""

import logging
import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from birkhoff.pipeline.progress_state import FleetProgress
from birkhoff.pipeline.progress_view import FleetView

log = logging.getLogger("birkhoff.run")

LINE_SECONDS = 30.0
"""Where there is no terminal, a line says how far the fleet is at most this often."""


class Progress(AbstractContextManager["Progress"]):
    """Follows a fleet, counted in source bytes and shards. `quiet` shows nothing; the log gets its events all the same.

    `downloaded` may be called from any thread, the other methods from one.
    """

    def __init__(self, console: Console, *, models: int, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self.state = FleetProgress(models=models)
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
        """What the terminal shows now."""
        with self._lock:
            return FleetView(self.state, dict(self._downloads))

    def downloaded(self, file: str, here: int, total: int | None) -> None:
        """Of a source file so many bytes are here."""
        with self._lock:
            first = file not in self._downloads
            self._downloads[file] = (here, total)
        if first:
            log.info("download", extra={"file": file, "bytes": total})
            self._line(f"downloading {file}" + (f", {total} bytes" if total else ""))

    def planned(self, model: str, nbytes: int, status: str | None, *, shards: int = 0) -> None:
        """A model's header was read; `status` is set if nothing is to be done for it."""
        self.state.plan(model, nbytes, shards, status)
        log.info("planned", extra={"model": model, "bytes": nbytes, "shards": shards})
        if status is not None:
            self._ended(model, status)

    def advanced(self, model: str, nbytes: int, status: str | None, *, reused: bool = False) -> None:
        """A shard of `nbytes` source bytes ended; `status` is set if its model ended with it."""
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
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class Transfer(AbstractContextManager["Transfer"]):
    """One bar for bytes on their way; nothing where there is no terminal."""

    def __init__(self, console: Console, label: str, total: int, *, quiet: bool = False) -> None:
        self._console, self._label, self._total = console, label, total
        self._live = console.is_terminal and not quiet
        self._lock = threading.Lock()
        self._bar: Bars | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Transfer":
        if self._live:
            columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bars(TextColumn("{task.description}"), *columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, nbytes: int) -> None:
        """So many bytes more are here, or fewer where negative; may be called from any thread."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(self._task, advance=nbytes)
