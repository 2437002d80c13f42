"""Any S3 service as a store, through botocore, the part of boto3 that makes the calls.

Credentials, profile, region and endpoint come from the standard AWS chain (environment, shared files, instance role)
unless `StoreSettings` names them. One attempt is bounded by the time-outs and a least speed (`pace`), all
of them by `attempts`: botocore's "standard" retry mode repeats what may pass (time-outs, 5xx, throttling), and this
module what botocore leaves alone: a body that breaks off after its headers or fails its checksum, 409 from writes that
met, and a body that changed on its way to the store.

A write repeated after its answer was lost meets its own object and gets 412. So a 412 is a loss only if another body
is there. The API: https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html (IfMatch, IfNoneMatch).
"""

import dataclasses
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions as aws
from botocore import UNSIGNED
from botocore.config import Config
from botocore.parsers import ResponseParserError
from botocore.session import get_session
from urllib3.exceptions import HTTPError

from birkhoff.pipeline.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.pace import pace_pools, slowness
from birkhoff.pipeline.store import (
    ObjectInfo,
    Store,
    StoreAddress,
    StoreSettings,
    check_encryption,
    check_endpoint,
)
from birkhoff.pipeline.store_keys import check_key, check_prefix, check_range, is_key
from birkhoff.pipeline.store_s3_direct import DirectReader

MAX_PUT_BYTES = 5 * 2**30  # of one PUT; larger objects would need multipart uploads, which are not conditional

# HTTPError: botocore does not wrap what breaks the body of a refusal.
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
_CHANGED = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_SPAN = re.compile(r"bytes (\d+)-(\d+)/")
_CREDENTIALS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_ENDPOINT_HINT = "check the network and AWS_ENDPOINT_URL_S3"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Credentials:
    """A key pair that does not come from the AWS chain; never printed, never part of an address."""

    access_key: str
    secret_key: str = field(repr=False)


def open_s3(address: StoreAddress, bucket: str, prefix: str) -> "S3Store":
    """Open `bucket`; connects at the first call. Raises StoreDeniedError, StoreError."""
    client = connect(address.settings)
    if not is_aws(client.meta.endpoint_url):
        # What the environment of this process says must hold for its workers too.
        settings = dataclasses.replace(address.settings, endpoint=client.meta.endpoint_url)
        address = dataclasses.replace(address, settings=settings)
    return S3Store(address, client, bucket, prefix)


def connect(settings: StoreSettings, credentials: S3Credentials | None = None) -> Any:
    """A botocore client for `settings`. With `credentials` the AWS chain is not asked, nor is any proxy used.

    Raises StoreDeniedError for a profile that does not exist, StoreError for other broken AWS settings.
    """
    try:
        session = get_session()  # of its own: one is not safe to share between threads
        if credentials:
            session.set_credentials(credentials.access_key, credentials.secret_key)
        region = settings.region or session.get_config_variable("region") or "us-east-1"
        style = "path" if settings.addressing == "auto" else settings.addressing
        config = Config(
            # Named, as botocore would sign addresses (see store_s3_direct) in the form before this one.
            signature_version=UNSIGNED if settings.anonymous else "s3v4",
            s3={"addressing_style": style},
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            max_pool_connections=settings.max_connections,
            request_checksum_calculation=settings.checksums,
            response_checksum_validation=settings.checksums,
            proxies={} if credentials else None,
        )
        client = session.create_client("s3", region_name=region, endpoint_url=settings.endpoint, config=config)
        if settings.addressing == "auto" and is_aws(client.meta.endpoint_url):
            config = config.merge(Config(s3={"addressing_style": "auto"}))
            client = session.create_client("s3", region_name=region, endpoint_url=settings.endpoint, config=config)
    except _NO_CREDENTIALS as error:
        raise StoreDeniedError(f"S3 client: {_line(error)}; {_CREDENTIALS_HINT}") from error
    except (aws.BotoCoreError, ValueError) as error:
        raise StoreError(f"S3 client: {_line(error)}; check the AWS_* variables and ~/.aws/config") from error
    # No door of botocore's leads to its connections; both managers, that of proxies too, look their pools up here.
    pace_pools(client._endpoint.http_session._pool_classes_by_scheme, settings.read_timeout)
    check_endpoint(client.meta.endpoint_url)
    check_encryption(client.meta.endpoint_url, allowed=settings.allow_http)
    return client


def is_aws(endpoint: str) -> bool:
    """Whether an endpoint is AWS's own, where buckets are host names."""
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


