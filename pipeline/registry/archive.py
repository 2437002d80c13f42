"""One version as one file, for machines without a network: an uncompressed tar, written and read as a stream.

    version.json               form of the archive; model, name, digest and alias of the version
    manifest.json              the version's manifest, which has that digest
    beside/labels.json, ...    objects beside the manifest in a store, sorted by path
    blobs/sha256/ab/<hex>      every blob once, in the manifest's order
    sha256.txt                 SHA-256 in hex of every byte before this member's header, and a line feed

Members are regular files with mode 644, user and group 0 without names, time 0, and POSIX ustar headers (IEEE Std
1003.1-1988, 10.1.1). The tar ends with two empty blocks. A version saved under the same name, labels and signatures
therefore always gives the same bytes.

Reading trusts nothing. A header must equal, byte for byte, what `write_archive` would write for the expected member,
which rules out links, devices, and other paths or sizes. The manifest must match the digest in `version.json`, each
blob its digest in the manifest, and the whole file `sha256.txt`, before anything is named. Memory holds one member at a
time, and never more of it than the file contains.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import Field

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, Digest, Document, read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ObjectNotFoundError, OutputError
from birkhoff.pipeline.files import atomic_output
from birkhoff.pipeline.registry.documents import BlobRecord, VersionManifest, VersionName, blob_key, sha256
from birkhoff.pipeline.registry.shipping import (
    BESIDE_PATH,
    MAX_BESIDE,
    MAX_BESIDE_BYTES,
    Delivery,
    Installed,
    Parcel,
    Report,
    install,
    put_blob,
)
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import NAME_PATTERN

HEAD, MANIFEST, BESIDE, CHECKSUM = "version.json", "manifest.json", "beside/", "sha256.txt"
MAX_HEAD_BYTES = 4096
MAX_MEMBER_BYTES = (1 << 33) - 1
"""The largest size that 11 octal digits in a header can state: 8 GiB less one byte."""

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_BUFFER_BYTES = 1 << 20


class ArchiveHead(Document):
    """The first member of an archive."""

    form: Literal[1] = 1
    """Version of the archive's layout."""
    model: Annotated[str, Field(pattern=f"^{NAME_PATTERN.pattern}$")]
    name: VersionName
    digest: Digest
    alias: Annotated[str, Field(pattern=f"^{NAME_PATTERN.pattern}$")] | None = None


def save(source: Store, parcel: Parcel, path: Path, *, report: Report = lambda _: None) -> int:
    """Write a version to a file and return its size in bytes. The file appears whole or not at all.

    Raises:
        IntegrityError: A blob is missing or damaged.
        OutputError: The file cannot be written, or a blob is too large for a tar.
        StoreError: The store failed.
    """
    with atomic_output(path) as file:
        write_archive(source, parcel, file, report=report)
        return file.tell()


def write_archive(source: Store, parcel: Parcel, file: BinaryIO, *, report: Report = lambda _: None) -> None:
    """Write a version as a tar in constant memory; the same version gives the same bytes. Raises what `save` raises."""
    manifest = parcel.manifest
    head = ArchiveHead(model=manifest.model, name=parcel.name, digest=manifest.digest, alias=parcel.alias)
    documents = {HEAD: head.to_bytes(), MANIFEST: manifest.to_bytes()}
    documents |= {f"{BESIDE}{path}": body for path, body in parcel.beside.items()}
    whole = hashlib.sha256()

    def put(piece: bytes | memoryview) -> None:
        whole.update(piece)
        file.write(piece)

    for name, body in documents.items():
        put(_member(name, body))
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for record in parcel.blobs:
        put(_header(blob_key(record.blob), record.bytes))
        _write_blob(source, parcel, record, put, buffer, report)
        put(_padding(record.bytes))
    file.write(_member(CHECKSUM, _checksum(whole.hexdigest())) + _END)


