"""Retention, garbage collection and leases: what goes, what stays, and what a crash or a race may never break."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    IntegrityError,
    ManifestError,
    PreconditionError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.registry import gc, leases, parallel, versions
from birkhoff.pipeline.registry.aliases import aliases, promote, rollback
from birkhoff.pipeline.registry.documents import (
    ShardRecord,
    SourceRecord,
    VersionManifest,
    blob_key,
    name_key,
    sha256,
    shard_key,
    statistics_key,
    version_key,
)
from birkhoff.pipeline.registry.fencing import SWEEP_KEY, read_sweep
from birkhoff.pipeline.registry.gc import Collection, collect, remove_version, retirable, retire
from birkhoff.pipeline.registry.leases import Lease, open_run, sweeping
from birkhoff.pipeline.registry.names import given, names, read_name, retire_name
from birkhoff.pipeline.registry.versions import is_whole, load_version, models, publish, resolve
from birkhoff.pipeline.store.base import Store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.publishing import keep, keep_felt, record_of
from tests.pipeline.publishing import publish_contents as make

pytestmark = pytest.mark.usefixtures("brief_permits")

NOW = timedelta(0)
DAY = timedelta(days=1)


def keys(store: Store, prefix: str = "") -> set[str]:
    """What lies there, but for the record of a sweep that has ended: on S3 it stays."""
    found = {info.key for info in store.list(prefix)}
    if SWEEP_KEY in found and store.url.startswith("s3:"):
        record = read_sweep(store)
        found -= {SWEEP_KEY} if record is not None and record[0].state == "ended" else set()
    return found


def objects(found: Collection, kind: str) -> set[str]:
    return {item.info.key for item in found.garbage if item.kind == kind}


def check_whole(store: Store) -> None:
    """No name and no alias refers to anything that is not there."""
    for model in models(store):
        pointers = [record for _, record in names(store, model)] + list(aliases(store, model).values())
        for digest in {pointer.digest for pointer in pointers}:
            assert is_whole(store, load_version(store, model, digest)), f"{model}@{digest}"


def fleet(store: Store) -> None:
    """Two models, five versions: net's v1 can go, with it one shard of two; a run that died left a lone shard."""
    make(store, "net", "a", "b")
    make(store, "net", "b", "c")
    make(store, "net", "d")
    make(store, "net", "e")
    make(store, "other", "a2", "b")
    promote(store, "net", "v2")
    keep(store, "lone")


def test_a_dry_run_shows_what_a_real_one_deletes(store: Store) -> None:
    fleet(store)
    before = keys(store)
    planned = collect(store, grace=NOW, keep=2)
    assert keys(store) == before
    found = collect(store, grace=NOW, keep=2, delete=True)
    gone = before - keys(store)
    assert (planned.deleted, planned.retired, found.retired) == (False, [("net", "v1")], [("net", "v1")])
    assert {item.info.key for item in planned.garbage} == gone
    assert [{**row, "deleted": True, "bytes": 0} for row in planned.rows()] == [
        {**row, "bytes": 0} for row in found.rows()
    ]
    assert gone == {
        name_key("net", "v1"),
        *objects(found, "version"),
        shard_key(record_of("a").key),
        shard_key(record_of("lone").key),
        blob_key(record_of("a").blob),
        blob_key(record_of("lone").blob),
    }
    assert len(objects(found, "version")) == 1
    check_whole(store)
    assert [(row["kind"], row["model"], row["objects"], row["kept"]) for row in found.rows()] == [
        ("name", "net", 1, 3),
        ("name", "other", 0, 1),
        ("version", "net", 1, 3),
        ("version", "other", 0, 1),
        ("shard", None, 2, 5),
        ("blob", None, 2, 5),
    ]
    assert collect(store, grace=NOW, delete=True).garbage == []


def test_nothing_young_is_deleted(store: Store) -> None:
    fleet(store)
    before = keys(store)
    found = collect(store, grace=DAY, keep=1, delete=True)
    assert (found.garbage, found.retired) == ([], [("net", "v1"), ("net", "v3")])
    assert keys(store) == before
    check_whole(store)


def age(store: Store, days: float) -> None:
    """Make every object of a directory store so much older."""
    root = store.address.url.removeprefix("file://")
    for key in keys(store):
        path = f"{root}/{key}"
        then = os.stat(path).st_mtime - days * 86400  # noqa: PTH116
        os.utime(path, (then, then))


