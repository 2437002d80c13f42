"""Notebook support: detect one, and make HTML tables. Imports no notebook library."""

import html
import sys
from collections.abc import Mapping, Sequence

from birkhoff.pipeline.text import printable


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """Return a title above a table of two columns; texts are escaped, those without a value left out."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{_cell(key)}</th><td style='text-align:left'>{_cell(value)}</td></tr>"
        for key, value in facts.items()
        if value
    )
    return f"<table><caption>{_cell(title)}</caption><tbody>{rows}</tbody></table>"


def rows_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a head; texts are escaped."""
    head = "".join(f"<th>{_cell(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return html.escape(printable(text))
