"""A store in plain files, with the same contract as S3 and no server.

An object is a file at `ROOT/KEY`. `ROOT/.store/` has files being written (`tmp/`), lock files (`locks/`) and a folder
for each permit to delete (`permits/`). A write makes a temporary file, fsyncs it, links (create) or renames (put,
replace) it into place, and fsyncs the folder. So a reader sees the old body or the new one, never half of one. A dead
writer leaves files only in `tmp/`, which listings skip and the next writer cleans up.

The tag is inode, modification time and size of the file. Every overwrite happens under a lock and moves the time
forward by at least a nanosecond, so an object never has one tag twice. Times are the file system's (on NFS the
server's); the clocks of writing machines are not used.

A deletion under a permit moves the file into the permit's folder and removes it there. `revoke` removes the folder, so
a process that was stopped for a year finds no folder to move the file to. No lock is held meanwhile, so a stopped
process blocks nobody.

Symbolic links below the root are refused, with their path, by listings, writes and deletions: the target may be shared
with another store, and listings do not enter it. Reading one object follows them, because its digest is checked.

It needs a POSIX file system with hard links, flock and times in nanoseconds: the usual local ones, or NFS 4.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from birkhoff.pipeline.errors import (
    ObjectNotFoundError,
    PermitEndedError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
)
from birkhoff.pipeline.files import read_at_most, sync_folder
from birkhoff.pipeline.store.base import ObjectInfo, Store, StoreAddress
from birkhoff.pipeline.store.keys import RESERVED, check_key, check_prefix, check_range, is_key

_TICK_NS = 20_000_000  # above the longest tick in use, 10 ms
ABANDONED_SECONDS = 3600.0  # an unlocked temporary file older than this has lost its writer

_REMEDIES = {
    errno.ENOSPC: "free some space, or point the store at a larger disk",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EEXIST: "one key cannot be the folder of another; rename one of them",
    errno.ENOTDIR: "one key cannot be the folder of another; rename one of them",
    errno.EISDIR: "one key cannot be the folder of another; rename one of them",
    errno.ENOTSUP: "the file system lacks hard links; use a local disk or an s3:// store",
    errno.ENOLCK: "the file system lacks locks; use a local disk or an s3:// store",
}
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class _LinkError(OSError):
    """A symbolic link in place of a file or folder of a store."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.ELOOP, "is a symbolic link")
        self.path = path


