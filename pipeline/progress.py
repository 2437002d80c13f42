"""Progress of a run: bars in a terminal, plain lines elsewhere, on standard error either way."""

import threading
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

_MARKS = {"published": "[green]published[/]", "up to date": "[dim]up to date[/]", "failed": "[red]failed[/]"}


class Progress(AbstractContextManager["Progress"]):
    """One bar for the fleet and one per model, counted in source bytes."""

    def __init__(self, console: Console, *, models: int, quiet: bool = False) -> None:
        self._console, self._models, self._quiet = console, models, quiet
        self._live = console.is_terminal and not quiet
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._downloads: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._fleet: TaskID | None = None
        self._done = 0

    def __enter__(self) -> "Progress":
        if self._live:
            self._bars.start()
            self._fleet = self._bars.add_task("[bold]fleet", total=0, note=f"0/{self._models} models")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._bars.stop()

    def downloaded(self, file: str, here: int, total: int | None) -> None:
        """Of a source file so many bytes are here; may be called from any thread."""
        with self._lock:
            first = file not in self._downloads
            if self._live:
                if first:
                    self._downloads[file] = self._bars.add_task(f"[dim]{file}", total=total, note="download")
                self._bars.update(self._downloads[file], completed=here, total=total)
            elif first:
                self._downloads[file] = TaskID(0)
                self._line(f"downloading {file}" + (f", {total} bytes" if total else ""))

    def planned(self, model: str, nbytes: int, status: str | None) -> None:
        """A model's header was read; `status` is set if nothing is to be done for it."""
        if self._live:
            total = self._bars.tasks[0].total or 0
            self._bars.update(TaskID(0), total=total + nbytes)
            self._tasks[model] = self._bars.add_task(model, total=nbytes, note="")
        if status is not None:
            self.advanced(model, nbytes, status)

    def advanced(self, model: str, nbytes: int, status: str | None) -> None:
        """A shard of `nbytes` source bytes ended; `status` is set if its model ended with it."""
        self._done += status is not None
        if self._live and self._fleet is not None:
            self._bars.update(self._tasks[model], advance=nbytes, note=_MARKS.get(status or "", ""))
            self._bars.update(self._fleet, advance=nbytes, note=f"{self._done}/{self._models} models")
        elif status is not None:
            self._line(f"{self._done}/{self._models} {model}: {status}")

    def _line(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False)


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
