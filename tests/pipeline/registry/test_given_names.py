"""Numbers that are not given again, kept as ranges."""

import random
from collections.abc import Iterator
from datetime import timedelta

import pytest

from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.registry.documents import GivenNames, given_key
from birkhoff.pipeline.registry.gc import collect, remove_version
from birkhoff.pipeline.registry.names import all_names, claim_name, given, read_given, remember_given
from birkhoff.pipeline.store.base import ObjectInfo
from birkhoff.pipeline.store.memory import MemoryStore
from tests.pipeline.publishing import publish_contents


def test_ranges_hold_just_what_was_put_in() -> None:
    rng = random.Random(0)
    for _ in range(200):
        chosen = {rng.randint(1, 40) for _ in range(rng.randint(0, 30))}
        parts = [set(rng.sample(sorted(chosen), len(chosen) // 2)), chosen]
        record = GivenNames()
        for part in parts:
            record = read_document(GivenNames, "given", record.with_numbers(part).to_bytes())
        assert {number for number in range(1, 42) if record.holds(number)} == chosen
        assert all(last + 1 < first for (_, last), (first, _) in zip(record.ranges, record.ranges[1:], strict=False))


@pytest.mark.parametrize("body", [b'{"ranges":[[3,1]]}', b'{"ranges":[[5,6],[1,2]]}', b'{"ranges":[[0,2]]}', b"[]"])
def test_what_is_no_list_of_ranges_is_refused(body: bytes) -> None:
    store = MemoryStore()
    store.put(given_key("net"), body)
    with pytest.raises(IntegrityError, match=r"models/net/given\.json"):
        read_given(store, "net")


def test_whoever_writes_at_once_loses_nothing() -> None:
    store = MemoryStore()

    class Rival(MemoryStore):
        """Writes a number between another's reading and writing."""

        left = 2

        def replace(self, key: str, body: bytes, *, tag: str) -> str:
            if Rival.left:
                Rival.left -= 1
                remember_given(store, "net", [f"v{70 + Rival.left}"])
            return store.replace(key, body, tag=tag)

    rival = Rival()
    rival._shelf = store._shelf
    remember_given(store, "net", ["v1"])
    remember_given(rival, "net", ["v2", "v9"])
    assert read_given(store, "net").ranges == ((1, 2), (9, 9), (70, 71))


def test_a_publisher_paused_after_listing_takes_no_number_that_was_collected_meanwhile() -> None:
    store = MemoryStore()
    publish_contents(store, "net", "a")

    class Paused(MemoryStore):
        """What others do between its first listing of names and its next step."""

        paused = False

        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            yield from list(store.list(prefix))
            if prefix == "models/net/names/" and not self.paused:
                self.paused = True
                for content in ("b", "c"):
                    publish_contents(store, "net", content)
                remove_version(store, "net", "v2")
                for _ in range(2):  # the first buries, the second deletes
                    collect(store, grace=timedelta(0), delete=True)
                assert given(store, "net") == ["v1", "v3"]

    paused = Paused()
    paused._shelf = store._shelf
    claim = claim_name(paused, "net", "d" * 64, "paused")
    assert paused.paused
    assert claim.name == "v4"
    assert claim_name(store, "net", "e" * 64, "later").name == "v5"
    for _ in range(2):
        collect(store, grace=timedelta(0), delete=True)
    assert [name for name, record in all_names(store, "net") if record.live] == ["v1", "v3"]
    assert read_given(store, "net").holds(2)
