"""The object store: one small contract, addresses that travel to workers, and a probe of what a store can do.

Six stores keep the contract: a directory (`directory`), any S3 service (`s3`), the S3 server that this package
starts by itself (`seaweedfs`), Google Cloud Storage (`gcs`), Azure Blob Storage (`azure`), and one in memory
(`memory`). `open.open_store` picks one by URL:

    s3://BUCKET[/PREFIX]     credentials and endpoint from the standard AWS chain, never from the URL
    gs://BUCKET[/PREFIX]     credentials from Google's application default ones
    az://CONTAINER[/PREFIX]  account and credentials from the AZURE_STORAGE_* variables, or Azure's default chain
    file:///DIR, file://./D  plain files; `%20` and the like are decoded, as in every file URL
    embedded[:///HOME]       SeaweedFS on loopback, started when needed; its data live under HOME/embedded
    memory://NAME            one that this process has made, for tests; nobody else can open it

The contract in short; `Store` has the details:

* An object appears whole or not at all, and is durable when the call that wrote it returns.
* Every method may be called twice. A conditional write that finds its own body there has succeeded: its first
  answer may have been lost on the way.
* `retry.TRANSIENT` are the errors that may pass: no answer, two writers that met, a body that fails the store's own
  checksum. `open_store` wraps every store that has such errors, so callers need no loop of their own: they see one
  after `StoreSettings.attempts` tries. `StoreUnreachableError` then leaves open whether a write took effect; call again
  to find out. Every other `StoreError` is permanent: the same call will fail the same way.
* A store may be shared by threads. It is neither picklable nor usable after `fork`: send `Store.address`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args
from urllib.parse import unquote

from birkhoff.pipeline.errors import ObjectNotFoundError, PermitEndedError, PreconditionError, StoreError
from birkhoff.pipeline.paths import birkhoff_home
from birkhoff.pipeline.store.endpoints import check_endpoint
from birkhoff.pipeline.store.keys import check_key

Addressing = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]

_NUMBERS = {
    "connect_timeout": (int, float),
    "read_timeout": (int, float),
    "attempts": (int,),
    "max_connections": (int,),
    "page_size": (int,),
}
BUCKETS = {
    "s3": "put them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in a profile, and the endpoint in "
    "AWS_ENDPOINT_URL_S3",
    "gs": "put them in a key file that GOOGLE_APPLICATION_CREDENTIALS names",
    "az": "put them in AZURE_STORAGE_CONNECTION_STRING, or in AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY",
}
"""Schemes of URLs that name a bucket of some service, and where its credentials belong instead."""

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
    """How to talk to a service; a directory needs none of it. Holds no secrets. Raises StoreError.

    `region`, `addressing` and `checksums` are of S3 alone.

    endpoint: URL of the service. None: for S3 AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile, AWS without those;
        for gs:// STORAGE_EMULATOR_HOST or Google's own; for az:// the account of the AZURE_STORAGE_* variables.
    region: signing region. None: AWS_REGION or the profile; `us-east-1` without those.
    addressing: bucket in the path or in the host name. `auto`: `s3.addressing_style` of the profile; without it `path`
        for every endpoint but AWS's own.
    checksums: `when_required` neither sends the CRC32 that boto3 sends since 1.36 nor asks for any, for stores that
        reject it. None: AWS_REQUEST_CHECKSUM_CALCULATION or the profile; `when_supported` without those.
    conditional_create, conditional_replace: whether `create` and `replace` send their condition. Off where the store
        has none (`probe`): then this client looks first, and only one publisher at a time is safe.
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
    conditional_create: bool = True
    conditional_replace: bool = True
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
        self.address: StoreAddress = address

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
    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """Body, or its first `length` bytes, and tag of one and the same state. Raises ObjectNotFoundError."""

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
    def touch(self, key: str) -> None:
        """Move the `modified` time of an object to now, its body unchanged. Raises ObjectNotFoundError."""

    @abstractmethod
    def delete(self, key: str, *, permit: str | None = None) -> None:
        """Remove an object; a missing one is fine.

        With a `permit` the store itself refuses once that has ended, however late the request reaches it, and the
        request is sent once: where its answer is lost, StoreUnreachableError leaves the outcome open.
        Raises PermitEndedError.
        """

    @abstractmethod
    def permit(self, now: datetime, *, witness: str) -> str:
        """A permit to delete, as a short text that may be stored.

        `now` is the store's time. `witness` is an object of the caller's own, on which a store may try whether it
        refuses late deletions. Where it does not, the permit never ends (see `revoke`).
        """

    @abstractmethod
    def revoke(self, permit: str) -> datetime | None:
        """End a permit, anybody's: no deletion under it takes effect after this returned None.

        A time says that it ends by itself when the store's clock has passed that. May be called twice. Raises
        StoreError where the permit never ends.
        """

    @abstractmethod
    def close(self) -> None:
        """Release connections. May be called twice; nothing else may be called after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


PERMIT_SECONDS = 30
"""How long a permit lasts on a store that ends it by its own clock."""

UNENDING = "unending"
"""The permit of a store that refuses no late deletion."""


def timed_permit(now: datetime) -> str:
    """The permit of a store that ends it by its own clock, in whole seconds."""
    return (now + timedelta(seconds=PERMIT_SECONDS)).replace(microsecond=0).isoformat()


def timed_end(permit: str) -> datetime | None:
    """When a permit ends by the store's clock; None for one that somebody has to end, or that nobody can."""
    try:
        end = datetime.fromisoformat(permit)
    except ValueError:
        return None
    return end if end.tzinfo is not None else None


