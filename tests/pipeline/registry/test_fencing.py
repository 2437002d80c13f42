"""The protocol of pipeline/registry/PROTOCOL.md on real stores, a case a rule; the simulator has the interleavings."""

import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, StoreError, StoreUnreachableError
from birkhoff.pipeline.registry import clock, fencing, gc, leases, parallel, versions
from birkhoff.pipeline.registry.aliases import aliases, promote
from birkhoff.pipeline.registry.documents import (
    NOTHING,
    AliasRecord,
    NameRecord,
    alias_key,
    blob_key,
    name_key,
    shard_key,
    version_key,
)
from birkhoff.pipeline.registry.fencing import SWEEP_KEY, SweepRecord
from birkhoff.pipeline.registry.gc import collect, retire
from birkhoff.pipeline.registry.history import history_rows
from birkhoff.pipeline.registry.leases import Lease, open_run
from birkhoff.pipeline.registry.names import claim_name, names, read_name
from birkhoff.pipeline.registry.versions import is_whole, load_version, models, publish, resolve
from birkhoff.pipeline.shard.run import find_record
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.memory import MemoryStore
from tests.pipeline.publishing import keep
from tests.pipeline.publishing import publish_contents as make

NOW = timedelta(0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "THREADS", 1)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Callable[[], object]], None]:
    """Lets a function of a module stop at its next call, while something else happens that knows of no lease."""

    def stop(module: Any, name: str, meanwhile: Callable[[], object]) -> None:
        real, done = getattr(module, name), threading.Event()

        def slow(*arguments: Any, **options: Any) -> Any:
            if not done.is_set():
                done.set()
                with monkeypatch.context() as patch:
                    patch.setattr(leases, "_live", lambda *_: [])  # the stopped one's lease has run out
                    thread = threading.Thread(target=meanwhile)
                    thread.start()
                    thread.join()
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, slow)

    return stop


def keys(store: Store, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}


def check_whole(store: Store) -> None:
    for model in models(store):
        pointers = [record for _, record in names(store, model)] + list(aliases(store, model).values())
        for digest in {pointer.digest for pointer in pointers}:
            assert is_whole(store, load_version(store, model, digest)), f"{model}@{digest}"


@pytest.mark.usefixtures("brief_permits")
def test_a_collection_stopped_in_its_sweep_deletes_nothing_of_a_version_published_meanwhile(
    store: Store, stopped: Any
) -> None:
    make(store, "net", "a", "b")
    make(store, "net", "c")
    retire(store, "net", 1)
    stopped(gc, "_touched", lambda: make(store, "net", "a", "b"))
    with pytest.raises(
        StoreError, match=r"gc: .*has ended this one because it was stopped or slow; nothing is damaged"
    ):
        collect(store, grace=NOW, delete=True)
    assert resolve(store, "net").name == "v3"
    check_whole(store)
    collect(store, grace=NOW, delete=True)
    check_whole(store)
    assert keys(store, "runs/") == ({SWEEP_KEY} if store.url.startswith("s3://") else set())


@pytest.mark.usefixtures("brief_permits")
@pytest.mark.parametrize("step", ["settle", "is_whole", "make_live", "claim_name", "all_names"])
def test_a_publisher_stopped_before_any_step_names_no_version_that_was_collected(
    store: Store, stopped: Any, step: str
) -> None:
    make(store, "net", "a")
    make(store, "net", "b")
    retire(store, "net", 1)
    stopped(versions, step, lambda: collect(store, grace=NOW, delete=True))
    said = ""
    try:
        make(store, "net", "a")
    except StoreError as error:
        said = str(error)
    assert not said or "a blob of net has gone since it was stored; run again" in said
    check_whole(store)
    version = make(store, "net", "a")
    assert resolve(store, "net").name == version.name
    check_whole(store)


def test_a_claim_is_no_version_and_goes_after_the_grace_period(store: Store) -> None:
    make(store, "net", "a")
    digest = resolve(store, "net").digest
    claim = claim_name(store, "net", digest, "dead")
    assert (claim.name, [name for name, _ in names(store, "net")]) == ("v2", ["v1"])
    with pytest.raises(ArtifactNotFoundError):
        resolve(store, "net@v2")
    assert [row["event"] for row in history_rows(store, "net")] == ["published", "moved"]
    collect(store, grace=timedelta(days=1), delete=True)
    assert read_name(store, "net", "v2").claimed
    collect(store, grace=NOW, delete=True)
    assert read_name(store, "net", "v2").dead
    assert not versions.make_live(store, "net", claim)
    assert make(store, "net", "b").name == "v3"


def test_a_claim_left_by_a_publisher_of_the_same_version_is_taken_over(store: Store) -> None:
    make(store, "net", "a")
    first = make(store, "net", "b")
    retire(store, "net", 1)
    manifest = first.manifest.model_copy(update={"code": "1"})
    claim = claim_name(store, "net", manifest.digest, "failed")
    assert publish(store, manifest).name == claim.name == "v3"
    assert not versions.make_live(store, "net", claim)


