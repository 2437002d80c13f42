"""Tables on standard output, and the same rows as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from birkhoff.pipeline.cli.app import json_text, print_json
from birkhoff.pipeline.text import all_printable, fixed, pairs, printable, shape, short, significant, size, span

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]

_FRAME = 3
"""Cells that a column takes besides its text: two of padding and a line."""

_READABLE = 24
"""Width that texts are cut to before a column is left out."""

_LEAST_WIDTH = 8
"""Width that texts are cut to when no more columns can be left out."""

_MOST_TEXT = 60
"""Default limit for the width of a text; an error's line may be much longer."""

_MEASURED = 500
"""Largest number of rows drawn with lines, at a millisecond each; longer output has plain columns fitted to this
many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: heading, the row's key, and how to format the value."""

    title: str
    key: str
    form: Callable[[Any], str] = str
    right: bool = False
    rank: int = 0
    """Order in which a narrow terminal leaves columns out: the greatest first, 0 never."""
    most: int = _MOST_TEXT
    """Most cells of its text."""
    tail: bool = False
    """Cut long texts at the beginning, because the end of a tensor's name tells more."""
    whole: bool = False
    """Never cut it, as for an id."""


def groups(rows: Sequence[Row]) -> str:
    """Format tensors by action and reason, one line per group."""
    return "\n".join(
        f"{row['tensors']} {row['action']}" + (f": {row['reason']}" if row["reason"] else "") for row in rows
    )


VERSION_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="version", key="version"),
    Column(title="status", key="status"),
    Column(title="source", key="source_bytes", form=size, right=True, rank=3),
    Column(title="stored", key="stored_bytes", form=size, right=True, rank=2),
    Column(title="ratio", key="ratio", form=fixed(2), right=True, rank=1),
    Column(title="SQNR min dB", key="sqnr_db_min", form=fixed(2), right=True, rank=4),
    Column(title="median dB", key="sqnr_db_median", form=fixed(2), right=True, rank=6),
    Column(title="agreement", key="agreement_mean", form=fixed(3), right=True, rank=2),
    Column(title="seconds", key="seconds", form=fixed(1), right=True, rank=5),
    Column(title="digest", key="digest", form=short, rank=7, whole=True),
)
LABELS_COLUMN = Column(title="labels", key="labels", form=pairs, rank=6)
LIST_COLUMNS = (
    *(column for column in VERSION_COLUMNS if column.key not in ("status", "seconds")),
    Column(title="profile", key="profile", rank=5),
    Column(title="aliases", key="aliases", form=", ".join, rank=1),
    Column(title="created", key="created", rank=8, whole=True),
    LABELS_COLUMN,
    Column(title="problem", key="problem"),
)
TENSOR_COLUMNS = (
    Column(title="tensor", key="name", most=100, tail=True),
    Column(title="shape", key="shape", form=shape, right=True, rank=3),
    Column(title="dtype", key="dtype", rank=6),
    Column(title="codec", key="action", rank=2),
    Column(title="bits/weight", key="bits_per_weight", form=fixed(2), right=True, rank=1),
    Column(title="target dB", key="target_db", form=fixed(2), right=True, rank=5),
    Column(title="SQNR dB", key="sqnr_db", form=fixed(2), right=True, rank=1),
    Column(title="max error", key="max_abs_error", form=significant(3), right=True, rank=7),
    Column(title="why", key="why", rank=4),
)
PLAN_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="profile", key="profile", rank=4),
    Column(title="base", key="base", rank=4),
    Column(title="status", key="status"),
    Column(title="source", key="source_bytes", form=size, right=True, rank=3),
    Column(title="stored ~", key="predicted_stored_bytes_range", form=span(size), right=True, rank=2),
    Column(title="ratio ~", key="predicted_ratio_range", form=span(fixed(2)), right=True, rank=1),
    Column(title="dB of tensors ~", key="predicted_tensor_db", form=span(fixed(0)), right=True, rank=5),
    Column(title="shards", key="shards", right=True, rank=7),
    Column(title="shared", key="shared_shards", right=True, rank=8),
    Column(title="CPU s ~", key="predicted_seconds", form=fixed(0), right=True, rank=9),
    Column(title="memory ~", key="predicted_memory_bytes", form=size, right=True, rank=10),
    Column(title="tensors", key="groups", form=groups, rank=6),
)

ADDRESS_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="state", key="state"),
    Column(title="bytes", key="bytes", form=size, right=True),
    Column(title="address", key="address"),
)


def filled(columns: Sequence[Column], rows: Sequence[Row], *optional: str) -> list[Column]:
    """Return the columns, except those of `optional` keys that no row has a value for."""
    return [column for column in columns if column.key not in optional or any(row.get(column.key) for row in rows)]


