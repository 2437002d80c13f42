"""What a store can do, found out on small objects before any real work starts."""

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from birkhoff.pipeline.errors import ConditionsError, PreconditionError, StoreError
from birkhoff.pipeline.store.base import UNENDING, Store

FOLDER = "probe/"
"""Where the probe writes."""

_IGNORED = "ignores conditional writes"
_GOOGLE = "storage.googleapis.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCapabilities:
    """What `check_store` found out.

    create, replace: whether `create` and `replace` let the right one through and refuse the others, as promised.
        Without that two publishers can overwrite each other: keep to one publisher and to keys that are written once.
    problem: what the store does instead, worded to follow its name in a sentence; None if both promises hold.
    """

    create: bool = True
    replace: bool = True
    problem: str | None = None

    @property
    def conditional_writes(self) -> bool:
        """Whether several publishers are safe."""
        return self.create and self.replace


def check_store(store: Store) -> StoreCapabilities:
    """Write, read back, overwrite and delete small objects in `FOLDER`, before any real work starts.

    Raises StoreDeniedError if one of these is not allowed, StoreUnreachableError if nothing answers, and StoreError
    if the store hands out anything but what was written last (a cache in front of it, say), or does not say when.
    """
    key, fresh = f"{FOLDER}{uuid.uuid4().hex}", f"{FOLDER}{uuid.uuid4().hex}"
    try:
        stale = store.put(key, b"first")
        _expect(store, key, b"first")
        store.put(key, b"second")
        _expect(store, key, b"second")
        store.head(key)
        create = _creates(store, key, fresh)
        replace = _replaces(store, key, stale)
    except BaseException:
        with contextlib.suppress(StoreError):
            _delete(store, key, fresh)
        raise
    _delete(store, key, fresh)
    problem = create if create == replace else " and ".join(filter(None, (create, replace)))
    return StoreCapabilities(create=create is None, replace=replace is None, problem=_named(store, problem or None))


def ends_permits(store: Store) -> bool:
    """Whether others can end what a process was permitted to delete, tried on an object in `FOLDER`.

    Raises StoreDeniedError, StoreUnreachableError, StoreError as `check_store`.
    """
    key = f"{FOLDER}{uuid.uuid4().hex}"
    store.put(key, b"witness")
    try:
        permit = store.permit(store.head(key).modified, witness=key)
        if permit == UNENDING:
            return False
        store.revoke(permit)
        return True
    finally:
        _delete(store, key)


def _delete(store: Store, *keys: str) -> None:
    for key in keys:
        store.delete(key)


def _expect(store: Store, key: str, body: bytes) -> None:
    found = store.get(key)
    if found != body:
        raise StoreError(
            f"{store.url}: {key} was written as {body!r} and read back as {found[:32]!r}; "
            "point the endpoint at the store itself, not at a cache or a proxy in front of it"
        )


def _creates(store: Store, key: str, fresh: str) -> str | None:
    """What is wrong with `create`: one over an object must lose, one of a new object must win."""
    return _lets(lambda: store.create(key, b"must lose"), wins=False) or _lets(
        lambda: store.create(fresh, b"must win"), wins=True, refused="refuses If-None-Match where no object is"
    )


def _replaces(store: Store, key: str, stale: str) -> str | None:
    """What is wrong with `replace`: one of a state long gone must lose, one of the state just read must win."""
    return _lets(lambda: store.replace(key, b"must lose too", tag=stale), wins=False) or _lets(
        lambda: store.replace(key, b"must win", tag=store.read(key)[1]), wins=True, refused="refuses If-Match always"
    )


def _lets(write: Callable[[], object], *, wins: bool, refused: str = "") -> str | None:
    """What a conditional write does instead of what it must; None where it does that."""
    try:
        write()
    except ConditionsError as error:
        return error.finding
    except PreconditionError:
        return refused if wins else None
    return None if wins else _IGNORED


def _named(store: Store, problem: str | None) -> str | None:
    """What is known of a service by its address goes with what was found."""
    host = urlsplit(store.address.settings.endpoint or "").hostname or ""
    if problem and (host == _GOOGLE or host.endswith(f".{_GOOGLE}")):
        return (
            f"{problem} (Google Cloud Storage's S3 interface has generations where S3 has ETags; gs://BUCKET uses them)"
        )
    return problem
