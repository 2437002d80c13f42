"""Trying again: what is repeated, how long it waits, and what is never repeated."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from birkhoff.pipeline.backoff import LONGEST_SECONDS
from birkhoff.pipeline.errors import (
    ConditionsError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreConflictError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store.base import ObjectInfo, Store, StoreAddress
from birkhoff.pipeline.store.retry import RetryingStore

INFO = ObjectInfo(key="k", size=10, tag="t", modified=datetime(2026, 1, 1, tzinfo=UTC))


class Scripted(Store):
    """Fails with each of `errors` in turn, then answers; counts calls."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(StoreAddress(url="s3://scripted"))
        self.errors = list(errors)
        self.calls: list[tuple[object, ...]] = []

    def _answer(self, *call: object) -> None:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        self._answer("get", key, start, length)
        return b"0123456789"[start : None if length is None else start + length]

    def copy_range(
        self, key: str, buffer: memoryview, sink: Callable[[memoryview], object], *, start: int, length: int
    ) -> int:
        """Hands on half of what is asked for before it fails."""
        self.calls.append(("copy_range", start, length))
        body = b"0123456789"[start : start + length]
        if self.errors:
            sink(memoryview(body[: length // 2]))
            raise self.errors.pop(0)
        sink(memoryview(body))
        return len(body)

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        self._answer("read", key)
        return b"body"[:length], "t"

    def put(self, key: str, body: bytes) -> str:
        self._answer("put", key, body)
        return "t"

    def create(self, key: str, body: bytes) -> str:
        self._answer("create", key, body)
        return "t"

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        self._answer("replace", key, body, tag)
        return "t"

    def head(self, key: str) -> ObjectInfo:
        self._answer("head", key)
        return INFO

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._answer("list", prefix)
        return iter([INFO])

    def touch(self, key: str) -> None:
        self._answer("touch", key)

    def delete(self, key: str, *, permit: str | None = None) -> None:
        self._answer("delete", key)

    def permit(self, now: datetime, *, witness: str) -> str:
        self._answer("permit", now, witness)
        return "p"

    def revoke(self, permit: str) -> datetime | None:
        self._answer("revoke", permit)
        return None

    def close(self) -> None:
        self._answer("close")


CALLS: list[tuple[Callable[[Store], object], object]] = [
    (lambda store: store.get("k", start=2, length=3), b"234"),
    (lambda store: store.read("k"), (b"body", "t")),
    (lambda store: store.put("k", b"1"), "t"),
    (lambda store: store.create("k", b"1"), "t"),
    (lambda store: store.replace("k", b"1", tag="t"), "t"),
    (lambda store: store.head("k"), INFO),
    (lambda store: store.delete("k"), None),
]
PASSING = [StoreUnreachableError("no answer"), StoreConflictError("met"), IntegrityError("checksum")]
LASTING = [
    ConditionsError("none", "has none"),
    ObjectNotFoundError("gone"),
    PreconditionError("lost"),
    StoreDeniedError("no"),
    StoreError("full"),
    OSError("disk"),
]


class TestRetryingStore:
    @pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize("call", CALLS)
    def test_what_may_pass_is_tried_again(
        self, waits: list[float], error: Exception, call: tuple[Callable[[Store], object], object]
    ) -> None:
        inner = Scripted(error, error, error)
        assert call[0](RetryingStore(inner, 4)) == call[1]
        assert len(inner.calls) == 4
        assert len(set(inner.calls)) == 1  # the very same call
        assert len(waits) == 3

    @pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
    @pytest.mark.parametrize("call", CALLS)
    def test_what_is_for_good_is_not(
        self, waits: list[float], error: Exception, call: tuple[Callable[[Store], object], object]
    ) -> None:
        inner = Scripted(error)
        with pytest.raises(type(error), match=str(error)):
            call[0](RetryingStore(inner, 4))
        assert (len(inner.calls), waits) == (1, [])

    @pytest.mark.parametrize("kind", [StoreUnreachableError, StoreConflictError, IntegrityError])
    def test_the_last_error_comes_out_and_counts(self, waits: list[float], kind: type[Exception]) -> None:
        inner = Scripted(*(kind(f"no answer {number}") for number in range(9)))
        with pytest.raises(kind) as caught:
            RetryingStore(inner, 3).put("k", b"")
        assert str(caught.value) == "no answer 2 (3 attempts)"
        assert len(inner.calls) == 3
        assert len(waits) == 2

    def test_one_attempt_is_one(self, waits: list[float]) -> None:
        with pytest.raises(StoreUnreachableError, match=r"^no$"):
            RetryingStore(Scripted(StoreUnreachableError("no")), 1).head("k")
        assert waits == []

    def test_what_the_store_asks_for_is_waited(self, waits: list[float]) -> None:
        asked = [StoreUnreachableError("slow", retry_after=seconds) for seconds in (7.0, 0.0, 1e9)]
        RetryingStore(Scripted(*asked), 4).put("k", b"")
        assert waits == [7.0, 0.0, LONGEST_SECONDS]

    def test_a_copy_goes_on_where_it_broke_off(self, waits: list[float]) -> None:
        inner, got = Scripted(*PASSING), bytearray()
        buffer = memoryview(bytearray(16))
        done = RetryingStore(inner, 4).copy_range("k", buffer, got.extend, start=2, length=8)
        assert (done, bytes(got)) == (8, b"23456789")
        assert inner.calls == [("copy_range", 2, 8), ("copy_range", 6, 4), ("copy_range", 8, 2), ("copy_range", 9, 1)]

    def test_an_error_of_the_sink_is_the_callers(self, waits: list[float]) -> None:
        """Whatever its class: its bytes must not come twice."""

        def sink(_: memoryview) -> None:
            raise StoreUnreachableError("of another store")

        inner = Scripted()
        with pytest.raises(StoreUnreachableError, match="of another store"):
            RetryingStore(inner, 4).copy_range("k", memoryview(bytearray(16)), sink, start=0, length=4)
        assert (len(inner.calls), waits) == (1, [])

    def test_a_listing_is_its_stores_own(self, waits: list[float]) -> None:
        inner = Scripted(StoreUnreachableError("page 7"))
        with pytest.raises(StoreUnreachableError, match=r"^page 7$"):
            RetryingStore(inner, 4).list("k")
        assert waits == []
