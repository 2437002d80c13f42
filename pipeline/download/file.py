"""One file of a source: found on this machine, or downloaded, with its digest checked either way."""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from birkhoff.pipeline.checkpoint.sniff import sniff
from birkhoff.pipeline.download.cache import DownloadCache, FirstSeen, Partial, Remote, stands
from birkhoff.pipeline.download.http import FetchSettings, HttpTransport, Report
from birkhoff.pipeline.download.spec import (
    SourcePart,
    file_name,
    hub_place,
    is_remote,
    package_place,
    scheme_of,
    shown_url,
)
from birkhoff.pipeline.errors import SourceError, SourceGoneError
from birkhoff.pipeline.families import HUB_FILES
from birkhoff.pipeline.files import file_sha256
from birkhoff.pipeline.store.base import BUCKETS

if TYPE_CHECKING:
    from birkhoff.pipeline.download.hub import HubTransport

log: logging.Logger = logging.getLogger("birkhoff.fetch")

_ASK_SECONDS = 5.0
_REMEDY = "put the file into a folder and name that with --mirror or BIRKHOFF_MIRROR, or run the same command again"


def local_file(part: SourcePart, cache: DownloadCache, mirror: Path | None, *, check: bool = True) -> Path | None:
    """Return the file at one of the paths, else in the mirror; None if only servers have it.

    Raises SourceError if its digest is not the expected one (with `check`), OSError if it cannot be read.
    """
    paths = [path for url in part.urls if not is_remote(url) and (path := _local(url))]
    if found := next((path for path in paths if path.exists()), None):
        expected = []
    elif found := mirrored(part, mirror):
        expected = [
            (seen.sha256, f"first seen at {seen.url} on {seen.time}") for _, seen in _first_seen_records(part, cache)
        ]
    else:
        # Only paths, and none exists: opening the first gives the best error.
        local = [url for url in part.urls if not is_remote(url)]
        if len(local) < len(part.urls):
            return None
        return paths[0] if paths else on_this_machine(local[0])
    if part.sha256 is not None:
        expected = [(part.sha256, "as the manifest says")]
    for digest, origin in expected if check else ():
        if (got := cache.digest(found)) != digest:
            raise SourceError(
                f"{found}: has sha256 {got}, expected {digest}, {origin}; replace the file or correct that"
            )
    return found


def _local(url: str) -> Path | None:
    """Return the local file of a path or a package; None for a package that is not installed or lacks the file."""
    if scheme_of(url) == "path":
        return Path(url)
    name, wanted = package_place(url)
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        return None
    # only files that the package itself lists, not the rest of the environment
    return next((Path(str(file.locate())) for file in files if file.as_posix() == wanted), None)


def cached_file(part: SourcePart, cache: DownloadCache) -> Path | None:
    """Return the cached copy of any of the addresses, without asking a server. Raises SourceError, OSError."""
    return next((path for url, seen in _first_seen_records(part, cache) if (path := _copy(url, seen, cache))), None)


def pinned(part: SourcePart, cache: DownloadCache) -> SourcePart:
    """Return the part with every hub address at the commit it led to first. Raises SourceError."""
    seen = {url: cache.first_seen(url) for url in part.urls if scheme_of(url) == "hf"}
    at = {url: hub_place(url).at(found.commit).url for url, found in seen.items() if found and found.commit}
    return part.model_copy(update={"urls": tuple(at.get(url, url) for url in part.urls)})


def _copy(url: str, seen: FirstSeen, cache: DownloadCache) -> Path | None:
    """Return the file of an address in the cache or the hub's; None if neither has it unchanged."""
    if seen.commit is None:
        return cache.copy(seen)
    from birkhoff.pipeline.download.hub import cached  # the library takes 0.3 s

    path = cached(url, seen.commit)
    return path if path is not None and stands(path, seen) else None


def remote_size(part: SourcePart, settings: FetchSettings) -> int | None:
    """Return the size of a download in bytes, from the first server that answers. Raises SourceError if none does."""
    problems = []
    for url in filter(is_remote, part.urls):
        try:
            return look(url, part, settings).size
        except SourceError as error:
            problems.append(str(error))
    raise SourceError("; ".join(problems))


def look(url: str, part: SourcePart, settings: FetchSettings) -> Remote:
    """Return a server's description of one address of `part`. Raises SourceError, or SourceGoneError for no such
    file."""
    if scheme_of(url) == "hf":
        return _hub(part).look(url)
    with closing(_transport(url, part, settings)) as transport:
        return transport.look(url)


def mirrored(part: SourcePart, mirror: Path | None) -> Path | None:
    """Return the file in the mirror, by the name of any of its addresses; None if it is not there."""
    if mirror is None:
        return None
    names = dict.fromkeys(file_name(url) for url in part.urls if is_remote(url))
    return next((path for name in names if (path := mirror / name).is_file()), None)


def on_this_machine(url: str) -> Path:
    """Return the file at a path or in an installed package. Raises SourceGoneError if there is none."""
    path = _local(url)
    if path is None:
        name, inside = package_place(url)
        raise SourceGoneError(f"{url}: package {name} with {inside} is not installed here: pip install {name}")
    if not path.exists():
        raise SourceGoneError(f"{path}: no such file; check the path")
    return path


