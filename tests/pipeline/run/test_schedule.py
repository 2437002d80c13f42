"""Ticks of a schedule, here and on a real Ray cluster: nothing to do, one changed tensor, an earlier tick at work."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.errors import BusyError
from birkhoff.pipeline.registry.leases import LEASE_SECONDS, schedule_lock
from birkhoff.pipeline.run import schedule
from birkhoff.pipeline.run.cleanup import MARK, Reaper
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS, RAY_GAVE_UP, RAY_SETTINGS
from tests.pipeline.command import execute

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]


def write_sources(folder: Path, *, changed: bool = False) -> Path:
    """Two models of two blocks each, a shard a block; `changed` alters one tensor of one of them."""
    for number, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(number)
        tensors = {f"blocks.{n}.weight": torch.randn(512, 1024, generator=generator) for n in range(2)}
        if changed and name == "one":
            tensors["blocks.1.weight"] *= 1.25
        save_file(tensors, folder / f"{name}.safetensors")
    models = ", ".join(f"{{name: {name}, source: {folder}/{name}.safetensors}}" for name in ("one", "two"))
    (folder / "fleet.yaml").write_text(f"shard_mib: 2\nprofile: fast\nmodels: [{models}]\n")
    return folder / "fleet.yaml"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    return (tmp_path / "store").as_uri()


def tick(manifest: Path, *more: str) -> int:
    words = ["compress", str(manifest), "--scheduled", "--executor", "inline", *more]
    return execute(*words)


def contents(url: str) -> dict[str, str]:
    with open_store(url) as store:
        return {info.key: info.tag for info in store.list()}


def check_ticks(url: str, again: dict[str, str], after: dict[str, str]) -> None:
    """What a store must hold after the tick of the changed tensor; `again` is what it held before."""
    new = set(after) - set(again)
    assert len([key for key in new if key.startswith("blobs/")]) == 1  # one shard encoded
    assert {key for key in new if "/names/" in key} == {"models/one/names/v2.json"}
    assert after["models/one/aliases/latest.json"] != again["models/one/aliases/latest.json"]
    assert after["models/two/aliases/latest.json"] == again["models/two/aliases/latest.json"]
    (report,) = [key for key in new if key.endswith("report.json")]
    with open_store(url) as store:
        document = json.loads(store.get(report))
    assert document["totals"]["shards_reused"] == 1
    (one,) = [model for model in document["models"] if model["name"] == "one"]
    assert one["changes"]["version"] == "v1"
    assert one["changes"]["tensors"] == {"same": 1, "changed": 1}


def test_three_ticks(url: str, tmp_path: Path, capsys: Capture) -> None:
    manifest = write_sources(tmp_path)
    assert tick(manifest) == 0
    first = contents(url)
    capsys.readouterr()
    assert tick(manifest) == 0
    assert "nothing to do: 2 of 2 models are up to date" in capsys.readouterr().err
    assert contents(url) == first
    write_sources(tmp_path, changed=True)
    assert tick(manifest) == 0
    check_ticks(url, first, contents(url))


def test_a_tick_that_overlaps_leaves_the_other_alone_and_says_who_it_is(
    url: str, tmp_path: Path, capsys: Capture
) -> None:
    manifest = write_sources(tmp_path)
    with open_store(url) as store, schedule_lock(store, ["two", "one"]):
        assert tick(manifest) == 0  # anything else would be a failed job to cron, systemd and Kubernetes
        said = capsys.readouterr()
        assert f"an earlier run of these models is still at work (one of them process {os.getpid()} on" in said.err
        assert execute("compress", str(manifest), "--executor", "inline", "--scheduled", "--json") == 0
        assert capsys.readouterr().out == "[]\n"
        assert not [key for key in contents(url) if key.startswith(("models/", "blobs/"))]
        with schedule_lock(store, ["three"]):  # another schedule
            pass
    assert tick(manifest) == 0
    assert not [key for key in contents(url) if key.startswith("runs/turn/")]


def test_a_run_by_hand_waits_for_the_one_at_work_and_says_so(url: str, tmp_path: Path, capsys: Capture) -> None:
    manifest, held, waiting = write_sources(tmp_path), threading.Event(), threading.Event()

    def hold() -> None:
        with open_store(url) as store, schedule_lock(store, ["two", "one"]):
            held.set()
            waiting.wait(PATIENT_SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENT_SECONDS)

    def release(seconds: float) -> None:
        waiting.set()
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        # Of this module alone: other threads sleep too, before this one has looked.
        patch.setattr(schedule, "time", SimpleNamespace(sleep=release))
        assert execute("compress", str(manifest), "--executor", "inline") == 0
    thread.join()
    err = capsys.readouterr().err
    said = f"warning: another run of these models is at work (one of them process {os.getpid()} on"
    assert err.count(said) == 1
    assert "; waiting for it to end" in err
    assert {key for key in contents(url) if "/names/" in key} == {f"models/{m}/names/v1.json" for m in ("one", "two")}


def test_a_run_by_hand_does_not_wait_for_the_dead(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_sources(tmp_path)
    script = (
        "import os, sys\n"
        "from birkhoff.pipeline.registry.leases import schedule_lock\n"
        "from birkhoff.pipeline.store.open import open_store\n"
        "with open_store(sys.argv[1]) as store, schedule_lock(store, ['one', 'two']):\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, url]).returncode == 9
    assert [key for key in contents(url) if key.startswith("runs/turn/")]
    monkeypatch.setattr(schedule, "_POLL_SECONDS", None)  # would fail if it waited
    assert execute("compress", str(manifest), "--executor", "inline") == 0


def test_the_turn_of_a_dead_process_ends_by_itself(directory_store: Store, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from birkhoff.pipeline.registry.leases import schedule_lock\n"
        "from birkhoff.pipeline.store.open import open_store\n"
        "with open_store(sys.argv[1]) as store, schedule_lock(store, ['net']):\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, directory_store.url]).returncode == 9
    (left,) = directory_store.list("runs/turn/")
    with pytest.raises(BusyError, match="still at work"), schedule_lock(directory_store, ["net"]):
        pass
    path = tmp_path / "store" / left.key
    os.utime(path, (path.stat().st_mtime - LEASE_SECONDS - 5,) * 2)
    with schedule_lock(directory_store, ["net"]):
        (mine,) = directory_store.list("runs/turn/")  # and that of the dead is gone
    assert mine.key != left.key


@pytest.fixture
def head(url: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray cluster with a dashboard, on loopback: its address, and the environment of its jobs."""
    own = ("RAY_", "MAKE", "ARGS")  # what a `make test ARGS=...` hands down is not for the `make submit` tried here
    environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    environment |= RAY_SETTINGS
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # jobs run `python`
    end = time.monotonic() + PATIENT_SECONDS
    with contextlib.ExitStack() as held:
        while (address := held.enter_context(_started_head(environment, tmp_path / "head.log"))) is None:
            said = (tmp_path / "head.log").read_text()
            held.close()
            assert RAY_GAVE_UP in said, said
            assert time.monotonic() < end, said
        yield address, environment


