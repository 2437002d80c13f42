"""Error answers of S3 services: the exception and the remedy for each code.

A status says little: services use 400, 403 and 501 for a dozen different things. So the code in the answer's XML
decides first, then the elements it names (`Header`, `Region`, `Endpoint`), then the request's parameters, and last the
status. Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; MinIO, Ceph and SeaweedFS add their
own.
"""

from collections.abc import Mapping
from typing import Any

import botocore.exceptions as aws

from birkhoff.pipeline.backoff import retry_after
from birkhoff.pipeline.errors import (
    ConditionsError,
    ObjectNotFoundError,
    PreconditionError,
    StoreConflictError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)

CREDENTIALS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
ENDPOINT_HINT = "check the network and AWS_ENDPOINT_URL_S3"
CHECKSUMS_HINT = (
    "this store rejects the checksums that clients send since 2025: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
)

_HEADERS = {"IfNoneMatch": "If-None-Match", "IfMatch": "If-Match"}
_MET = ("ConditionalRequestConflict", "OperationAborted")
_CHANGED = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_UNSUPPORTED = ("NotImplemented", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "UnsupportedOperation")
_ELSEWHERE = (
    *("PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"),
    *("IllegalLocationConstraintException", "301", "307"),
)
_SLOW = (
    *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "RequestThrottled"),
    *("RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests", "TooManyRequestsException"),
)
_BROKEN = ("RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete")
"""Transient, although their status is 400."""
_REMEDIES: Mapping[str, tuple[type[StoreError], str]] = {
    **dict.fromkeys(_EXPIRED, (StoreDeniedError, "get new credentials, and run the same command again")),
    **dict.fromkeys((*_CHANGED, *_BROKEN), (StoreUnreachableError, f"{ENDPOINT_HINT}, or try again later")),
    **dict.fromkeys(_SLOW, (StoreUnreachableError, "it has too many requests: try again later")),
    **dict.fromkeys(_MET, (StoreConflictError, "other writers are busy with this key, try again")),
    **dict.fromkeys(
        ("QuotaExceeded", "QuotaExceededException", "XMinioAdminBucketQuotaExceeded", "ServiceQuotaExceededException"),
        (StoreError, "the quota is used up: free some space there (`birkhoff gc`), or ask for a larger one"),
    ),
    **dict.fromkeys(
        ("InsufficientStorage", "XMinioStorageFull", "StorageFull", "507"),
        (StoreError, "the store's own disks are full: free some space there (`birkhoff gc`), or give it more"),
    ),
    "RequestTimeTooSkewed": (StoreDeniedError, "set this machine's clock"),
    "MissingContentLength": (
        StoreError,
        "set AWS_ENDPOINT_URL_S3 to the store itself: what stands before it drops lengths",
    ),
    "EntityTooLarge": (StoreError, "the store takes no object of this size; lower shard_mib in the manifest"),
}


class RangeError(StoreError):
    """416: the range starts at or after the end of the object."""


def answered(where: str, error: aws.ClientError, sent: Mapping[str, object]) -> StoreError:
    """Return the error for an answer with status 300 or above to a request with the parameters `sent`.

    `where` names operation, address and endpoint.
    """
    status, code = status_of(error), code_of(error)
    text = f"{where}: {said(error)}"
    condition = next((_HEADERS[name] for name in sent if name in _HEADERS), None)
    if status == 404:
        return ObjectNotFoundError(f"{where}: no such object")
    if status in (304, 412) or (status == 409 and condition and code not in _MET):
        return PreconditionError(text)
    if status == 416:
        return RangeError(text)
    if code in _ELSEWHERE or (status == 400 and code in ("400", "") and _region(error)):
        return StoreError(f"{text}; {_elsewhere(error)}")
    if code in _REMEDIES:
        kind, remedy = _REMEDIES[code]
        return _with_wait(kind(f"{text}; {remedy}"), error)
    if status in (401, 403):
        return StoreDeniedError(f"{text}; check the key pair and its permissions: {CREDENTIALS_HINT}")
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507)):
        return _with_wait(StoreUnreachableError(f"{text}; {ENDPOINT_HINT}, or try again later"), error)
    return _unsupported(text, error, condition)


def _unsupported(text: str, error: aws.ClientError, condition: str | None) -> StoreError:
    """Return the error for the remaining 3xx, 4xx and 501: usually a feature that the service lacks."""
    status, code = status_of(error), code_of(error)
    about = f"{named(error, 'Header')} {named(error, 'Message')}".lower()
    if any(word in about for word in ("checksum", "trailer", "aws-chunked")):
        return StoreError(f"{text}; {CHECKSUMS_HINT}")
    if condition and (code in _UNSUPPORTED or status in (405, 501)):
        finding = f"answers {condition} with {status} {code}"
        return ConditionsError(f"{text}; it has no conditional writes: let one machine publish at a time", finding)
    if status == 501 or code == "NotImplemented":
        return StoreError(f"{text}; the store lacks this call: use a newer release of it, or another store")
    return StoreError(f"{text}; see the store's manual for {code or status}, or check AWS_ENDPOINT_URL_S3")


def _elsewhere(error: aws.ClientError) -> str:
    """Return the remedy for a bucket in another region or at another endpoint."""
    region, endpoint = _region(error), named(error, "Endpoint")
    remedies = []
    if region:
        remedies.append(f"set AWS_REGION={region}")
    if endpoint:
        remedies.append(f"point AWS_ENDPOINT_URL_S3 at {endpoint}")
    if not remedies:
        return "the bucket is in another region or at another endpoint: correct AWS_REGION or AWS_ENDPOINT_URL_S3"
    return f"the bucket is elsewhere: {', or '.join(remedies)}"


def _region(error: aws.ClientError) -> str:
    """Return the region that an answer names; answers to HEAD have it only in a header."""
    return named(error, "Region") or _header(error, "x-amz-bucket-region")


def _with_wait(error: StoreError, answer: aws.ClientError) -> StoreError:
    if isinstance(error, StoreUnreachableError):
        error.retry_after = retry_after(_header(answer, "retry-after"))
    return error


def _header(error: aws.ClientError, name: str) -> str:
    return str(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get(name, ""))[:100]


def status_of(error: aws.ClientError) -> int:
    """Return the HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def said(error: aws.ClientError) -> str:
    """Return status, code and message of an answer."""
    status, code = str(status_of(error)), code_of(error)
    message = line(str(error.response.get("Error", {}).get("Message") or ""))
    return f"{status} {': '.join(part for part in (code, message) if part not in ('', status))}".rstrip()


def code_of(error: aws.ClientError) -> str:
    """Return the code of an answer, such as NoSuchBucket."""
    return named(error, "Code")


def named(error: aws.ClientError, element: str) -> str:
    """Return the text of an element in the answer's XML, on one line and bounded; empty if it is missing."""
    found: Any = error.response.get("Error", {}).get(element, "")
    return " ".join(str(found or "").split())[:100]


def line(error: Exception | str) -> str:
    """Return the text of an error on one line of bounded length."""
    return " ".join(str(error).split())[:300]
