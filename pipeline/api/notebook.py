"""Progress of a run in a notebook: the terminal's view, redrawn in the output of the cell."""

import io

from rich.console import Console

from birkhoff.pipeline.api.transfer import Display
from birkhoff.pipeline.progress.progress import Progress

_WIDTH = 110
"""Width of the view, in columns."""


class NotebookProgress(Progress):
    """Redraws when the run advances, in the thread of the run, because only that may write to the cell's output."""

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
    """Return a console that records; rich would otherwise open an output of its own (`force_jupyter`)."""
    return Console(
        file=io.StringIO(),
        record=True,
        width=_WIDTH,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
    )
