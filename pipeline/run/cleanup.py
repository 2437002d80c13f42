"""End what a driver leaves behind, however it ends: Ctrl-C, SIGTERM, SIGKILL or normally.

Ray's processes outlive their driver for different times, its agents by up to a minute. So everything that a `Reaper`
covers starts with a mark in its environment, which children inherit, and a small process waits on a pipe that only the
driver holds. Ray's agents wipe their environment when they set a title, and become orphans once their raylet is gone.
Therefore that process polls while it waits, and remembers the children of marked processes. When the pipe closes, it
kills them all and removes their folder. It is this file, run as a script, with the standard library only, so that it
starts at once.

Linux only: /proc shows environments and parents. Elsewhere only the folder is removed.
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
"""Between looks at what there is while the driver lives; one takes some milliseconds."""

_SETTLED_SECONDS = 10.0
"""How long nothing may be found after a driver was killed: a process that it was just starting has no mark yet, and on
a machine under load 3 s were too few."""

_ORDERLY = b"q"


class Reaper:
    """Looks after processes started inside `covering`, and after `folder` (None for none), which need not exist yet."""

    def __init__(self, folder: Path | None) -> None:
        self._mark = uuid.uuid4().hex
        self._family = Family(self._mark)
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

    def cpu_seconds(self) -> float:
        """CPU time that everything it covers used so far; what has ended no longer counts."""
        return self._family.cpu_seconds()

    def close(self) -> None:
        """End everything now; returns when it is gone."""
        assert self._process.stdin is not None  # a pipe, see above
        with contextlib.suppress(OSError):  # ended already
            self._process.stdin.write(_ORDERLY)
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * _PATIENCE_SECONDS)


class Family:
    """The processes of this user that carry the mark in their environment, and their descendants seen so far."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._known: dict[int, str] = {}

    def alive(self) -> list[int]:
        """Members that run now; zombies do not count."""
        running = _running()
        # A number may be given anew: the same process has the same start.
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
            with contextlib.suppress(OSError):  # ended meanwhile
                words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
                ticks += int(words[11]) + int(words[12])  # utime and stime of proc(5), counted after the name
        return ticks / os.sysconf("SC_CLK_TCK")

    def _carries(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or somebody else's
            return False


def _running() -> dict[int, tuple[int, str]]:
    """Return (parent, start in ticks since boot) of every process but zombies and this one."""
    found: dict[int, tuple[int, str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir("/proc"):  # noqa: PTH208 (several times a second)
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # ended meanwhile
                words = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if words[0] not in "ZX":
                    found[int(entry)] = int(words[1]), words[19]
    return found


def reap(family: Family, settled_seconds: float) -> None:
    """Kill every member of the family, until there were none for `settled_seconds`."""
    start = last = time.monotonic()
    while time.monotonic() < min(last + settled_seconds, start + _PATIENCE_SECONDS):
        for pid in family.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            last = time.monotonic()
        time.sleep(_SCAN_SECONDS)


def main(mark: str, folder: str) -> None:
    """Wait for the driver's end, then clean up."""
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
        shutil.rmtree(folder, ignore_errors=True)  # what was killed may have been writing a moment ago


if __name__ == "__main__":
    main(*sys.argv[1:])
