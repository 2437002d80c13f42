"""Any S3 service as a store, through boto3.

Credentials, profile, region and endpoint come from the standard AWS chain (environment, shared files, instance role)
unless `StoreSettings` sets them. A call sends each request once, bounded by time-outs and a minimum throughput
(`least_speed`). `retry.RetryingStore` around this store repeats transient failures; only pages of listings are repeated
here.

A write that is repeated because its answer was lost meets its own object and gets 412. So 412 means a lost race only if
another body is there. The API: https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html (IfMatch,
IfNoneMatch).
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from urllib3.exceptions import HTTPError

from birkhoff.pipeline.errors import (
    ConditionsError,
    IntegrityError,
    ObjectNotFoundError,
    PermitEndedError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store.base import (
    PERMIT_SECONDS,
    UNENDING,
    Addressing,
    Checksums,
    ObjectInfo,
    SigningStore,
    StoreAddress,
    StoreSettings,
    permit_end,
)
from birkhoff.pipeline.store.endpoints import check_encryption, check_endpoint
from birkhoff.pipeline.store.keys import check_key, check_prefix, check_range, is_key
from birkhoff.pipeline.store.least_speed import pace_pools, slowness
from birkhoff.pipeline.store.retry import persist
from birkhoff.pipeline.store.s3_direct import DirectReader
from birkhoff.pipeline.store.s3_errors import (
    CREDENTIALS_HINT,
    ENDPOINT_HINT,
    RangeError,
    answered,
    code_of,
    line,
    status_of,
)


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make imports of a module fail inside the block, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as the import system documents
    try:
        yield
    finally:
        del sys.modules[module]


# botocore takes the standard library's SSLContext from urllib3's bridge to pyOpenSSL, or from urllib3 itself if there
# is no bridge. pyOpenSSL, which Ray requires, would add 25 ms to the start of a `pull`.
with _absent("urllib3.contrib.pyopenssl"):
    import botocore.exceptions as aws
    import botocore.session
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.auth import SIGV4_TIMESTAMP, S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.config import Config
    from botocore.loaders import JSONFileLoader, Loader
    from botocore.parsers import ResponseParserError

MAX_PUT_BYTES = 5 * 2**30  # in one PUT; larger objects would need multipart uploads, which are not conditional

# HTTPError: botocore does not wrap errors in the body of a refusal.
_FAILURES = (aws.BotoCoreError, aws.ClientError, ResponseParserError, HTTPError)
_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, ResponseParserError, HTTPError)
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.ProfileNotFound,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
)
_PARTS = ("Code", "Message")
_SPAN = re.compile(r"bytes (\d+)-(\d+)/")
_NO_REDIRECT = "before-call.s3.HeadBucket"
"""botocore asks for a bucket's location with this call, and would loop if the answer is itself a redirect."""
_TRANSFERS = "creating-client-class.s3"
"""The event on which boto3 adds `upload_file` and similar methods to a client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Credentials:
    """A key pair from outside the AWS chain; never printed, never part of an address."""

    access_key: str
    secret_key: str = field(repr=False)


def open_s3(address: StoreAddress, bucket: str, prefix: str) -> "S3Store":
    """Open `bucket`; connects at the first call. Raises StoreDeniedError, StoreError."""
    core = _Core()
    # Workers must use the settings that environment and profile give here.
    settings = _resolved(address.settings, core)
    client = _client(settings, core, None)
    if not is_aws(client.meta.endpoint_url):
        settings = dataclasses.replace(settings, endpoint=client.meta.endpoint_url)
    return S3Store(dataclasses.replace(address, settings=settings), client, bucket, prefix)


def connect(settings: StoreSettings, credentials: S3Credentials | None = None) -> Any:
    """Return a boto3 client for `settings` that sends each request once.

    With `credentials`, neither the AWS chain nor a proxy is used.

    Raises StoreDeniedError for a profile that does not exist, StoreError for other invalid AWS settings.
    """
    core = _Core()
    return _client(_resolved(settings, core), core, credentials)


class _Core(botocore.session.Session):  # type: ignore[misc]
    """A botocore session for boto3, without boto3's transfer manager: each body here goes in one request.

    Each thread needs its own; all share what was read of botocore's data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lazy_register_component("data_loader", lambda: _loader(self.get_config_variable("data_path")))

    def register(self, event_name: str, handler: Any, *arguments: Any, **options: Any) -> None:
        """Register a handler, unless it adds the transfer manager."""
        if event_name != _TRANSFERS:
            super().register(event_name, handler, *arguments, **options)


