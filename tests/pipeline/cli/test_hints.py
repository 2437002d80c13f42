"""Commands that messages print: whole, with the store of the command that prints them, and they run as printed."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from birkhoff.pipeline import hints
from birkhoff.pipeline.cli import main
from birkhoff.pipeline.hints import hint
from tests.layers import modules
from tests.pipeline.command import captured

Capture = pytest.CaptureFixture[str]

NAMED = {
    "birkhoff pull": "says what wrote a folder",
    "birkhoff save": "says what wrote a file",
    "birkhoff push": "says what writes to a registry, which is no store",
    "birkhoff sign": "for the publisher, who has the key",
    "birkhoff key new": "in --help: says where a key comes from",
    "birkhoff key": "says which command takes no store",
    "birkhoff schema": "in --help",
    "birkhoff gc": "in a table of remedies by code, which is made before any store is known",
}
"""Commands that a text names without telling the reader to run them, and why they stand there without arguments."""

SAMPLES = {
    "model": "demo-sam",
    "version.model": "demo-sam",
    "f'{model}@{held[0]}'": "demo-sam@stable",
    "record.run": "20260102T030405.678Z-9abc",
    "str(folder)": "pulled",
    "str(manifest)": "manifests/demo.yaml",
}
"""Values for what a hint's words say of the moment."""


def literals() -> Iterator[tuple[str, str]]:
    """(place, text) of every string of the pipeline that is no docstring."""
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        described = {
            id(node.value)
            for parent in ast.walk(tree)
            for node in (parent.body if isinstance(getattr(parent, "body", None), list) else [])
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                yield f"{name}:{node.lineno}", node.value


def calls() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every hint in the code, what is not known before it runs replaced by a sample."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            if "hint" in (getattr(function, "id", ""), getattr(function, "attr", "")):
                words = []
                for argument in node.args:  # type: ignore[attr-defined]
                    if isinstance(argument, ast.Constant):
                        words.append(str(argument.value))
                    elif not isinstance(argument, ast.Starred):
                        words.append(SAMPLES[ast.unparse(argument)])
                yield f"{name}:{node.lineno}", words  # type: ignore[attr-defined]


def parses(words: list[str]) -> None:
    """Hold a command line against the commands there are: known, its options known, nothing missing."""
    command, context = typer.main.get_command(main.app), None
    rest = words
    while True:
        context = command.make_context(rest[0] if rest else "birkhoff", list(rest), parent=context)
        children = getattr(command, "commands", {})
        protected = [*context._protected_args, *context.args]
        if not children or not protected:
            return
        command, rest = children[protected[0]], protected[1:]


def test_no_message_writes_a_command_line_by_itself() -> None:
    found = {}
    for place, text in literals():
        for said in re.findall(r"`(birkhoff [a-z][^`]*)`", text) + re.findall(
            r"(?:with|run|:) (birkhoff [a-z]+)", text
        ):
            if said not in NAMED:
                found[place] = said
    assert not found, "say `{hint(...)}`, which knows the store and the program"


def test_every_hint_is_a_whole_command_line() -> None:
    found = dict(calls())
    assert len(found) >= 7
    for place, words in found.items():
        try:
            parses([*words, *([] if words[0] in hints._WITHOUT_STORE else ["--store", "file:///x"])])
        except Exception as error:
            raise AssertionError(f"{place}: birkhoff {shlex.join(words)}: {error}") from error


def test_a_hint_carries_what_the_command_at_hand_was_told() -> None:
    hints.forget()
    assert hint("history", "net") == "birkhoff history net"
    hints.remember(store="s3://b/with space", allow_http="yes", program=".venv/bin/birkhoff")
    try:
        assert hint("history", "net") == ".venv/bin/birkhoff history net --store 's3://b/with space' --allow-http"
        assert hint("cache", "prune") == ".venv/bin/birkhoff cache prune --allow-http"
    finally:
        hints.forget()


@pytest.mark.parametrize(
    ("called", "printed"),
    [
        ("/somewhere/pytest/__main__.py", "birkhoff"),
        ("/src/birkhoff/__main__.py", f"{shlex.quote(sys.executable)} -m birkhoff"),
        ("no such/bin/birkhoff", "'no such/bin/birkhoff'"),
        ("-c", "birkhoff"),
    ],
)
def test_the_program_is_printed_as_it_was_called(called: str, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", "/nowhere")
    assert hints.program() == printed


def printed(text: str) -> list[str]:
    """The command lines of a text."""
    return re.findall(r"`(birkhoff [^`]+)`", text) + re.findall(r"^report: (birkhoff .+)$", text, re.MULTILINE)


def test_what_is_printed_runs(
    demo_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Each command prints its hint and the hint is run, word for word, in an environment that names another store."""
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "another").as_uri())
    monkeypatch.chdir(tmp_path)
    root, store = Path(__file__).parents[3], (tmp_path / "a store").as_uri()
    source = root / "manifests" / "demo" / "demo_sam.safetensors"
    (tmp_path / "m.yaml").write_text(f"store: '{store}'\nprofile: fast\nmodels: [{{name: net, source: {source}}}]\n")
    (tmp_path / "a store" / "blobs" / "sha256" / "ab").mkdir(parents=True)
    (tmp_path / "a store" / "blobs" / "sha256" / "ab" / ("ab" * 32)).write_bytes(b"x")
    lines = {
        "compress m.yaml --executor inline": 1,
        "gc --grace 0s --store": 1,
        "key show absent.pub": 1,
    }
    for line, count in lines.items():
        words = [*line.split(), *([store] if line.endswith("--store") else [])]
        _, out, err = captured(capsys, *words)
        found = printed(out + err)
        assert len(found) == count, (line, err)
        for said in found:
            program, *rest = shlex.split(said)
            assert program == "birkhoff"
            code, _, err = captured(capsys, *rest)
            assert code == 0, (said, err)
    assert not (tmp_path / "a store" / "blobs" / "sha256" / "ab" / ("ab" * 32)).exists()  # gc --yes, as it was told
