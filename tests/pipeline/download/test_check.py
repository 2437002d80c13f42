"""`plan --check-sources`: every address of a manifest, against a real server on loopback."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.cli import schema
from birkhoff.pipeline.download.check import Address, AddressState, check_addresses
from birkhoff.pipeline.download.http import FetchSettings
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.errors import EXIT_CODES, SourceError
from tests.pipeline.command import captured

ANSWERS = {"there.pth": 200, "moved.pth": 302, "gone.pth": 404, "taken.pth": 410, "shut.pth": 401, "ill.pth": 503}
SIZE = 1234
QUICK = FetchSettings(connect_timeout=2, read_timeout=2, attempts=1)


class Handler(BaseHTTPRequestHandler):
    """Answers by the file's name; counts what it was asked, and waits for others to be asked too."""

    asked: list[str]
    together: threading.Barrier | None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.together is not None:
            self.together.wait(10)
        self.send_response(ANSWERS[self.path.rpartition("/")[2]])
        self.send_header("Content-Length", str(SIZE))
        if "moved" in self.path:
            self.send_header("Location", "/there.pth")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """Address of a server, and its handler."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "BIRKHOFF_MIRROR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    handler = type("Asked", (Handler,), {"asked": [], "together": None})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", handler
    served.shutdown()
    served.server_close()


def part(*urls: str) -> SourcePart:
    return SourcePart(urls=urls)


def states(found: list[Address]) -> list[tuple[str, str, int | None]]:
    return [(one.url.rpartition("/")[2], one.state, one.nbytes) for one in found]


def test_each_address_has_its_state(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, _ = server
    here = tmp_path / "here.pth"
    here.write_bytes(b"12345")
    sources = {
        "a": [part(f"{url}/there.pth", f"{url}/moved.pth"), part(f"{url}/gone.pth")],
        "b": [part(str(here), str(tmp_path / "absent.pth"), "package://no-such-weights/x/y.pth")],
        "c": [part(f"{url}/taken.pth"), part(f"{url}/shut.pth"), part(f"{url}/ill.pth?a=1")],
        "d": [part("http://127.0.0.1:9/none.pth")],
    }
    found = check_addresses(sources, settings=QUICK)
    assert [one.model for one in found] == list("aaabbbcccd")
    assert states(found) == [
        ("there.pth", "answers", SIZE),
        ("moved.pth", "answers", SIZE),
        ("gone.pth", "gone", None),
        ("here.pth", "here", 5),
        ("absent.pth", "gone", None),
        ("y.pth", "gone", None),
        ("taken.pth", "gone", None),
        ("shut.pth", "fails", None),
        ("ill.pth", "fails", None),
        ("none.pth", "fails", None),
    ]
    assert all(one.good == (not one.problem) for one in found)
    assert "404 Not Found" in found[2].problem
    assert "pip install no-such-weights" in found[5].problem


def test_servers_are_asked_at_once_and_once_for_each_address(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    handler.together = threading.Barrier(6)  # nobody gets an answer before six have asked
    urls = [f"{url}/{number}/there.pth" for number in range(6)]
    sources = {f"m{number}": [part(*urls)] for number in range(3)}
    begin = time.monotonic()
    found = check_addresses(sources, settings=QUICK)
    assert time.monotonic() - begin < 10
    assert len(found) == 18
    assert {one.state for one in found} == {"answers"}
    assert sorted(handler.asked) == [f"HEAD /{number}/there.pth" for number in range(6)]


def test_what_the_mirror_has_is_asked_of_nobody(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    (tmp_path / "gone.pth").write_bytes(b"123")
    found = check_addresses({"a": [part(f"{url}/gone.pth", f"{url}/there.pth")]}, mirror=tmp_path, settings=QUICK)
    assert states(found) == [("gone.pth", "mirror", 3), ("there.pth", "answers", SIZE)]
    assert handler.asked == ["HEAD /there.pth"]
    with pytest.raises(SourceError, match="expected a folder of checkpoints"):
        check_addresses({}, mirror=tmp_path / "absent")


def test_the_command(
    server: tuple[str, type[Handler]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "no-store").as_uri())
    url, handler = server
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "net.safetensors")
    manifest = tmp_path / "fleet.yaml"
    models = [{"name": "good", "source": {"urls": ["net.safetensors", f"{url}/there.pth"]}}]
    manifest.write_text(json.dumps({"models": models}))
    code, out, _ = captured(capsys, "plan", str(manifest), "--check-sources")
    assert code == 0
    assert "answers" in out
    assert handler.asked == ["HEAD /there.pth"]
    models.append({"name": "bad", "source": {"urls": [f"{url}/gone.pth"]}})
    manifest.write_text(json.dumps({"models": models}))
    code, out, err = captured(capsys, "plan", str(manifest), "--check-sources", "--json")
    assert code == EXIT_CODES[SourceError] == 4
    rows = json.loads(out)
    assert [(row["model"], row["state"], row["bytes"]) for row in rows] == [
        ("good", "here", (tmp_path / "net.safetensors").stat().st_size),
        ("good", "answers", SIZE),
        ("bad", "gone", None),
    ]
    assert f"bad: {url}/gone.pth: 404 Not Found" in err
    assert not (tmp_path / "no-store").exists()
    assert captured(capsys, "plan", str(manifest), "--check-sources", "--only", "good")[0] == 0


def test_the_schema_names_every_state() -> None:
    shown = schema.outputs()["plan --check-sources"]["items"]["properties"]["state"]["enum"]
    assert shown == list(get_args(AddressState))
