"""The contract of an object store, and the addresses by which workers open one.

Six stores implement it: a directory (`directory`), any S3 service (`s3`), an S3 server that this package starts
(`seaweedfs`), Google Cloud Storage (`gcs`), Azure Blob Storage (`azure`), and memory (`memory`). `open.open_store`
picks one by URL:

    s3://BUCKET[/PREFIX]     credentials and endpoint from the standard AWS chain, never from the URL
    gs://BUCKET[/PREFIX]     Google's application default credentials
    az://CONTAINER[/PREFIX]  account and credentials from the AZURE_STORAGE_* variables, or Azure's default chain
    file:///DIR, file://./D  plain files; `%20` and the like are decoded, as in every file URL
    embedded[:///HOME]       SeaweedFS on loopback, started when needed; its data are in HOME/embedded
    memory://NAME            one that this process created, for tests; no other process can open it

The contract in short; `Store` has the details:

* An object appears whole or not at all, and is durable when the call that wrote it returns.
* Every method may be called twice. A conditional write that finds its own body has succeeded: the first answer may have
  been lost.
* `retry.TRANSIENT` lists the errors worth a retry: no answer, a conflict of two writers, a body that fails the store's
  own checksum. `open_store` wraps every store that has such errors, so callers see one only after
  `StoreSettings.attempts` tries and need no loop of their own. After a StoreUnreachableError it is unknown whether a
  write took effect; repeat the call to find out. Every other StoreError is permanent.
* Threads may share a store. It cannot be pickled or used after `fork`: send `Store.address` instead.
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
"""URL schemes of buckets, and where their credentials belong."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """Facts about an object that need no read of its body.

    `size` is in bytes, `modified` an aware UTC time. `tag` is opaque and identifies this state of the object for
    `Store.replace` in the same store. It says nothing about the body in other stores or at other times.
    """

    key: str
    size: int
    tag: str
    modified: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to talk to a service. Holds no secrets; a directory ignores it. Raises StoreError.

    `region`, `addressing` and `checksums` apply to S3 only.

    endpoint: URL of the service. None: for S3 AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile, else AWS; for gs://
    STORAGE_EMULATOR_HOST, else Google's; for az:// the account of the AZURE_STORAGE_* variables.
    region: Signing region. None: AWS_REGION or the profile, else `us-east-1`.
    addressing: Bucket in the path or in the host name. `auto`: `s3.addressing_style` of the profile, else `path` for
    every endpoint except AWS's own.
    checksums: `when_required` neither sends nor asks for the CRC32 that boto3 uses since 1.36, for stores that reject
    it. None: AWS_REQUEST_CHECKSUM_CALCULATION or the profile, else `when_supported`.
    conditional_create, conditional_replace: Whether `create` and `replace` send their condition. Turned off (by
    `probe`) for stores without it: the client then reads before it writes, and only one publisher at a time is safe.
    anonymous: Send unsigned requests, for public buckets.
    allow_http: Permit plain http to other machines.
    connect_timeout, read_timeout: Seconds, per attempt.
    attempts: Tries per request in all, with exponential back-off.
    max_connections: Size of one client's connection pool.
    page_size: Objects per listing request, at most 1000.
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

    Keys are relative POSIX paths; `keys.check_key` refuses others with StoreError. A key must not be the folder of
    another key (`a` and `a/b`): file systems cannot hold both. Besides the errors named below, every method raises
    StoreUnreachableError, StoreDeniedError and, for other failures (no such bucket, disk full), StoreError. Methods
    that read a body raise IntegrityError if it contradicts the service's own checksum.
    """

    def __init__(self, address: "StoreAddress") -> None:
        self.address: StoreAddress = address

    @property
    def url(self) -> str:
        """Canonical URL, without credentials."""
        return self.address.url

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes `start` to `start + length` of an object, fewer if it ends before. Raises
        ObjectNotFoundError."""

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """Hand the bytes of `get` to `sink` in order, in pieces no larger than `buffer`, which may carry them.

        Returns their number. A piece is valid during its call only. Raises ObjectNotFoundError.
        """
        body = memoryview(self.get(key, start=start, length=length))
        for place in range(0, len(body), len(buffer)):
            sink(body[place : place + len(buffer)])
        return len(body)

    @abstractmethod
    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """Return the body, or its first `length` bytes, and the tag of the same state. Raises ObjectNotFoundError."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> str:
        """Write unconditionally; return the new tag."""

    @abstractmethod
    def create(self, key: str, body: bytes) -> str:
        """Write unless another body is there; return the tag.

        Of several writers with different bodies exactly one succeeds, if the store has conditional writes
        (`StoreCapabilities.conditional_writes`). Writers with equal bodies all succeed, so a lock must put its owner's
        name in the body. Raises PreconditionError.
        """

    @abstractmethod
    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """Write if the object still has this tag (compare-and-swap); return the new tag.

        Also succeeds if the object has this body already. Raises PreconditionError if it has another one or is gone,
        and also if this write took effect, its answer was lost, and the object was overwritten since.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return size, tag and time of an object. Raises ObjectNotFoundError."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with the string `prefix`, sorted by key.

        Objects whose names are not valid keys are left out. An object that is written or deleted meanwhile may or may
        not be listed. Errors are raised by the call or while iterating.
        """

    @abstractmethod
    def touch(self, key: str) -> None:
        """Set the `modified` time of an object to now, its body unchanged. Raises ObjectNotFoundError."""

    @abstractmethod
    def delete(self, key: str, *, permit: str | None = None) -> None:
        """Delete an object; a missing one is no error.

        With a `permit` the store refuses the request once the permit has ended, however late it arrives. Such a request
        is sent once: if its answer is lost, StoreUnreachableError leaves the outcome open. Raises PermitEndedError.
        """

    @abstractmethod
    def permit(self, now: datetime, *, witness: str) -> str:
        """Return a permit to delete, as a short text that may be stored.

        `now` is the store's time. `witness` is an object of the caller, which a store may try to delete too late, to
        find out whether it refuses that. If it does not, the permit never ends (see `revoke`).
        """

    @abstractmethod
    def revoke(self, permit: str) -> datetime | None:
        """End a permit, anybody's. After None is returned no deletion under it takes effect.

        A returned time means that the permit ends by itself when the store's clock has passed it. May be called twice.
        Raises StoreError if the permit never ends.
        """

    @abstractmethod
    def close(self) -> None:
        """Release connections. May be called twice; no other call may follow."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


PERMIT_SECONDS = 30
"""Seconds that a permit lasts on a store that ends it by its own clock."""

UNENDING = "unending"
"""The permit of a store that does not refuse late deletions."""


def timed_permit(now: datetime) -> str:
    """Return a permit for a store that ends it by its own clock, in whole seconds."""
    return (now + timedelta(seconds=PERMIT_SECONDS)).replace(microsecond=0).isoformat()


def timed_end(permit: str) -> datetime | None:
    """Return when a permit ends by the store's clock; None if it must be revoked, or never ends."""
    try:
        end = datetime.fromisoformat(permit)
    except ValueError:
        return None
    return end if end.tzinfo is not None else None


