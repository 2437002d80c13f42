"""The stand-in for commands in pages: its forks do what a process of their own would do."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm.server(tmp_path_factory.mktemp("warm"), dict(os.environ)) as script:
        yield script


def ask(client: Path, *words: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **more}
    return subprocess.run([client, *words], cwd=folder, env=variables, input="in", capture_output=True, text=True)


def test_a_command_has_its_folder_environment_output_and_exit_code(client: Path, tmp_path: Path) -> None:
    ended = ask(client, "birkhoff", "list", "--store", "file://./none", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (7, "")
    assert f"there is no folder {tmp_path / 'none'}" in ended.stderr
    ended = ask(client, "birkhoff", "cache", "--json", folder=tmp_path, BIRKHOFF_HOME="home")
    assert ended.returncode == 0
    assert str(tmp_path / "home" / "cache") in ended.stdout


def test_a_script_reads_its_input_and_leaves_nothing_to_the_next(client: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os, sys, torch\ntorch.left = 1\nos.environ['LEFT'] = '1'\nprint(sys.stdin.read())"
    )
    (tmp_path / "b.py").write_text("import os, torch\nprint(hasattr(torch, 'left'), 'LEFT' in os.environ)")
    assert ask(client, "a.py", folder=tmp_path).stdout == "in\n"
    assert ask(client, "b.py", folder=tmp_path).stdout == "False False\n"


@pytest.mark.parametrize(
    ("text", "code"), [("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os; os._exit(0)", 70), ("", 0)]
)
def test_exit_codes(client: Path, tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "s.py").write_text(text)
    ended = ask(client, "s.py", folder=tmp_path)
    assert ended.returncode == code
    assert ("ZeroDivisionError" in ended.stderr) == (code == 1)
