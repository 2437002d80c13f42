"""All commands: each says what it does, those that show facts have `--json` under keys that stay, shells complete."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from birkhoff.pipeline.cli import completion, main
from tests.pipeline.command import execute

FACTLESS = {"bom", "provenance", "store up", "store down", "schema"}
"""They print an address, a word, and a schema."""

KEYS = {
    "list": {"aliases", "created", "digest", "model", "profile", "ratio", "source_bytes", "sqnr_db_median"}
    | {"labels", "missing_blobs", "missing_bytes", "problem"},
    "verify demo-s*": {"artifact", "blobs", "bytes", "digest", "error", "model", "status", "tensors"},
    "inspect demo-sam": {
        "action",
        "bits_per_weight",
        "dtype",
        "max_abs_error",
        "name",
        "shape",
        "sqnr_db",
        "target_db",
    },
    "history demo-sam": {"alias", "digest", "event", "from", "profile", "ratio", "stored_bytes", "time", "version"}
    | {"labels"},
    "diff demo-sam@v1 demo-sam@v1 --all": {"action_a", "action_b", "change", "name", "shape", "sqnr_db_a"},
    "gc": {"bytes", "kept", "kind", "model", "objects", "retired"},
    "doctor": {"advice", "check", "code", "found", "state"},
    "plan manifests/demo.yaml": {"model", "profile", "status", "predicted_ratio", "predicted_stored_bytes", "groups"},
}


def leaves(command: object = None, path: str = "") -> Iterator[tuple[str, click.Command]]:
    command = typer.main.get_command(main.app) if command is None else command
    children = getattr(command, "commands", {})
    if not children or (getattr(command, "invoke_without_command", False) and path):
        yield path, command  # type: ignore[misc]
    for name, child in children.items():
        yield from leaves(child, f"{path} {name}".strip())


def test_every_command_says_what_it_does_and_has_json() -> None:
    found = dict(leaves())
    assert len(found) > 18
    for path, command in found.items():
        assert command.help, path
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) == (path not in FACTLESS), path


@pytest.mark.parametrize("words", KEYS)
def test_rows_have_the_keys_that_stay(
    words: str, demo_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    line = [*words.split(), "--json", "--store", demo_store]
    assert execute(*line) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(KEYS[words] <= set(row) for row in rows)


def complete(words: str, **more: str) -> list[str]:
    """What bash would be offered for the last word."""
    environment = os.environ | {"_BIRKHOFF_COMPLETE": "complete_bash", "COMP_WORDS": words, **more}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    script = "from birkhoff.pipeline.cli.main import main; main()"
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert not ended.stderr
    return ended.stdout.split()


def test_shells_complete_commands_models_and_references(demo_store: str) -> None:
    assert complete("birkhoff prom") == ["promote"]
    assert complete("birkhoff inspect de", BIRKHOFF_STORE=demo_store) == ["demo-sam"]
    assert set(complete("birkhoff inspect demo-sam@", BIRKHOFF_STORE=demo_store)) == {"demo-sam@latest", "demo-sam@v1"}


def test_completion_is_quiet_where_no_store_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BIRKHOFF_STORE", raising=False)
    context = typer.Context(click.Command("inspect"))  # type: ignore[arg-type]
    assert completion.references(context, "de") == []
    assert not (tmp_path / "home").exists()  # no server was started
