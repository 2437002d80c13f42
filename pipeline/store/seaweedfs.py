"""The embedded store: a SeaweedFS S3 server on loopback for demos, development and tests, started when needed.

    HOME/embedded/          HOME is $BIRKHOFF_HOME, or .birkhoff in the current directory; mode 0700
        data/               the server's data; survive restarts
        s3.json             its one key pair, created once; mode 0600
        state.json          pid, start time of that pid, ports, whether it stays up; mode 0600
        server.log          output of this server; server.log.1 is that of the previous one
        start.lock          held while a server is started or stopped
        users.lock          shared by all users of the server

A server that was started on demand is stopped by its last user. After `up` it stays until `down`. It runs in its own
session, so Ctrl-C reaches only the client, which then stops the server in order. A client that is killed leaves the
server running, idle, on loopback: the next user of the same HOME finds and uses it, and stops it at the end (or `down`
does). The kernel releases the locks of dead processes.

Only processes of this host can reach the server. S3 requires the key pair, and the HTTP ports that serve data a token
derived from it. The master's HTTP port and the internal gRPC ports require neither, so do not use it on hosts shared
with people you do not trust.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal, Self

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import PreconditionError, StoreDeniedError, StoreError, StoreUnreachableError
from birkhoff.pipeline.files import atomic_file, take_lock
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.paths import birkhoff_home
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings
from birkhoff.pipeline.store.s3 import S3Credentials, S3Store, connect
from birkhoff.pipeline.store.seaweedfs_process import BUCKET, HOST, find_ports, spawn, start_time, terminate
from birkhoff.pipeline.text import size

log: logging.Logger = logging.getLogger("birkhoff.store")

READY_SECONDS = 120.0  # a start takes 0.5 s; with ten processes per processor 30 s were too short
_LEAST_FREE_BYTES = 64 << 20
"""Free space needed on a small disk. The server makes volumes read-only when 1 % is left, and grows them by more
than that."""

LOG_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedServer:
    """A running server: S3 endpoint, bucket and key pair."""

    home: Path
    pid: int
    endpoint: str
    bucket: str
    credentials: S3Credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """The content of state.json. `pid` and `started` name the process that runs, or ran last."""

    pid: int
    started: str
    ports: dict[str, int]
    persistent: bool

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        path = folder / "state.json"
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise StoreError(f"embedded server: {path} is damaged; end the weed process, then remove it") from error

    def save(self, folder: Path) -> None:
        _write_private(folder / "state.json", json.dumps(asdict(self)))

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started


class _HungError(StoreUnreachableError):
    """A server runs, but does not answer."""


@contextmanager
def use_embedded(home: Path | None = None) -> Iterator[EmbeddedServer]:
    """Yield the server, started if it does not run. The last user to leave stops it, unless `up` was called.

    Raises StoreError if it cannot be started or does not answer within READY_SECONDS.
    """
    server, leave = _join(_folder(home))
    try:
        yield server
    finally:
        leave()


def up(home: Path | None = None) -> EmbeddedServer:
    """Start the server if it does not run, and keep it until `down`. May be called twice. Raises StoreError."""
    folder = _folder(home)
    with _starting(folder):
        server, state = _ensure_running(folder)
        replace(state, persistent=True).save(folder)
    return server


def down(home: Path | None = None) -> Literal["stopped", "in use", "not running"]:
    """Stop the server. If others use it, the last of them stops it, and the result is `in use`."""
    folder = _folder(home)
    if not folder.is_dir():
        return "not running"
    with _starting(folder):
        state = _State.load(folder)
        if state is None or not state.alive:
            return "not running"
        replace(state, persistent=False).save(folder)
        if _in_use(folder):
            return "in use"
        terminate(state.pid, state.started, state.ports)
        return "stopped"


def attach(home: Path | None = None) -> EmbeddedServer:
    """Return the running server without becoming a user that it waits for. Raises StoreUnreachableError."""
    folder = _folder(home)
    state = _State.load(folder)
    if state is None or not state.alive:
        raise StoreUnreachableError(
            f"embedded server: none is running in {folder}; start it with `{hint('store', 'up')}`"
        )
    return _server(folder, state)


def environment(home: Path | None = None) -> dict[str, str]:
    """Return variables that point this package, and tools that read AWS's, to the running server.

    They contain the secret key: pass them to processes, not to logs. Raises StoreUnreachableError.
    """
    server = attach(home)
    return {
        "AWS_ACCESS_KEY_ID": server.credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": server.credentials.secret_key,
        "AWS_ENDPOINT_URL_S3": server.endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "BIRKHOFF_STORE": f"s3://{server.bucket}",
    }


def tool_environment(home: Path | None = None) -> dict[str, str]:
    """Return `environment`, with the variables of s5cmd and of rclone (a remote `birkhoff:`).

    Raises StoreUnreachableError.
    """
    shared = environment(home)
    rclone = {
        "TYPE": "s3",
        "PROVIDER": "SeaweedFS",
        "ACCESS_KEY_ID": shared["AWS_ACCESS_KEY_ID"],
        "SECRET_ACCESS_KEY": shared["AWS_SECRET_ACCESS_KEY"],
        "ENDPOINT": shared["AWS_ENDPOINT_URL_S3"],
        "REGION": shared["AWS_REGION"],
    }
    named = {f"RCLONE_CONFIG_BIRKHOFF_{name}": value for name, value in rclone.items()}
    return {**shared, "S3_ENDPOINT_URL": shared["AWS_ENDPOINT_URL_S3"], **named}


def open_embedded(address: StoreAddress, home: Path, *, start: bool) -> Store:
    """Open the server of `home` as a store: as one of its users (`start`), or attached to the running one."""
    if not start:
        return _EmbeddedStore(address, attach(home), leave=None)
    server, leave = _join(_folder(home))
    try:
        return _EmbeddedStore(address, server, leave=leave)
    except BaseException:
        leave()
        raise


class _EmbeddedStore(S3Store):
    """The embedded server's bucket. Closing it, or the end of the process, ends its use of the server."""

    def __init__(self, address: StoreAddress, server: EmbeddedServer, leave: Callable[[], None] | None) -> None:
        settings = replace(address.settings, endpoint=server.endpoint, addressing="path", anonymous=False)
        super().__init__(address, connect(settings, server.credentials), server.bucket, "")
        self._folder = _folder(server.home)
        self._leave = weakref.finalize(self, leave) if leave else None

    def put(self, key: str, body: bytes) -> str:
        with _room(self._folder):
            return super().put(key, body)

    def create(self, key: str, body: bytes) -> str:
        with _room(self._folder):
            return super().create(key, body)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        with _room(self._folder):
            return super().replace(key, body, tag=tag)

    def close(self) -> None:
        super().close()  # first, because the server waits for open connections
        if self._leave:
            self._leave()


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Report a full disk if a write fails because of it: the server only says that it has no volume."""
    try:
        yield
    except (PreconditionError, StoreDeniedError):
        raise
    except StoreError as error:
        raise _full(folder) or error from None


def _full(folder: Path) -> StoreError | None:
    """Return the error for a disk with less space than the server keeps free; None if it has more."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    disk = shutil.disk_usage(place)
    if disk.free > max(_LEAST_FREE_BYTES, disk.total // 100):
        return None
    return StoreError(
        f"embedded store: the disk of {folder} is full, {size(disk.free)} of {size(disk.total)} are free; free some "
        f"space (`{hint('gc')}` shows what it can delete), or point BIRKHOFF_HOME at a larger disk"
    )


def _join(folder: Path) -> tuple[EmbeddedServer, Callable[[], None]]:
    """Become a user of the server; return it, and a function that ends the use."""
    with _starting(folder):
        users = _open_lock(folder / "users.lock")
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            server, _ = _ensure_running(folder)
        except BaseException:
            users.close()
            raise
    owner = os.getpid()

    def leave() -> None:
        if os.getpid() == owner:  # not in a fork of the user
            _leave(folder, users)

    return server, leave


def _leave(folder: Path, users: IO[str]) -> None:
    # Another signal must not leave a server behind that was told to end and takes its time.
    with interrupt.held(), _starting(folder, take=_take_whatever_happens):
        users.close()
        state = _State.load(folder)
        if state and state.alive and not state.persistent and not _in_use(folder):
            terminate(state.pid, state.started, state.ports)


def _in_use(folder: Path) -> bool:
    with _open_lock(folder / "users.lock") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _ensure_running(folder: Path) -> tuple[EmbeddedServer, _State]:
    """Return the running server if it answers, or start one. The caller holds start.lock."""
    state = _State.load(folder)
    if state and state.alive:
        server = _server(folder, state)
        try:
            _wait_ready(folder, server, state)
            return server, state
        except StoreUnreachableError:
            if state.alive:
                terminate(state.pid, state.started, state.ports)
    try:
        return _started(folder, state)
    except _HungError as error:
        # On a busy machine one of its parts may miss the start of another, and never come up.
        log.warning("%s; starting it once more", error)
        return _started(folder, state)


def _started(folder: Path, before: _State | None) -> tuple[EmbeddedServer, _State]:
    """Start a server, on the ports of the one before if they are free, and wait until it answers. Raises StoreError,
    _HungError if it runs but does not answer."""
    credentials = _credentials(folder)
    ports = find_ports(before.ports if before else None)
    pid = spawn(folder, ports, credentials.secret_key)
    state = _State(pid=pid, started=start_time(pid) or "", ports=ports, persistent=False)
    try:
        state.save(folder)
        server = _server(folder, state)
        _wait_ready(folder, server, state)
    except BaseException as error:
        hung = isinstance(error, StoreUnreachableError) and state.alive
        terminate(state.pid, state.started, state.ports)
        if hung:
            raise _HungError(str(error)) from error
        raise
    return server, state


def _wait_ready(folder: Path, server: EmbeddedServer, state: _State) -> None:
    """Wait until an object can be written. Raises StoreUnreachableError with the end of the server's log."""
    settings = StoreSettings(endpoint=server.endpoint, addressing="path", connect_timeout=2, read_timeout=5, attempts=1)
    address = StoreAddress(url=f"s3://{BUCKET}", settings=settings)
    deadline = time.monotonic() + READY_SECONDS
    with S3Store(address, connect(settings, server.credentials), server.bucket, "probe") as store:
        while True:
            try:
                # Not empty: only a body with bytes needs the volumes, which may be ready seconds after the rest.
                store.put("ready", b"ready")
                store.get("ready")
                store.delete("ready")
                return
            except StoreError as error:
                problem = error
            if not state.alive or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    if (full := _full(folder)) is not None:
        raise full from problem
    how = f"does not answer after {READY_SECONDS:.0f} s" if state.alive else "ended by itself"
    raise StoreUnreachableError(
        f"embedded server: process {state.pid} {how}; run again, or use --store file:///DIR; {_log_end(folder)}"
    ) from problem


def _log_end(folder: Path) -> str:
    path = folder / "server.log"
    with suppress(OSError):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return f"{path} ends: {' | '.join(lines[-LOG_LINES:])}"
    return f"there is no {path}"


def _server(folder: Path, state: _State) -> EmbeddedServer:
    return EmbeddedServer(
        home=folder.parent,
        pid=state.pid,
        endpoint=f"http://{HOST}:{state.ports['s3']}",
        bucket=BUCKET,
        credentials=_credentials(folder),
    )


def _credentials(folder: Path) -> S3Credentials:
    """Return the key pair of s3.json, which SeaweedFS reads too; created on first use."""
    path = folder / "s3.json"
    if not path.exists():
        pair = {"accessKey": f"birkhoff{secrets.token_hex(6)}", "secretKey": secrets.token_hex(20)}
        identity = {"name": BUCKET, "credentials": [pair], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        _write_private(path, json.dumps({"identities": [identity]}))
    try:
        pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return S3Credentials(access_key=pair["accessKey"], secret_key=pair["secretKey"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(f"embedded server: {path} is damaged; stop the server, then remove it") from error


def _folder(home: Path | None) -> Path:
    return (home or birkhoff_home()) / "embedded"


def _take_whatever_happens(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def _starting(folder: Path, take: Callable[[IO[str]], None] = take_lock) -> Iterator[None]:
    """Keep other processes from starting or stopping the server."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = _open_lock(folder / "start.lock")
    except OSError as error:
        raise StoreError(f"embedded server: {error}; set BIRKHOFF_HOME to a directory you can write") from error
    with lock:
        take(lock)
        yield


def _open_lock(path: Path) -> IO[str]:
    return path.open("a")


def _write_private(path: Path, text: str) -> None:
    """Write a file that appears whole and that only this user can read."""
    with atomic_file(path, mode=0o600) as file:
        file.write(text.encode())