def test_old_readers_see_a_claim_and_a_buried_name_as_retired(store: Store) -> None:
    make(store, "net", "a")
    claim_name(store, "net", resolve(store, "net").digest, "dead")
    make(store, "net", "b")
    retire(store, "net", 1)
    collect(store, grace=NOW, delete=True)
    claim_name(store, "net", resolve(store, "net").digest, "dead")
    for key in keys(store, "models/net/names/"):
        record = json.loads(store.get(key))
        assert record.keys() <= {"digest", "created", "publisher", "single_publisher", "retired"}
        assert ("retired" in record) == (key != name_key("net", "v3"))


def test_an_alias_that_is_being_made_is_none_yet(store: Store) -> None:
    make(store, "net", "a")
    unmade = AliasRecord(version="v1", digest=NOTHING, gen=1, moved="2030-01-01T00:00:00+00:00", publisher="dead")
    store.create(alias_key("net", "stable"), unmade.to_bytes())
    assert set(aliases(store, "net")) == {"latest"}
    with pytest.raises(ArtifactNotFoundError, match="no version or alias"):
        resolve(store, "net@stable")
    collect(store, grace=NOW, delete=True)
    move = promote(store, "net", "v1")
    assert (move.before, move.after.gen, move.after.previous) == (None, 1, ())
    assert resolve(store, "net@stable").name == "v1"


@pytest.mark.parametrize("alias", ["stable", "latest"])
def test_a_mover_stopped_after_its_look_at_the_name_points_at_no_version_that_was_collected(
    store: Store, stopped: Any, alias: str
) -> None:
    from birkhoff.pipeline.registry import aliases as module

    make(store, "net", "a")
    make(store, "net", "b")

    def meanwhile() -> None:
        retire(store, "net", 1)
        collect(store, grace=NOW, delete=True)

    stopped(module, "_next", meanwhile)
    with pytest.raises(ArtifactNotFoundError, match="v1"):
        promote(store, "net", "v1", alias)
    assert aliases(store, "net")["latest"].version == "v2"
    check_whole(store)


def test_a_burial_rewrites_an_alias_and_changes_nothing_of_what_it_says(store: Store) -> None:
    make(store, "net", "a")
    make(store, "net", "b")
    before = aliases(store, "net")["latest"]
    retire(store, "net", 1)
    collect(store, grace=NOW, delete=True)
    after = aliases(store, "net")["latest"]
    assert after.publisher != before.publisher
    assert after.model_copy(update={"publisher": before.publisher}) == before


def _dead_sweep(store: Store, *found: str) -> SweepRecord:
    """What a collection that was killed has left."""
    lease = Lease(store, "runs/sweep/")
    permit = store.permit(lease.renew(), witness=lease.key)
    store.delete(lease.key)
    record = SweepRecord(sweep="x", holder="process 1 on h", step=1, state="sweeping", permit=permit, keys=found)
    store.create(SWEEP_KEY, record.to_bytes())
    return record


def test_what_a_killed_collection_condemned_can_be_published_and_goes_with_the_next_collection(
    directory_store: Store,
) -> None:
    store = directory_store
    key = blob_key(keep(store, "a").blob)
    record = _dead_sweep(store, key)
    make(store, "net", "a")
    found = fencing.read_sweep(store)
    assert found is not None
    assert found[0].state == "ended"
    with pytest.raises(StoreError, match="its permit has ended"):
        store.delete(key, permit=record.permit)
    collect(store, grace=NOW, delete=True)
    assert keys(store, "runs/") == set()
    check_whole(store)


def test_on_s3_a_publisher_waits_for_the_end_of_the_permit() -> None:
    ahead = timedelta(0)
    store = MemoryStore(like="s3", clock=lambda: datetime.now(UTC) + ahead)
    key = blob_key(keep(store, "a").blob)
    record = _dead_sweep(store, key)
    waited: list[float] = []

    def pause(seconds: float) -> None:
        nonlocal ahead
        ahead += timedelta(seconds=7)
        waited.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "pause", pause)
        make(store, "net", "a")
    assert len(waited) >= 4
    with pytest.raises(StoreError, match="its permit has ended"):
        store.delete(key, permit=record.permit)
    check_whole(store)


def test_where_nobody_can_end_a_collection_publishing_what_it_condemned_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.1)
    monkeypatch.setattr(leases, "SLACK_SECONDS", 0.1)
    store = MemoryStore(like="plain")
    key = blob_key(keep(store, "a").blob)
    _dead_sweep(store, key)
    match = r"a collection \(process 1 on h\) may still be deleting.*delete runs/condemned.json and run again"
    with pytest.raises(StoreError, match=match):
        make(store, "net", "a")
    with pytest.raises(StoreError, match=match):
        collect(store, grace=NOW, delete=True)
    assert make(store, "net", "b").name == "v2"  # v1 is the claim of the first
    store.delete(SWEEP_KEY)
    assert make(store, "net", "a").name == "v3"
    check_whole(store)


