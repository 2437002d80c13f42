"""Files that appear whole or not at all, links to files that others share, and what tells a file's states apart."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from birkhoff.pipeline.errors import OutputError

SPARE_BYTES = 256 << 20
"""Left free on the disk for everything else that runs there."""

_SETTLED_SECONDS = 5.0
"""Age from which a file's times tell its states apart."""

_FICLONE = 0x40049409
"""ioctl of Linux (linux/fs.h): share the blocks of another file until one of the two changes."""


@contextlib.contextmanager
def appearing(path: Path, *, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that appears under its name whole, durable and with `mode`, once the block ends well, or never.

    Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """`appearing`, whose errors are those of an output.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with appearing(path) as file:
            yield file
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; name a place that can be written") from None


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something. Raises OutputError."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; name a new folder")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a new folder") from None


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its name whole, once the block ends well, or not at all.

    Raises:
        OutputError: there is one of that name that holds something, or it cannot be written.
    """
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> list[int]:
    """What tells the states of a file apart without reading it: size, inode, and its times in ns. Raises OSError."""
    facts = path.stat()
    return [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


def is_settled(state: list[int]) -> bool:
    """Whether a change after `file_state` will show: a file changed twice within one tick of its clock would not."""
    return time.time() - max(state[2:]) / 1e9 > _SETTLED_SECONDS


def write_whole(path: Path, body: bytes) -> None:
    """Write a file so that it appears under its name whole or not at all. Raises OutputError."""
    with whole_file(path) as file:
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
