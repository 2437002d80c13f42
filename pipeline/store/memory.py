"""A store in this process's memory, with the same contract, for tests of code that uses stores.

`MemoryStore()` creates an empty one with a URL of its own, `memory://<name>`. The URL opens it again anywhere in this
process, while any store under it exists. `like` chooses the kind of store to imitate where kinds differ:

=============  ========================  =======================  ======================================
`like`         tags                      times                    deletions under a permit are refused
=============  ========================  =======================  ======================================
``directory``  unique                    microseconds             from the moment it is revoked
``s3``         equal for equal bodies    whole seconds            once the store's clock has passed its end
``plain``      equal for equal bodies    whole seconds            never
=============  ========================  =======================  ======================================
"""

import hashlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

from birkhoff.pipeline.errors import ObjectNotFoundError, PermitEndedError, PreconditionError, StoreError
from birkhoff.pipeline.store.base import (
    UNENDING,
    ObjectInfo,
    Store,
    StoreAddress,
    permit_end,
    timed_permit,
    unrevocable,
)
from birkhoff.pipeline.store.keys import check_key, check_prefix, check_range

Kind = Literal["directory", "s3", "plain"]


def _utc() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class _Object:
    body: bytes
    info: ObjectInfo


@dataclass(eq=False)
class _Shelf:
    """The state shared by all stores under one URL."""

    like: Kind
    clock: Callable[[], datetime]
    objects: dict[str, _Object] = field(default_factory=dict)
    permits: set[str] = field(default_factory=set)
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> datetime:
        now = self.clock()
        return now if self.like == "directory" else now.replace(microsecond=0)

    def write(self, key: str, body: bytes) -> str:
        self.written += 1
        tag = f"{self.written:x}" if self.like == "directory" else hashlib.md5(body).hexdigest()
        self.objects[key] = _Object(body, ObjectInfo(key=key, size=len(body), tag=tag, modified=self.now()))
        return tag


_shelves: weakref.WeakValueDictionary[str, _Shelf] = weakref.WeakValueDictionary()


class MemoryStore(Store):
    """A new, empty store, or the one at `address`. `clock` gives the store's time, aware and in UTC.

    Raises StoreError for an address that no store of this process has.
    """

    def __init__(
        self,
        address: StoreAddress | None = None,
        *,
        like: Kind = "directory",
        clock: Callable[[], datetime] = _utc,
    ) -> None:
        shelf = _Shelf(like, clock) if address is None else _shelves.get(address.url)
        if shelf is None:
            raise StoreError(
                f"{address.url if address else ''}: no such store in this process; a memory store ends with the "
                "process that made it: name a file:// or s3:// store"
            )
        super().__init__(address or StoreAddress(url=f"memory://{uuid.uuid4().hex}"))
        self._shelf = shelf
        _shelves[self.url] = shelf

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        check_range(key, start, length)
        return self._find("get", key).body[start : None if length is None else start + length]

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        found = self._find("read", key)
        return found.body[:length], found.info.tag

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return self._find("head", key).info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store."""
        check_prefix(prefix)
        with self._shelf.lock:
            found = [item.info for key, item in self._shelf.objects.items() if key.startswith(prefix)]
        return iter(sorted(found, key=lambda info: info.key))

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        check_key(key)
        with self._shelf.lock:
            return self._shelf.write(key, body)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        check_key(key)
        with self._shelf.lock:
            if (found := self._shelf.objects.get(key)) is not None:
                return self._same_or_lost("create", found, body)
            return self._shelf.write(key, body)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        check_key(key)
        with self._shelf.lock:
            if (found := self._shelf.objects.get(key)) is None:
                raise PreconditionError(f"replace {self.url}/{key}: the object is gone; read it again")
            if found.info.tag != tag:
                return self._same_or_lost("replace", found, body)
            return self._shelf.write(key, body)

    def touch(self, key: str) -> None:
        """See Store."""
        with self._shelf.lock:
            found = self._find("touch", key)
            info = replace(found.info, modified=self._shelf.now())
            self._shelf.objects[key] = _Object(found.body, info)

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store."""
        check_key(key)
        with self._shelf.lock:
            if permit is not None and self._ended(permit):
                raise PermitEndedError(f"delete {self.url}/{key}: its permit has ended")
            self._shelf.objects.pop(key, None)

    def permit(self, now: datetime, *, witness: str) -> str:  # noqa: ARG002
        """See Store."""
        if self._shelf.like == "s3":
            return timed_permit(now)
        if self._shelf.like == "plain":
            return UNENDING
        permit = uuid.uuid4().hex
        with self._shelf.lock:
            self._shelf.permits.add(permit)
        return permit

    def revoke(self, permit: str) -> datetime | None:
        """See Store."""
        if self._shelf.like == "plain":
            raise unrevocable(self.url)
        if self._shelf.like == "s3":
            return permit_end(permit)
        with self._shelf.lock:
            self._shelf.permits.discard(permit)
        return None

    def close(self) -> None:
        """See Store. The objects stay while any store under this URL exists."""

    def _ended(self, permit: str) -> bool:
        if self._shelf.like == "s3":
            return self._shelf.clock() > permit_end(permit)
        return self._shelf.like == "directory" and permit not in self._shelf.permits

    def _find(self, operation: str, key: str) -> _Object:
        try:
            return self._shelf.objects[check_key(key)]
        except KeyError:
            raise ObjectNotFoundError(f"{operation} {self.url}/{key}: no such object") from None

    def _same_or_lost(self, operation: str, found: _Object, body: bytes) -> str:
        if found.body == body:
            return found.info.tag
        raise PreconditionError(
            f"{operation} {self.url}/{found.info.key}: another body is there; read it and decide again"
        )
