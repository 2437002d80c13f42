"""The download cache: files under the SHA-256 of their bytes, and records of their addresses.

    FOLDER/<sha256>/<name>        a download, complete and read-only; renamed into place
    FOLDER/seen/<key>.json        first-seen record of an address: digest, size, ETag, time
    FOLDER/partial/<key>.part     a running download, with <key>.json: the ETag and size it belongs to
    FOLDER/locks/<key>            held while an address is downloaded

<key> is the SHA-256 of the address. Only damaged copies and finished partial files are ever removed. You may delete the
folder while nothing runs.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from birkhoff.pipeline.download.spec import shown_url
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.files import (
    atomic_file,
    file_sha256,
    file_state,
    remembered_digest,
    shortage,
    sync_folder,
    take_lock,
)
from birkhoff.pipeline.paths import birkhoff_home


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A server's description of a file. `size` is in bytes; fields that it does not state are None."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None
    """The Last-Modified header, verbatim."""
    commit: str | None = None
    """The commit of the repository, if the file is in one."""

    @property
    def validator(self) -> str | None:
        """The validator for If-Range (RFC 9110, 13.1.5): a strong ETag, else the time of the last change."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return self.etag
        return self.modified if self.etag is None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSeen:
    """First-seen record of an address or a local file: the digest that is required from then on."""

    url: str
    """Without its query."""
    sha256: str
    size: int
    etag: str | None
    modified: str | None
    name: str
    """Name of the copy under FOLDER/<sha256>."""
    mtime_ns: int
    """Modification time of the copy when it was hashed. While it stays, the copy is not hashed again."""
    time: str
    """When the digest was first seen, ISO 8601 in UTC."""
    commit: str | None = None
    """Commit of the repository on the Hugging Face Hub; the file stays in the hub's cache, at this commit."""


class DownloadCache:
    """The cache in `folder`, created on first use. Threads and processes may share it."""

    @classmethod
    def at(cls, folder: Path | None = None) -> Self:
        """Return the cache in a folder; by default `downloads` in the birkhoff home."""
        return cls(folder or birkhoff_home() / "downloads")

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder.absolute()

    def first_seen_file(self, url: str) -> Path:
        """Return the file of an address's first-seen record; delete it to forget the address."""
        return self.folder / "seen" / f"{_key(url)}.json"

    def first_seen(self, url: str) -> FirstSeen | None:
        """Return the first-seen record of an address; None for a new one. Raises SourceError if it is damaged."""
        record = self.first_seen_file(url)
        try:
            return FirstSeen(**json.loads(record.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise SourceError(f"{record}: not a record of a download ({error}); delete it") from error

    def copy(self, seen: FirstSeen) -> Path | None:
        """Return the cached file of an address, or None. A file that has changed is hashed, and removed if wrong.

        Raises SourceError.
        """
        path = self.folder / seen.sha256 / seen.name
        if stands(path, seen):
            return path
        path.unlink(missing_ok=True)
        return None

    def holding(self, sha256: str) -> Path | None:
        """Return a cached file with this digest, from any address, after hashing it. Raises OSError."""
        with suppress(FileNotFoundError):
            for path in sorted((self.folder / sha256).iterdir()):
                if file_sha256(path) == sha256:
                    return path
        return None

    def partial(self, url: str) -> "Partial":
        """Return the running download of an address, or a new one. The caller must hold its lock."""
        base = self.folder / "partial" / _key(url)
        base.parent.mkdir(parents=True, exist_ok=True)
        return Partial(url=shown_url(url), path=base.with_suffix(".part"), note=base.with_suffix(".json"))

    def adopt(self, url: str, source: Path, *, sha256: str, name: str, remote: Remote, link: bool = False) -> Path:
        """Move a complete file, whose digest was just computed, under that digest, and record its address and time.

        With `link` the file stays and gains a second name. Raises OSError.
        """
        target = self.folder / sha256 / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            with suppress(FileExistsError):
                os.link(source, target)
        elif source != target:
            with source.open("rb") as file:
                os.fsync(file.fileno())
            source.chmod(0o444)
            source.replace(target)
            sync_folder(target.parent)
        self.note(url, target, sha256=sha256, name=name, remote=remote)
        return target

    def note(self, url: str, target: Path, *, sha256: str, name: str, remote: Remote) -> None:
        """Record an address whose file, just hashed, is at `target`. Raises OSError."""
        facts = target.stat()
        seen = FirstSeen(
            url=shown_url(url),
            sha256=sha256,
            size=facts.st_size,
            etag=remote.etag,
            modified=remote.modified,
            name=name,
            mtime_ns=facts.st_mtime_ns,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=remote.commit,
        )
        write_json(self.first_seen_file(url), asdict(seen))

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a local file outside the cache, remembered while size and times stay. Raises
        OSError."""
        note = self.first_seen_file(path.as_uri())
        return remembered_digest(note, lambda: {str(path): file_state(path)}, lambda: file_sha256(path))

    @contextmanager
    def lock(self, url: str) -> Iterator[None]:
        """Lock an address against downloads by other processes and threads."""
        lock = self.folder / "locks" / _key(url)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as file:
            take_lock(file)
            yield


def stands(path: Path, seen: FirstSeen) -> bool:
    """Return whether a file exists unchanged; it is hashed if its time has changed. Raises OSError."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return False
    if (facts.st_size, facts.st_mtime_ns) == (seen.size, seen.mtime_ns):
        return True
    return facts.st_size == seen.size and file_sha256(path) == seen.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A running download: its first bytes, and the state of the remote file that they belong to."""

    url: str
    path: Path
    note: Path

    @property
    def done(self) -> int:
        """Number of bytes that have arrived."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def remote(self) -> Remote | None:
        """Return the remote file that the bytes belong to; None if that is unknown and they are useless."""
        try:
            note = json.loads(self.note.read_bytes())
            # A machine that crashed may have lost unsynced bytes, and left zeros in their place.
            return Remote(**note["remote"]) if note["boot"] == _boot() else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def begin(self, remote: Remote) -> Self:
        """Start over with the bytes of `remote`. Raises SourceError if the disk has no room."""
        self.discard()
        if remote.size is not None:
            check_space(self.path.parent, remote.size, self.url)
        write_json(self.note, {"boot": _boot(), "remote": asdict(remote)})
        self.path.touch()
        return self

    def discard(self) -> None:
        """Delete the bytes."""
        # In this order: bytes without a note are ignored.
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def check_space(folder: Path, nbytes: int, label: str) -> None:
    """Raise SourceError if `folder` cannot take `nbytes` and leave `SPARE_BYTES`."""
    if lack := shortage(folder, nbytes):
        raise SourceError(f"{label}: {lack}; make room or point BIRKHOFF_HOME at a larger disk")


def write_json(path: Path, value: object) -> None:
    """Write a small file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _boot() -> str:
    """Return an id of this boot of the machine; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
