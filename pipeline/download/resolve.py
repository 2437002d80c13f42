"""The entry point for a manifest's sources: `resolve` downloads and opens them, `peek` only looks.

A file is taken from the first of these that has it:

1. a local path among its addresses;
2. the mirror, a folder with files under the names of the addresses (`--mirror`, BIRKHOFF_MIRROR);
3. the download cache;
4. the addresses in order. With the index of a sharded checkpoint, its shards are downloaded too.

Its digest is checked against the manifest's `sha256`. Without one, the digest of the first download is recorded and
required from then on. A cached file is used if the server confirms its size and ETag or, with a warning, if no server
answers. So a file that changes at its address fails its model, and nothing else.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.download.cache import DownloadCache
from birkhoff.pipeline.download.file import Fetcher, cached_file, local_file, pinned, remote_size
from birkhoff.pipeline.download.http import FetchSettings, Report
from birkhoff.pipeline.download.merge import merge
from birkhoff.pipeline.download.sharded_index import beside, shard_parts
from birkhoff.pipeline.download.spec import SourcePart, is_remote, scheme_of, shown_url
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import first_line

__all__ = ["FetchSettings", "NotDownloaded", "Report", "mirror_folder", "peek", "resolve"]

_Find = Callable[[SourcePart], Path | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotDownloaded:
    """A source with `missing` files that are not downloaded yet, one address for each."""

    missing: tuple[str, ...]
    nbytes: int | None
    """Bytes to download, according to the servers; None if one does not say."""
    problem: str = ""
    """The servers' answers, if none of them can deliver a file now."""

    def __str__(self) -> str:
        size = f"{self.nbytes} bytes" if self.nbytes is not None else "the server does not say how large"
        return f"{', '.join(map(shown_url, self.missing))}: not downloaded yet ({size}); `compress` will"


def resolve(
    source: Sequence[SourcePart],
    *,
    cache: Path,
    downloads: Path | None = None,
    mirror: Path | None = None,
    report: Report | None = None,
    settings: FetchSettings | None = None,
) -> Checkpoint:
    """Download the files of a source, check their digests, and describe them as one checkpoint.

    Args:
        source: The manifest's source, with absolute paths.
        cache: Folder for checkpoints that must be rewritten once; see `open_checkpoint`.
        downloads: The download cache. Default: `downloads` in the birkhoff home.
        mirror: See `mirror_folder`.
        report: Called for every chunk that arrives.
        settings: Time-outs and attempts.

    Raises:
        UnsafeSourceError: A pickle would run code.
        SourceError: A file cannot be fetched, has another digest, has changed since it was first seen, or is not a
            checkpoint; a glob matches nothing, or two files have the same tensor name.
    """
    store = DownloadCache.at(downloads)
    here = partial(local_file, cache=store, mirror=mirror_folder(mirror))
    fetcher = Fetcher(store, report, settings or FetchSettings())
    with _disk_errors(store):
        paths, _ = _gather(source, here, fetcher.obtain, store)  # a file that cannot be fetched is an error there
        return _open(source, paths, cache, store)


def peek(
    source: Sequence[SourcePart],
    *,
    cache: Path,
    downloads: Path | None = None,
    mirror: Path | None = None,
    settings: FetchSettings | None = None,
) -> Checkpoint | NotDownloaded:
    """Return what `resolve` returns if the files are here; else what to download, after asking for sizes.

    Asks no server about local files, and hashes them only if their times have changed. Raises what `resolve` raises,
    except for a server that does not answer.
    """
    store = DownloadCache.at(downloads)
    here = partial(local_file, cache=store, mirror=mirror_folder(mirror), check=False)
    with _disk_errors(store):
        paths, missing = _gather(source, here, partial(cached_file, cache=store), store)
        if missing:
            return _not_downloaded(missing, settings or FetchSettings())
        return _open(source, paths, cache, store)


def mirror_folder(option: Path | None) -> Path | None:
    """Return the mirror: `option`, else BIRKHOFF_MIRROR, else None. Raises SourceError if it is not a folder."""
    given = option or os.environ.get("BIRKHOFF_MIRROR")
    if not given:
        return None
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise SourceError(f"mirror {folder}: expected a folder of checkpoints; correct --mirror or BIRKHOFF_MIRROR")
    return folder


def _gather(
    source: Sequence[SourcePart], here: _Find, there: _Find, store: DownloadCache
) -> tuple[list[Path], list[SourcePart]]:
    """Return the files of a source, by `here` or else by `there`, with their shards; and the parts that neither has."""
    paths, missing = [], []
    for part in source:
        path = here(part)
        if path is None and (path := there(part)):
            parts = shard_parts(pinned(part, store), path)
            shards = {name: found for name, shard in parts.items() if (found := here(shard) or there(shard))}
            missing += [shard for name, shard in parts.items() if name not in shards]
            if any(shard.parent != path.parent for shard in shards.values()):
                path = beside(path, shards, store.folder / "sharded")
        if path is None:
            missing.append(part)
        else:
            paths.append(path)
    return paths, missing


def _open(source: Sequence[SourcePart], paths: Sequence[Path], cache: Path, downloads: DownloadCache) -> Checkpoint:
    opened = [
        (part, open_checkpoint(path, cache=cache, under=part.under)) for part, path in zip(source, paths, strict=True)
    ]
    merged = merge(opened, downloads.folder / "merged")
    return replace(merged, origin=tuple(filter(None, (_origin(part, downloads) for part in source))))


def _origin(part: SourcePart, store: DownloadCache) -> str | None:
    """Return a part's hub address at its commit; None if it is not from the hub."""
    for url, at in zip(part.urls, pinned(part, store).urls, strict=True):
        seen = store.first_seen(url) if scheme_of(url) == "hf" else None
        if seen is not None and seen.commit is not None:
            return at
    return None


def _not_downloaded(parts: Sequence[SourcePart], settings: FetchSettings) -> NotDownloaded:
    """Ask the servers for the sizes of missing files."""
    missing = tuple(next(filter(is_remote, part.urls)) for part in parts)
    try:
        sizes = [remote_size(part, settings) for part in parts]
    except SourceError as error:
        return NotDownloaded(missing=missing, nbytes=None, problem=str(error))
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return NotDownloaded(missing=missing, nbytes=None)
    return NotDownloaded(missing=missing, nbytes=sum(known))


@contextmanager
def _disk_errors(cache: DownloadCache) -> Iterator[None]:
    """Convert disk errors in the cache to source errors."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{error.filename or cache.folder}: {first_line(error)}; "
            "check its permissions, or point BIRKHOFF_HOME at a disk with room"
        ) from error
