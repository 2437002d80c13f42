"""The local cache of blobs: files under the SHA-256 of their bytes, shared by models, folders and processes.

    FOLDER/sha256/ab/<hex>        a blob, complete and read-only; renamed into place
    FOLDER/partial/<hex>.part     a running download: full size from the start, locked while a process works on it
    FOLDER/partial/<hex>.done     a byte for each of its ranges that has arrived
    FOLDER/refs/<key>.json        the last result of a reference to a store, for `--offline`

FOLDER is `cache` under BIRKHOFF_HOME if that is set, else `birkhoff` under XDG_CACHE_HOME (~/.cache). You may delete it
while nothing runs. Nothing in it is trusted: every reader checks a blob's digest, and a wrong blob is removed and
fetched again. So blobs are not synced to disk, and a crash of the machine costs a download.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.files import FULL, atomic_write, file_sha256, shortage
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.paths import cache_folder

BUFFER_BYTES = 1 << 20
"""Bytes read, hashed and written at a time; they fit into a core's cache."""

_REMEDY = "point BIRKHOFF_HOME or XDG_CACHE_HOME at a folder that can be written"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUsage:
    """The contents of a cache: `bytes` of blobs, and `partial_bytes` of running or abandoned downloads.

    `linked` blobs are also in a pulled folder, so removing them from the cache frees nothing.
    """

    folder: str
    blobs: int
    bytes: int
    linked: int
    partial: int
    partial_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What `prune` removed, or would remove. Bytes exclude files that pulled folders still use."""

    blobs: int
    bytes: int
    partial: int


class BlobCache:
    """The cache in `folder`, created on first use. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder: Path = (folder or cache_folder()).absolute()

    def obstacle(self) -> str | None:
        """Try to write, and return the obstacle; None if there is none."""
        try:
            for name in ("partial", "sha256"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder / name):
                    pass
        except OSError as error:
            return error.strerror or str(error)
        return None

    def path(self, digest: str) -> Path:
        """Return the path of a blob, whether it is there or not."""
        return self.folder / "sha256" / digest[:2] / digest

    def partial_path(self, digest: str) -> Path:
        """Return the path of a blob's partial file."""
        return self.folder / "partial" / f"{digest}.part"

    def find(self, digest: str, size: int) -> Path | None:
        """Return the file of a blob if it has the right size; note its use, read no bytes."""
        path = self.path(digest)
        try:
            facts = path.stat()
        except OSError:
            return None
        if facts.st_size != size:
            return None
        with contextlib.suppress(OSError):  # a cache that cannot be written is still usable
            os.utime(path, ns=(time.time_ns(), facts.st_mtime_ns))
        return path

    def whole(self, blobs: Iterable[tuple[str, int]]) -> set[str]:
        """Return the digests of those (digest, size) that are here. Reads and hashes each file, removes damaged
        ones."""
        # Threads only for what is hashed; os.path.exists is also False if a folder may not be read.
        there = [blob for blob in blobs if os.path.exists(self.path(blob[0]))]  # noqa: PTH110
        with ThreadPoolExecutor(max_workers=processors()) as pool:
            return {digest for digest in pool.map(self._checked, there) if digest}

    def _checked(self, blob: tuple[str, int]) -> str | None:
        digest, size = blob
        path = self.path(digest)
        try:
            seen = path.stat()
        except OSError:
            return None
        if self.find(digest, size) is not None and file_digest(path) == digest:
            return digest
        self._discard(path, seen)
        return None

    def read(self, digest: str) -> bytes | None:
        """Return the bytes of a blob if they are here and right; remove a wrong file. Raises OutputError."""
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                body, seen = file.read(), os.fstat(file.fileno())
        except OSError:
            return None
        if hashlib.sha256(body).hexdigest() == digest:
            return body
        self._discard(path, seen)
        return None

    def _discard(self, path: Path, seen: os.stat_result) -> None:
        """Remove a damaged file, unless another process has replaced it since."""
        with disk_errors(self.folder), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), seen):
                path.unlink()

    def adopt(self, digest: str, partial: Path) -> None:
        """Turn a file that was just hashed into a blob. Raises OSError."""
        path = self.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.chmod(0o444)
        os.utime(partial)  # its last use; the file may have been begun long ago
        partial.replace(path)

    def remember(self, reference: str, body: bytes) -> None:
        """Store the result of a reference for offline use, if the cache can be written."""
        path = self._note(reference)
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.is_file() and path.read_bytes() == body):
                atomic_write(path, body)

    def recall(self, reference: str) -> bytes | None:
        """Return the result that `remember` stored; None without one."""
        try:
            return self._note(reference).read_bytes()
        except OSError:
            return None

    def check_room(self, nbytes: int) -> None:
        """Raise OutputError if the disk has no room for this many bytes."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lack = shortage(self.folder, nbytes)
        if lack:
            raise OutputError(
                f"cache: {lack}; free some space (`{hint('cache', 'prune')}`), or point BIRKHOFF_HOME at a larger disk"
            )

    def usage(self) -> CacheUsage:
        """Count the contents."""
        blobs = [facts for _, facts in _files(self.folder / "sha256")]
        partial = [facts for path, facts in _files(self.folder / "partial") if path.suffix == ".part"]
        return CacheUsage(
            folder=str(self.folder),
            blobs=len(blobs),
            bytes=sum(facts.st_size for facts in blobs),
            linked=sum(facts.st_nlink > 1 for facts in blobs),
            partial=len(partial),
            partial_bytes=sum(512 * facts.st_blocks for facts in partial),
        )

    def prune(self, *, unused: timedelta, keep_bytes: int = 0, dry_run: bool = False) -> Pruned:
        """Remove blobs unused for so long, least recently used first, until `keep_bytes` remain; and abandoned
        downloads.

        Pulled folders stay complete. A concurrent pull fetches removed blobs again. Raises OutputError.
        """
        found = sorted(_files(self.folder / "sha256"), key=lambda item: item[1].st_atime)
        left, before = sum(facts.st_size for _, facts in found), time.time() - unused.total_seconds()
        gone: list[os.stat_result] = []
        with disk_errors(self.folder):
            for path, facts in found:
                if left > keep_bytes and facts.st_atime <= before:
                    left -= facts.st_size
                    gone.append(facts)
                    if not dry_run:
                        path.unlink(missing_ok=True)
            partial = sum(_prune_partial(path, dry_run=dry_run) for path, _ in _files(self.folder / "partial"))
        freed = sum(facts.st_size for facts in gone if facts.st_nlink == 1)
        return Pruned(blobs=len(gone), bytes=freed, partial=partial)

    def _note(self, reference: str) -> Path:
        return self.folder / "refs" / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"


def file_digest(path: Path) -> str:
    """Return `file_sha256`; for an unreadable file "", which matches no digest."""
    try:
        return file_sha256(path)
    except OSError:
        return ""


@contextlib.contextmanager
def usable_cache(target: Path, tell: Callable[[str], object]) -> Iterator[BlobCache]:
    """Yield the cache for a pull into `target`; if it cannot be written, a temporary one beside the target.

    A full disk is an error instead, because the target is usually on the same disk.
    """
    cache = BlobCache()
    why = cache.obstacle()
    if why is None or why in map(os.strerror, FULL):
        yield cache
        return
    tell(f"cache {cache.folder} cannot be written ({why}); pulling without it")
    parent = next(place for place in (target.absolute(), *target.absolute().parents) if place.is_dir())
    try:
        beside = tempfile.TemporaryDirectory(dir=parent, prefix=".part-cache-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}; name a folder that can be written") from None
    with beside as folder:
        yield BlobCache(Path(folder))


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError in the cache to an OutputError with path and remedy."""
    try:
        yield
    except OSError as error:
        remedy = f"free some space (`{hint('cache', 'prune')}`), or " if error.errno in FULL else ""
        raise OutputError(f"cache {error.filename or folder}: {error.strerror or error}; {remedy}{_REMEDY}") from error


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if path.is_file():
                yield path, facts


def _prune_partial(path: Path, *, dry_run: bool) -> bool:
    """Remove a download that no process works on, with its note; return whether there was one."""
    if path.suffix != ".part":
        return False
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return False  # finished and moved away meanwhile; the file there is another one's
        if not dry_run:
            path.with_suffix(".done").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return True
    return False