@pytest.mark.parametrize("answered", [True, False])
def test_on_s3_what_was_deleted_stays_condemned_while_its_permit_lasts(
    monkeypatch: pytest.MonkeyPatch, *, answered: bool
) -> None:
    """A proxy may send a request twice: the second copy takes effect although the first was answered."""
    ahead = timedelta(0)
    store = MemoryStore(like="s3", clock=lambda: datetime.now(UTC) + ahead)
    key = blob_key(keep(store, "a").blob)
    delete, lost, permits = store.delete, [not answered], set[str]()

    def pause(seconds: float) -> None:
        nonlocal ahead
        ahead += timedelta(seconds=7)

    def noting(key: str, *, permit: str | None = None) -> None:
        delete(key, permit=permit)
        permits.update([permit] if permit else [])
        if permit and lost and lost.pop():
            raise StoreUnreachableError("answer lost")

    monkeypatch.setattr(store, "delete", noting)
    monkeypatch.setattr(clock, "pause", pause)
    assert len(collect(store, grace=NOW, delete=True).garbage) == 2
    assert ahead < timedelta(seconds=10)  # nobody waits for it
    keep(store, "b")
    assert len(collect(store, grace=NOW, delete=True).garbage) == 2
    found = fencing.read_sweep(store)
    assert found is not None
    assert (found[0].state, key in found[0].keys) == ("ended", True)  # the later collection knows of it too
    make(store, "net", "a")
    assert ahead > timedelta(seconds=30)
    for permit in permits:
        with pytest.raises(StoreError, match="its permit has ended"):
            delete(key, permit=permit)
    check_whole(store)
    for _ in range(2):
        ahead += timedelta(minutes=1)
        collect(store, grace=NOW, delete=True)
    found = fencing.read_sweep(store)
    assert found is not None
    assert found[0].keys == ()


def test_what_is_reused_becomes_young(directory_store: Store) -> None:
    store, record = directory_store, keep(directory_store, "a")
    root = store.url.removeprefix("file://")
    touched = [blob_key(record.blob), shard_key(record.key)]

    def age() -> None:
        for key in keys(store):
            os.utime(f"{root}/{key}", (0, 0))

    age()
    assert find_record(store, record.key) == record
    assert all(store.head(key).modified.year > 2000 for key in touched)
    version = make(store, "net", "a")
    make(store, "net", "b")
    age()
    assert make(store, "net", "a").same_as == "v1"
    assert store.head(blob_key(record.blob)).modified.year > 2000
    assert store.head(version_key("net", version.digest)).modified.year > 2000


def test_a_shard_whose_blob_is_longer_than_its_record_says_is_read_no_further(memory_store: Store) -> None:
    record = keep(memory_store, "a")
    memory_store.put(blob_key(record.blob), b"a" * 1000)
    asked: list[int | None] = []
    get = memory_store.get

    def noting(key: str, *, start: int = 0, length: int | None = None) -> bytes:
        asked.append(length)
        return get(key, start=start, length=length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_store, "get", noting)
        assert find_record(memory_store, record.key) is None
    assert asked == [MAX_DOCUMENT_BYTES + 1, 2]


def test_documents_larger_than_any_are_read_no_further(memory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = memory_store
    make(store, "net", "a")
    store.put(alias_key("net", "stable"), b" " * (MAX_DOCUMENT_BYTES + 100))
    read, asked = store.read, list[int]()

    def noting(key: str, *, length: int | None = None) -> tuple[bytes, str]:
        body, tag = read(key, length=length)
        asked.append(len(body))
        return body, tag

    monkeypatch.setattr(store, "read", noting)
    with pytest.raises(IntegrityError, match="larger than"):
        promote(store, "net", "v1")
    assert max(asked) == MAX_DOCUMENT_BYTES + 1


def test_publishing_reads_few_of_many_names(memory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store, get = memory_store, memory_store.get
    digest = make(store, "net", "a").digest
    for number in range(2, 500):
        record = NameRecord(digest=digest, created="2030-01-01T00:00:00+00:00", publisher=f"{number}")
        store.create(name_key("net", f"v{number}"), record.to_bytes())
    asked: list[str] = []

    def noting(key: str, **options: Any) -> bytes:
        asked.append(key)
        return get(key, **options)

    monkeypatch.setattr(store, "get", noting)
    assert make(store, "net", "b").name == "v500"
    assert len([key for key in asked if "/names/" in key]) < 5


def test_a_lease_from_ahead_of_the_stores_clock_ends_when_nobody_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(leases, "SLACK_SECONDS", 0.1)
    ahead = timedelta(days=1)
    store = MemoryStore(clock=lambda: datetime.now(UTC) + ahead)
    keep(store, "a")
    Lease(store, "runs/open/").renew()
    ahead = timedelta(0)  # the clock is set right
    assert len(collect(store, grace=-timedelta(days=2), delete=True).garbage) == 2
    assert keys(store) == set()
    ahead = timedelta(days=1)
    with open_run(store):
        ahead = timedelta(0)
        with pytest.raises(StoreError, match="has open runs"):
            collect(store, grace=NOW, delete=True)