class DirectoryStore(Store):
    """A store in the folder `root`, which the first write creates. Raises StoreError if `root` is a file."""

    def __init__(self, address: StoreAddress, root: Path) -> None:
        super().__init__(address)
        self._root = root
        self._internal = root / RESERVED
        self._prepared = False
        try:
            is_file = root.exists() and not root.is_dir()
        except OSError as error:
            raise self._store_error("open", "", error) from error
        if is_file:
            raise StoreError(f"{address.url}: expected a directory, found a file; name another path")

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        check_range(key, start, length)
        with self._reading("get", key) as path, path.open("rb") as file:
            file.seek(start)
            return read_at_most(file, length)

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """See Store."""
        check_range(key, start, length)
        done = 0
        with self._reading("get", key) as path, path.open("rb", buffering=0) as file:
            file.seek(start)
            while count := file.readinto(buffer[: length - done]):
                done += count
                sink(buffer[:count])
        return done

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        # A body never changes under its inode, so both come from the same state.
        with self._reading("read", key) as path, path.open("rb") as file:
            return read_at_most(file, length), _tag(os.fstat(file.fileno()))

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        with self._reading("head", key) as path:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, "not an object")
            return _info(key, found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store."""
        return self._entries(check_prefix(prefix))

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        with self._writing("put", key) as path, self._temporary(body) as temporary, self._locked(key):
            return _move(temporary, path)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        with self._writing("create", key) as path, self._temporary(body) as temporary:
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return self._same_or_lost("create", path, key, body)
            sync_folder(path.parent)
            return _tag(temporary.stat())

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        with self._writing("replace", key) as path, self._temporary(body) as temporary, self._locked(key):
            found = _tag_at(path)
            if found is None:
                raise PreconditionError(f"replace {self.url}/{key}: the object is gone; read it again")
            if found != tag:
                return self._same_or_lost("replace", path, key, body)
            return _move(temporary, path)

    def touch(self, key: str) -> None:
        """See Store."""
        try:
            with self._writing("touch", key) as path:
                _stamp(path, after=path.stat().st_mtime_ns)
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _MISSING:
                raise ObjectNotFoundError(f"touch {self.url}/{key}: no such object") from error
            raise

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store. Folders stay: removing them would race with writers."""
        with self._writing("delete", key) as path:
            if _tag_at(path) is None:  # a missing object needs no lock file
                return
            if permit is not None:
                self._delete_under(permit, key, path)
                return
            with self._locked(key), suppress(FileNotFoundError):
                path.unlink()
                sync_folder(path.parent)

    def permit(self, now: datetime, *, witness: str) -> str:  # noqa: ARG002
        """See Store."""
        permit = uuid.uuid4().hex
        with self._writing("permit", witness):
            _make_folder(self._permits / permit)
        return permit

    def revoke(self, permit: str) -> datetime | None:
        """See Store."""
        folder = self._permits / check_key(permit)
        with self._writing("revoke", permit), suppress(FileNotFoundError):
            while True:
                for path in folder.iterdir():
                    path.unlink(missing_ok=True)
                try:
                    folder.rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    continue  # something was moved there meanwhile
                sync_folder(self._permits)
                break
        return None

    def _delete_under(self, permit: str, key: str, path: Path) -> None:
        """Move an object to its permit's folder and remove it there; without that folder the permit has ended."""
        folder = self._permits / check_key(permit)
        moved = folder / uuid.uuid4().hex
        try:
            path.rename(moved)
        except FileNotFoundError:
            if folder.is_dir():
                return  # the object is gone
            raise PermitEndedError(f"delete {self.url}/{key}: its permit has ended") from None
        sync_folder(path.parent)
        moved.unlink(missing_ok=True)

    @property
    def _permits(self) -> Path:
        return self._internal / "permits"

    def close(self) -> None:
        """See Store. Nothing is open between calls."""

    def _entries(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, slash, _ = prefix.rpartition("/")
        try:
            self._refuse_links(folder)
            yield from _walk(self._root / folder, folder + slash, prefix)
        except OSError as error:
            raise self._store_error("list", prefix, error) from error

    def _same_or_lost(self, operation: str, path: Path, key: str, body: bytes) -> str:
        """Return the tag of the object if it holds `body`; raise PreconditionError otherwise."""
        with suppress(FileNotFoundError), path.open("rb") as file:
            if file.read(len(body) + 1) == body:
                sync_folder(path.parent)  # its writer may have died before that
                return _tag(os.fstat(file.fileno()))
        raise PreconditionError(f"{operation} {self.url}/{key}: another body is there; read it and decide again")

    @contextmanager
    def _reading(self, operation: str, key: str) -> Iterator[Path]:
        """Yield the path of an object to read; convert OSError to StoreError."""
        try:
            yield self._root / check_key(key)
        except OSError as error:
            if error.errno in _MISSING:
                raise ObjectNotFoundError(f"{operation} {self.url}/{key}: no such object") from error
            raise self._store_error(operation, key, error) from error

    @contextmanager
    def _writing(self, operation: str, key: str) -> Iterator[Path]:
        """Yield the path of an object to write; convert OSError to StoreError."""
        try:
            self._refuse_links(check_key(key))
            yield self._root / key
        except OSError as error:
            raise self._store_error(operation, key, error) from error

    def _refuse_links(self, key: str) -> None:
        """Raise _LinkError if the path of a key contains a symbolic link."""
        path = self._root
        for component in key.split("/"):
            path = path / component
            if path.is_symlink():
                raise _LinkError(path)

    def _store_error(self, operation: str, key: str, error: OSError) -> StoreError:
        if isinstance(error, _LinkError):
            return StoreError(
                f"{operation} {self.url}/{key}: {error.path} is a symbolic link, and a store holds none; move what it "
                "points at to its place, or mount the other disk there"
            )
        what = f"{operation} {self.url}/{key}: {error.strerror or error}"
        if error.errno in _DENIED:
            return StoreDeniedError(f"{what}; give this user write access, or name another directory")
        return StoreError(f"{what}; {_REMEDIES.get(error.errno or 0, 'check the disk and the path')}")

    @contextmanager
    def _temporary(self, body: bytes) -> Iterator[Path]:
        """Yield a durable file with `body`, locked while its writer lives, and remove what is left of it."""
        self._prepare()
        path = self._internal / "tmp" / uuid.uuid4().hex
        with path.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(body)
                file.flush()
                _stamp(path, after=0)
                os.fsync(file.fileno())
                yield path
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold off other overwriters of the key, in any process. 256 lock files serve all keys."""
        self._prepare()
        name = hashlib.sha256(key.encode()).hexdigest()[:2]
        with (self._internal / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _prepare(self) -> None:
        """Create the internal folders and clear files of dead writers, once per store."""
        if self._prepared:
            return
        for name in ("tmp", "locks"):
            _make_folder(self._internal / name)
        for path in (self._internal / "tmp").iterdir():
            with suppress(FileNotFoundError, BlockingIOError, PermissionError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    with path.open("rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
        self._prepared = True


def _move(temporary: Path, path: Path) -> str:
    """Put `temporary` in place of the present file. The caller holds the key's lock."""
    _make_folder(path.parent)
    with suppress(FileNotFoundError):
        previous = path.stat().st_mtime_ns
        if temporary.stat().st_mtime_ns <= previous:  # written meanwhile, or the clock was set back
            _stamp(temporary, after=previous)
    tag = _tag(temporary.stat())
    temporary.replace(path)
    sync_folder(path.parent)
    return tag


def _stamp(path: Path, *, after: int) -> None:
    """Set the modification time to the file system's now, but later than `after` (ns).

    The file system's own stamps tick every few milliseconds. If the machine's clock is within the same tick, it
    separates files that were written in one tick. If not, it is wrong or belongs to another machine, and a random
    offset separates them.
    """
    os.utime(path)
    stamp, mine = path.stat().st_mtime_ns, time.time_ns()
    now = mine if 0 <= mine - stamp < _TICK_NS else stamp + secrets.randbelow(1000)
    now = max(now, after + 1)
    os.utime(path, ns=(now, now))


def _tag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _tag_at(path: Path) -> str | None:
    """Return the tag of the object at `path`; None if there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _tag(found) if stat.S_ISREG(found.st_mode) else None


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    modified = datetime.fromtimestamp(found.st_mtime, tz=UTC)
    return ObjectInfo(key=key, size=found.st_size, tag=_tag(found), modified=modified)


def _walk(folder: Path, start: str, prefix: str) -> Iterator[ObjectInfo]:
    """Yield the objects below `folder`, whose keys begin with `start`, sorted by key."""
    try:
        with os.scandir(folder) as entries:
            # As part of a key a folder's name ends in a slash, and sorts so: a-b, a/b, a0.
            named = [(entry.name + "/" * entry.is_dir(follow_symlinks=False), entry) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, entry in sorted(named, key=lambda pair: pair[0]):
        key = start + name
        if entry.is_symlink() and (key.startswith(prefix) or prefix.startswith(f"{key}/")):
            raise _LinkError(Path(entry.path))
        if name.endswith("/"):
            if key != f"{RESERVED}/" and (key.startswith(prefix) or prefix.startswith(key)):
                yield from _walk(Path(entry.path), key, prefix)
        elif key.startswith(prefix) and is_key(key) and entry.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):
                yield _info(key, entry.stat())


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable before the next."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