@contextlib.contextmanager
def _started_head(environment: dict[str, str], log: Path) -> Iterator[str | None]:
    """The address of a cluster of one node until the block ends; None if it ended while it started, as `log` says."""
    folder = Path("/tmp", f"bf-head-{uuid.uuid4().hex[:10]}")  # the paths of sockets must be short
    ports = [_free_port() for _ in range(3)]
    words = ["start", "--head", "--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--include-dashboard=true"]
    words += [f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}", "--num-cpus=2"]
    words += ["--object-store-memory=100000000", f"--temp-dir={folder}", "--block"]
    reaper = Reaper(folder)
    with reaper.covering():
        program, marked = str(Path(sys.executable).parent / "ray"), environment | {MARK: os.environ[MARK]}
        with log.open("w") as written:
            process = subprocess.Popen([program, *words], env=marked, stdout=written, stderr=written)
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        yield address if _comes_up(process, f"{address}/api/jobs/", log) else None
    finally:
        process.terminate()
        process.wait(PATIENT_SECONDS)
        reaper.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _comes_up(head: subprocess.Popen[bytes], page: str, log: Path) -> bool:
    """Whether it says that it has started, and serves the page: the page is there before the node, and goes again where
    that does not come up."""
    deadline = time.monotonic() + PATIENT_SECONDS
    while head.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(page, timeout=PATIENT_SECONDS).close()
            if "Ray runtime started" in log.read_text():
                return True
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return False


@pytest.mark.slow
def test_ticks_submitted_to_a_ray_cluster(head: tuple[str, dict[str, str]], url: str, tmp_path: Path) -> None:
    if not (ROOT / ".venv" / "bin" / "ray").exists():
        pytest.skip("`make submit` needs the environment of `make setup`")
    address, environment = head
    clone = tmp_path / "clone"
    for name in ("codec", "kernels", "pipeline", "src"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "manifests/cluster/submit.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    subprocess.run(
        ["git", "-C", str(clone), "add", "codec", "kernels", "pipeline", "src", "pyproject.toml"], check=True
    )
    (clone / ".venv").symlink_to(ROOT / ".venv")
    (clone / ".gitignore").write_text(".venv\n")

    def submit(manifest: Path) -> str:
        words = ["make", "-o", ".venv/.ready", "submit", f"ADDRESS={address}", f"MANIFEST={manifest}"]
        ended = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    submit(write_sources(tmp_path))
    first = contents(url)
    assert "nothing to do: 2 of 2 models are up to date" in submit(tmp_path / "fleet.yaml")
    assert contents(url) == first
    submit(write_sources(tmp_path, changed=True))
    check_ticks(url, first, contents(url))
