"""A start of Ray on a busy machine: waited for while it makes progress, given up if it stalls, done without."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.run import demand, patience
from birkhoff.pipeline.run.cleanup import Family, Reaper
from birkhoff.pipeline.run.cluster import Cluster
from birkhoff.pipeline.run.patience import STALL_CPU_SECONDS, STALL_SECONDS, START_SECONDS, Patience, wait_for
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import captured

Capture = pytest.CaptureFixture[str]


class World:
    """A clock that steps with every look at it, and processes that use CPU time until `stalls`."""

    def __init__(self, *, per_second: float, stalls: float = float("inf")) -> None:
        self.now, self._rate, self._stalls = 0.0, per_second, stalls

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def cpu(self) -> float:
        return min(self.now, self._stalls) * self._rate


def given_up_after(world: World) -> float:
    waiting = Patience(world.cpu, world.clock)
    while not waiting.over():
        pass
    return world.now


def test_what_makes_progress_is_waited_for_and_what_stalls_is_not() -> None:
    slow = 2 * STALL_CPU_SECONDS / STALL_SECONDS
    assert given_up_after(World(per_second=slow)) > START_SECONDS
    assert given_up_after(World(per_second=slow, stalls=100.0)) < 100 + STALL_SECONDS + 20
    assert given_up_after(World(per_second=slow / 4)) == pytest.approx(STALL_SECONDS, abs=3)


def test_the_last_error_comes_once_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_POLL_SECONDS", 0.0)
    asked = iter([RuntimeError("no node"), RuntimeError("no node"), "node"])

    def ask() -> object:
        answer = next(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wait_for(ask, Patience(World(per_second=1).cpu, World(per_second=1).clock)) == "node"

    def refuse() -> None:
        raise RuntimeError("no node yet")

    dead = World(per_second=0)
    with pytest.raises(RuntimeError, match="no node yet"):
        wait_for(refuse, Patience(dead.cpu, dead.clock))


def test_the_pinned_ray_has_what_is_replaced_and_gets_it_back() -> None:
    import ray

    services, node, parameter = ray._private.services, ray._private.node, ray._private.parameter
    places = [(services, name) for name in ("get_node", "start_raylet", "start_ray_process", "start_api_server")]
    places += [(node, "wait_for_persisted_port"), (parameter, "RayParams")]
    before = [getattr(module, name) for module, name in places]
    with patience.patient_start(ray, lambda: 0.0):
        inside = [getattr(module, name) for module, name in places]
        made = parameter.RayParams(metrics_export_port=None)
    assert not set(before) & set(inside)
    assert [getattr(module, name) for module, name in places] == before
    source = Path(node.__file__).read_text()
    for called in ("get_node", "start_raylet", "start_api_server"):
        assert f"ray._private.services.{called}(" in source
    assert "= wait_for_persisted_port(" in source
    commands = Path(services.__file__).read_text().partition("def start_raylet(")[2]
    assert "= start_ray_process(" in commands
    assert f'"{patience._RUNTIME_ENV_AGENT}{{}}".format(' in commands
    assert "ray._private.parameter.RayParams(" in Path(ray._private.worker.__file__).read_text()
    ports = {made.metrics_agent_port, made.metrics_export_port, made.dashboard_agent_listen_port}
    assert len(ports | {made.runtime_env_agent_port}) == 4
    assert (made.no_monitor, made.include_log_monitor) == (True, False)


def test_the_node_is_given_a_sleeper_for_one_agent() -> None:
    words = ["raylet", "--node_id=1", "--dashboard_agent_command=python b.py"]
    assert list(map(patience._lean, words)) == words
    program, seconds = patience._lean("--runtime_env_agent_command=python a.py").partition("=")[2].split()
    assert (Path(program).name, int(seconds) > 10**9) == ("sleep", True)


def test_where_nothing_sleeps_the_agent_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert patience._lean("--runtime_env_agent_command=python a.py") == "--runtime_env_agent_command=python a.py"


def test_ports_that_others_hold_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = patience.free_ports(2)
    monkeypatch.setattr(patience, "_PORTS", range(min(held, free), min(held, free) + 2))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", patience._PORTS[0]))
        assert patience.free_ports(1) == [patience._PORTS[1]]


def test_cpu_time_of_what_a_reaper_covers() -> None:
    reaper = Reaper(None)
    try:
        with reaper.covering():
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        deadline = time.monotonic() + PATIENT_SECONDS
        while reaper.cpu_seconds() < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert reaper.cpu_seconds() >= 0.2
    finally:
        reaper.close()
    assert busy.wait(PATIENT_SECONDS) == -signal.SIGKILL
    assert reaper.cpu_seconds() == 0.0


def comes_to_report(url: str, name: bytes) -> bool:
    """Whether a server that may still be starting comes to report a metric of this name: it serves its own first."""
    deadline = time.monotonic() + PATIENT_SECONDS
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(url, timeout=PATIENT_SECONDS) as response,
        ):
            if name in response.read():
                return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
def test_a_node_that_needs_longer_than_ray_allows_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's node stands still for 35 s, and then its agents for 20 s: Ray itself gives up after 30 s and after 15 s."""
    reapers: list[Reaper] = []
    make = Reaper.__init__

    def note(self: Reaper, folder: Path | None) -> None:
        make(self, folder)
        reapers.append(self)

    monkeypatch.setattr(Reaper, "__init__", note)
    monkeypatch.setattr(patience, "STALL_SECONDS", 120.0)
    throttle = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from birkhoff.pipeline.run.cleanup import Family\n"
        "def stop(names, seconds):\n"
        "    held = None\n"
        "    while held is None:\n"
        "        for pid in family.alive():\n"
        "            try: words = Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\\0')\n"
        "            except OSError: continue\n"
        "            if any(word.endswith(names) for word in words): held = pid\n"
        "    os.kill(held, signal.SIGSTOP); time.sleep(seconds); os.kill(held, signal.SIGCONT)\n"
        "family = Family(sys.argv[1])\n"
        "stop((b'/raylet',), 35)\n"
        "stop((b'/dashboard/agent.py', b'ray::DashboardAgent'), 20)\n"  # the name that it gives itself later
    )
    start = Cluster._start
    helpers: list[subprocess.Popen[bytes]] = []

    def held(self: Cluster) -> None:
        init = Reaper.covering

        def covering(reaper: Reaper) -> object:
            helpers.append(subprocess.Popen([sys.executable, "-c", throttle, reaper._mark]))
            return init(reaper)

        with monkeypatch.context() as patch:
            patch.setattr(Reaper, "covering", covering)
            start(self)

    monkeypatch.setattr(Cluster, "_start", held)
    began = time.monotonic()
    with Cluster(None, {"SHOWN": "yes"}) as cluster:
        assert time.monotonic() - began > 30
        for helper in helpers:
            assert helper.wait(PATIENT_SECONDS) == 0
        shown = cluster.ray.remote(os.getenv)
        assert cluster.ray.get(shown.remote("SHOWN"), timeout=PATIENT_SECONDS) == "yes"  # the node serves
        port = cluster.ray.nodes()[0]["MetricsExportPort"]
        # So does the agent, which nothing waited for.
        assert comes_to_report(f"http://127.0.0.1:{port}/metrics", b"ray_")
        assert not cluster.lost()
    assert len(reapers) == 1  # the first try held
    assert not Family(reapers[0]._mark).alive()


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "birkhoff"))
    save_file(
        {"a.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}, tmp_path / "net.safetensors"
    )
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    return [str(tmp_path / "m.yaml"), "--store", (tmp_path / "store").as_uri()]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Ray fails to start, in a run that is long enough for it."""
    monkeypatch.setattr(demand, "START_BYTES", 0)

    def fail_with(error: Exception) -> None:
        def fail(self: Cluster) -> None:
            raise error

        monkeypatch.setattr(Cluster, "_start", fail)

    return fail_with


def reports(words: list[str]) -> list[dict[str, object]]:
    with open_store(words[-1]) as store:
        keys = [info.key for info in store.list("runs/") if info.key.endswith("report.json")]
        return [json.loads(store.get(key)) for key in keys]


def test_without_ray_shards_run_in_this_process_and_one_line_says_so(
    manifest: list[str], no_ray: Callable[[Exception], None], capsys: Capture
) -> None:
    no_ray(RuntimeError("The current node timed out during startup."))
    code, out, err = captured(capsys, "compress", *manifest)
    assert (code, "published" in out) == (0, True), err
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: Ray did not start (RuntimeError: The current node timed out during startup.); shards run in "
        "threads of this process"
    ]
    (report,) = reports(manifest)
    assert report["settings"]["executor"] == "inline"  # type: ignore[index]


def test_whoever_asks_for_ray_gets_it_or_an_error_and_no_report(
    manifest: list[str], no_ray: Callable[[Exception], None], capsys: Capture
) -> None:
    no_ray(RuntimeError("no room"))
    code, _, err = captured(capsys, "compress", *manifest, "--executor", "ray")
    assert code == 13
    assert "error: cannot reach Ray on this machine: RuntimeError: no room; try --executor inline" in err
    assert reports(manifest) == []


def test_a_home_folder_that_cannot_be_written_is_named(
    manifest: list[str], no_ray: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HOME", "/sys")
    no_ray(PermissionError(1, "Operation not permitted", "/sys/.ray"))
    code, _, err = captured(capsys, "compress", *manifest)
    assert code == 0
    assert "warning: Ray did not start (the home folder /sys cannot be written (Operation not permitted); point" in err


def test_a_short_run_starts_no_ray(
    manifest: list[str], no_ray: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    no_ray(RuntimeError("not asked for"))
    monkeypatch.setattr(demand, "START_BYTES", 1 << 20)
    code, _, err = captured(capsys, "compress", *manifest)
    assert code == 0
    assert "warning" not in err
    (report,) = reports(manifest)
    assert report["settings"]["executor"] == "inline"  # type: ignore[index]


@pytest.mark.parametrize(("key", "words"), [("", ["--workers", "1"]), ("shard_seconds: 60\n", [])])
def test_a_number_of_workers_or_a_limit_of_time_asks_for_ray(
    manifest: list[str],
    no_ray: Callable[[Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    key: str,
    words: list[str],
) -> None:
    no_ray(RuntimeError("asked for"))
    monkeypatch.setattr(demand, "START_BYTES", 1 << 20)
    path = Path(manifest[0])
    path.write_text(key + path.read_text())
    code, _, err = captured(capsys, "compress", *manifest, *words)
    assert code == 0
    assert "Ray did not start (RuntimeError: asked for)" in err


def test_a_cluster_goes_with_ray(manifest: list[str]) -> None:
    from birkhoff.pipeline.cli import main

    with pytest.raises(Exception, match="names a Ray cluster") as caught:
        main.app(["compress", *manifest, "--executor", "inline", "--address", "h:1"], standalone_mode=False)
    assert getattr(caught.value, "exit_code", None) == 2
