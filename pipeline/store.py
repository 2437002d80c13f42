"""The object store: one small contract, addresses that travel to workers, and a probe of what a store can do.

Three stores keep the contract: a directory (`store_directory`), any S3 service (`store_s3`), and the S3 server
this package starts by itself (`embedded`). `open_store` picks one by URL:

    s3://BUCKET[/PREFIX]     credentials and endpoint from the standard AWS chain, never from the URL
    file:///DIR, file://./D  plain files; `%20` and the like are decoded, as in every file URL
    embedded[:///HOME]       SeaweedFS on loopback, started when needed; its data live under HOME/embedded

The contract in short; `Store` has the details:

* An object appears whole or not at all, and is durable when the call that wrote it returns.
* Every method may be called twice. A conditional write that finds its own body there has succeeded: its first
  answer may have been lost on the way.
* The store retries what may pass by itself (time-outs, 5xx, throttling) up to `StoreSettings.attempts` times, so
  callers need no retry loop of their own. `StoreUnreachableError` after that leaves open whether a write took
  effect; call again to find out. Every other `StoreError` is permanent: the same call will fail the same way.
* A store may be shared by threads. It is neither picklable nor usable after `fork`: send `Store.address`.
"""

import contextlib
import ipaddress
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from birkhoff.pipeline.errors import (
    ObjectNotFoundError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.home import birkhoff_home
from birkhoff.pipeline.store_keys import check_key

Addressing = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]

_NUMBERS = {
    "connect_timeout": (int, float),
    "read_timeout": (int, float),
    "attempts": (int,),
    "max_connections": (int,),
    "page_size": (int,),
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a store knows about an object without reading it.

    `size` is in bytes, `modified` an aware UTC time. `tag` is opaque and names this very state of the object:
    hand it to `Store.replace` in the same store; it says nothing about the body elsewhere or later.
    """

    key: str
    size: int
    tag: str
    modified: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to talk to an S3 service; a directory needs none of it. Holds no secrets. Raises StoreError.

    endpoint: URL of the service. None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile; AWS without those.
    region: signing region. None: AWS_REGION or the profile; `us-east-1` without those.
    addressing: bucket in the path or in the host name; `auto` is `path` for every endpoint but AWS's own.
    checksums: `when_required` leaves out the CRC32 that boto3 sends since 1.36, for stores that reject it. None:
        AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION; `when_supported` without those.
    anonymous: send unsigned requests, for public buckets.
    allow_http: talk to another machine without encryption too.
    connect_timeout, read_timeout: seconds, each counted anew for every attempt.
    attempts: tries per request in all, with exponential back-off between them.
    max_connections: size of the connection pool of one client.
    page_size: objects per listing request, at most 1000.
    """

    endpoint: str | None = None
    region: str | None = None
    addressing: Addressing = "auto"
    checksums: Checksums | None = None
    anonymous: bool = False
    allow_http: bool = False
    connect_timeout: float = 5.0
    read_timeout: float = 60.0
    attempts: int = 4
    max_connections: int = 16
    page_size: int = 1000

    def __post_init__(self) -> None:
        if self.addressing not in get_args(Addressing):
            raise StoreError(_refusal("addressing", get_args(Addressing), self.addressing))
        if self.checksums not in (None, *get_args(Checksums)):
            raise StoreError(_refusal("checksums", get_args(Checksums), self.checksums))
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) not in kind or not 0 < value < 1e6:
                expected = "seconds above 0" if float in kind else "a whole number above 0"
                raise StoreError(_refusal(name, expected, value))
        if self.endpoint is not None:
            check_endpoint(self.endpoint)


