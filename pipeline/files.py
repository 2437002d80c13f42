"""Atomic file writes, links to shared files, and fingerprints of a file's state."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from birkhoff.pipeline.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk that is full, by what is on it or by what its user may have."""

SPARE_BYTES = 256 << 20
"""Left free on the disk for everything else that runs there."""

_SETTLED_SECONDS = 5.0
"""Age from which a file's times tell its states apart."""

_FICLONE = 0x40049409
"""ioctl of Linux (linux/fs.h): share the blocks of another file until one of the two changes."""


@contextlib.contextmanager
def atomic_path(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """An empty file to fill, which appears as `path` whole, durable and with `mode` once the block ends well, or never.

    Raises OSError.
    """
    import tempfile  # in functions: commands that write nothing start without it

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """`atomic_path`, open for writing. Raises OSError."""
    with atomic_path(path, mode=mode) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """`atomic_file` in a folder that is made if there is none, with the errors of an output.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        remedy = "free some space, or name another disk" if error.errno in FULL else "name a place that can be written"
        raise OutputError(f"{path}: {error.strerror}; {remedy}") from None


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable, where its file system can. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def shortage(folder: Path, nbytes: int) -> str | None:
    """What a folder's disk lacks for `nbytes` more and `SPARE_BYTES` on top, for a message; None if there is room.

    Raises OSError.
    """
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_BYTES <= free:
        return None
    return f"needs {nbytes} bytes in {folder} and {SPARE_BYTES} to spare, {free} are free"


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something. Raises OutputError."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; name a new folder")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a new folder") from None


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name whole, once the block ends well, or not at all.

    Raises:
        OutputError: there is one of that name that holds something, or it cannot be written.
    """
    import tempfile

    check_new_folder(folder)
    target, temporary = folder.absolute(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, in constant memory. Raises OSError."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> list[int]:
    """What tells the states of a file apart without reading it: size, inode, and its times in ns. Raises OSError."""
    facts = path.stat()
    return [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


def is_settled(state: list[int]) -> bool:
    """Whether a change after `file_state` will show: a file changed twice within one tick of its clock would not."""
    return time.time() - max(state[2:]) / 1e9 > _SETTLED_SECONDS


State = Mapping[str, list[int]]
"""`file_state` of some files, by their paths."""


def remembered_digest(note: Path, state: Callable[[], State], take: Callable[[], str]) -> str:
    """The digest of files, taken anew only if they have changed since the file `note` was written.

    It is noted if the files stayed as they were while it was taken, and a later change would show in their state.
    Raises OSError, and what `state` and `take` raise.
    """
    before = state()
    found = recalled_digest(note, before)
    if found is None:
        found = take()
        if state() == before and all(map(is_settled, before.values())):
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(note) as file:
                file.write(json.dumps({"state": before, "sha256": found}).encode())
    return found


def recalled_digest(note: Path, state: State) -> str | None:
    """The digest that was noted for files in this state, None where there is none; reads nothing of the files."""
    try:
        known = json.loads(note.read_bytes())
        return str(known["sha256"]) if known["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def atomic_write(path: Path, body: bytes) -> None:
    """Write a file so that it appears under its name whole or not at all. Raises OutputError."""
    with atomic_output(path) as file:
        file.write(body)


def place(source: Path, target: Path) -> None:
    """Give a file a second name that costs no bytes where the file system can: shared blocks, else a hard link.

    Copies elsewhere, such as across file systems. What stood at `target` is replaced at once. Raises OSError.
    """
    fresh = target.with_name(f".part-{os.getpid()}-{target.name}")
    fresh.unlink(missing_ok=True)
    try:
        if not _share_blocks(source, fresh):
            fresh.unlink(missing_ok=True)
            try:
                os.link(source, fresh)
            except OSError:
                shutil.copyfile(source, fresh)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _share_blocks(source: Path, target: Path) -> bool:
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            return False
        return True
