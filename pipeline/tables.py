"""Tables on standard output, and the same rows as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = Mapping[str, Any]

_ANY_WIDTH = 10_000
"""No terminal is wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: heading, the row's key, and how its value is written."""

    title: str
    key: str
    form: Callable[[Any], str] = str
    right: bool = False


def size(count: int) -> str:
    """Bytes for people: `5.7 MiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def short(digest: str) -> str:
    """First 12 digits of a digest: enough to tell versions apart."""
    return digest[:12]


def fixed(digits: int) -> Callable[[float], str]:
    """A number with so many decimals."""
    return lambda value: f"{value:.{digits}f}"


def significant(digits: int) -> Callable[[float], str]:
    """A number with so many digits that count."""
    return lambda value: f"{value:.{digits}g}"


def shape(dims: Sequence[int]) -> str:
    """`768x768`; `scalar` for no dimensions."""
    return "x".join(map(str, dims)) or "scalar"


def span(form: Callable[[Any], str]) -> Callable[[Sequence[Any]], str]:
    """Two values as `5.7 to 6.4`, or as one where they read alike."""
    return lambda ends: " to ".join(dict.fromkeys(map(form, ends)))


def groups(rows: Sequence[Row]) -> str:
    """Tensors by action, and why: one line a group."""
    return "\n".join(
        f"{row['tensors']} {row['action']}" + (f": {row['reason']}" if row["reason"] else "") for row in rows
    )


VERSION_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="version", key="version"),
    Column(title="status", key="status"),
    Column(title="source", key="source_bytes", form=size, right=True),
    Column(title="stored", key="stored_bytes", form=size, right=True),
    Column(title="ratio", key="ratio", form=fixed(2), right=True),
    Column(title="SQNR min dB", key="sqnr_db_min", form=fixed(2), right=True),
    Column(title="median dB", key="sqnr_db_median", form=fixed(2), right=True),
    Column(title="seconds", key="seconds", form=fixed(1), right=True),
    Column(title="digest", key="digest", form=short),
)
LIST_COLUMNS = (
    *(column for column in VERSION_COLUMNS if column.key not in ("status", "seconds")),
    Column(title="profile", key="profile"),
    Column(title="aliases", key="aliases", form=", ".join),
    Column(title="created", key="created"),
)
TENSOR_COLUMNS = (
    Column(title="tensor", key="name"),
    Column(title="shape", key="shape", form=shape, right=True),
    Column(title="dtype", key="dtype"),
    Column(title="codec", key="action"),
    Column(title="bits/weight", key="bits_per_weight", form=fixed(2), right=True),
    Column(title="target dB", key="target_db", form=fixed(2), right=True),
    Column(title="SQNR dB", key="sqnr_db", form=fixed(2), right=True),
    Column(title="max error", key="max_abs_error", form=significant(3), right=True),
    Column(title="why", key="why"),
)
PLAN_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="profile", key="profile"),
    Column(title="status", key="status"),
    Column(title="source", key="source_bytes", form=size, right=True),
    Column(title="stored ~", key="predicted_stored_bytes_range", form=span(size), right=True),
    Column(title="ratio ~", key="predicted_ratio_range", form=span(fixed(2)), right=True),
    Column(title="dB of tensors ~", key="predicted_tensor_db", form=span(fixed(0)), right=True),
    Column(title="shards", key="shards", right=True),
    Column(title="shared", key="shared_shards", right=True),
    Column(title="CPU s ~", key="predicted_seconds", form=fixed(0), right=True),
    Column(title="memory ~", key="predicted_memory_bytes", form=size, right=True),
    Column(title="tensors", key="groups", form=groups),
)


def show(console: "Console", columns: Sequence[Column], rows: Sequence[Row], *, as_json: bool, title: str = "") -> None:
    """Print rows as a table, on a terminal too narrow for it as one block of lines a row, or as one JSON list."""
    if as_json:
        console.file.write(json.dumps(rows, indent=2, default=str) + "\n")
        return
    from rich.measure import Measurement

    table = _table(columns, rows, title)
    wide = Measurement.get(console, console.options.update_width(_ANY_WIDTH), table).maximum > console.width
    if not wide:
        console.print(table)
        return
    if title:
        console.print(title, highlight=False, markup=False)
    console.print(_blocks(columns, rows))


def _table(columns: Sequence[Column], rows: Sequence[Row], title: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_value(column, row)) for column in columns))
    return table


def _blocks(columns: Sequence[Column], rows: Sequence[Row]) -> "Table":
    """What the table says, every row below the other, without what is not there."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for index, row in enumerate(rows):
        if index:
            grid.add_row()
        for column in columns:
            if value := _value(column, row):
                grid.add_row(Text(column.title), Text(value))
    return grid


def _value(column: Column, row: Row) -> str:
    value = row.get(column.key)
    return "" if value is None else column.form(value)
