"""Pulling: what is fetched, what is taken from the cache, and what is left behind when something breaks."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from birkhoff.pipeline import files
from birkhoff.pipeline.artifact import blob
from birkhoff.pipeline.artifact.blob import Blob
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.fetch import THREADS, fetch
from birkhoff.pipeline.artifact.pull import blob_files, blob_id, bring, pull
from birkhoff.pipeline.artifact.references import Found, find, recall
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, OutputError, StoreError
from birkhoff.pipeline.registry.documents import SourceRecord, VersionManifest, blob_key
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.registry.versions import publish
from birkhoff.pipeline.store import s3_direct
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.publishing import unmeasured

RANGE = 64 << 10
SIZES = (1, 1000, RANGE, RANGE + 1, 5 * RANGE + 17)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob, "RANGE_BYTES", RANGE)


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache")


def body(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{size} {seed}").randbytes(size)


def release(store: Store, bodies: list[bytes]) -> Found:
    """A published version of these blobs, as `find` gives it."""
    shards = tuple(unmeasured(data, source_bytes=len(data), tensors=1) for data in bodies)
    for shard, data in zip(shards, bodies, strict=True):
        store.put(blob_key(shard.blob), data)
    source = SourceRecord(file="net.pth", sha256=shards[0].blob, bytes=1, format="torch-zip")
    manifest = VersionManifest(model="net", source=source, profile="fast", recipe={}, code="0", shards=shards)
    version = publish(store, manifest)
    return Found(model="net", name=version.name, digest=version.digest, manifest=manifest)


def contents(found: Found, folder: Path) -> list[bytes]:
    files = blob_files(found.manifest)
    return [(folder / files[blob_id(shard)]).read_bytes() for shard in found.manifest.shards]


class Watched:
    """Counts the bytes that come out of a store, and may break off after some."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.limit = 0, None
        plain: Callable[..., int] = store.copy_range

        def copy_range(key: str, buffer: memoryview, sink: Callable[[memoryview], Any], **span: int) -> int:
            def count(piece: memoryview) -> None:
                if self.limit is not None and self.bytes >= self.limit:
                    raise StoreError("the cable was pulled")
                self.bytes += len(piece)
                sink(piece)

            return plain(key, buffer, count, **span)

        monkeypatch.setattr(store, "copy_range", copy_range)

    limit: int | None


