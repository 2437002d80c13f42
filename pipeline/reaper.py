"""Ends what a driver leaves behind, however it ends: Ctrl-C, SIGTERM, SIGKILL or its normal end.

Ray's own processes die with their driver at different speeds: its agents outlive a killed one by up to a minute. So
everything that a `Reaper` covers starts with a mark in its environment, which children inherit, and a small process
waits on a pipe that only the driver holds. When the pipe closes, that process kills whatever carries the mark and
removes the folder they worked in. It is this file, run as a script: standard library only, so that it starts at once.

Linux only, where /proc tells environments; elsewhere only the folder is removed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "BIRKHOFF_RUN"
_PATIENCE_SECONDS = 30.0
_SCAN_SECONDS = 0.05
_SETTLED_SECONDS = 10.0
"""How long nothing may be found after a driver was killed: a process that it was just starting has no mark yet, and on
a machine under load 3 s were too few."""

_ORDERLY = b"q"


class Reaper:
    """Looks after processes started inside `covering`, and after `folder` (None for none), which need not exist yet."""

    def __init__(self, folder: Path | None) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self._mark, str(folder or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # else whoever reads the driver's output would wait for this process too
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the driver's terminal is not for it
        )

    @contextlib.contextmanager
    def covering(self) -> Iterator[None]:
        """Mark every process that is started meanwhile, and what those start later."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def close(self) -> None:
        """End everything now; returns when it is gone."""
        assert self._process.stdin is not None  # a pipe, see above
        with contextlib.suppress(OSError):  # ended already
            self._process.stdin.write(_ORDERLY)
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * _PATIENCE_SECONDS)


def reap(mark: str, settled_seconds: float) -> None:
    """Kill every process that carries the mark, until there were none for `settled_seconds`."""
    start = last = time.monotonic()
    while time.monotonic() < min(last + settled_seconds, start + _PATIENCE_SECONDS):
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            last = time.monotonic()
        time.sleep(_SCAN_SECONDS)


def marked(mark: str) -> list[int]:
    """Processes of this user whose environment carries the mark; zombies have none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    with contextlib.suppress(FileNotFoundError):
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def main(mark: str, folder: str) -> None:
    """Wait for the driver's end, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = b""
    while byte := os.read(0, 1):
        said += byte
    reap(mark, 2 * _SCAN_SECONDS if said == _ORDERLY else _SETTLED_SECONDS)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while folder and Path(folder).exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)  # what was killed may have been writing a moment ago


if __name__ == "__main__":
    main(*sys.argv[1:])