def permit_end(permit: str) -> datetime:
    """When a timed permit ends. Raises StoreError for another text."""
    end = timed_end(permit)
    if end is None:
        raise StoreError(f"permit {permit[:80]!r}: expected an aware time, as written by a store of this kind")
    return end


def unrevocable(url: str) -> StoreError:
    """The error for a permit that never ends."""
    return StoreError(
        f"{url}: this store does not refuse late deletions, so only the process that was permitted to delete can say "
        "that it has ended"
    )


class SigningStore(Store):
    """A store behind a network whose permits are signatures that end by its own clock, if it holds to that."""

    def __init__(self, address: "StoreAddress") -> None:
        super().__init__(address)
        self._refuses_late: bool | None = None
        """Whether the service has refused a deletion that came too late; None where that was not tried."""

    @abstractmethod
    def _signs(self) -> bool:
        """Whether there is a key to sign with."""

    @abstractmethod
    def _delete_signed(self, key: str, end: datetime) -> None:
        """Send one DELETE that is signed until `end` by the service's clock. Raises PermitEndedError."""

    def permit(self, now: datetime, *, witness: str) -> str:
        """See Store. The store is asked once to delete `witness` too late."""
        if self._refuses_late is None:
            self._refuses_late = self._tries_late(now, witness)
        return timed_permit(now) if self._refuses_late else UNENDING

    def revoke(self, permit: str) -> datetime | None:
        """See Store."""
        if permit == UNENDING:
            raise unrevocable(self.url)
        return permit_end(permit)

    def _tries_late(self, now: datetime, witness: str) -> bool:
        """Whether the service refuses to delete an object by a signature that has ended."""
        if not self._signs():
            return False
        try:
            self._delete_signed(witness, now - timedelta(seconds=PERMIT_SECONDS))
        except PermitEndedError:
            with suppress(ObjectNotFoundError):
                return self.head(witness).key == witness
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """All that a worker needs to open the same store: a canonical URL and settings, small and without secrets.

    Credentials do not travel: each process finds its own in the chain of its cloud, or, for the embedded server, in a
    file only its user can read.
    """

    url: str
    settings: StoreSettings = field(default_factory=StoreSettings)

    @classmethod
    def parse(cls, url: str, settings: StoreSettings | None = None) -> "StoreAddress":
        """Check a URL and make it canonical: absolute paths, no trailing slash. Raises StoreError."""
        scheme, _, rest = url.partition("://")
        if scheme in BUCKETS:
            url = _canonical_bucket(scheme, rest)
        elif scheme == "file":
            url = _file_path(rest).as_uri()
        elif scheme == "memory":
            url = f"memory://{check_key(rest)}"
        elif scheme == "embedded":
            home = _file_path(rest) if rest else birkhoff_home()
            url = home.as_uri().replace("file://", "embedded://", 1)
        else:
            # The text is not repeated when it may hold a password.
            shown = "a URL with an @" if "@" in url else repr(url)
            raise StoreError(
                "store URL: expected s3://BUCKET[/PREFIX], gs://BUCKET[/PREFIX], az://CONTAINER[/PREFIX], file:///DIR, "
                f"file://./DIR or embedded, got {shown}"
            )
        return cls(url=url, settings=settings or StoreSettings())


def same_or_lost(store: Store, operation: str, key: str, body: bytes, refusal: StoreError) -> str:
    """After a refused condition: the tag of the object if it holds `body`, as a lost answer leaves it.

    Raises PreconditionError for another one, or none.
    """
    try:
        found, tag = store.read(key, length=len(body) + 1)
    except ObjectNotFoundError:
        raise PreconditionError(f"{operation} {store.url}/{key}: the object is gone; read it again") from refusal
    if found == body:
        return tag
    raise PreconditionError(
        f"{operation} {store.url}/{key}: another body is there; read it and decide again"
    ) from refusal


def store_folder(url: str) -> Path | None:
    """The folder of a canonical file:// URL; None for other stores."""
    scheme, _, rest = url.partition("://")
    return Path(unquote(rest)) if scheme == "file" else None


def _canonical_bucket(scheme: str, rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise StoreError(f"store URL: expected {scheme}://BUCKET[/PREFIX] without credentials; {BUCKETS[scheme]}")
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(f"store URL: expected {scheme}://BUCKET[/PREFIX], got {f'{scheme}://{rest}'!r}")
    prefix = prefix.strip("/")
    return f"{scheme}://{bucket}/{check_key(prefix)}" if prefix else f"{scheme}://{bucket}"


def _file_path(rest: str) -> Path:
    path = unquote(rest.removeprefix("localhost"))
    if not path.startswith(("/", "./", "../")) and path not in (".", ".."):
        raise StoreError(f"store URL: expected file:///DIR or a relative file://./DIR, got {'file://' + rest!r}")
    return Path(path).resolve()


def _refusal(name: str, expected: object, got: object) -> str:
    return f"store setting {name}: expected {expected}, got {got!r}"
