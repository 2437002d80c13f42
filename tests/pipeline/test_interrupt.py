"""Ctrl-C at any moment: one line, exit code 130, nothing half-published, and the next run goes on."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

RUN_MARK = b"BIRKHOFF_RUN="
BIRKHOFF = str(Path(sys.executable).with_name("birkhoff"))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"b.{n}.w": torch.randn(512, 2048, generator=generator) for n in range(60)}, tmp_path / "net.safetensors"
    )
    (tmp_path / "m.yaml").write_text("shard_mib: 4\nmodels: [{name: net, source: net.safetensors}]\n")
    store = (tmp_path / "store").as_uri()
    return [BIRKHOFF, "compress", str(tmp_path / "m.yaml"), "--executor", "inline", "--store", store]


@pytest.mark.slow
def test_sigint_ends_with_one_line_and_the_next_run_goes_on(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    for seconds in (0.6, 1.5, 4.0):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            if process.returncode == 0:  # it came when everything was published already
                assert "published" in err
                return
            assert process.returncode == 130, err
            assert [line for line in err.splitlines() if line.startswith("error: interrupted")], err
            assert "Traceback" not in err
        assert not list((tmp_path / "store").rglob("names/*.json"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout
    checked = subprocess.run(
        [BIRKHOFF, "verify", "net", "--store", command[-1]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def marked_processes(home: Path) -> list[int]:
    """Processes of the Ray cluster that a run with this BIRKHOFF_HOME started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"BIRKHOFF_HOME={home}".encode() in words and any(word.startswith(RUN_MARK) for word in words):
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_leaves_no_process_and_no_file_of_ray(command: list[str], tmp_path: Path) -> None:
    command = [word for word in command if word not in ("--executor", "inline")]
    ray, home = Path(tempfile.mkdtemp(prefix="bf-", dir="/tmp")), tmp_path / "home"  # a socket's path must be short
    environment = {**os.environ, "BIRKHOFF_HOME": str(home), "RAY_TMPDIR": str(ray)}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for(lambda: bool(list((tmp_path / "store").rglob("shards/*/*.json"))))  # it is at work
        assert marked_processes(home)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert [line for line in err.splitlines() if line.startswith("error: interrupted")], err
        wait_for(lambda: not marked_processes(home))
        wait_for(lambda: not list(ray.iterdir()))
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert not list((tmp_path / "store").rglob("names/*.json"))
