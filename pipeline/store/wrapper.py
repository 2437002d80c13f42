"""A store around another store. Subclasses change one aspect and pass on the rest."""

from collections.abc import Callable, Iterator
from datetime import datetime

from birkhoff.pipeline.store.base import ObjectInfo, Store


class StoreWrapper(Store):
    """Passes every call on to `inner`, which it owns."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner.address)
        self.inner = inner

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        return self.inner.get(key, start=start, length=length)

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """See Store."""
        return self.inner.copy_range(key, buffer, sink, start=start, length=length)

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        return self.inner.read(key, length=length)

    def put(self, key: str, body: bytes) -> str:
        """See Store."""
        return self.inner.put(key, body)

    def create(self, key: str, body: bytes) -> str:
        """See Store."""
        return self.inner.create(key, body)

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        """See Store."""
        return self.inner.replace(key, body, tag=tag)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return self.inner.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store."""
        return self.inner.list(prefix)

    def touch(self, key: str) -> None:
        """See Store."""
        self.inner.touch(key)

    def delete(self, key: str, *, permit: str | None = None) -> None:
        """See Store."""
        self.inner.delete(key, permit=permit)

    def permit(self, now: datetime, *, witness: str) -> str:
        """See Store."""
        return self.inner.permit(now, witness=witness)

    def revoke(self, permit: str) -> datetime | None:
        """See Store."""
        return self.inner.revoke(permit)

    def close(self) -> None:
        """See Store."""
        self.inner.close()
