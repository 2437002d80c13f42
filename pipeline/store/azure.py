"""Azure Blob Storage as a store, through azure-storage-blob.

An object's tag is its ETag, which is unique to each write. Conditions are If-None-Match and If-Match
(https://learn.microsoft.com/rest/api/storageservices/specifying-conditional-headers-for-blob-service-operations).
Account and key come from the variables of Azure's command line: AZURE_STORAGE_CONNECTION_STRING, or
AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN; for an account alone, from azure-identity's
default chain. A call sends each request once, bounded by time-outs and a minimum throughput; `retry.RetryingStore`
repeats transient failures. (The library itself asks up to three times for a body that breaks off.)

A permit is a shared access signature (https://learn.microsoft.com/rest/api/storageservices/create-service-sas), which
the service refuses after it expires. It needs the account's key; without one, permits never end.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
)
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobClient, BlobProperties, BlobSasPermissions, ContainerClient, generate_blob_sas
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

CREDENTIALS_HINT = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or log in by `az login`"
)
ENDPOINT_HINT = "check the network and the account that the AZURE_STORAGE_* variables name"

_ONE_REQUEST_BYTES = 64 << 20
"""Bodies up to this size go in one request; larger ones in blocks, whose commit carries the condition."""
_FAILURES = (AzureError, requests.RequestException, HTTPError, ValueError)
_KEPT = ("BlobImmutableDueToPolicy", "BlobImmutableDueToLegalHold", "LeaseIdMissing", "BlobArchived")

T = TypeVar("T")
_Page = tuple[list[ObjectInfo], str | None]
_Found = tuple[list[BlobProperties], str | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AzureAccount:
    """Address and credentials of a storage account; never printed, never part of a store's address."""

    endpoint: str
    name: str | None = None
    key: str | None = dataclasses.field(default=None, repr=False)
    sas: str | None = dataclasses.field(default=None, repr=False)


def open_azure(address: StoreAddress, container: str, prefix: str) -> "AzureStore":
    """Open `container`; connects at the first call. Raises StoreDeniedError, StoreError."""
    settings = address.settings
    account = find_account(settings)
    check_encryption(account.endpoint, allowed=settings.allow_http)
    session = requests.Session()
    pace_session(session, settings.read_timeout, settings.max_connections)
    options: dict[str, Any] = {
        "transport": _transport(session, settings),
        "retry_total": 0,
        "max_single_put_size": _ONE_REQUEST_BYTES,
        "max_single_get_size": 1 << 40,
    }
    client = ContainerClient(account.endpoint, container, credential=_credential(account, settings), **options)
    settings = dataclasses.replace(settings, endpoint=account.endpoint)
    return AzureStore(dataclasses.replace(address, settings=settings), client, session, account, prefix)


def _transport(session: requests.Session, settings: StoreSettings) -> RequestsTransport:
    """Return a transport over a session that the caller closes."""
    return RequestsTransport(
        session=session,
        session_owner=False,
        connection_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
    )