def show(console: "Console", columns: Sequence[Column], rows: Sequence[Row], *, as_json: bool, title: str = "") -> None:
    """Print rows as a table, or as one JSON list. Each row is one line of the table.

    Long texts are cut. A terminal that is too narrow for all columns shows the most important ones, and names the
    others below. A file or a pipe gets all columns, so that they never depend on the values.
    """
    if as_json:
        print_json(rows, console.file)
        return
    from rich.table import Table
    from rich.text import Text

    title = printable(title)
    cells = {column.key: [_value(column, row) for row in rows] for column in columns}
    widths = {column.key: _width(column, cells[column.key]) for column in columns}
    kept = _fitting(columns, widths, console.width) if console.is_terminal else list(columns)
    table = Table(header_style="bold")
    for column in kept:
        justify: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=True, min_width=widths[column.key])
    for index in range(len(rows)):
        table.add_row(*(Text(_cut(cells[column.key][index], widths[column.key], column.tail)) for column in kept))
    if title:
        console.print(Text(title, "italic"), soft_wrap=True)
    console.width = max(console.width, _total(widths[column.key] for column in kept))  # rich would cut it
    console.print(table)
    if len(kept) < len(columns):
        console.print(Text(_left_out(columns, kept), "dim"), soft_wrap=True)


def stream(
    console: "Console", columns: Sequence[Column], rows: Iterable[Row], *, as_json: bool, title: str = ""
) -> None:
    """Print rows as they come, in constant memory: as `show` does for few, in plain lines for many, or as one JSON
    list.

    The first `_MEASURED` rows decide which of the plain columns fit and how wide they are. In a file or a pipe, a
    longer value further down shifts its line. JSON waits in a temporary file for the last row, so that an earlier
    failure can be the one document.
    """
    left = iter(rows)
    first = list(islice(left, _MEASURED))
    more = list(islice(left, 1))
    if not more:
        show(console, columns, first, as_json=as_json, title=title)
        return
    everything = chain(first, more, left)
    if as_json:
        from shutil import copyfileobj
        from tempfile import TemporaryFile

        with TemporaryFile("w+", encoding="utf-8") as file:
            for number, row in enumerate(everything):
                file.write(f"{',' if number else '['}\n  {json_text(row)}")
            file.write("\n]\n")
            file.seek(0)
            copyfileobj(file, console.file)
        return
    from rich.cells import cell_len

    widths = {column.key: _width(column, [_value(column, row) for row in first]) for column in columns}
    kept = _fitting(columns, widths, console.width) if console.is_terminal else list(columns)

    def line(cells: Iterable[str]) -> str:
        placed = []
        for column, cell in zip(kept, cells, strict=True):
            text = _cut(cell, widths[column.key] if console.is_terminal else column.most, column.tail)
            space = " " * (widths[column.key] - cell_len(text))
            placed.append(space + text if column.right else text + space)
        return f"{'  '.join(placed).rstrip()}\n"

    console.file.write(f"{printable(title)}\n" if title else "")
    console.file.write(line(column.title for column in kept))
    for row in everything:
        console.file.write(line(_value(column, row) for column in kept))
    if len(kept) < len(columns):
        console.file.write(f"{_left_out(columns, kept)}\n")


def _left_out(columns: Sequence[Column], kept: Sequence[Column]) -> str:
    return f"too narrow for: {', '.join(column.title for column in columns if column not in kept)} (--json has all)"


def _fitting(columns: Sequence[Column], widths: dict[str, int], room: int) -> list[Column]:
    """Return the columns that a terminal has room for, leaving out the least important first; adjusts `widths` too."""
    kept = list(columns)
    while _total(widths[c.key] if c.whole else min(widths[c.key], _READABLE) for c in kept) > room:
        least = max(kept, key=lambda column: column.rank)
        if not least.rank:
            break
        kept.remove(least)
    for least_width in (_READABLE, _LEAST_WIDTH):
        while (excess := _total(widths[column.key] for column in kept) - room) > 0:
            widest = max(kept, key=lambda column: 0 if column.whole else widths[column.key]).key
            if widths[widest] <= least_width or all(column.whole for column in kept):
                break
            widths[widest] = max(least_width, widths[widest] - excess)
    return kept


def _total(widths: Iterable[int]) -> int:
    """Return the width in cells of a table with these columns."""
    return sum(width + _FRAME for width in widths) + 1


def _width(column: Column, values: Sequence[str]) -> int:
    from rich.cells import cell_len

    widest = max((cell_len(line) for value in values for line in value.split("\n")), default=0)
    return max(cell_len(column.title), min(widest, column.most))


def _cut(text: str, width: int, tail: bool) -> str:
    """Fit each line of a text into a width: cut its end, or its beginning if it is a name."""
    from rich.cells import cell_len, set_cell_size

    def line(value: str) -> str:
        if cell_len(value) <= width:
            return value
        if tail:
            return "…" + set_cell_size(value[::-1], width - 1)[::-1]
        return set_cell_size(value, width - 1) + "…"

    return "\n".join(map(line, text.split("\n")))


def _value(column: Column, row: Row) -> str:
    value = all_printable(row.get(column.key))
    return "" if value is None else column.form(value)
