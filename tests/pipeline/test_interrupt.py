"""Ctrl-C at any moment: one line, exit code 130, nothing half-published, and the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
