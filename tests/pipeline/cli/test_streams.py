"""Standard streams that are closed, full or without a reader: the work is done, and the exit code tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.publishing import publish_tensors

COMPRESS = ("compress", "m.yaml", "--executor", "inline")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return place(tmp_path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same where the model is published."""
    folder = tmp_path_factory.mktemp("filled")
    with open_store((folder / "store").as_uri()) as store:
        publish_tensors(store, "net", {"a.weight": torch.randn(64, 64)})
    return place(folder)


def place(folder: Path) -> dict[str, str]:
    """A folder with a manifest of one model, and the environment of commands in it."""
    save_file({"a.weight": torch.randn(64, 64)}, folder / "net.safetensors")
    (folder / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    store = (folder / "store").as_uri()
    return {**os.environ, "BIRKHOFF_HOME": str(folder / "home"), "BIRKHOFF_STORE": store}


def shell(environment: dict[str, str], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its streams as the script, which ends in `"$@"` and redirections, has them."""
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "birkhoff", *arguments]
    folder = Path(environment["BIRKHOFF_HOME"]).parent
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=PATIENT_SECONDS)


def published(environment: dict[str, str]) -> bool:
    with open_store(environment["BIRKHOFF_STORE"]) as store:
        return resolve(store, "net").name == "v1"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ('"$@" >&-', 0, ""),
        ('"$@" <&- >&- 2>&-', 0, ""),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 141, ""),
        (
            '"$@" > /dev/full',
            16,
            "standard output: No space left on device; the command succeeded, but its output is lost",
        ),
        ('"$@" 2> /dev/full', 0, ""),
        ('"$@" 2>&1 > /dev/null | true; exit ${PIPESTATUS[0]}', 0, ""),
    ],
    ids=["closed", "all closed", "reader gone", "full", "errors to a full disk", "reader of errors gone"],
)
def test_a_run_is_published_whatever_reads_it(environment: dict[str, str], script: str, code: int, words: str) -> None:
    done = shell(environment, script, *COMPRESS)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "this is a bug" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert published(environment)


def test_a_failed_command_keeps_its_own_code(environment: dict[str, str]) -> None:
    for script in ('"$@" >&-', '"$@" > /dev/full', '"$@" | true; exit ${PIPESTATUS[0]}'):
        assert shell(environment, script, "pull", "absent").returncode == 7  # imports little, unlike `compress`
        assert shell(environment, script, "nonsense").returncode == 2


def test_files_do_not_take_the_place_of_closed_streams(environment: dict[str, str]) -> None:
    """Else what is printed would end in the next file that is opened."""
    code = (
        "import os\nfrom birkhoff.pipeline import streams\nstreams.guard()\n"
        "file = open('opened', 'w')\nassert file.fileno() > 2\nprint('text', flush=True)\nos.write(1, b'bytes')\n"
    )
    folder = Path(environment["BIRKHOFF_HOME"]).parent
    script = 'exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(
        ["bash", "-c", script, sys.executable, code], env=environment, cwd=folder, check=True, timeout=PATIENT_SECONDS
    )
    assert (folder / "opened").read_bytes() == b""


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("--help",), ("history", "net")])
def test_every_kind_of_output(filled: dict[str, str], command: tuple[str, ...]) -> None:
    assert shell(filled, '"$@" >&-', *command).returncode == 0
    assert shell(filled, '"$@" | true; exit ${PIPESTATUS[0]}', *command).returncode == 141
    assert shell(filled, '"$@" > /dev/full', *command).returncode == 16
