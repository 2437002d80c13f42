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
from typing import IO, Any, BinaryIO

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, quota or file size limit."""

SPARE_BYTES = 256 << 20
"""Bytes to leave free on a disk for other programs."""

_READ_BYTES = 16 << 20
"""Bytes of a file that are read and hashed together. Between the two a thread waits for the interpreter's lock, for up
to 5 ms if others compute."""

_LOCK_SECONDS = 0.1

_SETTLED_SECONDS = 5.0
"""Age in seconds from which the times of a file reveal a later change."""

_FICLONE = 0x40049409
"""Linux ioctl (linux/fs.h) that shares the blocks of another file until one of the two changes."""

_unshared: set[tuple[int, int]] = set()
"""Pairs of devices, of source and target, whose file systems cannot do that. Each attempt costs a new file."""


@contextlib.contextmanager
def atomic_path(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path to fill. When the block ends without error, the file appears as `path`, complete and
    durable.

    Raises OSError.
    """
    import tempfile  # imported here, so that commands that write nothing start faster

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
    """As `atomic_path`, opened for writing. Raises OSError."""
    with atomic_path(path, mode=mode) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """As `atomic_file`, in a folder that is created if necessary.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        remedy = "free some space, or name another disk" if error.errno in FULL else "name a place that can be written"
        raise OutputError(f"{path}: {error.strerror}; {remedy}") from None


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable, if its file system can. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def shortage(folder: Path, nbytes: int) -> str | None:
    """Return what a folder's disk lacks for `nbytes` and `SPARE_BYTES`, for a message; None if there is room.

    Raises OSError.
    """
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_BYTES <= free:
        return None
    return f"needs {nbytes} bytes in {folder} and {SPARE_BYTES} to spare, {free} are free"


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that is not empty. Raises OutputError."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; name a new folder")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a new folder") from None


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. When the block ends without error, it appears as `folder`.

    Raises:
        OutputError: The folder exists and is not empty, or cannot be written.
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
    """Return the SHA-256 of a file in hex, in constant memory. Raises OSError."""
    import hashlib

    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            interrupt.check()
            digest.update(buffer[:count])
    return digest.hexdigest()


def fill_checked(out: memoryview, path: Path, digest: str) -> bool:
    """Fill `out` from a file. Return whether the file has exactly these bytes, with this SHA-256 in hex.

    Few and long calls: a thread may wait 5 ms after each if others compute. A file that cannot be read is a wrong one.
    """
    import hashlib

    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != len(out):
                return False
            while done < len(out) and (count := file.readinto(out[done:])):
                done += count
    except OSError:
        return False
    return done == len(out) and hashlib.sha256(out).hexdigest() == digest


def read_at_most(file: BinaryIO, length: int | None) -> bytes:
    """Return up to `length` bytes of an open file, or all. Python would set memory aside for all that is asked for."""
    if length is None:
        return file.read()
    left = os.fstat(file.fileno()).st_size - file.tell()
    return file.read(max(0, min(length, left)))


def take_lock(file: IO[Any]) -> None:
    """Lock an open file against other holders, and wait for them. Raises Interrupted once the user asks to stop."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            interrupt.pause(_LOCK_SECONDS)


def file_state(path: Path) -> list[int]:
    """Return size, inode and times in ns, which reveal a change of a file without reading it. Raises OSError."""
    facts = path.stat()
    return [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


def is_settled(state: list[int]) -> bool:
    """Return whether a later change will show in `file_state`. Two changes within one tick of the file's clock would
    not."""
    return time.time() - max(state[2:]) / 1e9 > _SETTLED_SECONDS


State = Mapping[str, list[int]]
"""`file_state` of several files by path."""


def remembered_digest(note: Path, state: Callable[[], State], take: Callable[[], str]) -> str:
    """Return the digest of files, computed only if they have changed since `note` was written.

    The digest is noted if the files did not change meanwhile, and a later change would show in their state. Raises
    OSError, and what `state` and `take` raise.
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
    """Return the digest noted for files in this state, or None. The files are not read."""
    try:
        known = json.loads(note.read_bytes())
        return str(known["sha256"]) if known["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def atomic_write(path: Path, body: bytes) -> None:
    """Write a file atomically. Raises OutputError."""
    with atomic_output(path) as file:
        file.write(body)


def place(source: Path, target: Path) -> None:
    """Give a file a second name without using space, by shared blocks or a hard link, if the file system can.

    Otherwise, for instance across file systems, copy it. An existing `target` is replaced atomically. Raises OSError.
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
    devices = source.stat().st_dev, target.parent.stat().st_dev
    if devices in _unshared:
        return False
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                _unshared.add(devices)
            return False
        return True
