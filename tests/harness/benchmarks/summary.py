"""README's table, from the results of `masks` and `inference`: what is gained, and what is lost.

    python -m tests.harness.benchmarks summary [--write]   # print it, or write it into README.md

`tests/test_readme.py` holds README to it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tests.harness.benchmarks.common import RESULTS, ROOT, table

README = ROOT / "README.md"
_MARKS = re.compile(
    r"(<!-- `python -m tests\.harness\.benchmarks summary --write` draws this table -->\n).*?(<!-- /table -->)", re.S
)

_HEAD = ["weights", "ratio", "agreement", "5th percentile", "memory, MB", "call, ms"]

ROWS = (
    ("float16", "float16", None),
    ("bfloat16", "bfloat16", "original bfloat16"),
    ("int8", "int8, channel", "torchao int8"),
    ("**Birkhoff**, `allocation: output`", "output, 5", "ours, balanced"),
    ("**Birkhoff**, `allocation: output`", "output, 6.1", "ours, balanced"),
    ("**Birkhoff**, default allocation", "scale, 6.1", "ours, balanced"),
    ("published Hyper-Compression", "published codec", None),
    ("4 bit, NF4", "NF4", "bitsandbytes NF4"),
    ("4 bit, hqq", "hqq 4 bit, 64", "hqq 4 bit"),
    ("4 bit, GPTQ", "GPTQ int4, 128", None),
    ("**Birkhoff**, `allocation: output`", "output, 10", "ours, balanced"),
)
"""(what README calls it, row of `masks`, form of `inference` on a GPU)."""


def lines() -> str:
    """The table, in Markdown."""
    masks: dict[str, Any] = json.loads((RESULTS / "masks.json").read_text())
    forms = {row["form"]: row for row in json.loads((RESULTS / "inference.json").read_text())["cuda SAM-H"]["rows"]}
    by_name = {row["name"]: row for row in masks["rows"]}
    rows = []
    for title, name, form in ROWS:
        row = by_name[name]
        measured = forms[form] if form else {}
        rows.append(
            [
                title,
                f"{masks['source_bytes'] / row['bytes']:.1f}",
                f"{row['agreement']:.3f}",
                f"{row['fifth']:.2f}",
                f"{measured['weights_bytes'] / 1e6:.0f}" if measured else "",
                f"{measured['latency_ms']:.1f}" if measured else "",
            ]
        )
    return table(_HEAD, rows)


def written(text: str) -> str:
    """README's text with the table as it is now."""
    if not _MARKS.search(text):
        raise ValueError(f"{README.name} has no marks for the table: {_MARKS.pattern}")
    return _MARKS.sub(lambda found: f"{found[1]}{lines()}\n{found[2]}", text)


def main(arguments: Sequence[str]) -> int:
    """Print the table, or write it."""
    if "--write" in arguments:
        README.write_text(written(README.read_text()))
    else:
        print(lines())
    return 0