class Store(ABC):
    """Objects under keys. The module's docstring has the contract that all methods share.

    Keys are relative POSIX paths; `store_keys.check_key` refuses the rest with StoreError. A key must not also be
    the folder of another key (`a` and `a/b`): file systems cannot hold both. Beside the errors named below every
    method raises StoreUnreachableError, StoreDeniedError and, for what is neither (no such bucket, disk full),
    StoreError; one that reads a body raises IntegrityError where the service's own checksum contradicts it.
    """

    def __init__(self, address: "StoreAddress") -> None:
        self.address = address

    @property
    def url(self) -> str:
        """Canonical URL, without credentials."""
        return self.address.url

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `start` to `start + length` of an object, fewer where it ends before. Raises ObjectNotFoundError."""

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """Hand `get`'s bytes to `sink` in order, in pieces no larger than `buffer`, through which they may go.

        Returns how many there were. A piece is valid during its call only. Raises ObjectNotFoundError.
        """
        body = memoryview(self.get(key, start=start, length=length))
        for place in range(0, len(body), len(buffer)):
            sink(body[place : place + len(buffer)])
        return len(body)

    @abstractmethod
    def read(self, key: str) -> tuple[bytes, str]:
        """Body and tag of one and the same state of an object. Raises ObjectNotFoundError."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> str:
        """Write unconditionally; returns the new tag."""

    @abstractmethod
    def create(self, key: str, body: bytes) -> str:
        """Write unless another body is there; returns the tag.

        Of several writers with different bodies exactly one succeeds, where `StoreCapabilities.conditional_writes`
        holds. Writers with equal bodies all succeed: whoever uses this as a lock puts its own name in the body.
        Raises PreconditionError.
        """

    @abstractmethod
    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """Write if the object still has this tag (compare-and-swap); returns the new tag.

        Succeeds also if the object holds `body` already. Raises PreconditionError if it holds another one or is
        gone; where this write took effect, lost its answer and was overwritten since, that is the error too.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size, tag and time of an object. Raises ObjectNotFoundError."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with the string `prefix`, sorted by key.

        What others wrote under names that are no keys is left out. An object written or deleted meanwhile may or
        may not be among them. Errors come at the call or while iterating.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine."""

    @abstractmethod
    def close(self) -> None:
        """Release connections. May be called twice; nothing else may be called after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """All that a worker needs to open the same store: a canonical URL and settings, small and without secrets.

    Credentials do not travel: each process finds its own in the AWS chain, or, for the embedded server, in a file
    only its user can read.
    """

    url: str
    settings: StoreSettings = field(default_factory=StoreSettings)

    @classmethod
    def parse(cls, url: str, settings: StoreSettings | None = None) -> "StoreAddress":
        """Check a URL and make it canonical: absolute paths, no trailing slash. Raises StoreError."""
        scheme, _, rest = url.partition("://")
        if scheme == "s3":
            url = _canonical_s3(rest)
        elif scheme == "file":
            url = _file_path(rest).as_uri()
        elif scheme == "embedded":
            home = _file_path(rest) if rest else birkhoff_home()
            url = home.as_uri().replace("file://", "embedded://", 1)
        else:
            # The text is not repeated when it may hold a password.
            shown = "a URL with an @" if "@" in url else repr(url)
            raise StoreError(
                f"store URL: expected s3://BUCKET[/PREFIX], file:///DIR, file://./DIR or embedded, got {shown}"
            )
        return cls(url=url, settings=settings or StoreSettings())

    def open(self, *, start: bool = False) -> Store:
        """Open the store. Workers leave `start` off: only the driver starts and stops the embedded server."""
        scheme, _, rest = self.url.partition("://")
        # Imported here: botocore takes 0.2 s, and the implementations import this module.
        if scheme == "file":
            from birkhoff.pipeline.store_directory import DirectoryStore

            return DirectoryStore(self, Path(unquote(rest)))
        if scheme == "embedded":
            from birkhoff.pipeline.embedded import open_embedded

            return open_embedded(self, Path(unquote(rest)), start=start)
        from birkhoff.pipeline.store_s3 import open_s3

        bucket, _, prefix = rest.partition("/")
        return open_s3(self, bucket, prefix)


def store_folder(url: str) -> Path | None:
    """The folder of a canonical file:// URL; None for other stores."""
    scheme, _, rest = url.partition("://")
    return Path(unquote(rest)) if scheme == "file" else None


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the store at `url` (see the module's docstring), starting the embedded server if that is the one.

    Opens no connection to a remote store: `check_store` does. Raises StoreError, StoreDeniedError.
    """
    return StoreAddress.parse(url, settings).open(start=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCapabilities:
    """What `check_store` found out.

    conditional_writes: `create` and `replace` refuse as promised. Without it two publishers can overwrite each
    other: keep to one publisher and to keys that are written once.
    """

    conditional_writes: bool


def check_store(store: Store) -> StoreCapabilities:
    """Write, read back, overwrite and delete a small object under `probe/`, before any real work starts.

    Raises StoreDeniedError if one of these is not allowed, StoreUnreachableError if nothing answers, and StoreError
    if the store hands out anything but what was written last (a cache in front of it, say).
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        first = store.put(key, b"first")
        _expect(store, key, b"first")
        store.put(key, b"second")
        _expect(store, key, b"second")
        conditional = _refuses(store, key, None) and _refuses(store, key, first)
    except BaseException:
        with contextlib.suppress(StoreError):
            store.delete(key)
        raise
    store.delete(key)
    return StoreCapabilities(conditional_writes=conditional)


def _expect(store: Store, key: str, body: bytes) -> None:
    found = store.get(key)
    if found != body:
        raise StoreError(
            f"{store.url}: {key} was written as {body!r} and read back as {found[:32]!r}; "
            "point the endpoint at the store itself, not at a cache in front of it"
        )


def _refuses(store: Store, key: str, stale_tag: str | None) -> bool:
    """Whether a conditional write that must lose does lose."""
    try:
        if stale_tag is None:
            store.create(key, b"must lose")
        else:
            store.replace(key, b"must lose", tag=stale_tag)
    except PreconditionError:
        return True
    except (StoreDeniedError, StoreUnreachableError, ObjectNotFoundError):
        raise
    except StoreError:
        return False  # some services answer the condition itself with 400 or 501
    return False


def check_endpoint(endpoint: str) -> str:
    """Return a usable endpoint URL. Raises StoreError, without repeating a password that was in it."""
    try:
        parts = urlsplit(endpoint)
        secret, usable = "@" in parts.netloc, parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        secret, usable = "@" in endpoint, False
    if secret:
        raise StoreError(
            "endpoint: expected no credentials in the URL; put them in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or in a profile"
        )
    if not usable:
        raise StoreError(f"endpoint: expected http://HOST[:PORT] or https://HOST[:PORT], got {endpoint!r}")
    return endpoint


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_encryption(endpoint: str, *, allowed: bool) -> None:
    """Refuse an endpoint on another machine that is reached without TLS. Raises StoreError."""
    parts = urlsplit(endpoint)
    if allowed or parts.scheme != "http" or is_loopback(parts.hostname or ""):
        return
    raise StoreError(
        f"endpoint {endpoint}: plain http can be read and changed on its way; use https, or allow it with "
        "--allow-http, `allow_http: true` in the manifest or BIRKHOFF_ALLOW_HTTP=1"
    )


def _canonical_s3(rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise StoreError(
            "store URL: expected s3://BUCKET[/PREFIX] without credentials; put them in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or in a profile, and the endpoint in AWS_ENDPOINT_URL_S3"
        )
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(f"store URL: expected s3://BUCKET[/PREFIX], got {'s3://' + rest!r}")
    prefix = prefix.strip("/")
    return f"s3://{bucket}/{check_key(prefix)}" if prefix else f"s3://{bucket}"


def _file_path(rest: str) -> Path:
    path = unquote(rest.removeprefix("localhost"))
    if not path.startswith(("/", "./", "../")) and path not in (".", ".."):
        raise StoreError(f"store URL: expected file:///DIR or a relative file://./DIR, got {'file://' + rest!r}")
    return Path(path).resolve()


def _refusal(name: str, expected: object, got: object) -> str:
    return f"store setting {name}: expected {expected}, got {got!r}"
