import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from birkhoff.pipeline.run.cleanup import Family, Reaper
from tests.patience import PATIENT_SECONDS

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
# Like Ray's raylet: starts something that shows no mark, tells its number, and sleeps.
PARENT = [
    sys.executable,
    "-S",
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'], env={})\n"
    "print(child.pid, flush=True); time.sleep(600)",
]
DRIVER = """
import subprocess, sys, time
from pathlib import Path
from birkhoff.pipeline.run.cleanup import Family, Reaper
reaper = Reaper(Path(sys.argv[1]))
Path(sys.argv[1]).mkdir()
with reaper.covering():
    parent = subprocess.Popen(eval(sys.argv[2]), stdout=subprocess.PIPE, text=True, start_new_session=True)
child = int(parent.stdout.readline())
time.sleep(1.5)  # the reaper looks around four times a second
print(parent.pid, child, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    late = time.monotonic() + PATIENT_SECONDS
    while any(map(runs, pids)) and time.monotonic() < late:
        time.sleep(0.02)
    return not any(map(runs, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_orphan_without_the_mark_is_ended_after_a_killed_driver(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), repr(PARENT)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    parent, child = map(int, driver.stdout.readline().split())
    try:
        assert runs(parent)
        assert runs(child)
        os.kill(parent, signal.SIGKILL)  # as Ray's raylet, which dies with its driver
        driver.kill()
        driver.wait()
        assert gone(parent, child)
        late = time.monotonic() + PATIENT_SECONDS
        while folder.exists() and time.monotonic() < late:
            time.sleep(0.05)
        assert not folder.exists()
    finally:
        for pid in filter(runs, (parent, child)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_strangers_are_left_alone() -> None:
    reaper = Reaper(None)
    with subprocess.Popen(SLEEPER) as stranger:
        try:
            with reaper.covering():
                covered = subprocess.Popen(SLEEPER)
            reaper.close()
            assert covered.wait(PATIENT_SECONDS) == -signal.SIGKILL
            assert runs(stranger.pid)
            assert stranger.pid not in Family("another mark").alive()
        finally:
            stranger.kill()
