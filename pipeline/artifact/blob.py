"""Download one blob into the cache: ranges arrive in any order, are hashed in order, and appear only if the digest is
right.

The file has its full size from the start, so that ranges are written to their places. It is locked while a process
works on it, and renamed once the digest is right. Ranges of an earlier, killed download are reused unchecked, because
the digest decides. If it is wrong, the blob is fetched once more from the beginning, because a bit may have flipped in
transit. Only a second wrong digest means damage in the store.

The next range in order is hashed as it arrives, later ones in turn from the page cache.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from birkhoff.pipeline.artifact.cache import BUFFER_BYTES, BlobCache, disk_errors
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.files import FULL
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.store.base import Store

RANGE_BYTES = 8 << 20
"""Bytes per request, and the most that a kill loses."""

_local = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob to fetch: its digest and its size in bytes."""

    digest: str
    size: int

    @property
    def ranges(self) -> int:
        """Number of requests it takes."""
        return max(1, -(-self.size // RANGE_BYTES))


class BlobDownload:
    """The download of one blob. Several threads may call `run`, once per range."""

    def __init__(self, blob: Blob, store: Store, cache: BlobCache, *, label: str) -> None:
        self.blob = blob
        self._store, self._cache, self._label = store, cache, label
        self._lock = threading.Lock()
        self._opened: bool | None = None
        self._file = -1
        self._again = False
        """Whether the first download was wrong."""
        self._restart()

    def open(self) -> bool:
        """Lock the partial file; return False if another process works on this blob.

        The result is kept until `retake`. Raises OSError.
        """
        with self._lock:
            if self._opened is None:
                self._opened = self._take()
            return self._opened

    def retake(self) -> bool:
        """Try again after `open` returned False; return whether the file is now locked. Raises OSError."""
        with self._lock:
            self._opened = self._take()
            return self._opened

    @property
    def busy(self) -> bool:
        """Whether another process was working on it."""
        return self._opened is False

    @property
    def ready(self) -> bool:
        """Whether the blob is in the cache."""
        return self._ready

    def run(self, index: int, report: Callable[[int], None]) -> None:
        """Fetch a range unless it is there. The last call to finish moves the blob into place.

        Raises:
            IntegrityError: The stored object is missing, truncated or has another digest.
            StoreError: The store failed.
            OSError: The disk failed.
        """
        start = index * RANGE_BYTES
        length = min(RANGE_BYTES, self.blob.size - start)
        if not self._done[index]:
            self._fetch(index, start, length, report)
        else:
            report(length)
        if self._hash_what_is_next():
            self._finish(report)

    def close(self) -> None:
        """Release the file; what has arrived stays for the next attempt."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _restart(self) -> None:
        self._sha = hashlib.sha256()
        self._hashed = 0
        self._hashing = False
        self._resumed = False
        self._ready = False
        self._done = bytearray(self.blob.ranges)

    def _take(self) -> bool:
        path = self._cache.partial_path(self.blob.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file)):
                    break
            os.close(file)  # finished and moved away between the two calls
        if self._cache.find(self.blob.digest, self.blob.size):  # another process finished it just before
            path.unlink(missing_ok=True)
            os.close(file)
            self._ready = True
            return True
        self._file = file
        self._take_over()
        return True

    def _take_over(self) -> None:
        """Count what an earlier download left, and allocate the rest."""
        if os.fstat(self._file).st_size == self.blob.size and self.blob.ranges > 1:
            with contextlib.suppress(FileNotFoundError):
                noted = self._notes.read_bytes()[: self.blob.ranges]
                self._done[: len(noted)] = noted
                self._resumed = any(self._done)
        if not self._resumed:
            self._notes.unlink(missing_ok=True)
            os.ftruncate(self._file, 0)
        if self.blob.size:
            _allocate(self._file, self.blob.size)

    @property
    def _notes(self) -> Path:
        return self._cache.partial_path(self.blob.digest).with_suffix(".done")

    def _fetch(self, index: int, start: int, length: int, report: Callable[[int], None]) -> None:
        with self._lock:
            leads = self._hashed == index and not self._hashing
            self._hashing |= leads
        place = start

        def take(piece: memoryview) -> None:
            nonlocal place
            if leads:
                self._sha.update(piece)
            with disk_errors(self._cache.folder):  # here, because a directory store would take it for its own error
                _write(self._file, piece, place)
            place += len(piece)
            report(len(piece))

        try:
            self._store.copy_range(blob_key(self.blob.digest), _buffer(), take, start=start, length=length)
        except ObjectNotFoundError:
            raise self._damage(f"is missing from {self._store.url}") from None
        if place < start + length:
            raise self._damage(f"is truncated: {place} of {self.blob.size} bytes")
        if self.blob.ranges > 1:
            with self._notes.open("ab"):
                pass
            with self._notes.open("r+b") as notes:
                notes.seek(index)
                notes.write(b"\1")
        with self._lock:
            self._done[index] = 1
            if leads:
                self._hashed += 1
                self._hashing = False

    def _hash_what_is_next(self) -> bool:
        """Hash the ranges that are next. Return True to exactly one caller, once the last range is hashed."""
        while True:
            with self._lock:
                if self._hashing or self._ready:
                    return False
                if self._hashed == self.blob.ranges:
                    self._hashing = True  # this caller finishes the download
                    return True
                if not self._done[self._hashed]:
                    return False
                self._hashing, index = True, self._hashed
            start = index * RANGE_BYTES
            self._hash(start, min(start + RANGE_BYTES, self.blob.size))
            with self._lock:
                self._hashed += 1
                self._hashing = False

    def _hash(self, start: int, stop: int) -> None:
        buffer = _buffer()
        while start < stop:
            count = os.preadv(self._file, [buffer[: stop - start]], start)
            if not count:
                raise self._damage(f"was cut off in the cache {self._cache.folder}")
            self._sha.update(buffer[:count])
            start += count

    def _finish(self, report: Callable[[int], None]) -> None:
        found = self._sha.hexdigest()
        if found == self.blob.digest:
            self._notes.unlink(missing_ok=True)  # first, because after the move the notes belong to another download
            self._cache.adopt(self.blob.digest, self._cache.partial_path(self.blob.digest))
            self._ready = True
            self.close()
            return
        self._notes.unlink(missing_ok=True)
        os.ftruncate(self._file, 0)
        if self._again:
            raise self._damage(f"is damaged: {self.blob.size} bytes with digest {found}")
        self._again = True
        self._restart()
        _allocate(self._file, self.blob.size)
        report(-self.blob.size)
        for index in range(self.blob.ranges):
            self.run(index, report)

    def _damage(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._label}: blob {self.blob.digest} {what}; compress again with a fresh store, or restore the object "
            "from a backup"
        )


def _buffer() -> memoryview:
    """Return a buffer of this thread."""
    try:
        found: memoryview = _local.buffer
    except AttributeError:
        found = _local.buffer = memoryview(bytearray(BUFFER_BYTES))
    return found


def _write(file: int, piece: memoryview, place: int) -> None:
    while len(piece):
        count = os.pwrite(file, piece, place)
        piece, place = piece[count:], place + count


def _allocate(file: int, size: int) -> None:
    """Give a file its size and allocate it on disk. Raises OSError if the disk is full."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in FULL:
            raise
        os.ftruncate(file, size)  # the file system cannot allocate
