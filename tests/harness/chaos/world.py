"""What the kill harness kills: a real `birkhoff compress` of three small models, its Ray, and the real S3 server."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.harness.benchmarks.process_tree import MARK, marked, role
from tests.harness.chaos.reader import Reader, connect

Target = Literal["driver", "worker", "store", "ray"]
TARGETS: tuple[Target, ...] = ("driver", "worker", "store", "ray")
"""`ray` is the raylet of the run or an agent of it, with which the raylet ends."""

MODELS = ("one", "two", "three")
BASES = {"three": "one"}
SHARDS = 6
"""Of each model, 1 MiB each; half of those of `two` are those of `one`, and `three` is a fine-tune of `one`."""

GONE_SECONDS = 40.0
"""Within this time of a driver's death everything that it started must have gone."""


@dataclass
class World:
    """One store and one set of checkpoints, in a folder that is removed at the end."""

    folder: Path
    mark: str = field(default_factory=lambda: f"chaos-{os.getpid()}-{time.monotonic_ns()}")
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir()
        # Ray's sockets lie deep, and a socket's path has at most 107 bytes.
        self.ray = Path(tempfile.mkdtemp(prefix="bf-", dir="/tmp"))
        (self.folder / "fleet.yaml").write_text(
            "shard_mib: 1\nmodels:\n"
            + "".join(f"  - {{name: {name}, source: {name}.safetensors{_base(name)}}}\n" for name in MODELS)
        )
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "BIRKHOFF_"))}
        self.environment = {
            **inherited,
            "BIRKHOFF_HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": str(self.ray),
            MARK: self.mark,
        }

    def close(self) -> None:
        """End the server and whatever else there is, and remove every file."""
        subprocess.run(self.command("store", "down"), env=self.environment, check=False, capture_output=True)
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.ray, ignore_errors=True)

    def command(self, *words: str) -> list[str]:
        """A command of ours."""
        return [sys.executable, "-m", "birkhoff", *words]

    def start_store(self) -> None:
        """Start the server, or find it running, and lead the environment to it."""
        subprocess.run(self.command("store", "up"), env=self.environment, check=True, capture_output=True)
        shown = subprocess.run(
            self.command("store", "env"), env=self.environment, check=True, capture_output=True, text=True
        )
        pairs = (line.removeprefix("export ").partition("=") for line in shown.stdout.splitlines())
        self.environment |= {key: value for key, _, value in pairs if key.startswith("AWS_")}

    def store_pid(self) -> int:
        """Process id of the server."""
        state = json.loads((self.folder / "home" / "embedded" / "state.json").read_text())
        return int(state["pid"])

    def write_checkpoints(self, generation: int) -> None:
        """New weights: another generation gives each model another version."""
        for number, name in enumerate(MODELS):
            tensors = {}
            for index in range(SHARDS):
                owner = 0 if number == 1 and index < SHARDS // 2 else number
                seed = (generation * len(MODELS) + owner) * SHARDS + index
                drawn = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
                if name in BASES:
                    base = generation * len(MODELS) * SHARDS + index
                    drawn = torch.randn(512, 512, generator=torch.Generator().manual_seed(base)) + 0.05 * drawn
                tensors[f"blocks.{index}.weight"] = drawn
            save_file(tensors, self.folder / f"{name}.safetensors")

    def start_run(self) -> subprocess.Popen[str]:
        """Start the command that is to be killed."""
        words = ("compress", str(self.folder / "fleet.yaml"), "--store", "s3://birkhoff/fleet", "--executor", "ray")
        return subprocess.Popen(
            self.command(*words, "--json"),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def reader(self) -> Reader:
        """A reader of the server that runs now."""
        return Reader(connect(self.environment), "birkhoff", "fleet/")

    def kill(self, target: Target, driver: subprocess.Popen[str], rng: random.Random) -> bool:
        """SIGKILL to the target; False if there is none any more."""
        if target == "driver":
            pid = driver.pid if driver.poll() is None else None
        elif target == "store":
            pid = self.store_pid()
        else:
            pid = self._waited_for(self._workers if target == "worker" else self._raylets, driver, rng)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def _waited_for(
        self, find: Callable[[int], list[int]], driver: subprocess.Popen[str], rng: random.Random
    ) -> int | None:
        """One of the driver's processes at random, waited for until there is one or the driver has ended."""
        while driver.poll() is None:
            if found := find(driver.pid):
                return rng.choice(found)
            time.sleep(0.05)
        return None

    def _workers(self, driver: int) -> list[int]:
        return [pid for pid in marked(self.mark) if role(pid, driver) == "worker"]

    def _raylets(self, driver: int) -> list[int]:
        raylets = [pid for pid in marked(self.mark) if "/raylet --" in _name(pid, 500)]
        return raylets + [pid for pid in self._titled_here() if role(pid, driver) == "ray"]

    def leaks(self) -> list[str]:
        """What a run that has ended left: processes, temporary files, half-written files."""
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        while (files := self._files()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left + files

    def _processes(self) -> list[str]:
        return [f"process {pid} ({_name(pid)})" for pid in sorted({*marked(self.mark), *self._titled_here()})]

    def _titled_here(self) -> list[int]:
        """Ray's titled processes of this world; its agents wipe their environment, and the mark with it."""
        return [pid for pid in _titled() if _works_in(pid, self.ray)]

    def _files(self) -> list[str]:
        folders = (self.folder / "tmp", self.ray)
        found = [path for folder in folders for path in folder.iterdir()]
        home = self.folder / "home"
        found += [path for path in home.rglob("*") if ".partial" in path.name and "embedded" not in path.parts]
        return [f"file {path}" for path in found]


def _base(name: str) -> str:
    return f", base: {BASES[name]}" if name in BASES else ""


def rows(output: str) -> list[dict[str, Any]]:
    """What a run that ended well says of its models."""
    found: list[dict[str, Any]] = json.loads(output)
    return found


def made(found: list[Mapping[str, Any]] | list[dict[str, Any]]) -> int:
    """Shards that a run encoded."""
    return sum((row["shards"] or 0) - row["shards_reused"] for row in found)


def _titled() -> list[int]:
    """Processes that gave themselves a title of Ray's."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::"):
                found.append(int(entry.name))
    return found


def _works_in(pid: int, folder: Path) -> bool:
    """Whether a process has a file below a folder open."""
    with contextlib.suppress(OSError):
        return any(str(link.readlink()).startswith(f"{folder}/") for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _name(pid: int, length: int = 60) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return "ended"
    return words[:length].decode(errors="replace")
