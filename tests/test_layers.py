"""Imports run one way: pipeline -> kernels -> codec. Read from every module, wherever in it it imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"codec": {"codec"}, "kernels": {"kernels", "codec"}, "pipeline": {"pipeline", "kernels", "codec"}}


def rooms_of(text: str) -> Iterator[str]:
    """The rooms that a module's text imports from; what is imported of `birkhoff` itself counts as `birkhoff`."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            assert node.level == 0, f"line {node.lineno}: a relative import"
        for name in names:
            package, _, rest = name.partition(".")
            if package == "birkhoff":
                room = rest.partition(".")[0]
                yield room if room in MAY_IMPORT else "birkhoff"
            elif package in MAY_IMPORT:
                yield f"top-level {package}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str) -> None:
    modules = sorted((ROOT / room).rglob("*.py"))
    assert len(modules) > 10
    allowed = MAY_IMPORT[room] | ({"birkhoff"} if room == "pipeline" else set())
    wrong = {
        f"{module.relative_to(ROOT)}: {found}"
        for module in modules
        for found in rooms_of(module.read_text())
        if found not in allowed
    }
    assert not wrong


def test_an_import_against_the_direction_is_seen() -> None:
    text = "def f():\n    from birkhoff.pipeline import store\nimport birkhoff.kernels.decode\n"
    text += "import kernels\nimport torch\n"
    assert sorted(rooms_of(text)) == ["kernels", "pipeline", "top-level kernels"]
    assert list(rooms_of("from birkhoff import __version__\nfrom birkhoff import codec")) == ["birkhoff", "codec"]


def test_the_rooms_are_namespace_folders() -> None:
    assert not [path for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")]
