"""Google Cloud Storage as a store, through google-cloud-storage and its JSON API.

An object's tag is its generation, which is unique to each write. Conditions are on generations; 0 means that no object
may exist (https://docs.cloud.google.com/storage/docs/request-preconditions). Credentials are Google's application
default ones; STORAGE_EMULATOR_HOST selects an emulator, without credentials. A call sends each request once
(`retry=None`; bodies above 8 MiB take two), bounded by time-outs and a minimum throughput; `retry.RetryingStore`
repeats transient failures.

A permit is a V4 signed URL (https://docs.cloud.google.com/storage/docs/access-control/signed-urls), which the service
refuses after it expires. If the credentials cannot sign, permits never end.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import google.auth
import requests
from google.api_core.exceptions import GoogleAPICallError, NotFound, RequestRangeNotSatisfiable
from google.auth.credentials import AnonymousCredentials, Signing
from google.auth.exceptions import GoogleAuthError, TransportError
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage import _signing
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from urllib3.exceptions import HTTPError

from birkhoff.pipeline.backoff import retry_after
from birkhoff.pipeline.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PermitEndedError,
    PreconditionError,
    StoreConflictError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store.base import (
    PERMIT_SECONDS,
    UNENDING,
    ObjectInfo,
    SigningStore,
    StoreAddress,
    StoreSettings,
    permit_end,
    same_or_lost,
)
from birkhoff.pipeline.store.endpoints import check_encryption, check_endpoint
from birkhoff.pipeline.store.keys import check_key, check_prefix, check_range, is_key
from birkhoff.pipeline.store.least_speed import pace_session, slowness
from birkhoff.pipeline.store.retry import persist

PUBLIC = "https://storage.googleapis.com"
EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"
CREDENTIALS_HINT = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
ENDPOINT_HINT = f"check the network and {EMULATOR_VARIABLE}"

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_UNREACHABLE = (requests.RequestException, TransportError, HTTPError, ValueError)
_FAILURES = (GoogleAPICallError, GoogleAuthError, InvalidResponse, *_UNREACHABLE)
_SLOW = ("rateLimitExceeded", "userRateLimitExceeded", "backendError")
"""Transient reasons, some of which come with status 403."""
_KEPT = ("retentionPolicyNotMet", "objectUnderActiveHold", "objectRetentionNotMet")
_UNPAID = ("userProjectMissing", "accountDisabled", "billingDisabled", "quotaExceeded", "dailyLimitExceeded")

T = TypeVar("T")
_Page = tuple[list[ObjectInfo], str | None]
_Found = tuple[list[storage.Blob], str | None]


def open_gcs(address: StoreAddress, bucket: str, prefix: str) -> "GcsStore":
    """Open `bucket`; connects at the first call. Raises StoreDeniedError, StoreError."""
    settings = _resolved(address.settings)
    endpoint = settings.endpoint or PUBLIC
    check_encryption(endpoint, allowed=settings.allow_http)
    credentials = _credentials(anonymous=settings.anonymous)
    session = AuthorizedSession(credentials, max_refresh_attempts=0 if settings.anonymous else 1)
    pace_session(session, settings.read_timeout, settings.max_connections)
    client = storage.Client(
        project=None, credentials=credentials, _http=session, client_options={"api_endpoint": endpoint}
    )
    return GcsStore(dataclasses.replace(address, settings=settings), client, bucket, prefix)


def _resolved(settings: StoreSettings) -> StoreSettings:
    """Return the settings, completed from the environment of this process, because workers must use the same."""
    emulator = os.environ.get(EMULATOR_VARIABLE)
    if settings.endpoint is not None or not emulator:
        return settings
    endpoint = emulator if "://" in emulator else f"http://{emulator}"
    return dataclasses.replace(settings, endpoint=check_endpoint(endpoint).rstrip("/"), anonymous=True)


def who(settings: StoreSettings) -> str:
    """Return whose credentials open a store with these settings, without secrets. Raises StoreDeniedError."""
    if settings.anonymous:
        return f"none, for {settings.endpoint or PUBLIC}"
    found = _credentials(anonymous=False)
    name = getattr(found, "service_account_email", None) or getattr(found, "quota_project_id", None)
    return f"{type(found).__module__}{f' of {name}' if name else ''}"


def _credentials(*, anonymous: bool) -> Any:
    if anonymous:
        return AnonymousCredentials()
    try:
        found, _ = google.auth.default(scopes=[_SCOPE])
    except GoogleAuthError as error:
        raise StoreDeniedError(f"gs:// client: {_line(error)}; {CREDENTIALS_HINT}") from error
    return found


class GcsStore(SigningStore):
    """The objects of `bucket` below `prefix`, through a Google client that this store owns."""

    def __init__(self, address: StoreAddress, client: storage.Client, bucket: str, prefix: str) -> None:
        super().__init__(address)
        self._client = client
        self._bucket = client.bucket(bucket)
        self._prefix = f"{prefix}/" if prefix else ""
        self._once: dict[str, Any] = {
            "timeout": (address.settings.connect_timeout, address.settings.read_timeout),
            "retry": None,
        }
        self._bucket_seen = False
        self._patches_move_time: bool | None = None
        """Whether changing metadata moves an object's time, as on Google's service; None if that was not tried."""
        self._plain = requests.Session()  # for signed URLs, which accept no other credentials
        pace_session(self._plain, address.settings.read_timeout, address.settings.max_connections)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        check_range(key, start, length)
        if length == 0:
            self.head(key)
            return b""
        return self._fetch("get", key, start, length)[0]

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        body, tag = self._fetch("read", key, 0, max(1, length) if length is not None else None)
        return body[:length], tag

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        blob = self._blob(key)
        self._call("head", key, lambda: blob.reload(**self._once))
        return self._info("head", blob)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Holds the whole listing, about 300 bytes per object."""
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        token: str | None = None
        while True:
            page, token = persist(partial(self._page, prefix, token), self.address.settings.attempts)
            found += page
            if not token:
                break
        return iter(sorted((info for info in found if is_key(info.key)), key=lambda info: info.key))

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        return self._write("put", key, body)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        return self._write("create", key, body, generation=0)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        check_key(key)
        if not tag.isdecimal():
            raise PreconditionError(f"replace {self.url}/{key}: {tag[:80]!r} is not a generation; read it again")
        return self._write("replace", key, body, generation=int(tag))

    def touch(self, key: str) -> None:
        """See Store. Changes the metadata, which moves the time on Google's service; elsewhere copies the object onto
        itself.

        A copy makes a new generation, but only of the generation that was found.
        """
        before = self.head(key) if self._patches_move_time is None else None
        if self._patches_move_time is not False:
            blob = self._blob(key)
            blob.metadata = {"touched": uuid.uuid4().hex}
            self._call("touch", key, lambda: blob.patch(**self._once))
            if before is None:
                return
            self._patches_move_time = self.head(key).modified > before.modified
        while not self._patches_move_time:
            source, target = self._blob(key), self._blob(key)
            tag = int(self.head(key).tag)
            try:
                self._call("touch", key, partial(self._copy, source, target, tag))
                return
            except PreconditionError:
                continue  # another writer came first: look again

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store."""
        if permit is not None and permit != UNENDING:
            self._delete_signed(key, permit_end(permit))
            return
        blob = self._blob(key)
        with suppress(ObjectNotFoundError):
            self._call("delete", key, lambda: blob.delete(**self._once))

    def close(self) -> None:
        """See Store."""
        self._plain.close()
        self._client.close()

    def _copy(self, source: storage.Blob, target: storage.Blob, generation: int) -> None:
        """Copy an object onto itself in the service, if it still has this generation."""
        token = None
        while True:
            token, _, _ = target.rewrite(
                source,
                token=token,
                if_generation_match=generation,
                if_source_generation_match=generation,
                **self._once,
            )
            if token is None:
                return

    def _signs(self) -> bool:
        return isinstance(self._client._credentials, Signing)

    def _delete_signed(self, key: str, end: datetime) -> None:
        """Send one DELETE that is signed until `end`, by the service's clock; this machine's is not used."""
        began = (end - timedelta(seconds=PERMIT_SECONDS)).astimezone(UTC)
        name = quote(self._prefix + check_key(key), safe="/~")
        try:
            url = _signing.generate_signed_url_v4(
                self._client._credentials,
                f"/{self._bucket.name}/{name}",
                PERMIT_SECONDS,
                api_access_endpoint=self._endpoint,
                method="DELETE",
                _request_timestamp=began.strftime("%Y%m%dT%H%M%SZ"),  # the only way to pass a time
            )
            answer = self._plain.delete(url, timeout=self._once["timeout"])
        except _FAILURES as error:
            raise self._store_error("delete", key, error) from error
        if answer.status_code == 404 or answer.ok:
            return
        if answer.status_code in (400, 401, 403) and "expired" in answer.text[:4096].lower():
            raise PermitEndedError(f"delete {self.url}/{key} at {self._endpoint}: its permit has ended")
        raise self._answered("delete", key, answer.status_code, answer)

    def _write(self, operation: str, key: str, body: bytes, *, generation: int | None = None) -> str:
        blob = self._blob(key)
        try:
            self._call(
                operation,
                key,
                lambda: blob.upload_from_string(
                    body,
                    content_type="application/octet-stream",
                    if_generation_match=generation,
                    checksum="crc32c",
                    **self._once,
                ),
            )
        except PreconditionError as error:
            return same_or_lost(self, operation, key, body, error)
        except StoreDeniedError as error:
            # Without permission to delete, any existing object gives 403, whatever the condition: check whether one
            # exists.
            if generation == 0:
                with suppress(ObjectNotFoundError, StoreDeniedError):
                    self.head(key)
                    return same_or_lost(self, operation, key, body, error)
            raise
        return self._tag(operation, blob)

    def _fetch(self, operation: str, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        """Return bytes of an object, and its tag. The library checks a whole body against its checksum."""
        blob = self._blob(key)
        span = {} if start == 0 and length is None else {"start": start}
        if length is not None:
            span["end"] = start + length - 1
        try:
            body: bytes = self._call(
                operation, key, lambda: blob.download_as_bytes(raw_download=True, **span, **self._once)
            )
        except _RangeError:
            if start > 0:
                return b"", ""
            return self._fetch(operation, key, 0, None)  # an empty object has no range
        return body, self._tag(operation, blob)

    def _page(self, prefix: str, token: str | None) -> _Page:
        """Return a page of a listing, and where it continues."""

        def ask() -> _Found:
            found = self._client.list_blobs(
                self._bucket,
                prefix=self._prefix + prefix,
                page_size=min(self.address.settings.page_size, 1000),
                page_token=token,
                fields="items(name,size,generation,updated),nextPageToken",
                **self._once,
            )
            return [*next(found.pages, ())], found.next_page_token

        blobs, following = self._call("list", prefix, ask)
        if following is not None and following == token:
            raise StoreError(f"list {self.url}/{prefix}: {self._endpoint} gives the same page again; use another store")
        return [self._info("list", blob) for blob in blobs], following

    def _blob(self, key: str) -> storage.Blob:
        return self._bucket.blob(self._prefix + check_key(key))

    def _call(self, operation: str, key: str, call: Callable[[], T]) -> T:
        try:
            answer = call()
        except RequestRangeNotSatisfiable as error:
            raise _RangeError(str(error)) from error
        except DataCorruption as error:
            raise IntegrityError(f"{operation} {self.url}/{key}: {_line(error)}; publish it again") from error
        except NotFound as error:
            if operation in ("put", "create", "replace", "list") or not self._bucket_there():
                raise self._missing_bucket(operation, key) from error
            raise ObjectNotFoundError(f"{operation} {self.url}/{key} at {self._endpoint}: no such object") from error
        except _FAILURES as error:
            raise self._store_error(operation, key, error) from error
        self._bucket_seen = True
        return answer

    def _bucket_there(self) -> bool:
        """Return whether the bucket exists, as far as these credentials may know; an answer about an object does not
        tell."""
        if not self._bucket_seen:
            try:
                next(self._client.list_blobs(self._bucket, page_size=1, fields="kind", **self._once).pages, None)
            except NotFound:
                return False
            except GoogleAPICallError:
                return True
            except _FAILURES as error:
                raise self._store_error("head", "", error) from error
            self._bucket_seen = True
        return True

    def _info(self, operation: str, blob: storage.Blob) -> ObjectInfo:
        key = str(blob.name).removeprefix(self._prefix)
        if blob.updated is None or blob.size is None:
            raise StoreError(
                f"{operation} {self.url}/{key}: the answer from {self._endpoint} has no size or time, which tell "
                "unused objects from new ones; use a newer release of the store, or another store"
            )
        return ObjectInfo(key=key, size=blob.size, tag=self._tag(operation, blob), modified=blob.updated)

    def _tag(self, operation: str, blob: storage.Blob) -> str:
        if blob.generation is None:
            key = str(blob.name).removeprefix(self._prefix)
            raise StoreUnreachableError(
                f"{operation} {self.url}/{key}: the answer from {self._endpoint} has no generation, so it is not "
                f"Google Cloud Storage's; {ENDPOINT_HINT}"
            )
        return str(blob.generation)

    @property
    def _endpoint(self) -> str:
        return self.address.settings.endpoint or PUBLIC

    def _missing_bucket(self, operation: str, key: str) -> StoreError:
        return StoreError(
            f"{operation} {self.url}/{key}: no bucket {self._bucket.name!r} at {self._endpoint}; create it, or "
            "correct the URL"
        )

    def _store_error(self, operation: str, key: str, error: Exception) -> StoreError:
        """Convert a Google error to a StoreError that names operation, bucket, key, endpoint and remedy."""
        where = f"{operation} {self.url}/{key} at {self._endpoint}"
        if isinstance(error, GoogleAPICallError):
            return self._answered(operation, key, int(error.code or 0), error.response)
        if isinstance(error, InvalidResponse):
            return self._answered(operation, key, int(error.response.status_code), error.response)
        if slow := slowness(error):
            return StoreUnreachableError(f"{where}: {slow}; {ENDPOINT_HINT}, or try again later")
        if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
            return StoreDeniedError(f"{where}: {_line(error)}; {CREDENTIALS_HINT}")
        return StoreUnreachableError(f"{where}: {_line(error)}; {ENDPOINT_HINT}")

    def _answered(self, operation: str, key: str, status: int, answer: requests.Response | None) -> StoreError:
        """Return the error for an answer by its reason, then its status, because 403 stands for a dozen different
        things.

        Reasons: https://docs.cloud.google.com/storage/docs/json_api/v1/status-codes
        """
        reason, message = _said(answer)
        text = f"{operation} {self.url}/{key} at {self._endpoint}: {status} {reason}: {message}".rstrip(": ")
        if reason in _KEPT:
            return StoreError(f"{text}; a retention policy or a hold of the bucket keeps this object as it is")
        if reason in _UNPAID:
            return StoreError(f"{text}; check the billing and the quotas of the bucket's project")
        if status in (304, 412):
            return PreconditionError(text)
        if reason in _SLOW or status in (408, 429) or (status >= 500 and status != 501):
            wait = retry_after(answer.headers.get("Retry-After")) if answer is not None else None
            return StoreUnreachableError(f"{text}; {ENDPOINT_HINT}, or try again later", retry_after=wait)
        if status in (401, 403):
            return StoreDeniedError(f"{text}; check the roles of these credentials on the bucket: {CREDENTIALS_HINT}")
        if status == 409:
            return StoreConflictError(f"{text}; other writers are busy with this key, try again")
        return StoreError(f"{text}; see Google's manual for {reason or status}, or check {EMULATOR_VARIABLE}")


class _RangeError(StoreError):
    """416: the range starts at or after the end of the object."""


def _said(answer: requests.Response | None) -> tuple[str, str]:
    """Return reason and message of a refusal, each on one line and bounded; empty if it has none."""
    if answer is None:
        return "", ""
    text = answer.text[: 1 << 16]
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        error = json.loads(text)["error"]
        reasons = [str(one.get("reason", "")) for one in error.get("errors", ())] or [str(error.get("status", ""))]
        return _line(reasons[0])[:100], _line(str(error.get("message", "")))
    return "", _line(text)


def _line(error: Exception | str) -> str:
    """Return the text of an error on one line of bounded length."""
    return " ".join(str(error).split())[:300]
