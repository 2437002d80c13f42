"""Tables for people: a row stays a row, a narrow terminal gets fewer columns, a long text is cut."""

import io
import json
import math
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from birkhoff.pipeline.cli.tables import Column, Row, show
from birkhoff.pipeline.text import fixed, size

COLUMNS = (
    Column(title="model", key="model"),
    Column(title="stored", key="stored", form=size, right=True, rank=2),
    Column(title="SQNR min dB", key="sqnr", form=fixed(2), right=True, rank=1),
    Column(title="why", key="why"),
)
ROWS = (
    {"model": "sam-vit-b", "stored": 3 << 20, "sqnr": 30.014, "why": "[bold]not markup[/bold]"},
    {"model": "edge", "stored": 0, "sqnr": None, "why": "a reason that goes on for longer than the terminal is wide"},
)


def shown(width: int, *, as_json: bool = False, terminal: bool = True, rows: Sequence[Row] = ROWS) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show(console, COLUMNS, rows, as_json=as_json, title="Models")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


def headings(lines: Sequence[str]) -> list[str]:
    return [heading.strip() for heading in lines[2].strip("┃").split("┃")]


def test_a_table_where_it_fits() -> None:
    lines = shown(120)
    assert lines[0].strip() == "Models"
    assert any("sam-vit-b" in line and "3.0 MiB" in line and "30.01" in line for line in lines)
    assert any("[bold]not markup[/bold]" in line for line in lines)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (100, ["model", "stored", "SQNR min dB", "why"]),
        (60, ["model", "SQNR min dB", "why"]),
        (34, ["model", "why"]),
        (20, ["model", "why"]),
    ],
)
def test_a_narrow_terminal_gets_the_important_columns_and_the_names_of_the_others(
    width: int, columns: list[str]
) -> None:
    lines = shown(width)
    assert headings(lines) == columns
    assert max(map(len, lines[1:7])) <= max(width, 27)
    assert sum(line.startswith("│") for line in lines) == len(ROWS)  # a row stays a row
    left_out = [column.title for column in COLUMNS if column.title not in columns]
    note = f"too narrow for: {', '.join(left_out)} (--json has all)"
    assert (lines[-1] == note) == bool(left_out)


def test_a_long_text_is_cut_and_changes_nothing_else() -> None:
    error = "https://example.org/" + "x" * 5000 + ": no such file; check the path"
    rows = [{"model": f"m{number}", "stored": number, "sqnr": 30.0, "why": ""} for number in range(30)]
    rows[7] = {"model": "m7", "stored": None, "sqnr": None, "why": error}
    for terminal, width in ((True, 100), (True, 80), (False, 80), (False, 400)):
        lines = shown(width, terminal=terminal, rows=rows)
        assert sum(line.startswith("│") for line in lines) == 30
        assert max(map(len, lines)) <= (width if terminal else 110)
        assert any("https://example.org/xxx" in line and "…" in line for line in lines)


def test_a_pipe_has_all_columns_whatever_the_rows_hold() -> None:
    for width in (20, 80, 200):
        assert headings(shown(width, terminal=False)) == [column.title for column in COLUMNS]


def test_of_a_tensors_name_the_end_stays() -> None:
    column = Column(title="tensor", key="name", most=30, tail=True)
    console = Console(file=io.StringIO(), width=200)
    name = "image_encoder." + "blocks.11." * 5 + "attn.qkv.weight"
    show(console, [column], [{"name": name}], as_json=False)
    assert "…" + name[-29:] in console.file.getvalue()  # type: ignore[attr-defined]


def test_json_does_not_know_of_terminals_and_is_json() -> None:
    assert json.loads("\n".join(shown(40, as_json=True)))[1]["sqnr"] is None
    odd = [{"model": "m", "stored": math.inf, "sqnr": [math.nan, 1.0], "why": ""}]

    def refuse(text: str) -> None:
        raise AssertionError(text)

    (row,) = json.loads("\n".join(shown(40, as_json=True, rows=odd)), parse_constant=refuse)
    assert (row["stored"], row["sqnr"]) == (None, [None, 1.0])
