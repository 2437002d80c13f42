"""Tables for people: whole where they fit, one block a row where the terminal is too narrow, never cut."""

import io
import json

from rich.console import Console

from birkhoff.pipeline.tables import Column, fixed, show, size

COLUMNS = (
    Column(title="model", key="model"),
    Column(title="stored", key="stored", form=size, right=True),
    Column(title="SQNR min dB", key="sqnr", form=fixed(2), right=True),
    Column(title="why", key="why"),
)
ROWS = (
    {"model": "sam-vit-b", "stored": 3 << 20, "sqnr": 30.014, "why": "[bold]not markup[/bold]"},
    {"model": "edge", "stored": 0, "sqnr": None, "why": "a reason that goes on for longer than the terminal is wide"},
)


def shown(width: int, *, as_json: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show(console, COLUMNS, ROWS, as_json=as_json, title="Models")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_a_table_where_it_fits() -> None:
    lines = shown(120)
    assert lines[0].strip() == "Models"
    assert any("sam-vit-b" in line and "3.0 MiB" in line and "30.01" in line for line in lines)
    assert any("[bold]not markup[/bold]" in line for line in lines)


def test_blocks_where_the_terminal_is_too_narrow() -> None:
    lines = shown(40)
    assert max(map(len, lines)) <= 40
    assert [line.strip() for line in lines[:5]] == [
        "Models",
        "model        sam-vit-b",
        "stored       3.0 MiB",
        "SQNR min dB  30.01",
        "why          [bold]not markup[/bold]",
    ]
    assert lines[5].strip() == ""
    assert sum(line.startswith("SQNR") for line in lines) == 1  # what is not there is not said
    assert "".join(line[13:] for line in lines[8:]).replace(" ", "") == str(ROWS[1]["why"]).replace(" ", "")


def test_json_does_not_know_of_terminals() -> None:
    assert json.loads("\n".join(shown(40, as_json=True)))[1]["sqnr"] is None
