"""Downloads over http(s): resumed after a break, retried after transient errors, with a minimum throughput.

Resuming follows RFC 9110: `Range` with `If-Range`, so that a file that has changed meanwhile is sent whole. Proxies, CA
bundles and ~/.netrc are those of the environment, as `requests` reads them.
"""

import http.client
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, NoReturn
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import DecodeError, HeaderParsingError, HTTPError, InvalidChunkLength, LocationParseError

import birkhoff
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.backoff import FIRST_SECONDS, Backoff, retry_after
from birkhoff.pipeline.download.cache import Partial, Remote, check_space
from birkhoff.pipeline.download.spec import check_plain_http, file_name, scheme_of, shown_url
from birkhoff.pipeline.errors import SourceError, SourceGoneError
from birkhoff.pipeline.store.least_speed import pace_session
from birkhoff.pipeline.text import first_line

Report = Callable[[str, int, int | None], None]
"""Receives progress: file name, bytes that arrived, total bytes if known. Called in the calling thread."""

_CHUNK_BYTES = 1 << 18
_MAX_REDIRECTS = 10
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429, 500, 502, 503, 504}
# Answers of servers without HEAD, and of signed addresses, whose signature covers the method.
_NO_HEAD = {400, 403, 405, 501}
_GONE = {404, 410}
_CODINGS = {"br", "compress", "deflate", "gzip", "x-gzip", "zstd"}
_QUOTING = (http.client.HTTPException, DecodeError, HeaderParsingError, InvalidChunkLength, LocationParseError)
"""Errors whose text repeats what the server sent, possibly the signed address. Those of the operating system
(`RemoteDisconnected` is one too) have texts of their own."""

# An attempt that brings this much does not count as failed.
_WORTH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """Patience of a download, with times in seconds.

    connect_timeout: For the connection and its TLS handshake.
    read_timeout: Between two bytes; a period of this length with too few bytes counts as a break (`least_speed`).
    attempts: Tries in a row without progress, in all.
    backoff: Longest wait before the second try; see `pipeline.backoff`.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    attempts: int = 5
    backoff: float = FIRST_SECONDS


class TransientError(Exception):
    """A failure worth retrying; `wait` is the server's request, in seconds."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


class HttpTransport:
    """Reads http(s) addresses. Threads must not share it."""

    def __init__(self, settings: FetchSettings, *, allow_http: bool = False) -> None:
        self._settings = settings
        self._allow_http = allow_http
        self._session = requests.Session()
        pace_session(self._session, settings.read_timeout)
        # Encoded bytes have another length, digest and ETag than the file.
        self._session.headers.update(
            {"Accept-Encoding": "identity", "User-Agent": f"birkhoff-compression/{birkhoff.__version__}"}
        )

    def close(self) -> None:
        """Release connections."""
        self._session.close()

    def look(self, url: str) -> Remote:
        """Return the server's description of the file, asked once. Raises SourceError."""
        try:
            with closing(self._answer("HEAD", url, {})) as response:
                if response.status_code == 200:
                    return _remote(response)
                if response.status_code not in _NO_HEAD:
                    _refuse(url, response)
            with closing(self._answer("GET", url, {})) as response:
                if response.status_code != 200:
                    _refuse(url, response)
                return _remote(response)
        except TransientError as error:
            raise SourceError(str(error)) from error

    def download(self, url: str, partial: Partial, report: Report | None) -> Remote:
        """Complete `partial`; return the file's description. Raises SourceError, OSError."""
        backoff, best = Backoff(self._settings.attempts, first=self._settings.backoff), partial.done
        while True:
            try:
                return self._continue(url, partial, report)
            except TransientError as error:
                if partial.done >= best + _WORTH_BYTES:
                    backoff.reset()
                best = max(best, partial.done)
                if not backoff.again(error.wait):
                    raise SourceError(f"{error} ({backoff.failures} attempts)") from error

    def _continue(self, url: str, partial: Partial, report: Report | None) -> Remote:
        """Make one attempt, which continues the last one if the file is still the same."""
        begun, start = partial.remote(), partial.done
        if begun is not None and start == begun.size:
            return begun
        headers = {}
        if begun is not None and begun.validator is not None and start:
            headers = {"Range": f"bytes={start}-", "If-Range": begun.validator}
        with closing(self._answer("GET", url, headers)) as response:
            remote = _begin_or_continue(url, response, partial, begun if headers else None)
            with partial.path.open("ab") as file:
                self._pour(url, response, file, remote, report)
        if remote.size is not None and partial.done != remote.size:
            raise TransientError(f"{shown_url(url)}: broke off after {partial.done} of {remote.size} bytes")
        return remote

    def _pour(
        self, url: str, response: requests.Response, file: BinaryIO, remote: Remote, report: Report | None
    ) -> None:
        """Append the body to `file`."""
        name, done = file_name(url), file.tell()
        try:
            # read1 returns what has arrived, so bytes before a break are kept.
            while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
                interrupt.check()
                file.write(chunk)
                done += len(chunk)
                if report is not None:
                    report(name, done, remote.size)
        except HTTPError as error:
            size = "?" if remote.size is None else remote.size
            raise TransientError(
                f"{shown_url(url)}: broke off after {done} of {size} bytes ({_reason(error)})"
            ) from error

    def _answer(self, method: str, url: str, headers: dict[str, str]) -> requests.Response:
        """Return the answer after all redirects, with its body unread. Raises SourceError, TransientError."""
        here = url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(method, here, headers)
            target = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or target is None:
                return response
            response.close()
            here = self._redirected(here, target)
        raise SourceError(f"{shown_url(url)}: more than {_MAX_REDIRECTS} redirects; check the address")

    def _request(self, method: str, url: str, headers: dict[str, str]) -> requests.Response:
        try:
            return self._session.request(
                method,
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(self._settings.connect_timeout, self._settings.read_timeout),
            )
        except requests.exceptions.SSLError as error:
            remedy = "check the address, the clock and the CA bundle (REQUESTS_CA_BUNDLE)"
            raise SourceError(f"{shown_url(url)}: TLS failed ({_reason(error)}); {remedy}") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise TransientError(
                f"{shown_url(url)}: no answer ({_reason(error)}); check the address and the network"
            ) from error
        except (OSError, HTTPError, ValueError) as error:  # OSError: a missing CA bundle
            raise SourceError(f"{shown_url(url)}: cannot be asked for ({_reason(error)}); check the address") from error

    def _redirected(self, here: str, target: str) -> str:
        """Return the target of a redirect, if it may be followed."""
        there = urljoin(here, target)
        try:
            if scheme_of(there) not in ("http", "https"):
                raise ValueError(f"redirected to {there.partition(':')[0]!r}, expected http or https")
            if scheme_of(here) == "https" and scheme_of(there) == "http":
                raise ValueError(f"redirected from https to plain http at {urlsplit(there).hostname}")
            if "@" in urlsplit(there).netloc:
                raise ValueError("redirected to a URL with credentials in it")
            check_plain_http(there, allowed=self._allow_http)
        except ValueError as error:
            raise SourceError(f"{shown_url(here)}: {error}; name the final address in the manifest") from None
        return there


