"""Ctrl-C at any moment: one line, exit code 130, nothing half-published, and the next run goes on."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.cli import main
from birkhoff.pipeline.download import hub
from birkhoff.pipeline.download.http import FetchSettings, HttpTransport
from birkhoff.pipeline.files import file_sha256, take_lock
from birkhoff.pipeline.interrupt import Interrupted
from birkhoff.pipeline.registry import leases
from birkhoff.pipeline.store import seaweedfs
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS

SHARDS = 30
RUN_MARK = b"BIRKHOFF_RUN="
BIRKHOFF = str(Path(sys.executable).with_name("birkhoff"))


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process takes signals as a command does."""
    monkeypatch.setattr(interrupt, "_asked", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    interrupt.install()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


class Interrupting(logging.Handler):
    """Is interrupted in the middle of a line, with its lock held."""

    written = 0

    def emit(self, record: logging.LogRecord) -> None:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked()
        self.written += 1


@pytest.mark.usefixtures("handlers")
@pytest.mark.timeout(2 * PATIENT_SECONDS, method="thread")  # the other method uses the alarm too
@pytest.mark.parametrize("then", [lambda: time.sleep(PATIENT_SECONDS), interrupt.check])
def test_a_signal_inside_logging_is_acted_on_once_and_with_its_lock_free(then: Callable[[], None]) -> None:
    handler = Interrupting()
    log = logging.Logger("of this test")
    log.addHandler(handler)

    def work() -> None:
        log.warning("interrupt me")
        then()

    with pytest.raises(Interrupted):
        work()
    time.sleep(0.1)  # and not interrupted again
    assert handler.written == 1
    assert in_a_thread(lambda: handler.lock is not None and handler.lock.acquire(blocking=False)) == [True]


@pytest.mark.usefixtures("handlers")
@pytest.mark.timeout(2 * PATIENT_SECONDS, method="thread")
def test_a_signal_while_torch_is_imported_is_acted_on_after_it() -> None:
    """Its compiled parts import, too, and end the process if that raises."""
    module: dict[str, object] = {"__name__": "torch"}
    code = compile("import signal; signal.raise_signal(signal.SIGINT); whole = True", "torch/__init__.py", "exec")

    def work() -> None:
        exec(code, module)
        time.sleep(PATIENT_SECONDS)

    with pytest.raises(Interrupted):
        work()
    assert module["whole"] is True


@pytest.mark.usefixtures("handlers")
@pytest.mark.timeout(2 * PATIENT_SECONDS, method="thread")
def test_a_signal_while_a_condition_takes_its_lock_leaves_it_free() -> None:
    """The call returns with the lock taken before the caller knows of it."""

    class Lock:
        def __init__(self) -> None:
            self.real = threading.Lock()

        def __enter__(self) -> None:
            self.real.acquire()
            signal.raise_signal(signal.SIGINT)

        def __exit__(self, *_: object) -> None:
            self.real.release()

    lock = Lock()
    condition = threading.Condition(threading.Lock())
    condition._lock = lock  # type: ignore[attr-defined]

    def wait() -> None:
        with condition:
            pass
        time.sleep(PATIENT_SECONDS)

    with pytest.raises(Interrupted):
        wait()
    assert lock.real.acquire(blocking=False)


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_another_is_taken_in_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some supervisors signal a process and its group in one moment."""
    seen = []
    ask = interrupt._ask

    def interrupted(number: int) -> None:
        seen.append(number)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGTERM)
        ask(number)

    monkeypatch.setattr(interrupt, "_ask", interrupted)
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT, signal.SIGTERM]
    assert interrupt.asked()


@pytest.mark.usefixtures("handlers")
def test_a_pause_ends_with_the_signal_in_every_thread() -> None:
    paused = threading.Event()

    def pause() -> None:
        paused.set()
        interrupt.pause(PATIENT_SECONDS)

    began = time.monotonic()
    with pytest.raises(Interrupted):  # where this thread waits
        in_a_thread(pause, beside=lambda: paused.wait() and signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        interrupt.pause(PATIENT_SECONDS)
    assert not [thread for thread in threading.enumerate() if thread.name == "of this test"]
    assert time.monotonic() - began < PATIENT_SECONDS


def test_a_thread_ends_with_its_own_event_alone() -> None:
    mine, others = threading.Event(), threading.Event()

    def work(event: threading.Event) -> bool:
        with interrupt.ends_with(event):
            try:
                interrupt.check()
            except Interrupted:
                return True
        interrupt.check()
        return False

    mine.set()
    assert in_a_thread(lambda: work(mine)) == [True]
    assert in_a_thread(lambda: work(others)) == [False]
    interrupt.check()


def hash_a_file(folder: Path) -> object:
    (folder / "file").write_bytes(b"x")
    return file_sha256(folder / "file")


def wait_for_a_lock(folder: Path) -> None:
    with (folder / "lock").open("ab") as held, (folder / "lock").open("ab") as file:
        fcntl.flock(held, fcntl.LOCK_EX)
        take_lock(file)


def pour_a_download(folder: Path) -> None:
    response: Any = SimpleNamespace(raw=SimpleNamespace(read1=lambda *_, **__: b"x"))
    remote: Any = SimpleNamespace(size=None)
    with (folder / "file").open("wb") as file:
        HttpTransport(FetchSettings())._pour("https://host/file", response, file, remote, None)


def download_from_a_hub(_: Path) -> object:
    return hub._reporting("folder/file", None)(total=2).update(1)


@pytest.mark.parametrize("work", [hash_a_file, wait_for_a_lock, pour_a_download, download_from_a_hub])
def test_what_takes_long_in_threads_looks_whether_it_is_to_stop(
    work: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "_asked", True)
    with pytest.raises(Interrupted):
        work(tmp_path)


def test_the_thread_of_a_lease_ends_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = threading.Event(), list[object]()

    def renew(_: object) -> None:
        asked.set()
        raise Interrupted

    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.01)
    monkeypatch.setattr(leases, "keep_once", renew)
    monkeypatch.setattr(threading, "excepthook", said.append)
    with open_store((tmp_path / "store").as_uri()) as store:
        keeper = leases.Keeper(leases.Lease(store, "runs/open/"))
        keeper.start()
        assert asked.wait(PATIENT_SECONDS)
        keeper.stop()
    assert said == []


@pytest.mark.usefixtures("handlers")
def test_another_signal_does_not_keep_a_server_that_was_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    def terminate(pid: int, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append(pid)

    state = SimpleNamespace(alive=True, persistent=False, pid=7, started="now", ports={})
    monkeypatch.setattr(seaweedfs._State, "load", lambda _: state)
    monkeypatch.setattr(seaweedfs, "terminate", terminate)
    with (tmp_path / "users.lock").open("a") as users:
        seaweedfs._leave(tmp_path, users)
    assert ended == [7]
    assert interrupt.asked()


def test_a_signal_before_the_first_is_reported_keeps_the_line_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise Interrupted

    monkeypatch.setattr(main, "execute", interrupted)
    monkeypatch.setattr(interrupt, "_number", signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert not interrupt.installed()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.count("error: interrupted") == 1


def in_a_thread(work: Callable[[], object], beside: Callable[[], object] = lambda: None) -> list[object]:
    """What `work` returned in another thread, nothing if it was interrupted. It has ended even if `beside` raises."""
    found: list[object] = []

    def run() -> None:
        with contextlib.suppress(Interrupted):
            found.append(work())

    thread = threading.Thread(target=run, name="of this test")
    thread.start()
    try:
        beside()
    finally:
        thread.join()
    return found


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"b.{n}.w": torch.randn(512, 512, generator=generator) for n in range(SHARDS)}, tmp_path / "net.safetensors"
    )
    (tmp_path / "m.yaml").write_text("shard_mib: 1\nmodels: [{name: net, source: net.safetensors}]\n")
    store = (tmp_path / "store").as_uri()
    return [BIRKHOFF, "compress", str(tmp_path / "m.yaml"), "--executor", "inline", "--store", store]


def stored(folder: Path) -> int:
    """Shards that are in the store."""
    return len(list((folder / "store").rglob("shards/*/*.json")))


def is_at(shards: int, process: subprocess.Popen[str], folder: Path) -> bool:
    return stored(folder) >= shards or process.poll() is not None


@pytest.mark.slow
@pytest.mark.timeout(1800)  # how long a start takes on a busy machine is no part of it
def test_sigint_ends_with_one_line_and_the_next_run_goes_on(command: list[str], tmp_path: Path) -> None:
    """While it imports, and after each of its first shards but one."""
    environment = {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    before = 0
    for more in (0, 1, 2):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(0.6)
        wait_for(partial(is_at, before + more, process, tmp_path))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENT_SECONDS)
        before = stored(tmp_path)
        assert process.returncode == 130, err
        assert [line for line in err.splitlines() if line.startswith("error: interrupted")], err
        assert "Traceback" not in err
        assert not list((tmp_path / "store").rglob("names/*.json"))
    assert 3 <= before < SHARDS
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)
    assert (run["status"], run["shards_reused"]) == ("published", before)
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


def wait_for(condition: Callable[[], bool], seconds: float = PATIENT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # how long a start takes on a busy machine is no part of it
def test_sigterm_leaves_no_process_and_no_file_of_ray(command: list[str], tmp_path: Path) -> None:
    command[command.index("inline")] = "ray"
    ray, home = Path(tempfile.mkdtemp(prefix="bf-", dir="/tmp")), tmp_path / "home"  # a socket's path must be short
    environment = {**os.environ, "BIRKHOFF_HOME": str(home), "RAY_TMPDIR": str(ray)}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for(lambda: stored(tmp_path) > 0)  # it is at work
        assert marked_processes(home)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENT_SECONDS)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert [line for line in err.splitlines() if line.startswith("error: interrupted")], err
        wait_for(lambda: not marked_processes(home))
        wait_for(lambda: not list(ray.iterdir()))
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert not list((tmp_path / "store").rglob("names/*.json"))
