"""One file of a source: found on this machine, or downloaded, with its digest checked either way."""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.fetch_cache import DownloadCache, Partial, Remote, Sight
from birkhoff.pipeline.fetch_http import FetchSettings, HttpTransport, Report
from birkhoff.pipeline.fetch_spec import SourcePart, file_name, is_remote, scheme_of, shown_url
from birkhoff.pipeline.files import file_sha256
from birkhoff.pipeline.source_content import sniff

log = logging.getLogger("birkhoff.fetch")

_ASK_SECONDS = 5.0
_REMEDY = "put the file into a folder and name that with --mirror or BIRKHOFF_MIRROR, or run the same command again"


def local_file(part: SourcePart, cache: DownloadCache, mirror: Path | None, *, check: bool = True) -> Path | None:
    """The file at one of the paths, else in the mirror; None if it is only to be had from servers.

    Raises SourceError if its digest is not the expected one (with `check`), OSError if it cannot be read.
    """
    paths = [Path(url) for url in part.urls if not is_remote(url)]
    if found := next((path for path in paths if path.exists()), None):
        expected = []
    elif found := _mirrored(part, mirror):
        expected = [(seen.sha256, f"first seen at {seen.url} on {seen.time}") for _, seen in _sights(part, cache)]
    else:
        # Paths alone, none of them there: whoever opens the first says so best.
        return paths[0] if len(paths) == len(part.urls) else None
    if part.sha256 is not None:
        expected = [(part.sha256, "as the manifest says")]
    for digest, origin in expected if check else ():
        if (got := cache.digest(found)) != digest:
            raise SourceError(
                f"{found}: has sha256 {got}, expected {digest}, {origin}; replace the file or correct that"
            )
    return found


def cached_file(part: SourcePart, cache: DownloadCache) -> Path | None:
    """The cached copy of any of the addresses; no server is asked. Raises SourceError, OSError."""
    return next((path for _, seen in _sights(part, cache) if (path := cache.copy(seen))), None)


def remote_size(part: SourcePart, settings: FetchSettings) -> int | None:
    """Bytes that a download would bring, from the first server that answers. Raises SourceError if none does."""
    problems = []
    for url in filter(is_remote, part.urls):
        try:
            return _look(url, part, settings).size
        except SourceError as error:
            problems.append(str(error))
    raise SourceError("; ".join(problems))


class Fetcher:
    """Downloads files into a cache. May be shared by threads if `report` may."""

    def __init__(self, cache: DownloadCache, report: Report | None, settings: FetchSettings) -> None:
        self._cache, self._report, self._settings = cache, report, settings
        # For questions that a silent network must not hold up: the answer is no more than a warning.
        self._hurried = replace(
            settings,
            connect_timeout=min(settings.connect_timeout, _ASK_SECONDS),
            read_timeout=min(settings.read_timeout, _ASK_SECONDS),
            attempts=1,
        )

    def obtain(self, part: SourcePart) -> Path:
        """The file of `part`, from the cache or from the first address that has it. Raises SourceError, OSError."""
        known = dict(_sights(part, self._cache))
        for url, seen in known.items():
            path = self._cache.copy(seen)
            if path is not None and (part.sha256 is not None or self._stands(url, seen, part)):
                return path
        if part.sha256 is not None and (path := self._cache.holding(part.sha256)):
            url = next(filter(is_remote, part.urls))
            return self._cache.adopt(url, path, sha256=part.sha256, name=part.name, remote=Remote(), link=True)
        return self._download_from_any(part, known)

    def _stands(self, url: str, seen: Sight, part: SourcePart) -> bool:
        """Whether the server still has what was seen first, by its size and ETag; if not, the digest decides.

        Raises SourceError for a file of another size.
        """
        try:
            now = _look(url, part, self._hurried)
        except SourceError as error:
            log.warning("%s; using the copy of %s", error, seen.time)
            return True
        if now.size not in (None, seen.size):
            raise self._changed(url, seen, f"it had {seen.size} bytes and has {now.size}")
        return None in (now.etag, seen.etag) or now.etag == seen.etag

    def _download_from_any(self, part: SourcePart, known: dict[str, Sight]) -> Path:
        problems: list[str] = []
        for url in filter(is_remote, part.urls):
            if problems:
                log.warning("%s; trying %s", problems[-1], shown_url(url))
            try:
                return self._download(url, part, known)
            except SourceError as error:
                problems.append(str(error))
        raise SourceError(f"{part.name}: cannot be fetched: {'; '.join(problems)}; {_REMEDY}")

    def _download(self, url: str, part: SourcePart, known: dict[str, Sight]) -> Path:
        """Download from one address, check, and put the file into the cache, unless it came there after `known`."""
        with self._cache.lock(url):
            if dict(_sights(part, self._cache)) != known and (path := cached_file(part, self._cache)):
                return path  # someone else was faster
            partial = self._cache.partial(url)
            with closing(_transport(url, part, self._settings)) as transport:
                remote = transport.download(url, partial, self._report)
            try:
                digest = self._checked(url, part, partial)
            except SourceError:
                partial.discard()
                raise
            path = self._cache.adopt(url, partial.path, sha256=digest, name=part.name, remote=remote)
            partial.discard()
            return path

    def _checked(self, url: str, part: SourcePart, partial: Partial) -> str:
        """Digest of a complete download. Raises SourceError if it is not the expected one, or no checkpoint at all."""
        digest = file_sha256(partial.path)
        if part.sha256 not in (None, digest):
            raise SourceError(
                f"{shown_url(url)}: has sha256 {digest}, expected {part.sha256} as the manifest says; "
                "find out which is right"
            )
        for seen_url, seen in _sights(part, self._cache):
            if seen.sha256 != digest:
                raise self._changed(seen_url, seen, f"it had sha256 {seen.sha256} and {shown_url(url)} has {digest}")
        try:
            sniff(partial.path)
        except SourceError as error:
            raise type(error)(str(error).replace(str(partial.path), shown_url(url))) from error
        return digest

    def _changed(self, url: str, seen: Sight, how: str) -> SourceError:
        return SourceError(
            f"{seen.url}: has changed since it was first seen on {seen.time}: {how}; to accept what is there now give "
            f"its `sha256` in the manifest, or delete {self._cache.sight_file(url)}"
        )


class _Transport(Protocol):
    def look(self, url: str) -> Remote: ...
    def download(self, url: str, partial: Partial, report: Report | None) -> Remote: ...
    def close(self) -> None: ...


def _transport(url: str, part: SourcePart, settings: FetchSettings) -> _Transport:
    if scheme_of(url) != "s3":
        return HttpTransport(settings, allow_http=part.allow_http)
    from birkhoff.pipeline.fetch_s3 import S3Transport  # botocore takes 0.2 s

    return S3Transport(settings, allow_http=part.allow_http)


def _look(url: str, part: SourcePart, settings: FetchSettings) -> Remote:
    with closing(_transport(url, part, settings)) as transport:
        return transport.look(url)


def _mirrored(part: SourcePart, mirror: Path | None) -> Path | None:
    if mirror is None:
        return None
    names = dict.fromkeys(file_name(url) for url in part.urls if is_remote(url))
    return next((path for name in names if (path := mirror / name).is_file()), None)


def _sights(part: SourcePart, cache: DownloadCache) -> Iterator[tuple[str, Sight]]:
    """Addresses that were seen before and what was seen, except what contradicts the digest of the manifest."""
    for url in filter(is_remote, part.urls):
        seen = cache.sight(url)
        if seen is not None and part.sha256 in (None, seen.sha256):
            yield url, seen
