"""Run a command under a time limit and watch the memory of everything it starts.

Linux only: figures come from /proc. A process's memory is its own pages (RssAnon) and its part of what it shares: the
PSS of files and shared memory, so that these count once; Ray's workers share much of torch. Pages that a fork shares
until one side writes count for both. A process belongs to the command if it inherited the mark that is put into its
environment, also where it detached itself, as Ray's and the embedded store's do.
"""

import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MARK = "BIRKHOFF_BENCHMARK_RUN"
PERIOD = 0.25
"""Seconds between samples of the processes' own pages, which the kernel has counted."""

YOUNG_SECONDS = 3.0
"""How long a process is asked in every sample what it shares: it still loads libraries."""

SHARED_PERIOD = 2.0
"""Seconds between samples of what a process shares. For a PSS the kernel goes through all pages of a process, which
must wait to map others: in each sample it took a fleet on two cores a tenth longer."""

Role = Literal["driver", "worker", "ray", "store", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A command that ended. `peaks` are bytes by role, each at its own worst moment; `job_peak` is the worst sum
    of driver and workers at one moment, `peak` that of all processes.
    """

    returncode: int | None
    """None if the time limit ended it."""
    wall_s: float
    output: str
    """Standard output."""
    errors: str
    """Standard error."""
    job_peak: int = 0
    peak: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    samples: int = 0


def measure(command: Sequence[str], *, environment: Mapping[str, str], limit_s: float) -> Measured:
    """Run a command to its end or to the limit, then end whatever it left running."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env={**environment, MARK: mark}, start_new_session=True
        )
        watch = _Watch(process.pid, mark)
        watch.start()
        try:
            code: int | None = process.wait(timeout=max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        wall = time.perf_counter() - start
        watch.stop()
        end_marked(mark)
        process.wait()
        out.seek(0)
        err.seek(0)
        return Measured(
            returncode=code,
            wall_s=wall,
            output=out.read(),
            errors=err.read(),
            job_peak=watch.job_peak,
            peak=watch.peak,
            peaks=dict(watch.peaks),
            samples=watch.samples,
        )


def end_marked(mark: str, patience_s: float = 5.0) -> None:
    """Ask every process of a run to end, and end those that do not."""
    deadline = time.monotonic() + patience_s
    signals = [signal.SIGTERM]
    while found := marked(mark):
        if time.monotonic() > deadline:
            signals = [signal.SIGKILL]
        for pid in found:
            for number in signals:
                _signal(pid, number)
        time.sleep(0.1)


def marked(mark: str) -> list[int]:
    """Live processes that carry a mark, this one left out."""
    return [pid for pid in _processes() if pid != os.getpid() and _carries(pid, mark)]


def own_bytes(pid: int) -> int:
    """Bytes of pages that are no file's and no shared memory; 0 for a process that has ended."""
    return _fields(pid, "status", b"RssAnon:")


def shared_bytes(pid: int) -> int:
    """A process's part of files and shared memory, in bytes; 0 for a process that has ended."""
    return _fields(pid, "smaps_rollup", b"Pss_File:", b"Pss_Shmem:")


def _fields(pid: int, name: str, *wanted: bytes) -> int:
    lines = (line.split() for line in _read(pid, name).splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words and words[0] in wanted)


class _Watch(threading.Thread):
    """Samples a run's memory until it is stopped."""

    def __init__(self, root: int, mark: str) -> None:
        super().__init__(daemon=True)
        self._root, self._mark = root, mark
        self._known: dict[int, bool] = {}
        self._shared: dict[int, tuple[float, float, int]] = {}
        """By process, when it was first and last asked what it shares, and the answer."""
        self._ended = threading.Event()
        self.job_peak = self.peak = self.samples = 0
        self.peaks: Counter[str] = Counter()

    def run(self) -> None:
        while not self._ended.wait(PERIOD):
            self._sample()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _sample(self) -> None:
        sizes: Counter[str] = Counter()
        for pid in self._members():
            sizes[role(pid, self._root)] += own_bytes(pid) + self._shared_of(pid)
        self.samples += 1
        self.peak = max(self.peak, sizes.total())
        self.job_peak = max(self.job_peak, sizes["driver"] + sizes["worker"])
        for name, size in sizes.items():
            self.peaks[name] = max(self.peaks[name], size)

    def _shared_of(self, pid: int) -> int:
        now = time.monotonic()
        first, last, size = self._shared.get(pid, (now, -SHARED_PERIOD, 0))
        if now - first < YOUNG_SECONDS or now - last > SHARED_PERIOD:
            last, size = now, shared_bytes(pid)
        self._shared[pid] = first, last, size
        return size

    def _members(self) -> list[int]:
        """Processes of the run; each process's environment is read once."""
        live = _processes()
        for pid in live:
            if pid not in self._known:
                self._known[pid] = _carries(pid, self._mark)
        return [pid for pid in live if self._known[pid]]


def role(pid: int, root: int) -> Role:
    """What a process of a run is there for."""
    if pid == root:
        return "driver"
    words = _read(pid, "cmdline").replace(b"\0", b" ")
    if words.split(b" ")[0].endswith(b"/raylet"):  # its arguments hold the command of a worker
        return "ray"
    if words.startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")):
        return "ray"
    if words.startswith(b"ray::") or b"default_worker.py" in words:
        return "worker"
    if b"/ray/" in words or b"ray-dashboard" in words:
        return "ray"
    return "store" if b"weed" in words.split(b" ")[0] else "other"


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208 (thousands of times)


def _carries(pid: int, mark: str) -> bool:
    return f"{MARK}={mark}".encode() in _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # ended meanwhile, or somebody else's
        return b""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
