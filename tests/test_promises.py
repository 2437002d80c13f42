"""Every promise of PROMISES.md names tests, and every test it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "PROMISES.md").read_text()
_TEST = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)+)`")
_PROMISE = re.compile(r"^(\d+)\. \*\*", re.MULTILINE)


def _tests_in(path: Path) -> set[str]:
    """`function` and `Class::function` of a file of tests."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def test_every_test_that_a_promise_names_exists() -> None:
    named = [test.split("::", 1) for test in _TEST.findall(PAGE)]
    assert len(named) == PAGE.count(".py::") > 50  # none is written so that it is not seen
    missing = [f"{file}::{test}" for file, test in named if test not in _tests_in(ROOT / file)]
    assert missing == []


def test_every_promise_names_a_test() -> None:
    parts = _PROMISE.split(PAGE)
    numbers, texts = parts[1::2], parts[2::2]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert [number for number, text in zip(numbers, texts, strict=True) if not _TEST.search(text)] == []