def test_the_grace_period_of_a_version_starts_when_it_is_retired(directory_store: Store) -> None:
    store = directory_store
    digest = make(store, "net", "a").digest
    make(store, "net", "b")
    age(store, 30)
    assert retire(store, "net", 1) == ["v1"]
    assert collect(store, grace=DAY, delete=True).garbage == []
    assert load_version(store, "net", digest).shards[0] == record_of("a")
    age(store, 2)
    assert len(collect(store, grace=DAY, delete=True).garbage) == 4
    with pytest.raises(ArtifactNotFoundError):
        load_version(store, "net", digest)


def test_a_young_record_holds_its_old_blob(directory_store: Store) -> None:
    store = directory_store
    keep(store, "a")
    age(store, 30)
    store.put(shard_key(record_of("a").key), record_of("a").to_bytes())
    assert collect(store, grace=DAY, delete=True).garbage == []
    age(store, 30)
    assert len(collect(store, grace=DAY, delete=True).garbage) == 2


def test_the_clock_of_the_store_counts_and_not_that_of_the_machine(directory_store: Store) -> None:
    keep(directory_store, "a")
    age(directory_store, -30)  # a store whose clock is ahead
    assert collect(directory_store, grace=NOW, delete=True).garbage == []


def test_retirement_keeps_the_newest_and_what_aliases_point_at(store: Store) -> None:
    for content in "abcde":
        make(store, "net", content)
    promote(store, "net", "v2")
    assert retirable(store, "net", 3) == ["v1"]
    assert retire(store, "net", 2) == ["v1", "v3"]
    assert retire(store, "net", 2) == []
    assert [name for name, _ in names(store, "net")] == ["v2", "v4", "v5"]
    assert retire(store, "net", 100) == []
    with pytest.raises(ManifestError, match="expected 1 version or more"):
        retire(store, "net", 0)


def test_a_number_is_never_given_twice(store: Store) -> None:
    make(store, "net", "a")
    make(store, "net", "b")
    make(store, "net", "c")
    for alias in ("stable", "latest"):
        promote(store, "net", "v1", alias)
    assert retire(store, "net", 1) == ["v2"]
    collect(store, grace=NOW, delete=True)
    assert given(store, "net") == ["v1", "v3"]
    assert make(store, "net", "b").name == "v4"
    assert retire(store, "net", 1) == ["v3"]
    promote(store, "net", "v4")
    rollback(store, "net")
    # v4 is latest no more and may go; its number stays.
    promote(store, "net", "v1", "latest")
    retire_name(store, "net", "v4")
    collect(store, grace=NOW, delete=True)
    assert given(store, "net") == ["v1", "v4"]
    assert make(store, "net", "b").name == "v5"
    # Content that was there before and comes back is a new event; the newest, published again, is none.
    assert make(store, "net", "a").name == "v6"
    assert make(store, "net", "a").name == "v6"
    check_whole(store)


def test_a_sweep_that_dies_anywhere_breaks_nothing_and_is_taken_up(
    directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, delete = directory_store, directory_store.delete
    monkeypatch.setattr(parallel, "THREADS", 1)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)  # between the tries of a deletion that got no answer
    for survived in range(10):
        make(store, "net", f"a{survived}", "b")
        make(store, "net", f"c{survived}", "b")
        digest = make(store, "net", f"d{survived}").digest
        left = survived

        def dying(key: str, *, permit: str | None = None) -> None:
            nonlocal left
            if not key.startswith("runs/"):
                if left == 0:
                    raise StoreUnreachableError("cut off")
                left -= 1
            delete(key, permit=permit)

        monkeypatch.setattr(store, "delete", dying)
        with pytest.raises(StoreUnreachableError):
            collect(store, grace=NOW, keep=1, delete=True)
        check_whole(store)
        for info in store.list("models/net/versions/"):
            assert is_whole(store, load_version(store, "net", info.key.split("/")[3])), "a manifest outlived a blob"
        for info in store.list("shards/"):
            assert blob_key(ShardRecord.model_validate_json(store.get(info.key)).blob) in keys(store)
        monkeypatch.setattr(store, "delete", delete)
        collect(store, grace=NOW, keep=1, delete=True)
        # One version of one shard and the numbers that were given are left, whatever was left before.
        assert len(keys(store)) == 6
        assert resolve(store, "net").digest == digest