class _Files(JSONFileLoader):  # type: ignore[misc]
    """Reads JSON into dicts, in half the time of botocore's OrderedDicts."""

    def _load_file(self, full_path: str, open_method: Callable[..., Any]) -> Any:
        if not os.path.isfile(full_path):  # noqa: PTH113
            return None
        with open_method(full_path, "rb") as file:
            return json.loads(file.read())


class _Services:
    """Names of services. To know one, its own folder is enough; listing all 440 takes 10 ms."""

    def __init__(self, loader: Loader, type_name: str) -> None:
        self._loader, self._type = loader, type_name

    def __contains__(self, service: str) -> bool:
        try:
            return bool(self._loader.list_api_versions(service, self._type))
        except aws.DataNotFoundError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(Loader.list_available_services(self._loader, self._type))


class _Loader(Loader):  # type: ignore[misc]
    """botocore's reader of what it knows of services, which takes most of a client's time; sessions share it."""

    FILE_LOADER_CLASS = _Files

    @property
    def search_paths(self) -> list[str]:
        """A copy: every session of boto3 adds a folder, which clients do not need."""
        return list(super().search_paths)

    def list_available_services(self, type_name: str) -> _Services:
        return _Services(self, type_name)


@cache
def _loader(data_path: str | None) -> _Loader:
    """The one that looks in this path of the AWS configuration, too."""
    return _Loader([os.path.expanduser(part) for part in data_path.split(os.pathsep)] if data_path else None)  # noqa: PTH111


def _resolved(settings: StoreSettings, core: _Core) -> StoreSettings:
    """Return the settings, completed from the AWS environment and profile of this process."""
    with _settings_errors():
        section = core.get_scoped_config().get("s3")
        region = settings.region or core.get_config_variable("region") or "us-east-1"
        sums = settings.checksums or core.get_config_variable("request_checksum_calculation")
    style = section.get("addressing_style") if isinstance(section, dict) else None
    addressing: Addressing = settings.addressing
    if addressing == "auto" and style in ("path", "virtual"):
        addressing = style
    checksums: Checksums = "when_required" if str(sums).lower() == "when_required" else "when_supported"
    return dataclasses.replace(settings, region=region, checksums=checksums, addressing=addressing)


def _client(settings: StoreSettings, core: _Core, credentials: S3Credentials | None) -> Any:
    """Return a client for resolved settings."""
    config = Config(
        # Named explicitly: by default botocore presigns URLs (see s3_direct) with the older signature version.
        signature_version=UNSIGNED if settings.anonymous else "s3v4",
        s3={"addressing_style": "path" if settings.addressing == "auto" else settings.addressing},
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=settings.max_connections,
        request_checksum_calculation=settings.checksums,
        response_checksum_validation="when_required" if settings.checksums == "when_required" else None,
        proxies={} if credentials else None,
    )
    arguments: dict[str, Any] = {"region_name": settings.region, "endpoint_url": settings.endpoint}
    if credentials:
        arguments |= {"aws_access_key_id": credentials.access_key, "aws_secret_access_key": credentials.secret_key}
    with _settings_errors():
        session = Session(botocore_session=core)  # a session must not be shared between threads
        client = session.client("s3", config=config, **arguments)
        if settings.addressing == "auto" and is_aws(client.meta.endpoint_url):
            config = config.merge(Config(s3={"addressing_style": "auto"}))
            client = session.client("s3", config=config, **arguments)
    client.meta.events.register(_NO_REDIRECT, _once)
    # botocore has no public hook for its connections; both its managers, for direct and proxied ones, find their pools
    # in this private dict.
    pace_pools(client._endpoint.http_session._pool_classes_by_scheme, settings.read_timeout)
    check_endpoint(client.meta.endpoint_url)
    check_encryption(client.meta.endpoint_url, allowed=settings.allow_http)
    return client


@contextmanager
def _settings_errors() -> Iterator[None]:
    """Convert errors about AWS settings to StoreError."""
    try:
        yield
    except _NO_CREDENTIALS as error:
        raise StoreDeniedError(f"S3 client: {line(error)}; {CREDENTIALS_HINT}") from error
    except (aws.BotoCoreError, ValueError) as error:
        raise StoreError(f"S3 client: {line(error)}; check the AWS_* variables and ~/.aws/config") from error


def _once(params: dict[str, Any], **_: object) -> None:
    """Mark a request as redirected, so that botocore does not redirect it again."""
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def is_aws(endpoint: str) -> bool:
    """Return whether an endpoint is AWS's own, which has buckets as host names."""
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


