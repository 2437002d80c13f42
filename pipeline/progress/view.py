"""The live view of a run in a terminal: the fleet on top, one line per model, downloads at the bottom."""

from collections import Counter
from collections.abc import Mapping

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from birkhoff.pipeline.progress.state import FleetProgress, ModelProgress, clock_time
from birkhoff.pipeline.text import size

_MARKS = {
    "published": ("●", "green"),
    "up to date": ("○", "dim"),
    "failed": ("✕", "bold red"),
    "working": ("◐", "cyan"),
    "waiting": ("·", "dim"),
}
_ORDER = ("failed", "working", "waiting", "published", "up to date")
"""Which models are shown first if the terminal has too few lines."""

_FRAME_LINES = 6
"""Lines that are not models', including one that the terminal keeps free."""

Downloads = Mapping[str, tuple[int, int | None]]
"""By file: bytes that have arrived, and the size if it is known."""


class FleetView:
    """A view of the given state. Make a new one for every redraw."""

    def __init__(self, state: FleetProgress, downloads: Downloads) -> None:
        self._state, self._downloads = state, downloads

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the head, the bar, as many models as fit, and the downloads."""
        running = {file: counts for file, counts in self._downloads.items() if counts[0] != counts[1]}
        height = options.height or console.height
        room = max(3, height - _FRAME_LINES - len(running))
        shown, hidden = _choose(list(self._state.planned.values()), room)
        parts: list[RenderableType] = [
            self._head(),
            _bar(self._state.done_bytes, self._state.nbytes, options.max_width),
            Text(),
        ]
        parts.append(_table(shown, running, options.max_width))
        if hidden:
            counts = Counter(state_of(model) for model in hidden)
            parts.append(Text("  and " + ", ".join(f"{counts[key]} {key}" for key in _ORDER if key in counts), "dim"))
        yield Group(*parts)

    def _head(self) -> Text:
        state = self._state
        speed, left = state.speed(), state.left()
        ended, shards = state.shards
        pieces = [
            (f"{state.done}/{state.models}", " models"),
            (f"{ended}/{shards}", " shards"),
            (f"{size(state.done_bytes)}", f" of {size(state.nbytes)}"),
            (f"{size(round(speed))}/s" if speed else "-", ""),
            (clock_time(state.seconds), " elapsed"),
            (clock_time(left) if left is not None else "-", " left"),
        ]
        head = Text(no_wrap=True, overflow="ellipsis")
        for index, (value, unit) in enumerate(pieces):
            head.append("   " if index else "")
            head.append(value, "bold").append(unit, "dim")
        return head


def state_of(model: ModelProgress) -> str:
    """Return a model's status, `working` or `waiting`."""
    return model.status or ("working" if model.done_shards else "waiting")


def _choose(models: list[ModelProgress], room: int) -> tuple[list[ModelProgress], list[ModelProgress]]:
    """Return (models that get a line, in their original order; the others)."""
    if len(models) <= room:
        return models, []
    ranked = sorted(models, key=lambda model: _ORDER.index(state_of(model)))
    kept = {model.name for model in ranked[: room - 1]}
    return [m for m in models if m.name in kept], [m for m in models if m.name not in kept]


def _table(models: list[ModelProgress], downloads: Downloads, width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=28)
    table.add_column(width=max(8, min(40, width - 72)))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for model in models:
        status = state_of(model)
        mark, style = _MARKS[status]
        done = model.nbytes if model.status else model.done_bytes
        note = f"{model.reused} shared" if model.reused else ""
        table.add_row(
            Text(f"{mark} {model.name}", style),
            _bar(done, model.nbytes, 40),
            f"{model.done_shards}/{model.shards}" if model.shards else "",
            Text(size(model.nbytes), "dim"),
            Text(" ".join(filter(None, (status if status != "working" else "", note))), style),
        )
    for file, (here, total) in downloads.items():
        shown = f"{size(here)}" + (f" of {size(total)}" if total else "")
        table.add_row(Text(f"↓ {file}", "magenta"), _bar(here, total or 0, 40), "", Text(shown, "dim"), "download")
    return table


def _bar(done: int, total: int, width: int) -> ProgressBar:
    return ProgressBar(
        total=total or 1,
        completed=done,
        width=width,
        complete_style="cyan",
        finished_style="green",
        style="grey30",
    )