def test_statistics_stay_while_a_version_was_made_by_them_and_go_with_their_hessians(store: Store) -> None:
    held, alone = keep_felt(store, "held"), keep_felt(store, "alone")
    make(store, "net", "a", felt=held)
    make(store, "net", "b", felt=held)
    found = collect(store, grace=NOW, delete=True)
    assert objects(found, "statistics") == {statistics_key(alone.key)}
    assert objects(found, "blob") == {blob_key(alone.hessians["w"].blob)}
    assert [row["kept"] for row in found.rows() if row["kind"] == "statistics"] == [1]
    order = [item.kind for item in found.garbage]
    assert order.index("statistics") < order.index("blob")
    retire(store, "net", 1)
    assert objects(collect(store, grace=NOW, delete=True), "statistics") == set()
    make(store, "net", "c")
    collect(store, grace=NOW, keep=1, delete=True)
    assert not keys(store, "statistics/")
    assert blob_key(held.hessians["w"].blob) not in keys(store)
    check_whole(store)


def test_young_statistics_hold_their_hessians_by_themselves(directory_store: Store) -> None:
    store = directory_store
    record = keep_felt(store, "felt")
    age(store, 30)
    store.touch(statistics_key(record.key))
    assert collect(store, grace=DAY, delete=True).garbage == []
    age(store, 30)
    assert len(collect(store, grace=DAY, delete=True).garbage) == 2


