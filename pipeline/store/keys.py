"""Keys that every store accepts: relative POSIX paths that S3 and common file systems can both hold.

Also the names in keys that all readers must agree on.
"""

import re
import unicodedata

from birkhoff.pipeline.errors import StoreError

MAX_KEY_BYTES = 1024  # of S3
MAX_COMPONENT_BYTES = 255  # of the common file systems
RESERVED = ".store"  # locks and temporary files of a directory store

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Valid names of models and aliases."""
DIGEST = re.compile(r"[0-9a-f]{64}")
"""A SHA-256 in hex, which names blobs and versions."""
ALIAS_LATEST = "latest"
ALIAS_STABLE = "stable"


_COMMON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}(/[A-Za-z0-9][A-Za-z0-9._-]{0,200}){0,4}")
"""Keys that this package makes, which need no closer check."""


def check_key(key: str) -> str:
    """Return a usable key. Raises StoreError if some store could not hold it, or would hold it under another key."""
    if _COMMON.fullmatch(key):
        return key
    problem = _problem(key.split("/"))
    if problem is None and len(key.encode()) > MAX_KEY_BYTES:
        problem = f"it is longer than {MAX_KEY_BYTES} bytes"
    if problem:
        raise StoreError(f"key {key[:80]!r}: expected a relative path like models/vit_b/v1.json, but {problem}")
    return key


def is_key(key: str) -> bool:
    """Return whether `check_key` accepts `key`."""
    try:
        check_key(key)
    except StoreError:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Return a usable prefix: nothing, or the beginning of a key. Raises StoreError."""
    if prefix.endswith("/") and _COMMON.fullmatch(prefix[:-1]):
        return prefix
    folders, _, last = prefix.rpartition("/")
    problem = _problem(folders.split("/") if "/" in prefix else []) or _problem([last or "-"], partial=True)
    if problem:
        raise StoreError(f"prefix {prefix[:80]!r}: expected the beginning of a key, but {problem}")
    return prefix


def check_range(key: str, start: int, length: int | None) -> None:
    """Raise StoreError for a negative start or length."""
    if start < 0 or (length is not None and length < 0):
        raise StoreError(f"get {key}: expected start and length of 0 or more bytes, got {start} and {length}")


def _problem(components: list[str], *, partial: bool = False) -> str | None:
    """Return what is wrong with the components of a key; with `partial`, the last one may be incomplete."""
    if components and components[0] == RESERVED:
        return f"{RESERVED}/ is reserved"
    for component in components:
        if component in ("", ".", "..") and not partial:
            return "it is empty, absolute, or has an empty, . or .. component"
        if "\\" in component or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in component):
            return "it holds a backslash, a control character or a lone surrogate"
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            return f"a component is longer than {MAX_COMPONENT_BYTES} bytes"
    return None