class S3Store(SigningStore):
    """The objects of `bucket` below `prefix`, through a botocore client that this store owns."""

    def __init__(self, address: StoreAddress, client: Any, bucket: str, prefix: str) -> None:
        super().__init__(address)
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._attempts = address.settings.attempts
        self._bucket_seen = False
        self._direct = DirectReader(client, address.settings)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        check_range(key, start, length)
        if length == 0:
            self.head(key)
            return b""
        if start == 0:  # Checksums cover whole objects, so ask for the whole, and for a range only if it is longer.
            body, response = self._fetch("get", key, at_most=length)
            if body is not None:
                return body
        last = "" if length is None else start + length - 1
        try:
            body, response = self._fetch("get", key, Range=f"bytes={start}-{last}")
        except RangeError:  # the range starts at or after the end
            return b""
        body = body or b""
        if "ContentRange" in response:
            return body
        return body[start : None if length is None else start + length]  # the store may ignore ranges

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """See Store. Whatever the direct reader does not deliver is read through botocore."""
        check_range(key, start, length)
        request = {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}
        done = self._direct.copy(request, buffer, sink, start=start, length=length)
        if done < length:
            done += super().copy_range(key, buffer, sink, start=start + done, length=length - done)
        return done

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        body, response = self._fetch("read", key, at_most=length)
        if body is None:  # it is longer than `length`
            body, response = self._fetch("read", key, Range=f"bytes=0-{(length or 1) - 1}")
        return (body or b"")[:length], self._tag("read", key, response)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        try:
            found = self._call("head", "head_object", key)
        except ObjectNotFoundError:
            self._require_bucket(key)  # a HEAD answer has no body that tells a missing bucket from a missing key
            raise
        return self._info("head", key, {**found, "Key": self._prefix + key})

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Holds the whole listing, about 300 bytes per object, because not every service sorts by key."""
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        place: dict[str, str] = {}
        while True:
            page = persist(partial(self._page, prefix, place), self._attempts)
            found += [self._info("list", prefix, entry) for entry in page.get("Contents", ())]
            if not page["IsTruncated"]:
                break
            place = self._next_place(prefix, page, place)
        return iter(sorted((info for info in found if is_key(info.key)), key=lambda info: info.key))

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        return self._write("put", key, body)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        return self._write("create", key, body, IfNoneMatch="*")

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        return self._write("replace", key, body, IfMatch=tag)

    def touch(self, key: str) -> None:
        """See Store. The service copies the object onto itself, for which its metadata must be replaced."""
        source = {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}
        self._call("touch", "copy_object", key, CopySource=source, MetadataDirective="REPLACE")

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store."""
        if permit is not None:
            self._delete_signed(key, None if permit == UNENDING else permit_end(permit))
            return
        with suppress(ObjectNotFoundError):
            self._call("delete", "delete_object", key)

    def close(self) -> None:
        """See Store."""
        self._direct.close()
        self._client.close()

    def _delete_once(self, url: str, key: str) -> None:
        """Send a DELETE to a presigned URL."""
        try:
            answer = self._client._endpoint.http_session.send(AWSRequest(method="DELETE", url=url).prepare())
        except _FAILURES as error:
            raise self._store_error("delete", key, error) from error
        if answer.status_code == 404 or answer.status_code < 300:
            return
        parsed = {"Error": _error_of(answer.content), "ResponseMetadata": {"HTTPStatusCode": answer.status_code}}
        if answer.status_code in (400, 403) and "expired" in str(parsed["Error"]).lower():
            raise PermitEndedError(f"delete {self.url}/{key} at {self._endpoint}: its permit has ended")
        raise self._store_error("delete", key, aws.ClientError(parsed, "DeleteObject"))

    def _signs(self) -> bool:
        return not self.address.settings.anonymous

    def _delete_signed(self, key: str, end: datetime | None) -> None:
        """See SigningStore; without an end the signature lasts as long as one can."""
        self._delete_once(self._signed(key, end), key)

    def _signed(self, key: str, end: datetime | None) -> str:
        """Return the URL of an object, presigned for DELETE until `end` by the service's clock, if given.

        This machine's clock is not used.
        """
        where = {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}
        try:
            url = str(self._client.generate_presigned_url("delete_object", Params=where, ExpiresIn=PERMIT_SECONDS))
            if end is None:
                return url
            signer = self._client._request_signer
            auth = _TimedAuth(signer._credentials, signer.signing_name, signer.region_name, PERMIT_SECONDS)
            auth.began = end - timedelta(seconds=PERMIT_SECONDS)
            request = AWSRequest(method="DELETE", url=url.partition("?")[0])
            auth.add_auth(request)
        except _FAILURES as error:
            raise self._store_error("delete", key, error) from error
        return str(request.url)

    def _write(self, operation: str, key: str, body: bytes, **condition: str) -> str:
        if len(body) > MAX_PUT_BYTES:
            raise StoreError(
                f"{operation} {self.url}/{key}: expected at most 5 GiB, got {len(body)} bytes; store it in parts"
            )
        try:
            answer = self._call(operation, "put_object", key, Body=body, **condition)
        except PreconditionError as error:
            return self._same_or_lost(operation, key, body, error, condition)
        except ObjectNotFoundError as error:
            if "IfMatch" in condition:  # AWS answers so if the object is gone
                return self._same_or_lost(operation, key, body, error, condition)
            raise StoreUnreachableError(
                f"{operation} {self.url}/{key}: {self._endpoint} answered 404 to a write, so it is not an "
                f"object store; {ENDPOINT_HINT}"
            ) from error
        return self._tag(operation, key, answer)

    def _same_or_lost(
        self, operation: str, key: str, body: bytes, refusal: StoreError, condition: Mapping[str, str]
    ) -> str:
        """Return the tag of the object if it holds `body`; raise PreconditionError otherwise."""
        with suppress(ObjectNotFoundError):
            found, tag = self.read(key, length=len(body) + 1)
            if found == body:
                return tag
            if tag == condition.get("IfMatch"):
                return self._never_matches(operation, key, body, tag)
            raise PreconditionError(
                f"{operation} {self.url}/{key}: another body is there; read it and decide again"
            ) from refusal
        raise PreconditionError(f"{operation} {self.url}/{key}: the object is gone; read it again") from refusal

    def _never_matches(self, operation: str, key: str, body: bytes, tag: str) -> str:
        """Replace an object that just refused its own tag, or report that no tag ever matches.

        Tags computed from the body may recur if the body was changed back in between; twice in a row that is ruled out.
        """
        try:
            return self._tag(operation, key, self._call(operation, "put_object", key, Body=body, IfMatch=tag))
        except PreconditionError as error:
            if self.head(key).tag != tag:
                raise
            finding = f"refuses If-Match with the very ETag it gave, {tag[:80]}"
            if tag.startswith("W/"):
                finding = f"gives weak ETags ({tag[:80]}), which If-Match never matches"
            raise ConditionsError(
                f"{operation} {self.url}/{key} at {self._endpoint}: the store {finding}; point AWS_ENDPOINT_URL_S3 at "
                "the store itself if a proxy is in front of it, else let one machine publish at a time",
                finding,
            ) from error

    def _fetch(
        self, operation: str, key: str, *, at_most: int | None = None, **arguments: str
    ) -> tuple[bytes | None, dict[str, Any]]:
        """GET an object; the body is None if the object has more than `at_most` bytes."""
        response = self._call(operation, "get_object", key, **arguments)
        self._tag(operation, key, response)
        try:
            with closing(response["Body"]) as body:
                if at_most is not None and response["ContentLength"] > at_most:
                    return None, response
                return _whole(body.read(), response), response
        except aws.FlexibleChecksumError as error:
            raise IntegrityError(f"{operation} {self.url}/{key}: {line(error)}; publish it again") from error
        except _FAILURES as error:
            raise self._store_error(operation, key, error) from error

    def _call(self, operation: str, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        full_key = self._prefix + check_key(key)
        try:
            response: dict[str, Any] = getattr(self._client, method)(Bucket=self._bucket, Key=full_key, **arguments)
        except _FAILURES as error:
            raise self._store_error(operation, key, error, arguments) from error
        self._bucket_seen = True
        return response

    def _tag(self, operation: str, key: str, response: Mapping[str, Any]) -> str:
        tag = response.get("ETag")
        if not isinstance(tag, str):
            raise self._bare(operation, key, "ETag")
        return tag

    def _page(self, prefix: str, place: Mapping[str, str]) -> dict[str, Any]:
        """Return a page of a listing. An answer that is not a listing must not pass for an empty one."""
        size = min(self.address.settings.page_size, 1000)
        try:
            page: dict[str, Any] = self._client.list_objects_v2(
                Bucket=self._bucket, Prefix=self._prefix + prefix, MaxKeys=size, **place
            )
        except _FAILURES as error:
            raise self._store_error("list", prefix, error) from error
        if "IsTruncated" not in page:
            raise StoreUnreachableError(
                f"list {self.url}/{prefix}: the answer from {self._endpoint} is not a listing, so it is not an object "
                f"store; {ENDPOINT_HINT}"
            )
        return page

    def _next_place(self, prefix: str, page: Mapping[str, Any], before: Mapping[str, str]) -> dict[str, str]:
        """Return where a listing continues. A service with only ListObjects version 1 gives no token, so its first
        page may not be all."""
        token = page.get("NextContinuationToken")
        if not token or token == before.get("ContinuationToken"):
            raise StoreError(
                f"list {self.url}/{prefix}: {self._endpoint} cut the listing short without a token for the rest, as "
                "services without ListObjectsV2 do; use a newer release of it, or another store"
            )
        return {"ContinuationToken": token}

    def _info(self, operation: str, key: str, entry: Mapping[str, Any]) -> ObjectInfo:
        """Return what an answer says of an object. `key` is for messages."""
        try:
            name, modified = entry["Key"].removeprefix(self._prefix), entry["LastModified"].astimezone(UTC)
            size = entry["ContentLength"] if operation == "head" else entry["Size"]
            return ObjectInfo(key=name, size=size, tag=entry["ETag"], modified=modified)
        except KeyError as error:
            raise self._bare(operation, key, str(error.args[0])) from error

    def _bare(self, operation: str, key: str, part: str) -> StoreError:
        """Return the error for an answer that lacks a required part."""
        text = f"{operation} {self.url}/{key}: the answer from {self._endpoint} has no {part}"
        if part == "ETag":
            return StoreUnreachableError(f"{text}, so it is not an object store's; {ENDPOINT_HINT}")
        return StoreError(
            f"{text}, which runs and collections need; point AWS_ENDPOINT_URL_S3 at the store itself if a proxy is in "
            "front of it, or use another store"
        )

    def _require_bucket(self, key: str) -> None:
        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except aws.ClientError as error:
            if status_of(error) == 404:
                raise self._missing_bucket("head", key) from error
            return  # not allowed to know
        except _FAILURES as error:
            raise self._store_error("head", key, error) from error
        self._bucket_seen = True

    @property
    def _endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    def _missing_bucket(self, operation: str, key: str) -> StoreError:
        return StoreError(
            f"{operation} {self.url}/{key}: no bucket {self._bucket!r} at {self._endpoint}; "
            "create it, or correct the URL or AWS_ENDPOINT_URL_S3"
        )

    def _store_error(
        self, operation: str, key: str, error: Exception, sent: Mapping[str, object] = MappingProxyType({})
    ) -> StoreError:
        """Convert a botocore error to a StoreError that names operation, bucket, key, endpoint and remedy."""
        where = f"{operation} {self.url}/{key} at {self._endpoint}"
        if isinstance(error, aws.ClientError):
            if code_of(error) == "NoSuchBucket":
                return self._missing_bucket(operation, key)
            return answered(where, error, sent)
        if isinstance(error, _NO_CREDENTIALS):
            return StoreDeniedError(f"{where}: {line(error)}; {CREDENTIALS_HINT}")
        if slow := slowness(error):
            return StoreUnreachableError(f"{where}: {slow}; {ENDPOINT_HINT}, or try again later")
        if isinstance(error, _UNREACHABLE):
            return StoreUnreachableError(f"{where}: {line(error)}; {ENDPOINT_HINT}")
        return StoreError(f"{where}: {line(error)}; check the AWS_* variables and ~/.aws/config")


class _TimedAuth(S3SigV4QueryAuth):  # type: ignore[misc]
    """Presigns a URL from a given time; botocore takes the machine's."""

    began: datetime

    def add_auth(self, request: AWSRequest) -> None:
        request.context["timestamp"] = self.began.astimezone(UTC).strftime(SIGV4_TIMESTAMP)
        self._modify_request_before_signing(request)
        text = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(text, request))


def _whole(body: bytes, response: Mapping[str, Any]) -> bytes:
    """Return the body of an answer if its Content-Range, if any, agrees. Raises IncompleteReadError."""
    span = _SPAN.match(response.get("ContentRange") or "")
    if span and len(body) != (wanted := int(span[2]) - int(span[1]) + 1):
        raise aws.IncompleteReadError(actual_bytes=len(body), expected_bytes=wanted)
    return body


def _error_of(body: bytes) -> dict[str, str]:
    """Return code and message of a refusal, as far as it has them."""
    found = {name: re.search(f"<{name}>([^<]*)</{name}>", body[:4096].decode(errors="replace")) for name in _PARTS}
    return {name: match[1] for name, match in found.items() if match}
