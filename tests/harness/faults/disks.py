"""Disks that are full or read-only, for real: small file systems in memory, in a mount namespace of this process's own.

    python -m tests.harness.faults.disks FOLDER      inside `unshare -rm`; prints its rows as JSON

A place of the pipeline lies on such a disk: a store in a directory, the cache of pulled blobs, the folder pulled into.
The stage is called with the fault, then without; then the store is walked down to every blob, and nothing half-written
is left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.store.open import open_store
from tests.harness.faults.stages import STAGES, Cell, Stage
from tests.patience import PATIENT_SECONDS

NAMESPACE = ("unshare", "-rm")
DISK = "300m"
"""More than a cache wants to leave free; takes memory only as far as it is written."""

STAGES_BY_NAME = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What lies on the disk, below the case's folder, and a stage that writes there."""

    name: str
    folder: str
    stage: str


PLACES = (
    Place(name="store in a directory", folder="store", stage="probe"),
    Place(name="store in a directory", folder="store", stage="upload blob"),
    Place(name="store in a directory", folder="store", stage="name"),
    Place(name="store in a directory", folder="store", stage="promote"),
    Place(name="store in a directory", folder="store", stage="gc: sweep"),
    Place(name="cache", folder="cache", stage="read for pull: blobs"),
    Place(name="folder pulled into", folder="out", stage="read for pull: blobs"),
)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte is left: the disk shrinks to what is on it, and that little is filled."""
    facts = os.statvfs(disk)
    used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize
    _mount("-o", f"remount,size={used + (64 << 10)}", str(disk))
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()
    _mount("-o", f"remount,size={DISK}", str(disk))


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written."""
    _mount("-o", "remount,ro", str(disk))
    yield
    _mount("-o", f"remount,rw,size={DISK}", str(disk))


FAULTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "disk full": full,
    "disk read-only": read_only,
}


def possible() -> bool:
    """Whether this machine lets its users mount in a namespace of their own."""
    return (
        shutil.which(NAMESPACE[0]) is not None
        and not subprocess.run(
            [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        ).returncode
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """Run every case in a namespace; returns what came of them."""
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.harness.faults.disks", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENT_SECONDS,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _case(base: Path, fault: str, place: Place) -> dict[str, Any]:
    stage, wrong, line = STAGES_BY_NAME[place.stage], [], ""
    disk = base / place.folder
    disk.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk))
    store_folder = base / "store" / "data"
    with open_store(store_folder.as_uri()) as store:
        stage.prepare(store)
        cell = Cell(store=store, folder=base / "cell")
        cell.folder.mkdir()
        for name in ("cache", "out"):
            (base / name).mkdir(exist_ok=True)
            (cell.folder / name).symlink_to(base / name / "data")
            (base / name / "data").mkdir()
        with FAULTS[fault](disk):
            completed, line = _act(stage, cell, wrong)
        if not _act(stage, cell, wrong)[0]:
            wrong.append("called again without a fault it failed")
        wrong += walk(store_folder, stage.versions)
    leaked = [str(path) for path in base.rglob("*") if path.is_file() and ".part" in path.name]
    leaked += [str(path) for path in (store_folder / ".store").rglob("*") if path.is_file() and "lock" not in str(path)]
    outcome = "completes" if completed else "fails"
    _unmount(disk)
    return {
        "fault": f"{fault}: {place.name}",
        "stage": stage.name,
        "outcome": outcome,
        "line": line.replace(str(base), "…"),
        "wrong": wrong,
        "leaked": leaked,
    }


def _act(stage: Stage, cell: Cell, wrong: list[str]) -> tuple[bool, str]:
    try:
        stage.act(cell)
    except BirkhoffError as error:
        if "\n" in str(error):
            wrong.append(f"more than one line: {error}")
        return False, str(error)
    except Exception as error:
        wrong.append(f"{type(error).__name__} is no error of ours: {error}")
        return False, str(error)
    return True, ""


def walk(store: Path, versions: int) -> list[str]:
    """What is wrong in a directory store, seen without any code of ours."""
    wrong, names = [], sorted((store / "models").glob("*/names/*.json"))
    if len(names) != versions:
        wrong.append(f"{len(names)} versions, expected {versions}")
    for pointer in [*names, *(store / "models").glob("*/aliases/*.json")]:
        digest = json.loads(pointer.read_text())["digest"]
        body = (pointer.parents[1] / "versions" / digest / "manifest.json").read_bytes()
        if hashlib.sha256(body).hexdigest() != digest:
            wrong.append(f"{pointer.name} leads to a manifest of other bytes")
        for shard in json.loads(body)["shards"]:
            blob = store / "blobs" / "sha256" / shard["blob"][:2] / shard["blob"]
            if not blob.is_file() or hashlib.sha256(blob.read_bytes()).hexdigest() != shard["blob"]:
                wrong.append(f"{pointer.name} needs blob {shard['blob'][:12]}, which is missing or damaged")
    return wrong


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True, capture_output=True)


def main(folder: Path) -> None:
    """Every fault at every place."""
    found = [
        _case(folder / f"{number}-{turn}", fault, place)
        for number, place in enumerate(PLACES)
        for turn, fault in enumerate(FAULTS)
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
