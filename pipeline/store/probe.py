"""The probe of a store: what it can do, tried on small objects before any real work starts."""

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from birkhoff.pipeline.errors import ConditionsError, PreconditionError, StoreError
from birkhoff.pipeline.store.base import UNENDING, Store

FOLDER = "probe/"
"""The probe writes here."""

_IGNORED = "ignores conditional writes"
_GOOGLE = "storage.googleapis.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCapabilities:
    """The result of `check_store`.

    create, replace: Whether `create` and `replace` accept the right write and refuse the others. If not, two publishers
    can overwrite each other: use one publisher at a time.
    problem: What the store does instead, worded to follow its name in a sentence; None if both work.
    """

    create: bool = True
    replace: bool = True
    problem: str | None = None

    @property
    def conditional_writes(self) -> bool:
        """Whether several publishers are safe."""
        return self.create and self.replace


def check_store(store: Store) -> StoreCapabilities:
    """Write, read back, overwrite and delete small objects in `FOLDER`.

    Raises:
        StoreDeniedError: One of these is not allowed.
        StoreUnreachableError: The store does not answer.
        StoreError: The store returns something else than was written last (a cache in front of it, say), or no time.
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
    """Return whether others can revoke a process's permit to delete, tried on an object in `FOLDER`.

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
    """Return what is wrong with `create`: over an object it must fail, for a new object it must succeed."""
    return _lets(lambda: store.create(key, b"must lose"), wins=False) or _lets(
        lambda: store.create(fresh, b"must win"), wins=True, refused="refuses If-None-Match where no object is"
    )


def _replaces(store: Store, key: str, stale: str) -> str | None:
    """Return what is wrong with `replace`: of an old state it must fail, of the present state it must succeed."""
    return _lets(lambda: store.replace(key, b"must lose too", tag=stale), wins=False) or _lets(
        lambda: store.replace(key, b"must win", tag=store.read(key)[1]), wins=True, refused="refuses If-Match always"
    )


def _lets(write: Callable[[], object], *, wins: bool, refused: str = "") -> str | None:
    """Return what a conditional write does wrong; None if it does what it must."""
    try:
        write()
    except ConditionsError as error:
        return error.finding
    except PreconditionError:
        return refused if wins else None
    return None if wins else _IGNORED


def _named(store: Store, problem: str | None) -> str | None:
    """Add to a finding what is known about a service by its address."""
    host = urlsplit(store.address.settings.endpoint or "").hostname or ""
    if problem and (host == _GOOGLE or host.endswith(f".{_GOOGLE}")):
        return (
            f"{problem} (Google Cloud Storage's S3 interface has generations where S3 has ETags; gs://BUCKET uses them)"
        )
    return problem
