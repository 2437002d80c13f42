"""Logs: JSON on standard error, and the trace of a run, which outlives a kill."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline import logs
from tests.patience import PATIENT_SECONDS

KILLED = """
import os, signal
from birkhoff.pipeline import logs
logs.join_trace()
with logs.shard("net", 3):
    logs.step("read", 100, "a.weight")
    logs.step("encode", 4096, "b\\u2028.weight")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(logs.FOLDER_VARIABLE, raising=False)
    return tmp_path / "home"


def test_every_line_of_a_run_is_a_json_object_and_its_trace_has_each_step(home: Path, tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(64, 64), "a.bias": torch.randn(64)}, tmp_path / "net.safetensors")
    models = "[{name: net, source: net.safetensors}, {name: gone, source: gone.safetensors}]"
    (tmp_path / "m.yaml").write_text(f"models: {models}\n")
    command = [sys.executable, "-m", "birkhoff", "compress", str(tmp_path / "m.yaml"), "--executor", "inline"]
    done = subprocess.run(
        [*command, "--store", (tmp_path / "store").as_uri(), "--log-format", "json"],
        capture_output=True,
        text=True,
        env={**os.environ, "BIRKHOFF_HOME": str(home)},
        timeout=PATIENT_SECONDS,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 14
    assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)
    assert {(line["event"], line["model"]) for line in lines if "model" in line} == {
        ("planned", "net"),
        ("planned", "gone"),
        ("shard", "net"),
        ("model", "net"),
        ("model", "gone"),
    }
    (failed,) = [line for line in lines if line["level"] == "ERROR"]
    assert "gone.safetensors: no such file" in failed["event"]
    (folder,) = (home / "runs").iterdir()
    (file,) = folder.iterdir()
    trace = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [(line["stage"], line.get("tensor"), line["model"], line["shard"]) for line in trace if "stage" in line]
    assert steps == [
        *((stage, name, "net", 0) for stage in ("read", "encode", "validate") for name in ("a.bias", "a.weight")),
        ("upload", None, "net", 0),
    ]
    assert {line["bytes"] for line in trace if line.get("tensor") == "a.weight"} == {64 * 64 * 4}
    assert [line["status"] for line in trace if line["event"] == "model"] == ["failed", "published"]


def test_the_last_step_of_a_killed_worker_is_known(home: Path) -> None:
    with logs.trace("20260102T030405.678Z-9abc") as folder:
        assert folder is not None
        assert logs.environment() == {logs.FOLDER_VARIABLE: str(folder)}
        with logs.shard("net", 3):
            logs.step("read", 7)
        assert logs.last_step("net", 3) is None  # it came back
        done = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ}, timeout=PATIENT_SECONDS)
        assert done.returncode == -signal.SIGKILL
        assert logs.last_step("net", 3) == "encode of b\u2028.weight, 4096 bytes"
        assert logs.last_step("net", 4) is None
        with next(folder.glob("worker-*.jsonl")).open("ab") as file:
            file.write(b'\xff{"half a line')
        assert logs.last_step("net", 3) == "encode of b\u2028.weight, 4096 bytes"
    assert logs.last_step("net", 3) is None
    assert logs.environment() == {}


def test_old_traces_go(home: Path) -> None:
    for day in range(1, 30):
        (home / "runs" / f"202601{day:02}T030405.678Z-9abc").mkdir(parents=True)
    (home / "runs" / "mine").mkdir()
    with logs.trace("20260202T030405.678Z-9abc"):
        kept = sorted(path.name for path in (home / "runs").iterdir())
    assert (len(kept), kept[-1], kept[0]) == (logs.KEPT_TRACES + 1, "mine", "20260111T030405.678Z-9abc")


def test_a_home_that_cannot_be_written_is_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    home.write_text("a file, not a folder")
    with logs.trace("20260102T030405.678Z-9abc") as folder:
        assert folder is None
        logs.step("read", 1)
    assert "no trace of this run" in caplog.text


def test_a_worker_that_cannot_write_its_trace_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file, not a folder")
    monkeypatch.setenv(logs.FOLDER_VARIABLE, str(home / "runs"))
    before = list(logging.getLogger("birkhoff").handlers)
    logs.join_trace()
    assert "no trace of this worker" in caplog.text
    assert logging.getLogger("birkhoff").handlers == before
