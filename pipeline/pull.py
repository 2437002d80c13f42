"""Pulling a version into a folder: missing blobs into the cache, then links from the cache into the folder.

    FOLDER/shard-00001-of-00099.safetensors   the shards, byte by byte as stored
    FOLDER/version.json                       model, name and digest, and the signatures that were asked for
    FOLDER/manifest.json                      last: a folder with a manifest is whole

Imports no torch: the command is done before that would be loaded.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from birkhoff.pipeline.artifact import ShardRecord, VersionManifest
from birkhoff.pipeline.blob_cache import BlobCache, file_digest
from birkhoff.pipeline.blob_download import Blob
from birkhoff.pipeline.blob_fetch import fetch
from birkhoff.pipeline.errors import ArtifactNotFoundError, OutputError
from birkhoff.pipeline.files import place, write_whole
from birkhoff.pipeline.references import Found
from birkhoff.pipeline.store import Store

MANIFEST_FILE = "manifest.json"
VERSION_FILE = "version.json"


def shard_file(manifest: VersionManifest, shard: ShardRecord) -> str:
    """Name of a shard's file in a pulled folder."""
    return f"shard-{manifest.shards.index(shard) + 1:05}-of-{len(manifest.shards):05}.safetensors"


def blobs_of(manifest: VersionManifest) -> list[Blob]:
    """Everything that a version refers to."""
    return [Blob(digest=shard.blob, size=shard.bytes) for shard in manifest.shards]


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
    names = {shard_file(manifest, shard): shard for shard in manifest.shards}
    for stale in [folder / MANIFEST_FILE, *(p for p in folder.glob("shard-*.safetensors") if p.name not in names)]:
        stale.unlink(missing_ok=True)
    write_whole(folder / VERSION_FILE, json.dumps(found.note()).encode())
    kept = _intact(folder, names.items())
    report(sum(names[name].bytes for name in kept))
    missing = {name: shard for name, shard in names.items() if name not in kept}
    fetched = bring(blobs_of(manifest), found, store, cache, only={s.blob for s in missing.values()}, report=report)
    for name, shard in missing.items():
        try:
            place(cache.path(shard.blob), folder / name)
        except OSError as error:
            raise OutputError(f"{folder / name}: {error.strerror}; name a folder that can be written") from None
    write_whole(folder / MANIFEST_FILE, manifest.to_bytes())
    return fetched


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


def _intact(folder: Path, files: Iterable[tuple[str, ShardRecord]]) -> set[str]:
    """Names of those files that are there, whole."""

    def check(item: tuple[str, ShardRecord]) -> str | None:
        name, shard = item
        path = folder / name
        whole = path.is_file() and path.stat().st_size == shard.bytes and file_digest(path) == shard.blob
        return name if whole else None

    with ThreadPoolExecutor() as pool:
        return {name for name in pool.map(check, files) if name}
