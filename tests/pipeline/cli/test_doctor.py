"""`birkhoff doctor`: what works, and for each thing that does not, the advice that mends it."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from birkhoff.kernels.runtime import device as runtime
from birkhoff.pipeline.cli import doctor_checks
from birkhoff.pipeline.cli.doctor_checks import Finding, examine
from birkhoff.pipeline.store.memory import MemoryStore
from birkhoff.pipeline.store.probe import StoreCapabilities
from tests.pipeline.command import execute

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BIRKHOFF_STORE", raising=False)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "gpu_in_sight", lambda: False)


def run(capsys: Capture, *arguments: str) -> tuple[int, dict[str, Finding]]:
    code = execute("doctor", "--json", *arguments)
    rows = json.loads(capsys.readouterr().out)
    return code, {row["check"]: Finding(**row) for row in rows}


def test_no_gpu_no_store_and_a_wrong_key_get_three_pieces_of_advice(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    without_gpu(monkeypatch)
    code, found = run(capsys, "--store", (tmp_path / "store").as_uri())
    assert (code, found["gpu"].state) == (0, "note")  # usable all the same
    assert "--profile fast" in found["gpu"].advice

    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")
        code, denied = run(capsys, "--store", s3_environment)
    assert (code, denied["credentials"].state) == (9, "fails")
    assert "AWS_SECRET_ACCESS_KEY" in denied["credentials"].advice
    assert "not-the-one" not in str(denied)
    assert "store" not in denied

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
        code, gone = run(capsys, "--store", s3_environment)
    assert (code, gone["store"].state) == (8, "fails")
    assert "AWS_ENDPOINT_URL_S3" in gone["store"].advice
    assert "make store-up" in gone["store"].advice
    assert len({found["gpu"].advice, denied["credentials"].advice, gone["store"].advice}) == 3


def test_no_credentials_at_all(no_aws: None, capsys: Capture) -> None:
    code, found = run(capsys, "--store", "s3://some-bucket")
    assert (code, found["credentials"].state) == (9, "fails")
    assert "AWS_PROFILE" in found["credentials"].advice


def test_a_store_that_works(s3_environment: str, capsys: Capture) -> None:
    code, found = run(capsys, "--store", s3_environment)
    assert code == 0
    assert found["credentials"].found == "from the AWS chain: env"
    assert (found["store"].state, found["conditional writes"].state) == ("ok", "ok")
    assert (found["late deletions"].state, found["late deletions"].found[:7]) == ("ok", "refused")


@pytest.mark.parametrize(("like", "state"), [("directory", "ok"), ("s3", "ok"), ("plain", "note")])
def test_whether_a_store_ends_what_a_stopped_collection_may_delete(
    like: Literal["directory", "s3", "plain"], state: str
) -> None:
    store = MemoryStore(like=like)
    rows = {finding.check: finding for finding in doctor_checks._opened(store, "memory")}
    assert rows["late deletions"].state == state
    assert ("runs/condemned.json" in rows["late deletions"].advice) == (state == "note")
    assert list(store.list("")) == []


def test_a_store_without_conditional_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_checks, "check_store", lambda store: StoreCapabilities(create=False, problem="forgets"))
    found = {finding.check: finding for finding in examine((tmp_path / "s").as_uri())}
    assert found["conditional writes"].state == "note"
    assert found["conditional writes"].found == "none: this store forgets"
    assert "one run at a time" in found["conditional writes"].advice


@pytest.mark.usefixtures("embedded_server")  # skips where it is not installed
def test_an_embedded_server_that_was_never_used_is_tried_and_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    code, found = run(capsys)
    assert (code, found["store"].state) == (0, "ok"), found
    assert not (tmp_path / "home").exists()


def test_a_folder_that_cannot_hold_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    code, found = run(capsys, "--store", (tmp_path / "store").as_uri())
    assert (code, found["home"].state) == (16, "fails")
    (tmp_path / "home").unlink()
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    code, found = run(capsys, "--store", (tmp_path / "store").as_uri())
    assert (code, found["cache"].state) == (16, "fails")
    assert "larger disk" in found["cache"].advice


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch)
    monkeypatch.setattr(runtime, "gpu_in_sight", lambda: True)
    found = {finding.check: finding for finding in examine((tmp_path / "s").as_uri())}
    assert "nvidia-smi" in found["gpu"].advice


def test_optional_parts_are_noted_with_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (module, purpose) in doctor_checks.EXTRAS.items():
        monkeypatch.setattr(doctor_checks, "find_spec", lambda _: None)
        found = doctor_checks._extra(name)
        assert (found.check, found.state, found.code) == (name, "note", 0)
        assert purpose in found.advice
        assert f"[{name}]" in found.advice
        monkeypatch.undo()
        if importlib.util.find_spec(module):
            assert doctor_checks._extra(name).state == "ok"


def test_an_address_of_ray_in_the_environment_is_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    found = {finding.check: finding for finding in examine((tmp_path / "s").as_uri())}
    assert "--address 10.0.0.1:6379" in found["ray"].advice


@pytest.mark.parametrize(
    "words", [["--help"], ["compress", "--help"], ["list", "--store"], ["history", "m", "--store"]]
)
def test_commands_that_need_neither_torch_nor_ray_do_not_import_them(words: list[str], tmp_path: Path) -> None:
    if words[-1] == "--store":
        words = [*words, (tmp_path / "store").as_uri()]
    script = (
        "import sys\nfrom birkhoff.pipeline.cli import main\n"
        f"main.run(lambda: main.app({words!r}, standalone_mode=False), debug=False)\n"
        "heavy = [name for name in ('torch', 'ray', 'numpy', 'transformers') if name in sys.modules]\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
