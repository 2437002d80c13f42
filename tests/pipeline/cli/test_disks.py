"""Full and read-only disks, as the command line meets them: one line with a remedy, and what can be done is done."""

import contextlib
import errno
import json
import logging
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from birkhoff.pipeline import logs
from birkhoff.pipeline.errors import PreconditionError, StoreError, StoreUnreachableError
from birkhoff.pipeline.store import seaweedfs
from tests.pipeline.command import captured, execute

Capture = pytest.CaptureFixture[str]
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_an_export_that_fills_the_disk_is_one_line_and_leaves_nothing(
    suffix: str, demo_store: str, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: the system refuses the write in the same place."""
    target = tmp_path / f"x{suffix}"
    ended = subprocess.run(
        [sys.executable, "-m", "birkhoff", "export", "demo-sam", "-o", str(target), "--store", demo_store],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 16, ended.stderr
    assert ended.stderr == f"error: {target}: File too large; free some space, or name another disk\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export demo-sam -o missing/folder/x.pth", "pull demo-sam -o missing/folder/x"])
def test_a_folder_that_is_missing_is_made(
    command: str, demo_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = captured(capsys, *command.split(), "--store", demo_store)
    assert (code, err) == (0, "")
    assert list((tmp_path / "missing" / "folder").iterdir())


def test_a_pull_goes_on_without_a_cache_that_cannot_be_written(
    demo_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "file"))
    code, out, err = captured(capsys, "pull", "demo-sam", "-o", str(tmp_path / "out"), "--store", demo_store, "--json")
    assert code == 0, err
    assert err == f"warning: cache {tmp_path}/file/cache cannot be written (Not a directory); pulling without it\n"
    assert json.loads(out)["fetched_bytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    assert execute("verify", str(tmp_path / "out")) == 0


def test_a_full_disk_anywhere_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/home/u/.birkhoff/embedded/state.json")

    monkeypatch.setattr("birkhoff.pipeline.store.default.open_default_store", fail)
    code, _, err = captured(capsys, "list")
    assert code == 16
    said = "/home/u/.birkhoff/embedded/state.json: No space left on device; free some space, or point BIRKHOFF_HOME"
    assert err == f"error: {said} elsewhere\n"


def test_a_trace_on_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = logs._file(tmp_path, "driver")
    assert isinstance(handler, logging.FileHandler)
    handler.close()
    full = Path("/dev/full").open("w")  # noqa: SIM115  closing it fails: it still holds what the disk did not take
    with contextlib.suppress(OSError), contextlib.closing(full), caplog.at_level(logging.INFO, "birkhoff"):
        handler.stream = full
        for _ in range(3):
            logging.getLogger("birkhoff.run").info("shard")
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith(f"the trace of this run ends here: {tmp_path}/driver-")
    assert "No space left on device" in said


def test_the_embedded_store_names_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seaweedfs.shutil, "disk_usage", lambda _: Usage(10 << 30, (10 << 30) - 4096, 4096))
    said = r"the disk of .* is full, 4.0 KiB of 10.0 GiB are free; free some"
    with pytest.raises(StoreError, match=said) as caught, seaweedfs._room(tmp_path / "embedded"):
        raise StoreUnreachableError("no free volumes left")
    assert type(caught.value) is StoreError  # and not that it is unreachable
    with pytest.raises(PreconditionError), seaweedfs._room(tmp_path):
        raise PreconditionError("it is there already")
    monkeypatch.setattr(seaweedfs.shutil, "disk_usage", lambda _: Usage(10 << 30, 5 << 30, 5 << 30))
    with pytest.raises(StoreUnreachableError, match="no free volumes"), seaweedfs._room(tmp_path):
        raise StoreUnreachableError("no free volumes left")