def permit_end(permit: str) -> datetime:
    """Return when a timed permit ends. Raises StoreError for another text."""
    end = timed_end(permit)
    if end is None:
        raise StoreError(f"permit {permit[:80]!r}: expected an aware time, as written by a store of this kind")
    return end


def unrevocable(url: str) -> StoreError:
    """Return the error for a permit that never ends."""
    return StoreError(
        f"{url}: this store does not refuse late deletions, so only the process that holds the permit can say that it "
        "has ended"
    )


class SigningStore(Store):
    """A networked store whose permits are signatures. They end by the service's clock, if the service checks their
    age."""

    def __init__(self, address: "StoreAddress") -> None:
        super().__init__(address)
        self._refuses_late: bool | None = None
        """Whether the service has refused a deletion that came too late; None if that was not tried."""

    @abstractmethod
    def _signs(self) -> bool:
        """Return whether there is a key to sign with."""

    @abstractmethod
    def _delete_signed(self, key: str, end: datetime) -> None:
        """Send one DELETE that is signed until `end`, by the service's clock. Raises PermitEndedError."""

    def permit(self, now: datetime, *, witness: str) -> str:
        """See Store. The first call tries once to delete `witness` too late."""
        if self._refuses_late is None:
            self._refuses_late = self._tries_late(now, witness)
        return timed_permit(now) if self._refuses_late else UNENDING

    def revoke(self, permit: str) -> datetime | None:
        """See Store."""
        if permit == UNENDING:
            raise unrevocable(self.url)
        return permit_end(permit)

    def _tries_late(self, now: datetime, witness: str) -> bool:
        """Return whether the service refuses a deletion whose signature has expired."""
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
    """What a worker needs to open the same store: a canonical URL and settings, without secrets.

    Credentials do not travel. Each process finds its own in the chain of its cloud or, for the embedded server, in a
    file that only its user can read.
    """

    url: str
    settings: StoreSettings = field(default_factory=StoreSettings)

    @classmethod
    def parse(cls, url: str, settings: StoreSettings | None = None) -> "StoreAddress":
        """Check a URL and make it canonical: absolute path, no trailing slash. Raises StoreError."""
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
            # It may hold a password, so it is not repeated.
            shown = "a URL with an @" if "@" in url else repr(url)
            raise StoreError(
                "store URL: expected s3://BUCKET[/PREFIX], gs://BUCKET[/PREFIX], az://CONTAINER[/PREFIX], file:///DIR, "
                f"file://./DIR or embedded, got {shown}"
            )
        return cls(url=url, settings=settings or StoreSettings())


def same_or_lost(store: Store, operation: str, key: str, body: bytes, refusal: StoreError) -> str:
    """Return the tag of an object after a refused condition, if it holds `body`, as it does after a lost answer.

    Raises PreconditionError if it holds another one, or is gone.
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
    """Return the folder of a canonical file:// URL; None for other stores."""
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
