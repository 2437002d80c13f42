"""A stranger's text on its way to a terminal: names and notes of a store, and what servers say of a request."""

import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from urllib3.exceptions import DecodeError

from birkhoff.pipeline.download import http as downloads
from birkhoff.pipeline.registry.versions import publish
from birkhoff.pipeline.store.base import store_folder
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.text import all_printable, printable
from tests.pipeline.command import captured
from tests.pipeline.publishing import publish_tensors

ESCAPE = "\x1b]0;PWNED\x07\x1b[2J"
NAMES = [
    f"a{ESCAPE}.weight",
    "[/b][link=http://evil]x",
    "\u202etxt.exe",
    "\x9b31m",
    "n\nINFO forged: line",
    "\ue000\u200b",
]
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ue000]")
"""What terminals act on: control characters but newline and tab, marks of direction, nothing visible."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store whose writer has put such text wherever a document takes text."""
    home = tmp_path_factory.mktemp("world")
    with open_store((home / "store").as_uri()) as store:
        version = publish_tensors(store, "m", {name: torch.randn(64, 64) for name in NAMES})
        source = version.manifest.source.model_copy(update={"file": f"f{ESCAPE}"})
        other = {"profile": f"p{ESCAPE}", "code": f"c{ESCAPE}[/x]", "source": source}
        publish(store, version.manifest.model_copy(update=other))
        folder = store_folder(store.url)
        assert folder is not None
    for name, key in (("aliases/latest.json", "moved"), ("names/v2.json", "created"), ("names/v2.json", "publisher")):
        path = folder / "models" / "m" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: f"t{ESCAPE}\u202e[/y]"}))
    settings = {
        "BIRKHOFF_HOME": str(home / "home"),
        "BIRKHOFF_STORE": folder.as_uri(),
        "FORCE_COLOR": "",
        "NO_COLOR": "1",
    }
    return {**os.environ, **settings}


COMMANDS = (
    ["inspect", "m"],
    ["inspect", "m", "--json"],
    ["list"],
    ["list", "m"],
    ["list", "--json"],
    ["history", "m"],
    ["history", "m", "--json"],
    ["diff", "m@v1", "m@v2"],
    ["verify", "m"],
    ["pull", "m", "-o", "out"],
    ["export", "m", "-o", "m.safetensors"],
    ["gc"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", ["200", "60"])
def test_no_command_prints_what_a_terminal_obeys(
    environment: dict[str, str],
    words: list[str],
    columns: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logged: None,
) -> None:
    for name, value in {**environment, "COLUMNS": columns}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    _, out, err = captured(capsys, *words)
    said = out + err
    assert said
    assert not OBEYED.search(said), said
    assert "Traceback" not in said


def test_json_holds_the_very_names(environment: dict[str, str]) -> None:
    program = [sys.executable, "-m", "birkhoff", "inspect", "m@v1", "--json"]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert sorted(row["name"] for row in json.loads(ran.stdout)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_printable_is_one_line_that_shows_what_it_hides(name: str) -> None:
    assert not OBEYED.search(printable(name))
    assert "\n" not in printable(name)
    assert all_printable({"a": [name, (name, 1)], name: None}) == {
        "a": [printable(name), (printable(name), 1)],
        printable(name): None,
    }


def test_a_log_line(capsys: pytest.CaptureFixture[str], logged: None) -> None:
    logging.getLogger("birkhoff.test").warning("a blob of %s", ESCAPE)
    said = capsys.readouterr().err
    assert "PWNED" in said
    assert not OBEYED.search(said)


class Echo:
    """Answers 302 to a signed address of its own, and there `status` with the request in its reason phrase."""

    CANARY = "X-Amz-Signature=c0ffee5ecret"

    def __init__(self, status: str) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._status = status
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(4096).decode(errors="replace").partition(" ")[2].partition(" ")[0]
                if "Signature" not in asked:
                    answer = f"HTTP/1.1 302 Found\r\nLocation: /signed?{self.CANARY}\r\nContent-Length: 0\r\n\r\n"
                else:
                    answer = self._status.replace("ECHO", asked) + "\r\nContent-Length: 0\r\n\r\n"
                connection.sendall(answer.encode())

    def close(self) -> None:
        self._server.close()


@pytest.fixture(params=["HTTP/1.1 403 no ECHO for you", "HTTP/1.1 418 ECHO", "ECHO is what you asked for"])
def echo(request: pytest.FixtureRequest) -> Iterator[Echo]:
    server = Echo(request.param)
    yield server
    server.close()


def test_an_answer_that_repeats_a_signed_address(
    echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], logged: None
) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"models:\n- {{name: m, source: 'http://127.0.0.1:{echo.port}/m.pth'}}\n")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.chdir(tmp_path)
    code, out, err = captured(capfd, "compress", str(manifest), "--executor", "inline")
    assert code == 4, err
    assert "c0ffee5ecret" not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"c0ffee5ecret" in path.read_bytes()]
    assert written == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http.client.BadStatusLine("GET /?secret"), "BadStatusLine"),
        (DecodeError("secret"), "DecodeError"),
        (http.client.RemoteDisconnected("Remote end closed connection"), "RemoteDisconnected: Remote end closed"),
        (ConnectionResetError(104, "Connection reset by peer"), r"ConnectionResetError: \[Errno 104\]"),
    ],
)
def test_errors_that_quote_the_server_are_named_alone(error: Exception, said: str) -> None:
    assert re.match(said, downloads._reason(error))
    assert "secret" not in downloads._reason(error)
