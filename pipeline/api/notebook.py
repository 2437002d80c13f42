"""A run's progress in a notebook: the view that a terminal has, drawn over itself in the cell's output."""

import io

from rich.console import Console

from birkhoff.pipeline.api.transfer import Display
from birkhoff.pipeline.run.progress import Progress

_WIDTH = 110
"""Columns of the view."""


class NotebookProgress(Progress):
    """Draws when the run has come further, in the thread that runs it: a cell's output belongs to that."""

    def __init__(self, *, models: int) -> None:
        super().__init__(_console(), models=models, quiet=True)
        self._display = Display()

    def planned(self, model: str, nbytes: int, status: str | None, *, shards: int = 0) -> None:
        """See Progress."""
        super().planned(model, nbytes, status, shards=shards)
        self._draw(last=status is not None)

    def advanced(self, model: str, nbytes: int, status: str | None, *, reused: bool = False) -> None:
        """See Progress."""
        super().advanced(model, nbytes, status, reused=reused)
        self._draw(last=status is not None)

    def _draw(self, *, last: bool) -> None:
        console = _console()
        console.print(self.view())
        html = console.export_html(inline_styles=True, clear=False, code_format="<pre>{code}</pre>")
        self._display.draw(html, console.export_text(), last=last)


def _console() -> Console:
    """One that records what it would draw; rich would show it as an output of its own (`force_jupyter`)."""
    return Console(
        file=io.StringIO(),
        record=True,
        width=_WIDTH,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
    )