def _remote(response: requests.Response) -> Remote:
    """Return the description in the headers of a complete answer."""
    length = response.headers.get("Content-Length", "")
    return Remote(
        size=int(length) if length.isdecimal() else None,
        etag=response.headers.get("ETag"),
        modified=response.headers.get("Last-Modified"),
    )


def _begin_or_continue(url: str, response: requests.Response, partial: Partial, begun: Remote | None) -> Remote:
    """Prepare `partial` for the body of an answer; `begun` is the file whose rest was requested, if any.

    Raises SourceError, TransientError.
    """
    _check_plain(url, response)
    if begun is not None and response.status_code == 206:
        _check_continues(url, response, partial, begun)
        if begun.size is not None:
            check_space(partial.path.parent, begun.size - partial.done, partial.url)
        return begun
    if response.status_code == 416:
        partial.discard()
        raise TransientError(f"{shown_url(url)}: has become shorter while it was being downloaded")
    if response.status_code != 200:
        _refuse(url, response)
    remote = _remote(response)
    _check_bounded(url, response, remote)
    partial.begin(remote)
    return remote


def _check_plain(url: str, response: requests.Response) -> None:
    """Refuse an encoded body."""
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if response.ok and encoding != "identity":
        how = f" as {encoding}" if encoding in _CODINGS else ""
        raise SourceError(f"{shown_url(url)}: comes encoded{how}, asked for plain; use another address")


def _check_bounded(url: str, response: requests.Response, remote: Remote) -> None:
    """Refuse a body whose end looks the same as a broken connection."""
    if remote.size is None and response.headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise SourceError(f"{shown_url(url)}: the server does not say how long the file is; use another address")


def _check_continues(url: str, response: requests.Response, partial: Partial, begun: Remote) -> None:
    """Check that a 206 is the rest of the file that was begun."""
    expected = f"bytes {partial.done}-"
    span, _, total = response.headers.get("Content-Range", "").partition("/")
    etag = response.headers.get("ETag", begun.etag)
    sizes = {str(begun.size), "*"} if begun.size is not None else {total}
    if not span.startswith(expected) or total not in sizes or etag != begun.etag:
        partial.discard()
        raise TransientError(f"{shown_url(url)}: has changed while it was being downloaded")


def _refuse(url: str, response: requests.Response) -> NoReturn:
    """Raise the error for an answer without a file."""
    # not the server's own phrase, which may repeat the signed address
    text = f"{shown_url(url)}: {response.status_code} {http.client.responses.get(response.status_code, '')}".rstrip()
    if response.status_code in _PASSING:
        raise TransientError(text, retry_after(response.headers.get("Retry-After")))
    raise (SourceGoneError if response.status_code in _GONE else SourceError)(text)


def _reason(error: BaseException) -> str:
    """Describe the innermost cause of a library's error in a few words; the outer ones repeat the URL with its
    query."""
    seen: list[BaseException] = [error]
    while (inner := _inner(seen[-1])) is not None and inner not in seen:
        seen.append(inner)
    last = seen[-1]
    return type(last).__name__ if isinstance(last, _QUOTING) and not isinstance(last, OSError) else first_line(last)


def _inner(error: BaseException) -> BaseException | None:
    """Return the error inside a library's error: urllib3 and requests keep it in an attribute, as the cause or an
    argument."""
    for inner in (getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            return inner
    return next((item for item in reversed(error.args) if isinstance(item, BaseException)), None)