def test_a_version_costs_its_difference_and_its_files_are_links(
    store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(store, monkeypatch)
    bodies = [body(size) for size in SIZES]
    first = release(store, bodies)
    assert pull(first, store, tmp_path / "one", cache) == sum(SIZES) == watched.bytes
    assert contents(first, tmp_path / "one") == bodies
    second = release(store, [body(777), *bodies[1:]])
    assert pull(second, store, tmp_path / "two", cache) == 777
    assert contents(second, tmp_path / "two") == [body(777), *bodies[1:]]
    assert watched.bytes == sum(SIZES) + 777
    assert pull(second, store, tmp_path / "two", cache) == 0
    for shard in first.manifest.shards:
        names = [cache.path(shard.blob), tmp_path / "one" / blob_files(first.manifest)[blob_id(shard)]]
        if names[0].stat().st_nlink > 1:  # a file system that shares blocks makes files of their own
            assert names[0].samefile(names[1])
    assert list((cache.folder / "partial").iterdir()) == []


def test_s3_bodies_come_straight_from_the_socket(
    s3_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = release(s3_store, [body(size) for size in SIZES])
    with monkeypatch.context() as patch:
        patch.setattr(s3_store, "get", lambda *_, **__: pytest.fail("took the slow way"))
        pull(found, s3_store, tmp_path / "one", cache)
    assert contents(found, tmp_path / "one") == [body(size) for size in SIZES]
    # A connection that breaks in the middle: the usual way goes on from there.
    drain = s3_direct._drain
    monkeypatch.setattr(s3_direct, "_drain", lambda *a: drain(*a[:-1], a[-1] // 2))
    fresh = BlobCache(tmp_path / "fresh")
    pull(found, s3_store, tmp_path / "two", fresh)
    assert contents(found, tmp_path / "two") == contents(found, tmp_path / "one")


def test_each_connection_looks_for_a_proxy_once(
    s3_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, looks = release(s3_store, [body(5000, seed) for seed in range(3 * THREADS)]), list[str]()
    monkeypatch.setattr(s3_direct, "_proxied", lambda scheme, _: bool(looks.append(scheme)))
    pull(found, s3_store, tmp_path / "one", cache)
    assert 1 <= len(looks) <= THREADS


def test_a_first_pull_starts_threads_for_downloads_only(
    directory_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, given = release(directory_store, [body(500, seed) for seed in range(5)]), list[str]()
    submit = ThreadPoolExecutor.submit

    def noted(pool: ThreadPoolExecutor, task: Callable[..., Any], *arguments: Any) -> Any:
        given.append(task.__name__)
        return submit(pool, task, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    pull(found, directory_store, tmp_path / "one", cache)
    assert given == ["_range"] * 5


def test_a_file_system_that_shares_no_blocks_is_asked_once(
    directory_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        asked.append(1)
        raise OSError(errno.EOPNOTSUPP, "not here")

    found, asked = release(directory_store, [body(5000, seed) for seed in range(5)]), list[int]()
    monkeypatch.setattr(files, "_unshared", set())
    monkeypatch.setattr(files.fcntl, "ioctl", refuse)
    pull(found, directory_store, tmp_path / "one", cache)
    assert len(asked) == 1
    assert {cache.path(shard.blob).stat().st_nlink for shard in found.manifest.shards} == {2}


def test_what_arrived_before_a_break_is_not_fetched_again(
    directory_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = body(40 * RANGE)
    found = release(directory_store, [data])
    watched = Watched(directory_store, monkeypatch)
    watched.limit = 25 * RANGE
    with pytest.raises(StoreError, match="cable"):
        pull(found, directory_store, tmp_path / "out", cache)
    assert not cache.path(found.manifest.shards[0].blob).exists()
    arrived = sum((cache.folder / "partial").glob("*.done").__next__().read_bytes())
    assert arrived > 0
    watched.limit, watched.bytes = None, 0
    pull(found, directory_store, tmp_path / "out", cache)
    assert watched.bytes == len(data) - arrived * RANGE
    assert contents(found, tmp_path / "out") == [data]
    assert list((cache.folder / "partial").iterdir()) == []


def test_a_wrong_rest_of_an_earlier_download_is_thrown_away(
    directory_store: Store, cache: BlobCache, tmp_path: Path
) -> None:
    data = body(8 * RANGE)
    found = release(directory_store, [data])
    part = cache.partial_path(found.manifest.shards[0].blob)
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(data)))
    part.with_suffix(".done").write_bytes(b"\1\0\1\1")
    pull(found, directory_store, tmp_path / "out", cache)
    assert contents(found, tmp_path / "out") == [data]


PULLER = """
import sys, time
from pathlib import Path
from birkhoff.pipeline.artifact import blob as blob_download
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.registry.trust import ANY
blob_download.RANGE_BYTES = {range}
write = blob_download._write
def slow(*arguments):
    time.sleep(0.05)
    write(*arguments)
blob_download._write = slow
cache = BlobCache(Path({cache!r}))
with open_store({url!r}) as store:
    pull(find(store, "net", cache, ANY), store, Path({out!r}), cache)
"""


def test_a_killed_pull_leaves_no_whole_file_and_the_next_one_goes_on(
    directory_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = body(200 * RANGE)
    found = release(directory_store, [data])
    code = PULLER.format(range=RANGE, cache=str(cache.folder), url=directory_store.url, out=str(tmp_path / "out"))
    puller = subprocess.Popen([sys.executable, "-c", code])
    notes = cache.partial_path(found.manifest.shards[0].blob).with_suffix(".done")
    deadline = time.monotonic() + PATIENT_SECONDS
    while not (notes.exists() and sum(notes.read_bytes()) >= 3) and time.monotonic() < deadline:
        assert puller.poll() is None
        time.sleep(0.01)
    puller.send_signal(signal.SIGKILL)
    puller.wait()
    assert not cache.path(found.manifest.shards[0].blob).exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"version.json"}
    watched = Watched(directory_store, monkeypatch)
    pull(found, directory_store, tmp_path / "out", cache)
    assert 0 < watched.bytes <= len(data) - 3 * RANGE
    assert contents(found, tmp_path / "out") == [data]


def _puller(url: str, cache: str, out: str, start: Any) -> None:
    blob.RANGE_BYTES = RANGE
    start.wait()
    with open_store(url) as store:
        pull(find(store, "net", BlobCache(Path(cache)), ANY), store, Path(out), BlobCache(Path(cache)))


def test_many_pullers_at_once_share_one_download(directory_store: Store, cache: BlobCache, tmp_path: Path) -> None:
    bodies = [body(size, seed) for seed in range(12) for size in (2000, 3 * RANGE)]
    found = release(directory_store, bodies)
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    folders = [tmp_path / f"out{index}" for index in range(3)]
    pullers = [
        context.Process(target=_puller, args=(directory_store.url, str(cache.folder), str(folder), start))
        for folder in folders
    ]
    for process in pullers:
        process.start()
    start.set()
    for process in pullers:
        process.join(PATIENT_SECONDS)
        assert process.exitcode == 0
    assert all(contents(found, folder) == bodies for folder in folders)
    assert list((cache.folder / "partial").iterdir()) == []
    assert cache.usage().blobs == len(bodies)


def test_a_blob_that_someone_else_fetches_is_waited_for(directory_store: Store, cache: BlobCache) -> None:
    blobs = [Blob(digest=s.blob, size=s.bytes) for s in release(directory_store, [body(9), body(8)]).manifest.shards]
    other = blob.BlobDownload(blobs[0], directory_store, cache, label="other")
    assert other.open()
    arriving = fetch(directory_store, blobs, cache, label="net")
    assert next(arriving) == blobs[1]
    other.run(0, lambda _: None)
    assert next(arriving) == blobs[0]
    assert [*arriving] == []
    # One that is given up is taken over.
    cache.path(blobs[0].digest).unlink()
    other = blob.BlobDownload(blobs[0], directory_store, cache, label="other")
    assert other.open()
    arriving = fetch(directory_store, blobs, cache, label="net")
    assert next(arriving) == blobs[1]
    other.close()
    assert next(arriving) == blobs[0]


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_damage_in_the_store_is_named_and_leaves_nothing_behind(
    store: Store, cache: BlobCache, tmp_path: Path, harm: str
) -> None:
    data = body(3 * RANGE)
    found = release(store, [body(5), data])
    digest = found.manifest.shards[1].blob
    store.delete(blob_key(digest))
    if harm != "gone":
        store.put(blob_key(digest), data[:-1] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=digest):
        pull(found, store, tmp_path / "out", cache)
    assert not cache.path(digest).exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damage_in_the_cache_is_mended(directory_store: Store, cache: BlobCache, tmp_path: Path) -> None:
    found = release(directory_store, [body(5000)])
    pull(found, directory_store, tmp_path / "one", cache)
    path = cache.path(found.manifest.shards[0].blob)
    path.unlink()
    path.write_bytes(bytes(5000))
    assert pull(found, directory_store, tmp_path / "two", cache) == 5000
    assert contents(found, tmp_path / "two") == [body(5000)]


def test_offline_from_the_cache(directory_store: Store, cache: BlobCache, tmp_path: Path) -> None:
    release(directory_store, [body(50), body(60)])
    found = find(directory_store, "net", cache, ANY)
    with pytest.raises(ArtifactNotFoundError, match=r"2 of its 2 blobs are not in the cache .* without --offline"):
        pull(found, None, tmp_path / "out", cache)
    pull(found, directory_store, tmp_path / "out", cache)
    for reference in ("net", f"net@{found.digest}"):
        again = recall(directory_store.url, reference, cache, ANY)
        assert again == found
        assert pull(again, None, tmp_path / reference, cache) == 0
        assert contents(again, tmp_path / reference) == [body(50), body(60)]
    with pytest.raises(ArtifactNotFoundError, match="has no such version"):
        recall(directory_store.url, "net@v7", cache, ANY)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_one_line_with_path_and_remedy(
    directory_store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    found = release(directory_store, [body(3 * RANGE)])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=rf"cache {cache.folder}.*No space left.*birkhoff cache prune"):
        pull(found, directory_store, tmp_path / "out", cache)


def test_a_cache_that_cannot_be_written_is_one_line(directory_store: Store, tmp_path: Path) -> None:
    found = release(directory_store, [body(10)])
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cache .*file.*point BIRKHOFF_HOME"):
        pull(found, directory_store, tmp_path / "out", BlobCache(tmp_path / "file"))


def test_too_little_room_is_said_before_anything_is_fetched(
    directory_store: Store, cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(directory_store, monkeypatch)
    found = release(directory_store, [body(10)])
    blobs = [Blob(digest=found.manifest.shards[0].blob, size=1 << 60)]
    with pytest.raises(OutputError, match=rf"{1 << 60} bytes in"):
        bring(blobs, found, directory_store, cache, only={blobs[0].digest})
    assert watched.bytes == 0


@pytest.fixture
def filled(directory_store: Store, cache: BlobCache, tmp_path: Path) -> BlobCache:
    """Blobs of 100, 200 and 300 bytes, used in this order; that of 300 has a second name."""
    found = release(directory_store, [body(100), body(200), body(300)])
    bring(
        [Blob(digest=s.blob, size=s.bytes) for s in found.manifest.shards],
        found,
        directory_store,
        cache,
        only={s.blob for s in found.manifest.shards},
    )
    for age, shard in zip((3, 2, 1), found.manifest.shards, strict=True):
        path = cache.path(shard.blob)
        os.utime(path, (time.time() - age * 86400, path.stat().st_mtime))
    os.link(cache.path(found.manifest.shards[2].blob), tmp_path / "link")
    (cache.folder / "partial" / f"{'0' * 64}.part").write_bytes(b"left by the dead")
    return cache


def test_usage_and_prune(filled: BlobCache) -> None:
    usage = filled.usage()
    assert (usage.blobs, usage.bytes, usage.linked, usage.partial) == (3, 600, 1, 1)
    assert filled.prune(unused=timedelta(days=2.5), dry_run=True).blobs == 1
    assert filled.usage() == usage
    pruned = filled.prune(unused=timedelta(days=2.5))
    assert (pruned.blobs, pruned.bytes, pruned.partial) == (1, 100, 1)
    assert filled.prune(unused=timedelta(0), keep_bytes=500).blobs == 0
    pruned = filled.prune(unused=timedelta(0))
    assert (pruned.blobs, pruned.bytes) == (2, 200)  # the linked one lives on
    assert filled.usage().blobs == 0