def find_account(settings: StoreSettings) -> AzureAccount:
    """Return the account that settings and environment name. Raises StoreDeniedError, StoreError."""
    found = _parts(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    name = found.get("accountname") or os.environ.get("AZURE_STORAGE_ACCOUNT")
    endpoint = settings.endpoint or found.get("blobendpoint")
    if endpoint is None:
        if not name:
            raise StoreDeniedError(f"az:// client: no storage account is named; {CREDENTIALS_HINT}")
        suffix = found.get("endpointsuffix", "core.windows.net")
        endpoint = f"{found.get('defaultendpointsprotocol', 'https')}://{name}.blob.{suffix}"
    check_endpoint(endpoint)
    parts = urlsplit(endpoint)
    # An emulator or a proxy has the account in the path, Azure in the host name.
    in_address = parts.path.strip("/").partition("/")[0] or (parts.hostname or "").partition(".")[0]
    return AzureAccount(
        endpoint=endpoint.rstrip("/"),
        name=name or in_address,
        key=found.get("accountkey") or os.environ.get("AZURE_STORAGE_KEY"),
        sas=found.get("sharedaccesssignature") or os.environ.get("AZURE_STORAGE_SAS_TOKEN"),
    )


def who(settings: StoreSettings) -> str:
    """Return account and kind of credentials of a store with these settings, without secrets. Raises as
    `find_account`."""
    account = find_account(settings)
    kind = "its key" if account.key else "a shared access signature" if account.sas else "azure-identity's chain"
    return f"account {account.name}, by {'none' if settings.anonymous else kind}"


def _parts(connection: str) -> dict[str, str]:
    """Return the fields of a connection string, by lower-case name. Raises StoreError."""
    found = {}
    for field in filter(None, connection.strip().split(";")):
        name, equals, value = field.partition("=")
        if not equals:
            raise StoreError("AZURE_STORAGE_CONNECTION_STRING: expected NAME=VALUE;NAME=VALUE, as the portal shows it")
        found[name.strip().lower()] = value.strip()
    return found


def _credential(account: AzureAccount, settings: StoreSettings) -> Any:
    if settings.anonymous:
        return None
    if account.key:
        return {"account_name": account.name, "account_key": account.key}
    if account.sas:
        return account.sas.removeprefix("?")
    try:
        from azure.identity import DefaultAzureCredential  # imports msal
    except ImportError as error:
        raise StoreDeniedError(
            f"az:// client: no key and no signature, and azure-identity is not installed; {CREDENTIALS_HINT}"
        ) from error
    return DefaultAzureCredential()


class AzureStore(SigningStore):
    """The objects of a container below `prefix`, through an Azure client that this store owns."""

    def __init__(
        self,
        address: StoreAddress,
        client: ContainerClient,
        session: requests.Session,
        account: AzureAccount,
        prefix: str,
    ) -> None:
        super().__init__(address)
        self._client = client
        self._session = session
        self._account = account
        self._prefix = f"{prefix}/" if prefix else ""

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
        return self._info("head", self._call("head", key, self._blob(key).get_blob_properties))

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
        return self._write("put", key, body, overwrite=True)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        return self._write("create", key, body, overwrite=False)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        return self._write(
            "replace", key, body, overwrite=True, etag=tag, match_condition=MatchConditions.IfNotModified
        )

    def touch(self, key: str) -> None:
        """See Store. Writes the metadata again, which moves the time and changes the tag."""
        self._call("touch", key, lambda: self._blob(key).set_blob_metadata({"touched": "1"}))

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store."""
        if permit is not None and permit != UNENDING:
            self._delete_signed(key, permit_end(permit))
            return
        with suppress(ObjectNotFoundError):
            self._call("delete", key, self._blob(key).delete_blob)

    def close(self) -> None:
        """See Store."""
        self._client.close()
        self._session.close()

    def _signs(self) -> bool:
        return self._account.key is not None and not self.address.settings.anonymous

    def _delete_signed(self, key: str, end: datetime) -> None:
        """Send one DELETE that is signed until `end`, by the service's clock.

        A refusal only says that the signature is not valid; the answer's Date tells whether it had expired.
        """
        name = self._prefix + check_key(key)
        signature = generate_blob_sas(
            account_name=self._account.name or "",
            container_name=self._client.container_name,
            blob_name=name,
            account_key=self._account.key,
            permission=BlobSasPermissions(delete=True),
            expiry=end.astimezone(UTC),
        )
        blob = BlobClient(
            self._account.endpoint,
            self._client.container_name,
            name,
            credential=signature,
            transport=_transport(self._session, self.address.settings),
            retry_total=0,
        )
        try:
            with suppress(ObjectNotFoundError):
                self._call("delete", key, blob.delete_blob)
        except StoreDeniedError as error:
            refusal = error.__cause__
            if isinstance(refusal, HttpResponseError) and (now := _clock(refusal)) is not None and now >= end:
                raise PermitEndedError(
                    f"delete {self.url}/{key} at {self._account.endpoint}: its permit has ended"
                ) from error
            raise

    def _write(self, operation: str, key: str, body: bytes, **condition: Any) -> str:
        blob = self._blob(key)
        try:
            answer = self._call(
                operation,
                key,
                lambda: blob.upload_blob(body, length=len(body), validate_content=True, **condition),
            )
        except PreconditionError as error:
            return same_or_lost(self, operation, key, body, error)
        return self._tag(operation, key, answer.get("etag"))

    def _fetch(self, operation: str, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        """Return bytes of an object, and its tag. A whole body is checked against the MD5 that the service stores."""
        blob = self._blob(key)
        span: dict[str, Any] = {} if start == 0 and length is None else {"offset": start, "length": length}

        def ask() -> tuple[bytes, BlobProperties]:
            answer = blob.download_blob(**span)
            return answer.readall(), answer.properties

        try:
            body, properties = self._call(operation, key, ask)
        except _RangeError:
            if start > 0:
                return b"", ""
            return self._fetch(operation, key, 0, None)  # an empty object has no range
        kept = properties.content_settings.content_md5
        if not span and kept and hashlib.md5(body, usedforsecurity=False).digest() != bytes(kept):
            raise IntegrityError(
                f"{operation} {self.url}/{key}: the body does not match the MD5 that {self._account.endpoint} has for "
                "it; publish it again"
            )
        return body, self._tag(operation, key, properties.etag)

    def _page(self, prefix: str, token: str | None) -> _Page:
        """Return a page of a listing, and where it continues."""

        def ask() -> _Found:
            pages = self._client.list_blobs(
                name_starts_with=self._prefix + prefix, results_per_page=min(self.address.settings.page_size, 5000)
            ).by_page(token)
            return [*next(pages, ())], pages.continuation_token  # type: ignore[attr-defined]

        blobs, following = self._call("list", prefix, ask)
        if following and following == token:
            raise StoreError(
                f"list {self.url}/{prefix}: {self._account.endpoint} gives the same page again; use another store"
            )
        return [self._info("list", blob) for blob in blobs], following

    def _blob(self, key: str) -> BlobClient:
        return self._client.get_blob_client(self._prefix + check_key(key))

    def _call(self, operation: str, key: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except _FAILURES as error:
            raise self._store_error(operation, key, error) from error

    def _info(self, operation: str, blob: BlobProperties) -> ObjectInfo:
        key = str(blob.name).removeprefix(self._prefix)
        tag = self._tag(operation, key, blob.etag)
        if blob.last_modified is None or blob.size is None:
            raise StoreError(
                f"{operation} {self.url}/{key}: the answer from {self._account.endpoint} has no size or time, which "
                "tell unused objects from new ones; use a newer release of the store, or another store"
            )
        return ObjectInfo(key=key, size=blob.size, tag=tag, modified=blob.last_modified.astimezone(UTC))

    def _tag(self, operation: str, key: str, etag: str | None) -> str:
        """Return an ETag in the form that conditions take: listings omit the quotes."""
        if not isinstance(etag, str):
            raise StoreUnreachableError(
                f"{operation} {self.url}/{key}: the answer from {self._account.endpoint} has no ETag, so it is not "
                f"Azure's; {ENDPOINT_HINT}"
            )
        return etag if etag.endswith('"') else f'"{etag}"'

    def _store_error(self, operation: str, key: str, error: Exception) -> StoreError:
        """Convert an Azure error to a StoreError that names operation, container, key, endpoint and remedy."""
        where = f"{operation} {self.url}/{key} at {self._account.endpoint}"
        if slow := slowness(error):
            return StoreUnreachableError(f"{where}: {slow}; {ENDPOINT_HINT}, or try again later")
        if isinstance(error, HttpResponseError) and error.status_code is not None:
            return self._answered(where, error, int(error.status_code))
        if isinstance(error, ClientAuthenticationError):  # raised by a chain that found no credentials
            return StoreDeniedError(f"{where}: {_line(error)}; {CREDENTIALS_HINT}")
        return StoreUnreachableError(f"{where}: {_line(error)}; {ENDPOINT_HINT}")

    def _answered(self, where: str, error: HttpResponseError, status: int) -> StoreError:
        """Return the error for an answer, by its code and then its status.

        Codes: https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
        """
        code = str(getattr(error.error_code, "value", error.error_code) or "") if hasattr(error, "error_code") else ""
        text = f"{where}: {status} {code}".rstrip()
        if message := _line(error.message.partition("\n")[0]):
            text = f"{text}: {message}"
        if code in ("ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled"):
            return StoreError(
                f"{where}: {status} {code}: no container {self._client.container_name!r}; create it, or correct the URL"
            )
        if status == 404 and code in ("", "BlobNotFound", "ResourceNotFound"):
            return ObjectNotFoundError(f"{where}: no such object")
        if code in _KEPT:
            return StoreError(f"{text}; a policy, a hold, a lease or its tier keeps this object as it is")
        if status in (304, 412) or code == "BlobAlreadyExists":
            return PreconditionError(text)
        if status == 416:
            return _RangeError(text)
        if status < 300:
            return StoreUnreachableError(f"{where}: the answer is not Azure's; {ENDPOINT_HINT}")
        if code in ("Md5Mismatch", "Crc64Mismatch") or status in (408, 429) or (status >= 500 and status != 501):
            wait = retry_after(_header(error, "Retry-After"))
            return StoreUnreachableError(f"{text}; {ENDPOINT_HINT}, or try again later", retry_after=wait)
        if status in (401, 403) or isinstance(error, ClientAuthenticationError):
            return StoreDeniedError(f"{text}; check the key or the roles of this identity: {CREDENTIALS_HINT}")
        if status == 409:
            return StoreConflictError(f"{text}; other writers are busy with this key, try again")
        if isinstance(error, ResourceNotFoundError):
            return StoreError(f"{text}; check the account: {CREDENTIALS_HINT}")
        return StoreError(f"{text}; see Azure's manual for {code or status}")


class _RangeError(StoreError):
    """416: the range starts at or after the end of the object."""


def _header(error: HttpResponseError, name: str) -> str | None:
    headers = getattr(error.response, "headers", None) or {}
    found = headers.get(name)
    return str(found) if found is not None else None


def _clock(error: HttpResponseError) -> datetime | None:
    """Return the service's time, from the Date of its answer."""
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(_header(error, "Date") or "")
    return None


def _line(error: Exception | str) -> str:
    """Return the text of an error on one line of bounded length."""
    return " ".join(str(error).split())[:300]
