"""Pull a version into a folder: fetch missing blobs into the cache, then link the folder's files to it.

    FOLDER/shard-00001-of-00099.safetensors   the shards, byte for byte as stored
    FOLDER/base-00001-of-00099.safetensors    containers of its base, if its tensors are differences
    FOLDER/files/config.json                  small files that go with the weights, if the version has any
    FOLDER/version.json                       model, name and digest, the signatures that were required, and `files`,
                                              the names that `pull` has written here
    FOLDER/model.sig                          the version's OMS signature, if it has one
    FOLDER/manifest.json                      last: a folder with a manifest is whole

A later pull into the folder removes files that `files` names and the new version lacks, and nothing else. A folder with
symbolic links in it is refused, so that nothing outside is ever written or removed.

Imports no torch, which would take longer than the command.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from birkhoff.pipeline.artifact.blob import Blob
from birkhoff.pipeline.artifact.cache import BlobCache, file_digest
from birkhoff.pipeline.artifact.fetch import fetch
from birkhoff.pipeline.artifact.references import Found
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, OutputError
from birkhoff.pipeline.files import atomic_file, atomic_write, place
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.registry.documents import FILE_NAME, BlobRecord, FileRecord, ShardRecord, VersionManifest
from birkhoff.pipeline.store.base import Store

MANIFEST_FILE = "manifest.json"
VERSION_FILE = "version.json"
FILES_FOLDER = "files"
SIGNATURE_FILE = "model.sig"

_OWN = re.compile(
    rf"(?:shard|base)-[0-9]{{5,}}-of-[0-9]{{5,}}\.safetensors|{FILES_FOLDER}/(?:{FILE_NAME.pattern})|{re.escape(SIGNATURE_FILE)}"
)
"""Names that `pull` gives to files."""

ROUNDS = 5
"""Attempts to use a blob of the cache, if another process removes it before it is used."""


BlobId = tuple[str, str, int]


def blob_id(record: BlobRecord) -> BlobId:
    """Return what distinguishes the records of a version: name or key, and blob."""
    name = record.name if isinstance(record, FileRecord) else record.key if isinstance(record, ShardRecord) else ""
    return (name, record.blob, record.bytes)


def blob_files(manifest: VersionManifest) -> dict[BlobId, str]:
    """Return the path of each blob's file in a pulled folder: shards, base containers, sidecar files."""
    files: dict[BlobId, str] = {}
    for number, shard in enumerate(manifest.shards, 1):
        files.setdefault(blob_id(shard), f"shard-{number:05}-of-{len(manifest.shards):05}.safetensors")
    bases = manifest.bases
    for number, base in enumerate(bases, 1):
        files[blob_id(base)] = f"base-{number:05}-of-{len(bases):05}.safetensors"
    own = {blob: path for (_, blob, _), path in files.items()}
    for base in (base for shard in manifest.shards for base in shard.bases or ()):
        files.setdefault(blob_id(base), own[base.blob])  # which may be one of its own shards
    return files | {blob_id(file): f"{FILES_FOLDER}/{file.name}" for file in manifest.files or ()}


def blobs_of(manifest: VersionManifest) -> list[Blob]:
    """Return all blobs that a version refers to."""
    return [Blob(digest=record.blob, size=record.bytes) for record in manifest.stored]


