"""End what a driver leaves behind, whether it ends by itself, by Ctrl-C, by SIGTERM or by SIGKILL.

Ray's processes outlive their driver, some agents by a minute. So every process that a `Reaper` covers starts with a
mark in its environment, which its children inherit, and a small process waits on a pipe that only the driver holds.
When the pipe closes, that process kills all marked processes and removes their folder.

Ray's agents wipe their environment when they set a title, and become orphans when their raylet ends. Therefore the
process also polls while it waits, and remembers the children of marked processes. It runs this file as a script with
the standard library alone, so it starts at once.

Processes are found on Linux only, where /proc shows environments and parents. Elsewhere only the folder is removed.
"""

import contextlib
import os
import select
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
_WATCH_SECONDS = 0.25
"""Time between two scans while the driver lives. One scan takes some milliseconds."""

_SETTLED_SECONDS = 10.0
"""After a driver was killed, the time without any marked process after which cleanup ends. A process that was just
starting has no mark yet; on a loaded machine 3 s were too few."""

_ORDERLY = b"q"


class Reaper:
    """Looks after the processes started inside `covering`, and after `folder`, which need not exist yet (None: no
    folder)."""

    def __init__(self, folder: Path | None) -> None:
        self._mark = uuid.uuid4().hex
        self._family = Family(self._mark)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self._mark, str(folder or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # else a reader of the driver's output waits for this process
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # keeps Ctrl-C in the driver's terminal away
        )

    @contextlib.contextmanager
    def covering(self) -> Iterator[None]:
        """Mark every process started inside the block, and thereby its children."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def cpu_seconds(self) -> float:
        """CPU time of all covered processes that run now."""
        return self._family.cpu_seconds()

    def close(self) -> None:
        """End all covered processes, and return when they are gone."""
        assert self._process.stdin is not None  # opened as a pipe above
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(_ORDERLY)
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * _PATIENCE_SECONDS)


class Family:
    """This user's processes that carry the mark in their environment, and those of their descendants seen so far."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._known: dict[int, str] = {}

    def alive(self) -> list[int]:
        """Return the process ids of members that run now, zombies excluded."""
        running = _running()
        # A process id may be reused, but then its start differs.
        self._known = {pid: begun for pid, begun in self._known.items() if running.get(pid, (0, ""))[1] == begun}
        grown = True
        while grown:
            grown = False
            for pid, (parent, begun) in running.items():
                if pid not in self._known and (parent in self._known or self._carries(pid)):
                    self._known[pid] = begun
                    grown = True
        return list(self._known)

    def cpu_seconds(self) -> float:
        """CPU time of the members that run now."""
        ticks = 0
        for pid in self.alive():
            with contextlib.suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
                ticks += int(words[11]) + int(words[12])  # utime and stime in proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def _carries(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to another user
            return False


def _running() -> dict[int, tuple[int, str]]:
    """Return (parent, start in ticks since boot) of every process, except zombies and this one."""
    found: dict[int, tuple[int, str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir("/proc"):  # noqa: PTH208 (several times a second)
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has ended
                words = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if words[0] not in "ZX":
                    found[int(entry)] = int(words[1]), words[19]
    return found


def reap(family: Family, settled_seconds: float) -> None:
    """Kill the family's members until none was found for `settled_seconds`."""
    start = last = time.monotonic()
    while time.monotonic() < min(last + settled_seconds, start + _PATIENCE_SECONDS):
        for pid in family.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            last = time.monotonic()
        time.sleep(_SCAN_SECONDS)


def main(mark: str, folder: str) -> None:
    """Wait until the driver ends, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    family, said = Family(mark), b""
    while True:
        if not select.select([0], [], [], _WATCH_SECONDS)[0]:
            family.alive()
        elif byte := os.read(0, 1):
            said += byte
        else:
            break
    reap(family, 2 * _SCAN_SECONDS if said == _ORDERLY else _SETTLED_SECONDS)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while folder and Path(folder).exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)  # a killed process may still have written


if __name__ == "__main__":
    main(*sys.argv[1:])
