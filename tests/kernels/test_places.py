"""One name leads to four places: a family of kernels, its reference in codec/, its tests, its benchmark."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.harness.benchmarks.bench_kernels import FAMILIES, PARTS, parts_of

ROOT = Path(__file__).parents[2]
FOUND = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/op.py"))
"""Families: folders with a host side. `runtime` holds what they share."""


def test_every_family_is_known() -> None:
    assert FOUND == ["decode", "encode", "entropy", "feedback", "int8", "linear", "packed", "trellis"]
    assert sorted(FAMILIES) == FOUND


@pytest.mark.parametrize("family", FOUND)
def test_a_family_has_its_four_places(family: str) -> None:
    assert (ROOT / "kernels" / family / "triton.py").is_file()
    assert (ROOT / "tests" / "kernels" / f"test_{family}.py").is_file()
    assert FAMILIES[family]
    assert set(FAMILIES[family]) <= set(PARTS)
    text = ast.get_docstring(ast.parse((ROOT / "kernels" / family / "op.py").read_text())) or ""
    references = re.findall(r"Reference: `(birkhoff\.codec(?:\.\w+)+)\.(\w+)`", text)
    assert references
    assert all(hasattr(import_module(module), name) for module, name in references)


def test_parts_by_family() -> None:
    assert parts_of("trellis,encode,decode") == ["search", "encode", "packed"]