def pull(
    found: Found,
    store: Store | None,
    folder: Path,
    cache: BlobCache,
    *,
    signature: bytes | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> int:
    """Pull a version into a folder with every digest checked; return the bytes fetched from the store.

    Files and blobs that folder or cache have are used after hashing them.

    Args:
        found: The version.
        store: The store to fetch from; None to use the cache only.
        folder: A new or empty folder, or one of an earlier pull.
        cache: Receives missing blobs; the folder's files are links to it.
        signature: The version's OMS signature, for `model.sig`.
        report: Called with numbers of bytes as they arrive.

    Raises:
        ArtifactNotFoundError: Without a store, the cache lacks a blob.
        IntegrityError: A stored blob does not match its digest.
        OutputError: Folder or cache cannot be written, or the folder has links or was not made by `pull`.
        StoreError: The store failed.
    """
    manifest = found.manifest
    _claim(folder)
    files = blob_files(manifest)
    names = {files[blob_id(record)]: record for record in manifest.stored}
    own = [*names, *([] if signature is None else [SIGNATURE_FILE])]
    before = _recorded(folder) - set(own)
    # Until the folder is whole, both versions' names are recorded, so that a later pull can remove what a killed one
    # left.
    atomic_write(folder / VERSION_FILE, _note(found, [*own, *before]))
    _clear(folder, before)
    kept = _intact(folder, names.items())
    report(sum(names[name].bytes for name in kept))
    missing = {name: record for name, record in names.items() if name not in kept}
    fetched = _fill(folder, missing, found, store, cache, report)
    if signature is not None:
        atomic_write(folder / SIGNATURE_FILE, signature)
    atomic_write(folder / VERSION_FILE, _note(found, own))
    atomic_write(folder / MANIFEST_FILE, manifest.to_bytes())
    return fetched


def _fill(
    folder: Path,
    missing: dict[str, BlobRecord],
    found: Found,
    store: Store | None,
    cache: BlobCache,
    report: Callable[[int], None],
) -> int:
    """Fill the folder; return the bytes fetched. Blobs that leave the cache meanwhile are fetched again."""
    fetched = 0
    for _ in range(ROUNDS):
        wanted = {record.blob for record in missing.values()}
        fetched += bring(blobs_of(found.manifest), found, store, cache, only=wanted, report=report)
        missing = {name: r for name, r in missing.items() if not _placed(cache.path(r.blob), folder / name, r)}
        if not missing:
            return fetched
        report(-sum(record.bytes for record in missing.values()))
    raise OutputError(
        f"cache {cache.folder}: files left it {ROUNDS} times while they were pulled; stop what removes them "
        f"(`{hint('cache', 'prune')}`, or a cleaner of temporary files) and pull again"
    )


def _placed(source: Path, target: Path, record: BlobRecord) -> bool:
    """Put a file of the cache into a folder; return False if it has left the cache. Raises OutputError."""
    try:
        target.parent.mkdir(exist_ok=True)
        if isinstance(record, FileRecord):  # small, and people edit it, so it must not be shared between folders
            with atomic_file(target) as file:
                file.write(source.read_bytes())
        else:
            place(source, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not source.exists():
            return False
        raise OutputError(f"{target}: {error.strerror}; name a folder that can be written") from None
    return True


def bring(
    blobs: Iterable[Blob],
    found: Found,
    store: Store | None,
    cache: BlobCache,
    *,
    only: set[str],
    report: Callable[[int], None] = lambda _: None,
) -> int:
    """Fetch the blobs of `only` into the cache, each hashed; return the bytes fetched. Raises as `pull`."""
    wanted = [blob for blob in blobs if blob.digest in only]
    whole = cache.whole((blob.digest, blob.size) for blob in wanted)
    missing = [blob for blob in wanted if blob.digest not in whole]
    report(sum(blob.size for blob in wanted if blob.digest in whole))
    if missing and store is None:
        raise ArtifactNotFoundError(
            f"{found.label}: {len(missing)} of its {len(wanted)} blobs are not in the cache {cache.folder} "
            f"({missing[0].digest}, ...); pull it once without --offline"
        )
    if store is not None:
        for _ in fetch(store, missing, cache, label=found.label, report=report):
            pass
    return sum(blob.size for blob in dict.fromkeys(missing))


def _claim(folder: Path) -> None:
    """Create the folder, or check that it is empty or from an earlier `pull`. Raises OutputError, also for links in
    it."""
    files = folder / FILES_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(folder.iterdir())
        inside = sorted(files.iterdir()) if files.is_dir() and not files.is_symlink() else []
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    link = next((path for path in [*entries, *inside] if path.is_symlink()), None)
    if link is not None:
        raise OutputError(f"{link} is a symbolic link, which `pull` never follows; remove it, or name a new folder")
    held = [path.name for path in entries if not path.name.startswith(".part-")]
    if held and not (folder / VERSION_FILE).is_file():
        raise OutputError(f"{folder} holds {held[0]} and was not made by `pull`; name an empty or new folder")


def _note(found: Found, files: list[str]) -> bytes:
    return json.dumps({**found.note(), "files": files}).encode()


def _recorded(folder: Path) -> set[str]:
    """Return the files that an earlier pull recorded, if they have names that `pull` gives.

    For a folder older than the record, return those that its manifest names.
    """
    names: object = None
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        names = json.loads(_small(folder / VERSION_FILE)).get("files")
    if names is None:
        with contextlib.suppress(OSError, IntegrityError):
            manifest = read_document(VersionManifest, str(folder / MANIFEST_FILE), _small(folder / MANIFEST_FILE))
            names = list(blob_files(manifest).values())
    if not isinstance(names, list):
        return set()
    return {name for name in names if isinstance(name, str) and _OWN.fullmatch(name)}


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES)


def _clear(folder: Path, gone: Iterable[str]) -> None:
    """Remove the manifest, and files of an earlier version. Raises OutputError."""
    files = folder / FILES_FOLDER
    try:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        if files.is_dir() and not any(files.iterdir()):
            files.rmdir()
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None


def _intact(folder: Path, files: Iterable[tuple[str, BlobRecord]]) -> set[str]:
    """Return the names of those files that exist undamaged."""

    def check(item: tuple[str, BlobRecord]) -> str | None:
        name, record = item
        path = folder / name
        whole = path.is_file() and path.stat().st_size == record.bytes and file_digest(path) == record.blob
        return name if whole else None

    there = [(name, record) for name, record in files if (folder / name).exists()]  # threads only for what is hashed
    with ThreadPoolExecutor() as pool:
        return {name for name in pool.map(check, there) if name}