def load(path: Path, target: Store, delivery: Delivery, *, report: Callable[[str, int], Report]) -> Installed:
    """Publish the version of an archive in a store. Blobs that the store has are read and checked too.

    Args:
        path: A file that `save` wrote, or a pipe.
        target: The store to publish in.
        delivery: How the version is named, aliased and signed there.
        report: Called with the version's label and size in bytes; returns a function that is told of bytes as they
            arrive.

    Raises:
        ArtifactNotFoundError: There is no such file.
        IntegrityError: The file is not an archive, or it is damaged; nothing was named.
        PreconditionError: The target has another version under this name.
        AliasError: An alias in the target is protected.
        StoreError: The store failed.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactNotFoundError(f"{path}: {error.strerror}; name a file that `birkhoff save` wrote") from None
    with file:
        archive = Archive(file, str(path))
        advance = report(archive.parcel.label, archive.parcel.nbytes)

        def bring(missing: Sequence[BlobRecord]) -> None:
            wanted = {record.blob for record in missing}
            for record, body in archive.blobs():
                if record.blob in wanted:
                    put_blob(target, record, body)
                    advance(record.bytes)
                interrupt.check()

        return install(target, archive.parcel, bring, delivery, report=advance)


class Archive:
    """An archive that is read from its first byte to its last. `label` names it in messages."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        """Read everything before the blobs. Raises IntegrityError."""
        self._file, self._label, self._whole = file, label, hashlib.sha256()
        name, size = self._next()
        head = read_document(ArchiveHead, f"{label}: {HEAD}", self._document(name, size, HEAD, MAX_HEAD_BYTES))
        name, size = self._next()
        body = self._document(name, size, MANIFEST, MAX_DOCUMENT_BYTES)
        if sha256(body) != head.digest:
            raise self._damage(f"{MANIFEST} has digest {sha256(body)}, {HEAD} says {head.digest}")
        manifest = read_document(VersionManifest, f"{label}: {MANIFEST}", body)
        if manifest.model != head.model:
            raise self._damage(f"{MANIFEST} is of model {manifest.model[:80]!r}, {HEAD} says {head.model!r}")
        beside: dict[str, bytes] = {}
        name, size = self._next()
        while name.startswith(BESIDE):
            path = name.removeprefix(BESIDE)
            if len(beside) == MAX_BESIDE or not BESIDE_PATH.fullmatch(path) or path <= max(beside, default=""):
                raise self._damage(f"member {name[:120]!r} has no place there")
            room = MAX_BESIDE_BYTES - sum(map(len, beside.values()))
            beside[path] = self._document(name, size, name, min(room, MAX_DOCUMENT_BYTES))
            name, size = self._next()
        self._first = name, size
        self.parcel: Parcel = Parcel(origin=label, name=head.name, alias=head.alias, manifest=manifest, beside=beside)

    def blobs(self) -> Iterator[tuple[BlobRecord, bytes]]:
        """Yield each blob once, checked against its digest, one in memory at a time. Raises IntegrityError."""
        for index, record in enumerate(self.parcel.blobs):
            name, size = self._next() if index else self._first
            if (name, size) != (blob_key(record.blob), record.bytes):
                raise self._damage(f"member {name[:120]!r} of {size} bytes stands where blob {record.blob} should")
            body = self._read(size)
            if sha256(body) != record.blob:
                raise self._damage(f"blob {record.blob} has digest {sha256(body)}")
            yield record, body
        expected = _checksum(self._whole.hexdigest())
        name, size = self._next()
        if self._document(name, size, CHECKSUM, len(expected)) != expected:
            raise self._damage(f"its bytes are not those that {CHECKSUM} was made of")
        name, size = self._next()
        if name:
            raise self._damage(f"member {name[:120]!r} comes after the last")

    def _next(self) -> tuple[str, int]:
        """Return name and size of the next member; an empty name at the end."""
        block = self._take(_BLOCK)
        if block == _END[:_BLOCK]:
            if self._take(_BLOCK) != block or self._file.read(1):
                raise self._damage("something follows the end")
            return "", 0
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            canonical = 0 <= info.size <= MAX_MEMBER_BYTES and _header(info.name, info.size) == block
        except (tarfile.TarError, ValueError, OutputError):
            canonical = False
        if not canonical:
            raise self._damage("a header is none of those that `birkhoff save` writes")
        return info.name, info.size

    def _document(self, name: str, size: int, expected: str, most: int) -> bytes:
        if name != expected or size > most:
            raise self._damage(f"member {name[:120]!r} of {size} bytes, expected {expected} of at most {most}")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        """Return a member's bytes. Memory grows with the bytes read, whatever size the header claims."""
        body = bytearray()
        while len(body) < size:
            body += self._take(min(_BUFFER_BYTES, size - len(body)))
        if self._take(-size % _BLOCK).strip(b"\0"):
            raise self._damage("something stands between two members")
        return bytes(body)

    def _take(self, size: int) -> bytes:
        try:
            piece = self._file.read(size)
        except OSError as error:
            raise self._damage(str(error.strerror)) from None
        if len(piece) < size:
            raise self._damage("it ends too early")
        self._whole.update(piece)
        return piece

    def _damage(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self._label}: no archive of `birkhoff save`, or damaged: {what}; save it again")


def _write_blob(
    source: Store,
    parcel: Parcel,
    record: BlobRecord,
    put: Callable[[memoryview], None],
    buffer: memoryview,
    report: Report,
) -> None:
    sha = hashlib.sha256()

    def take(piece: memoryview) -> None:
        sha.update(piece)
        put(piece)
        report(len(piece))
        interrupt.check()

    try:
        length = source.copy_range(blob_key(record.blob), buffer, take, start=0, length=record.bytes)
    except ObjectNotFoundError:
        raise IntegrityError(f"{parcel.label}: blob {record.blob} is missing from {source.url}") from None
    if length != record.bytes or sha.hexdigest() != record.blob:
        raise IntegrityError(
            f"{parcel.label}: blob {record.blob} is damaged in {source.url}: {length} bytes with digest "
            f"{sha.hexdigest()}; compress again with a fresh store, or restore the object from a backup"
        )


def _header(name: str, size: int) -> bytes:
    """Return the header of a member. Raises OutputError if ustar cannot express its name or size."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    if size > MAX_MEMBER_BYTES:
        raise OutputError(
            f"{name}: {size} bytes, and a tar holds at most {MAX_MEMBER_BYTES} of one; bring it with `copy`"
        )
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:
        raise OutputError(f"{name[:120]!r}: no header of a tar can hold this name") from None


def _member(name: str, body: bytes) -> bytes:
    return _header(name, len(body)) + body + _padding(len(body))


def _checksum(digest: str) -> bytes:
    return f"{digest}\n".encode()


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)