class S3Store(Store):
    """The objects of `bucket` below `prefix`, through a botocore client that this store then owns."""

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
        if start == 0:  # asked for whole, as checksums are of whole objects; by range only where it is longer
            body, response = self._fetch("get", key, at_most=length)
            if body is not None:
                return body
        last = "" if length is None else start + length - 1
        try:
            body, response = self._fetch("get", key, Range=f"bytes={start}-{last}")
        except _RangeError:  # starts at or after the end
            return b""
        body = body or b""
        if "ContentRange" in response:
            return body
        return body[start : None if length is None else start + length]  # a store that ignores ranges

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """See Store. What the direct way does not bring goes the usual one, with its retries and its errors."""
        check_range(key, start, length)
        request = {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}
        done = self._direct.copy(request, buffer, sink, start=start, length=length)
        if done < length:
            done += super().copy_range(key, buffer, sink, start=start + done, length=length - done)
        return done

    def read(self, key: str) -> tuple[bytes, str]:
        """See Store."""
        body, response = self._fetch("read", key)
        return body or b"", self._tag("read", key, response)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        try:
            found = self._call("head", "head_object", key)
        except ObjectNotFoundError:
            self._require_bucket(key)  # the answer to HEAD has no body to say which of the two is missing
            raise
        tag, modified = self._tag("head", key, found), found["LastModified"].astimezone(UTC)
        return ObjectInfo(key=key, size=found["ContentLength"], tag=tag, modified=modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Holds the whole listing, some 300 bytes an object: not every service sorts by key."""
        check_prefix(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            PaginationConfig={"PageSize": min(self.address.settings.page_size, 1000)},
        )
        try:
            found = [self._info(entry) for page in pages for entry in self._entries(prefix, page)]
        except _FAILURES as error:
            raise self._store_error("list", prefix, error) from error
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

    def delete(self, key: str) -> None:
        """See Store."""
        with suppress(ObjectNotFoundError):
            self._call("delete", "delete_object", key)

    def close(self) -> None:
        """See Store."""
        self._direct.close()
        self._client.close()

    def _write(self, operation: str, key: str, body: bytes, **condition: str) -> str:
        if len(body) > MAX_PUT_BYTES:
            raise StoreError(
                f"{operation} {self.url}/{key}: expected at most 5 GiB, got {len(body)} bytes; store it in parts"
            )
        for attempt in range(self._attempts):
            try:
                answer = self._call(operation, "put_object", key, Body=body, **condition)
                return self._tag(operation, key, answer)
            except (_ConflictError, _ChangedError) as error:
                conflict = error
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
            except PreconditionError as error:
                return self._same_or_lost(operation, key, body, error)
            except ObjectNotFoundError as error:
                if "IfMatch" in condition:  # AWS's answer where the object is gone
                    return self._same_or_lost(operation, key, body, error)
                raise StoreUnreachableError(
                    f"{operation} {self.url}/{key}: {self._endpoint} answered 404 to a write, so it is not an "
                    f"object store; {_ENDPOINT_HINT}"
                ) from error
        raise conflict

    def _same_or_lost(self, operation: str, key: str, body: bytes, refusal: StoreError) -> str:
        """Tag of the object if it holds `body`; otherwise the condition has lost."""
        with suppress(ObjectNotFoundError):
            found, tag = self.read(key)
            if found == body:
                return tag
            raise PreconditionError(
                f"{operation} {self.url}/{key}: another body is there; read it and decide again"
            ) from refusal
        raise PreconditionError(f"{operation} {self.url}/{key}: the object is gone; read it again") from refusal

    def _fetch(
        self, operation: str, key: str, *, at_most: int | None = None, **arguments: str
    ) -> tuple[bytes | None, dict[str, Any]]:
        """GET an object, again if its body breaks off; no body if the object has more than `at_most` bytes."""
        for attempt in range(self._attempts):
            response = self._call(operation, "get_object", key, **arguments)
            self._tag(operation, key, response)
            try:
                with closing(response["Body"]) as body:
                    if at_most is not None and response["ContentLength"] > at_most:
                        return None, response
                    return _whole(body.read(), response), response
            except aws.BotoCoreError as error:
                broken = error
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
        if isinstance(broken, aws.FlexibleChecksumError):
            raise IntegrityError(f"{operation} {self.url}/{key}: {_line(broken)}; publish it again") from broken
        raise self._store_error(operation, key, broken) from broken

    def _call(self, operation: str, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        full_key = self._prefix + check_key(key)
        for attempt in range(self._attempts):
            try:
                response: dict[str, Any] = getattr(self._client, method)(Bucket=self._bucket, Key=full_key, **arguments)
            except HTTPError as error:
                broken = error
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
                continue
            except _FAILURES as error:
                raise self._store_error(operation, key, error) from error
            self._bucket_seen = True
            return response
        raise self._store_error(operation, key, broken) from broken

    def _tag(self, operation: str, key: str, response: dict[str, Any]) -> str:
        tag = response.get("ETag")
        if not isinstance(tag, str):
            raise StoreUnreachableError(
                f"{operation} {self.url}/{key}: the answer from {self._endpoint} has no ETag, so it is not "
                f"an object store's; {_ENDPOINT_HINT}"
            )
        return tag

    def _entries(self, prefix: str, page: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """What a page of a listing holds. A page of something else would pass for an empty one."""
        if "IsTruncated" not in page:
            raise StoreUnreachableError(
                f"list {self.url}/{prefix}: the answer from {self._endpoint} is no listing, so it is not an object "
                f"store's; {_ENDPOINT_HINT}"
            )
        found: Sequence[dict[str, Any]] = page.get("Contents", ())
        return found

    def _info(self, entry: dict[str, Any]) -> ObjectInfo:
        key, modified = entry["Key"].removeprefix(self._prefix), entry["LastModified"].astimezone(UTC)
        return ObjectInfo(key=key, size=entry["Size"], tag=entry["ETag"], modified=modified)

    def _require_bucket(self, key: str) -> None:
        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except aws.ClientError as error:
            if _status(error) == 404:
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

    def _store_error(self, operation: str, key: str, error: Exception) -> StoreError:
        """The error of ours for one of botocore's, naming operation, bucket, key, endpoint and remedy."""
        where = f"{operation} {self.url}/{key} at {self._endpoint}"
        if isinstance(error, aws.ClientError):
            if error.response.get("Error", {}).get("Code") == "NoSuchBucket":
                return self._missing_bucket(operation, key)
            return _answered(where, error)
        if isinstance(error, _NO_CREDENTIALS):
            return StoreDeniedError(f"{where}: {_line(error)}; {_CREDENTIALS_HINT}")
        if slow := slowness(error):
            return StoreUnreachableError(f"{where}: {slow}; {_ENDPOINT_HINT}, or try again later")
        if isinstance(error, _UNREACHABLE):
            return StoreUnreachableError(f"{where}: {_line(error)}; {_ENDPOINT_HINT}")
        return StoreError(f"{where}: {_line(error)}; check the AWS_* variables and ~/.aws/config")


class _RangeError(StoreError):
    """416: the range starts at or after the end of the object."""


class _ConflictError(StoreError):
    """409: another conditional write of the same key was under way."""


class _ChangedError(StoreUnreachableError):
    """400: the bytes that arrived are not those that were sent."""


def _whole(body: bytes, response: dict[str, Any]) -> bytes:
    """The body of an answer whose Content-Range, if it has one, agrees. Raises IncompleteReadError."""
    span = _SPAN.match(response.get("ContentRange") or "")
    if span and len(body) != (wanted := int(span[2]) - int(span[1]) + 1):
        raise aws.IncompleteReadError(actual_bytes=len(body), expected_bytes=wanted)
    return body


def _answered(where: str, error: aws.ClientError) -> StoreError:
    """The error for an answer with status 300 or above."""
    status, code = _status(error), error.response.get("Error", {}).get("Code", "")
    text = f"{where}: {status} {_line(error)}"
    if status == 404:
        return ObjectNotFoundError(f"{where}: no such object")
    if status == 412:
        return PreconditionError(text)
    if status == 416:
        return _RangeError(text)
    if status == 409 and code in ("ConditionalRequestConflict", "OperationAborted"):
        return _ConflictError(f"{text}; other writers are busy with this key, try again")
    if code in _CHANGED:
        return _ChangedError(f"{text}; {_ENDPOINT_HINT}, or try again later")
    if code in _EXPIRED:
        return StoreDeniedError(f"{text}; get new credentials, and run the same command again")
    if code == "RequestTimeTooSkewed":
        return StoreDeniedError(f"{text}; set this machine's clock")
    if status in (401, 403):
        return StoreDeniedError(f"{text}; check the key pair and its permissions: {_CREDENTIALS_HINT}")
    if status in (408, 429) or (status >= 500 and status != 501):
        return StoreUnreachableError(f"{text}; {_ENDPOINT_HINT}, or try again later")
    if status in (400, 501):
        return StoreError(f"{text}; a store that rejects checksums needs the setting checksums=when_required")
    return StoreError(f"{text}; {_ENDPOINT_HINT}")


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _line(error: Exception) -> str:
    """The text of an error in one line of bounded length."""
    return " ".join(str(error).split())[:300]
