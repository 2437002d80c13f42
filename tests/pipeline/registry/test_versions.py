"""What a store has of a version."""

from birkhoff.pipeline.registry.documents import BaseBlob, blob_key, sha256
from birkhoff.pipeline.registry.versions import missing_blobs
from birkhoff.pipeline.store.base import ObjectInfo, Store
from birkhoff.pipeline.store.memory import MemoryStore


class Counting(MemoryStore):
    """Notes which objects it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def head(self, key: str) -> ObjectInfo:
        self.asked.append(key)
        return super().head(key)


def stored(store: Store, *bodies: bytes) -> list[BaseBlob]:
    for body in bodies:
        store.put(blob_key(sha256(body)), body)
    return [BaseBlob(blob=sha256(body), bytes=len(body)) for body in bodies]


def test_blobs_that_were_seen_are_not_asked_about_again() -> None:
    store, seen = Counting(), set[tuple[str, int]]()
    one, two, three = stored(store, b"1", b"22", b"333")
    gone = BaseBlob(blob=sha256(b"gone"), bytes=4)
    assert missing_blobs(store, [one, two, gone, one], seen) == [gone]
    assert len(store.asked) == 3
    assert missing_blobs(store, [two, three, gone], seen) == [gone]
    assert store.asked[3:] == [blob_key(three.blob), blob_key(gone.blob)]
    assert seen == {(record.blob, record.bytes) for record in (one, two, three)}


def test_a_blob_of_another_size_is_missing_although_its_digest_was_seen() -> None:
    store, seen = Counting(), set[tuple[str, int]]()
    (one,) = stored(store, b"1")
    assert missing_blobs(store, [one], seen) == []
    longer = BaseBlob(blob=one.blob, bytes=2)
    assert missing_blobs(store, [longer], seen) == [longer]


def test_without_what_was_seen_every_blob_is_asked_about() -> None:
    store = Counting()
    records = stored(store, b"1", b"22")
    assert missing_blobs(store, records) == missing_blobs(store, records) == []
    assert len(store.asked) == 4
