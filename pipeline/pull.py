"""Pulling a version into a folder: missing blobs into the cache, then links from the cache into the folder.

    FOLDER/shard-00001-of-00099.safetensors   the shards, byte by byte as stored
    FOLDER/files/config.json                  small files that go with the weights, where the version has any
    FOLDER/version.json                       model, name and digest, and the signatures that were asked for
    FOLDER/manifest.json                      last: a folder with a manifest is whole

Imports no torch: the command is done before that would be loaded.
"""

import json
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from birkhoff.pipeline.artifact import BlobRecord, FileRecord, ShardRecord, VersionManifest
from birkhoff.pipeline.blob_cache import BlobCache, file_digest
from birkhoff.pipeline.blob_download import Blob
from birkhoff.pipeline.blob_fetch import fetch
from birkhoff.pipeline.errors import ArtifactNotFoundError, OutputError
from birkhoff.pipeline.files import place, write_whole
from birkhoff.pipeline.references import Found
from birkhoff.pipeline.store import Store

MANIFEST_FILE = "manifest.json"
VERSION_FILE = "version.json"
FILES_FOLDER = "files"

ROUNDS = 5
"""Times that a blob is brought into the cache, should another process remove it before it is used."""


def blob_file(manifest: VersionManifest, record: BlobRecord) -> str:
    """Path of a blob's file in a pulled folder: a shard's, or that of a file that goes with the weights."""
    return f"{FILES_FOLDER}/{record.name}" if isinstance(record, FileRecord) else shard_file(manifest, record)


def shard_file(manifest: VersionManifest, shard: ShardRecord) -> str:
    """Name of a shard's file in a pulled folder."""
    return f"shard-{manifest.shards.index(shard) + 1:05}-of-{len(manifest.shards):05}.safetensors"


def blobs_of(manifest: VersionManifest) -> list[Blob]:
    """Everything that a version refers to."""
    return [Blob(digest=record.blob, size=record.bytes) for record in manifest.stored]


def pull(
    found: Found,
    store: Store | None,
    folder: Path,
    cache: BlobCache,
    *,
    report: Callable[[int], None] = lambda _: None,
) -> int:
    """Bring a version into a folder, every digest checked; returns the bytes fetched from the store.

    What the folder or the cache holds is taken from there once its bytes were hashed.

    Args:
        found: the version.
        store: where it is; None to do without: then the cache must hold it.
        folder: new, empty, or of an earlier pull.
        cache: where what is missing goes, and what the folder's files are links to.
        report: told of bytes as they are there.

    Raises:
        ArtifactNotFoundError: without a store, the cache lacks a blob.
        IntegrityError: a stored blob does not match its digest.
        OutputError: folder or cache cannot be written, or the folder holds files that are not of `pull`.
        StoreError: the store failed.
    """
    manifest = found.manifest
    _claim(folder)
    names = {blob_file(manifest, record): record for record in manifest.stored}
    _clear(folder, names)
    write_whole(folder / VERSION_FILE, json.dumps(found.note()).encode())
    kept = _intact(folder, names.items())
    report(sum(names[name].bytes for name in kept))
    missing = {name: record for name, record in names.items() if name not in kept}
    fetched = _fill(folder, missing, found, store, cache, report)
    write_whole(folder / MANIFEST_FILE, manifest.to_bytes())
    return fetched


def _fill(
    folder: Path,
    missing: dict[str, BlobRecord],
    found: Found,
    store: Store | None,
    cache: BlobCache,
    report: Callable[[int], None],
) -> int:
    """Bring files into the folder; returns the bytes fetched. What leaves the cache meanwhile is fetched once more."""
    fetched = 0
    for _ in range(ROUNDS):
        wanted = {record.blob for record in missing.values()}
        fetched += bring(blobs_of(found.manifest), found, store, cache, only=wanted, report=report)
        missing = {name: r for name, r in missing.items() if not _placed(cache.path(r.blob), folder / name)}
        if not missing:
            return fetched
        report(-sum(record.bytes for record in missing.values()))
    raise OutputError(
        f"cache {cache.folder}: files left it {ROUNDS} times while they were pulled; stop what removes them "
        "(`birkhoff cache prune`, or a cleaner of temporary files) and pull again"
    )


def _placed(source: Path, target: Path) -> bool:
    """Put a file of the cache into a folder; False where it left the cache meanwhile. Raises OutputError."""
    try:
        target.parent.mkdir(exist_ok=True)
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
    """Have the blobs of `only` in the cache, each hashed; returns the bytes fetched. Raises as `pull`."""
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
    """Make the folder, or find it empty or left by an earlier `pull`: what else lies there is not ours to remove."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".part-"))
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    if held and not (folder / VERSION_FILE).is_file():
        raise OutputError(f"{folder} holds {held[0]} and was not made by `pull`; name an empty or new folder")


def _clear(folder: Path, names: Container[str]) -> None:
    """Remove the manifest, and what an earlier version left that is not in `names`. Raises OutputError."""
    files = folder / FILES_FOLDER
    try:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for path in [*folder.glob("shard-*.safetensors"), *files.glob("[!.]*")]:
            if path.relative_to(folder).as_posix() not in names:
                path.unlink()
        if files.is_dir() and not any(files.iterdir()):
            files.rmdir()
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None


def _intact(folder: Path, files: Iterable[tuple[str, BlobRecord]]) -> set[str]:
    """Names of those files that are there, whole."""

    def check(item: tuple[str, BlobRecord]) -> str | None:
        name, record = item
        path = folder / name
        whole = path.is_file() and path.stat().st_size == record.bytes and file_digest(path) == record.blob
        return name if whole else None

    with ThreadPoolExecutor() as pool:
        return {name for name in pool.map(check, files) if name}
