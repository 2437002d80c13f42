"""Checks of service URLs: usable, without credentials, and encrypted unless they are on this machine."""

import ipaddress
from urllib.parse import urlsplit

from birkhoff.pipeline.errors import StoreError


def check_endpoint(endpoint: str) -> str:
    """Return a usable endpoint URL. Raises StoreError, without repeating a password in it."""
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
    """Return whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_exposed(url: str) -> bool:
    """Return whether a URL reaches another machine over plain http, which can be read and changed on its way."""
    parts = urlsplit(url)
    return parts.scheme.lower() == "http" and not is_loopback(parts.hostname or "")


def check_encryption(endpoint: str, *, allowed: bool) -> None:
    """Refuse an endpoint on another machine without TLS. Raises StoreError."""
    if allowed or not is_exposed(endpoint):
        return
    raise StoreError(
        f"endpoint {endpoint}: plain http can be read and changed on its way; use https, or allow it with "
        "--allow-http, `allow_http: true` in the manifest or BIRKHOFF_ALLOW_HTTP=1"
    )