class Fetcher:
    """Downloads files into a cache. Threads may share it if they may share `report`."""

    def __init__(self, cache: DownloadCache, report: Report | None, settings: FetchSettings) -> None:
        self._cache, self._report, self._settings = cache, report, settings
        # For questions whose answer is only worth a warning, so that a silent network does not delay them.
        self._hurried = replace(
            settings,
            connect_timeout=min(settings.connect_timeout, _ASK_SECONDS),
            read_timeout=min(settings.read_timeout, _ASK_SECONDS),
            attempts=1,
        )

    def obtain(self, part: SourcePart) -> Path:
        """Return the file of `part`, from the cache or the first address that has it. Raises SourceError, OSError."""
        known = dict(_first_seen_records(part, self._cache))
        for url, seen in known.items():
            path = _copy(url, seen, self._cache)
            if path is not None and (part.sha256 is not None or self._stands(url, seen, part)):
                return path
        if part.sha256 is not None and (path := self._cache.holding(part.sha256)):
            url = next(filter(is_remote, part.urls))
            return self._cache.adopt(url, path, sha256=part.sha256, name=part.name, remote=Remote(), link=True)
        return self._download_from_any(part, known)

    def _stands(self, url: str, seen: FirstSeen, part: SourcePart) -> bool:
        """Return whether the server still has the first-seen file, by size and ETag; if not, the digest decides.

        Raises SourceError for a file of another size, or a hub file that differs at its commit.
        """
        if scheme_of(url) == "hf" and hub_place(url).revision == seen.commit:
            return True
        try:
            now = look(url, part, self._hurried)
        except SourceError as error:
            log.warning("%s; using the copy of %s", error, seen.time)
            return True
        if now.size not in (None, seen.size):
            raise self._changed(url, seen, f"it had {seen.size} bytes and has {now.size}")
        if seen.commit is not None and now.etag != seen.etag:
            raise self._changed(
                url, seen, f"it was that of commit {seen.commit}, and is another since {now.commit}: name one of them"
            )
        return None in (now.etag, seen.etag) or now.etag == seen.etag

    def _download_from_any(self, part: SourcePart, known: dict[str, FirstSeen]) -> Path:
        problems: list[str] = []
        for url in filter(is_remote, part.urls):
            if problems:
                log.warning("%s; trying %s", problems[-1], shown_url(url))
            try:
                return self._download(url, part, known)
            except SourceError as error:
                problems.append(str(error))
        raise SourceError(f"{part.name}: cannot be fetched: {'; '.join(problems)}; {_REMEDY}")

    def _download(self, url: str, part: SourcePart, known: dict[str, FirstSeen]) -> Path:
        """Download from one address, check, and cache the file, unless it was cached after `known` was read."""
        with self._cache.lock(url):
            if dict(_first_seen_records(part, self._cache)) != known and (path := cached_file(part, self._cache)):
                return path  # another process was faster
            if scheme_of(url) == "hf":
                return self._from_hub(url, part)
            partial = self._cache.partial(url)
            with closing(_transport(url, part, self._settings)) as transport:
                remote = transport.download(url, partial, self._report)
            try:
                digest = self._checked(url, part, partial.path)
            except SourceError:
                partial.discard()
                raise
            path = self._cache.adopt(url, partial.path, sha256=digest, name=part.name, remote=remote)
            partial.discard()
            return path

    def _from_hub(self, url: str, part: SourcePart) -> Path:
        """Download one file into the hub's cache, with the files beside a whole one, check it, and record its
        commit."""
        hub, place = _hub(part), hub_place(url)
        seen = dict(_first_seen_records(part, self._cache)).get(url)
        if seen is not None and seen.commit is not None:
            place = place.at(seen.commit)  # the file is at this commit, but left the hub's cache
        path, remote = hub.fetch(place.url, self._report)
        digest = self._checked(url, part, path)
        if part.whole and remote.commit is not None:
            hub.companions(place.at(remote.commit).url, HUB_FILES)
        self._cache.note(url, path, sha256=digest, name=part.name, remote=remote)
        return path

    def _checked(self, url: str, part: SourcePart, path: Path) -> str:
        """Return the digest of a complete download. Raises SourceError if it is unexpected, or not a checkpoint."""
        digest = file_sha256(path)
        if part.sha256 not in (None, digest):
            raise SourceError(
                f"{shown_url(url)}: has sha256 {digest}, expected {part.sha256} as the manifest says; "
                "find out which is right"
            )
        for seen_url, seen in _first_seen_records(part, self._cache):
            if seen.sha256 != digest:
                raise self._changed(seen_url, seen, f"it had sha256 {seen.sha256} and {shown_url(url)} has {digest}")
        try:
            sniff(path)
        except SourceError as error:
            raise type(error)(str(error).replace(str(path), shown_url(url))) from error
        return digest

    def _changed(self, url: str, seen: FirstSeen, how: str) -> SourceError:
        return SourceError(
            f"{seen.url}: has changed since it was first seen on {seen.time}: {how}; to accept what is there now give "
            f"its `sha256` in the manifest, or delete {self._cache.first_seen_file(url)}"
        )


class _Transport(Protocol):
    def look(self, url: str) -> Remote: ...
    def download(self, url: str, partial: Partial, report: Report | None) -> Remote: ...
    def close(self) -> None: ...


def _hub(part: SourcePart) -> "HubTransport":
    from birkhoff.pipeline.download.hub import HubTransport

    return HubTransport(allow_http=part.allow_http)


def _transport(url: str, part: SourcePart, settings: FetchSettings) -> _Transport:
    if scheme_of(url) not in BUCKETS:
        return HttpTransport(settings, allow_http=part.allow_http)
    from birkhoff.pipeline.download.bucket import BucketTransport

    return BucketTransport(settings, allow_http=part.allow_http)


def _first_seen_records(part: SourcePart, cache: DownloadCache) -> Iterator[tuple[str, FirstSeen]]:
    """Yield first-seen records by address, except those that contradict the manifest's digest."""
    for url in filter(is_remote, part.urls):
        seen = cache.first_seen(url)
        if seen is not None and part.sha256 in (None, seen.sha256):
            yield url, seen
