"""A progress bar for transfers, in a terminal or a notebook."""

import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from birkhoff.pipeline.notebook import in_notebook
from birkhoff.pipeline.text import printable, size

_PAUSE_SECONDS = 0.2
"""Seconds between two drawings in a notebook."""


@contextmanager
def transferring(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal's standard error or in a notebook. The function it yields is thread-safe."""
    if not quiet and in_notebook():
        with _notebook_bar(label, total) as advance:
            yield advance
        return
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)

        def advance(nbytes: int) -> None:
            bar.update(task, advance=nbytes)

        yield advance


class Display:
    """An output of a notebook cell that is redrawn in place; `text` serves frontends without HTML."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0

    def draw(self, html: str, text: str, *, last: bool = False) -> None:
        """Replace the output, at most a few times per second, except for the last time."""
        now = time.monotonic()
        if not last and now - self._drawn < _PAUSE_SECONDS:
            return
        self._drawn = now
        from IPython.display import display

        bundle = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


@contextmanager
def _notebook_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    shown, lock, here = Display(), threading.Lock(), 0

    def show(*, last: bool = False) -> None:
        text = f"{printable(label)}: {size(here)} of {size(total)}"
        shown.draw(f"<progress value='{here}' max='{max(total, 1)}'></progress> {html.escape(text)}", text, last=last)

    def advance(nbytes: int) -> None:
        nonlocal here
        with lock:
            here += nbytes
            # A notebook takes output of a cell's own thread alone; the others are counted with its next.
            if threading.current_thread() is threading.main_thread():
                show()

    show()
    try:
        yield advance
    finally:
        show(last=True)