def test_statistics_that_cannot_be_read_stop_no_collection(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    record = keep_felt(store, "felt")
    make(store, "net", "a", felt=record)
    store.put(statistics_key(record.key), b"{")
    found = collect(store, grace=NOW, delete=True)
    assert objects(found, "blob") == {blob_key(record.hessians["w"].blob)}
    assert "a run measures them again" in caplog.text
    assert statistics_key(record.key) in keys(store)
    check_whole(store)


def test_what_a_version_needs_that_was_named_since_the_mark_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, look = keep_felt(store, "felt"), gc._Mark.look_again

    @contextlib.contextmanager
    def beside_a_sweep(store: Store) -> Iterator[Lease]:
        with leases._held(store, "runs/open/") as (lease, _):
            yield lease

    def publish_first(mark: gc._Mark) -> None:
        make(store, "net", "a", felt=record)
        look(mark)

    # The publisher does not wait for the sweep, and touches nothing: as one whose lease was lost unnoticed.
    monkeypatch.setattr(gc._Mark, "look_again", publish_first)
    monkeypatch.setattr(versions, "open_run", beside_a_sweep)
    monkeypatch.setattr(versions, "settle", lambda *_: None)
    assert objects(collect(store, grace=NOW, delete=True), "statistics") == set()
    assert blob_key(record.hessians["w"].blob) in keys(store)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_what_cannot_be_read_stops_a_collection_before_it_deletes(store: Store, damage: str) -> None:
    fleet(store)
    key = version_key("net", resolve(store, "net@v2").digest)
    if damage == "missing":
        store.delete(key)
    else:
        store.put(key, store.get(key).replace(b'"p"', b'"q"'))
    before = keys(store)
    with pytest.raises((ArtifactNotFoundError, IntegrityError)):
        collect(store, grace=NOW, delete=True)
    assert keys(store) == before


def test_an_open_run_holds_off_a_sweep(store: Store) -> None:
    keep(store, "a")
    with open_run(store) as outer, open_run(store) as inner:
        assert inner is outer  # of one thread: it must not wait for a sweep that waits for the outer one
        with pytest.raises(StoreError, match=r"has open runs \(1, one of them process \d+ on .*nothing was deleted"):
            collect(store, grace=NOW, delete=True)
        assert len(collect(store, grace=NOW).garbage) == 2
    assert len(collect(store, grace=NOW, delete=True).garbage) == 2
    assert keys(store) == set()


def test_a_sweep_that_waits_is_not_starved_by_runs_that_overlap(store: Store) -> None:
    """Two publishers so that always one of them is open: without waiting a sweep never finds the store free."""
    keep(store, "garbage")
    turns, refused, stop = (threading.Semaphore(1), threading.Semaphore(0)), threading.Event(), threading.Event()
    began: list[float] = []

    def publisher(me: int) -> None:
        assert turns[me].acquire(timeout=PATIENT_SECONDS)
        while not stop.is_set():
            with open_run(store) as run:
                began.append(time.monotonic())
                turns[1 - me].release()  # the other one opens before this one ends, unless a sweep holds it off
                refused.wait()
                turns[me].acquire(timeout=1)
                run.check()

    with ThreadPoolExecutor(2) as pool:
        publishers = [pool.submit(publisher, me) for me in (0, 1)]
        try:
            while len(began) < 2:
                time.sleep(0.01)
            with pytest.raises(StoreError, match="has open runs"):
                collect(store, grace=NOW, delete=True)
            refused.set()
            found = collect(store, grace=NOW, delete=True, wait=timedelta(seconds=120))
        finally:
            stop.set()
            refused.set()
            for turn in turns:
                turn.release()
        for future in publishers:
            future.result()
    assert {item.info.key for item in found.garbage} == {
        shard_key(record_of("garbage").key),
        blob_key(record_of("garbage").blob),
    }


def test_runs_inside_an_open_run_do_not_wait_for_the_sweep_that_waits_for_it(store: Store) -> None:
    with ThreadPoolExecutor(1) as pool:
        with open_run(store):
            waiting = pool.submit(collect, store, grace=NOW, delete=True, wait=timedelta(seconds=120))
            while not keys(store, "runs/sweep/"):
                time.sleep(0.01)
            version = make(store, "net", "a")  # publishes under a run of its own
            assert not waiting.done()
        assert waiting.result().garbage == []
    assert is_whole(store, version.manifest)


def test_sweeps_that_wait_for_each_other_take_turns(store: Store) -> None:
    keep(store, "a")
    with ThreadPoolExecutor(3) as pool:
        with open_run(store):
            sweeps = [
                pool.submit(collect, store, grace=NOW, delete=True, wait=timedelta(seconds=120)) for _ in range(3)
            ]
            while len(keys(store, "runs/sweep/")) < 2:
                time.sleep(0.005)
        assert sorted(len(sweep.result().garbage) for sweep in sweeps) == [0, 0, 2]
    assert keys(store, "runs/") == set()


def test_two_sweeps_exclude_each_other(store: Store) -> None:
    with sweeping(store), pytest.raises(StoreError, match="has open runs"):
        collect(store, grace=NOW, delete=True)


def test_a_publisher_waits_for_a_sweep(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    keep(store, "a")
    order: list[str] = []

    def publisher() -> None:
        with open_run(store):
            order.append("publisher")
            make(store, "net", "a")

    thread = threading.Thread(target=publisher)
    with sweeping(store):
        thread.start()
        time.sleep(0.3)
        order.append("sweep")
    thread.join()
    assert order == ["sweep", "publisher"]
    assert caplog.text.count("waiting for the garbage collection") == 1
    check_whole(store)


def test_publishing_what_was_collected_meanwhile_is_an_error_and_no_version(store: Store) -> None:
    record = keep(store, "a")
    collect(store, grace=NOW, delete=True)
    source = SourceRecord(file="f", sha256=sha256(b"f"), bytes=9, format="test")
    manifest = VersionManifest(model="net", source=source, profile="p", recipe={}, code="0", shards=(record,))
    with pytest.raises(StoreError, match="a blob of net has gone"):
        publish(store, manifest)
    assert keys(store) == set()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out after a second."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "SLACK_SECONDS", 1.0)


def test_a_lease_lives_as_long_as_its_holder(store: Store, brief: None) -> None:
    with open_run(store) as lease:
        time.sleep(2.6)
        lease.check()
        with pytest.raises(StoreError, match="has open runs"):
            collect(store, grace=NOW, delete=True)


def test_the_lease_of_a_dead_process_ends_by_itself_and_is_cleared_away(store: Store, brief: None) -> None:
    for prefix in ("runs/open/", "runs/sweep/"):
        Lease(store, prefix).renew()
    with pytest.raises(StoreError, match="has open runs"):
        collect(store, grace=NOW, delete=True)
    time.sleep(3.1)  # times may come in whole seconds
    collect(store, grace=NOW, delete=True)
    assert keys(store) == set()


def test_a_holder_that_was_cut_off_knows_it_for_good(
    directory_store: Store, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(key: str, body: bytes) -> str:
        raise StoreUnreachableError("cut off")

    with open_run(directory_store) as lease:
        lease.check()
        with monkeypatch.context() as patch:
            patch.setattr(directory_store, "put", cut_off)
            time.sleep(1.2)
            with pytest.raises(StoreError, match="ran out"):
                lease.check()
        lease.renew()
        with pytest.raises(StoreError, match="ran out, as this process was stopped or cut off"):
            lease.check()


def test_a_sweep_that_lost_its_lease_stops(directory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(directory_store, "a")
    before = keys(directory_store)
    monkeypatch.setattr(Lease, "_over", lambda self: True)
    with pytest.raises(StoreError, match="ran out"):
        collect(directory_store, grace=NOW, delete=True)
    assert keys(directory_store) == before


def test_publishers_movers_and_sweeps_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishers take shards from one small pool, so what one run drops the next one reuses."""
    poll = 0.1 if store.url.startswith("s3:") else 0.02  # a look at a server is a dozen requests
    monkeypatch.setattr(leases, "POLL_SECONDS", poll)
    rounds, swept, stop = 4, 0, threading.Event()
    make(store, "m0", "s0")
    make(store, "m1", "s1")

    doors = threading.Event()

    def pause() -> None:
        time.sleep(0.02)
        doors.wait()

    def usher() -> None:
        """Let work begin for a while, then none until a sweep has ended: it gives up while any run is open."""
        while not stop.is_set():
            doors.set()
            time.sleep(0.4)
            before, late = swept, time.monotonic() + PATIENT_SECONDS
            doors.clear()
            while swept == before and not stop.is_set():
                if time.monotonic() > late:
                    stop.set()
                    doors.set()
                    pytest.fail("no sweep came through although no new work began")
                time.sleep(0.02)
        doors.set()

    def publisher(seed: int) -> None:
        """Publish for some rounds, and go on until sweeps came between: a fast machine is done before the first."""
        rng, turn = random.Random(seed), 0
        while not stop.is_set() and (turn < rounds or swept < 2):
            with open_run(store) as run:
                contents = [f"s{rng.randint(0, 5)}" for _ in range(2)]
                make(store, f"m{seed % 2}", *contents, f"own {seed} {turn}")
                retire(store, f"m{seed % 2}", 2)
                run.check()
            turn += 1
            pause()

    def mover(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            name = rng.choice(list(names(store, "m0")))[0]
            try:
                if rng.random() < 0.4:
                    rollback(store, "m0", rng.choice(["stable", "latest"]))
                else:
                    promote(store, "m0", name)
            except (AliasError, ArtifactNotFoundError, PreconditionError) as error:
                refusals = ("came from nowhere", "has no alias", "was retired", "meanwhile", "has no version")
                if not any(words in str(error) for words in refusals):
                    raise
            pause()

    def sweep() -> None:
        nonlocal swept
        while not stop.is_set():
            try:
                collect(store, grace=NOW, delete=True)
                swept += 1
            except StoreError as error:
                if "has open runs" not in str(error):
                    raise
            time.sleep(poll)

    def check() -> None:
        while not stop.is_set():
            with open_run(store):  # with no grace at all, a reader needs a lease as well
                check_whole(store)
            pause()

    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(task) for task in (usher, sweep, sweep, check, lambda: mover(1))]
        publishers = [pool.submit(publisher, seed) for seed in range(3)]
        try:
            for future in publishers:
                future.result()
        finally:
            stop.set()
            doors.set()
        for future in others:
            future.result()
    check_whole(store)
    collect(store, grace=NOW, keep=1, delete=True)
    check_whole(store)
    assert swept >= 2


def test_a_version_is_removed_unless_an_alias_points_at_it(store: Store) -> None:
    for content in "abc":
        make(store, "net", content)
    promote(store, "net", "v1")
    for name, alias in (("v1", "stable"), ("v3", "latest")):
        with pytest.raises(AliasError, match=f"{name} of net is what {alias} points at; move the alias first"):
            remove_version(store, "net", name)
    removed = remove_version(store, "net", "v2")
    assert removed.digest == version_digest(store, "v2")
    with pytest.raises(ArtifactNotFoundError, match="v2 was retired on"):
        resolve(store, "net@v2")
    with pytest.raises(ArtifactNotFoundError, match="version v2 was retired"):
        remove_version(store, "net", "v2")
    collect(store, grace=NOW, delete=True)
    assert {resolve(store, f"net@{name}").name for name in ("v1", "v3")} == {"v1", "v3"}
    assert len(keys(store, "blobs/")) == 2
    check_whole(store)


def test_an_alias_that_comes_to_a_version_while_it_is_removed_keeps_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in "ab":
        make(store, "net", content)
    retire_name = gc.retire_name

    def promoted_first(*arguments: Any) -> None:
        promote(store, "net", "v1")
        retire_name(*arguments)

    monkeypatch.setattr(gc, "retire_name", promoted_first)
    with pytest.raises(AliasError, match="v1 of net is what stable points at"):
        remove_version(store, "net", "v1")
    assert resolve(store, "net@stable").name == resolve(store, "net@v1").name == "v1"


def version_digest(store: Store, name: str) -> str:
    return read_name(store, "net", name).digest
