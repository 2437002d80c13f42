"""What other processes do to a cache between two steps of a pull: put just there, by hand."""

import fcntl
import os
from datetime import timedelta
from pathlib import Path

import pytest

from birkhoff.pipeline.artifact import cache as blob_cache
from birkhoff.pipeline.artifact import pull as pull_module
from birkhoff.pipeline.artifact.blob import Blob
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.fetch import fetch
from birkhoff.pipeline.artifact.pull import ROUNDS, blob_files, blob_id, pull
from birkhoff.pipeline.artifact.readers import CachedArtifact
from birkhoff.pipeline.artifact.references import Found
from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.registry.documents import sha256
from birkhoff.pipeline.registry.versions import load_version
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_contents, record_of

ALL = timedelta(0)


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def found(directory_store: Store) -> Found:
    version = publish_contents(directory_store, "net", "one", "two")
    manifest = load_version(directory_store, "net", version.digest)
    return Found(model="net", name=version.name, digest=version.digest, manifest=manifest)


def test_what_is_pruned_before_it_is_placed_is_fetched_again(
    directory_store: Store, cache: BlobCache, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, prunes = pull_module.place, iter(range(2))

    def pruned_first(source: Path, target: Path) -> None:
        if next(prunes, None) is not None:
            cache.prune(unused=ALL)
        place(source, target)

    monkeypatch.setattr(pull_module, "place", pruned_first)
    told: list[int] = []
    assert pull(found, directory_store, tmp_path / "out", cache, report=told.append) > 6
    for shard, body in zip(found.manifest.shards, (b"one", b"two"), strict=True):
        assert (tmp_path / "out" / blob_files(found.manifest)[blob_id(shard)]).read_bytes() == body
    assert sum(told) == 6


def test_a_cache_that_loses_everything_for_ever_is_one_line(
    directory_store: Store, cache: BlobCache, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = pull_module.place

    def pruned_first(source: Path, target: Path) -> None:
        cache.prune(unused=ALL)
        place(source, target)

    monkeypatch.setattr(pull_module, "place", pruned_first)
    with pytest.raises(OutputError, match=f"files left it {ROUNDS} times while they were pulled; stop what removes"):
        pull(found, directory_store, tmp_path / "out", cache)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_pruned_before_it_is_read_is_fetched_again(
    directory_store: Store, cache: BlobCache, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, read, prunes = CachedArtifact(found, directory_store, cache), cache.read, iter(range(2))

    def pruned_first(digest: str) -> bytes | None:
        if next(prunes, None) is not None:
            cache.prune(unused=ALL)
        return read(digest)

    monkeypatch.setattr(cache, "read", pruned_first)
    assert artifact.blob(record_of("one")) == b"one"


def test_a_good_file_that_replaced_the_damaged_one_stays(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pullers find the same damage; the faster one has mended it when the slower one comes to remove it."""
    digest = sha256(b"good")
    path = cache.path(digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"evil")
    plain = blob_cache.file_digest

    def mended_meanwhile(of: Path) -> str:
        before = plain(of)
        (cache.folder / "fresh").write_bytes(b"good")
        (cache.folder / "fresh").replace(path)
        return before

    monkeypatch.setattr(blob_cache, "file_digest", mended_meanwhile)
    assert cache.whole([(digest, 4)]) == set()
    assert path.read_bytes() == b"good"


def test_prune_leaves_a_download_that_began_in_the_place_of_one_that_ended(
    cache: BlobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = cache.partial_path(sha256(b"x"))
    part.parent.mkdir(parents=True)
    part.write_bytes(b"first")

    def another_takes_its_place(file: object, operation: int) -> None:
        part.rename(cache.folder / "adopted")
        part.write_bytes(b"second")

    monkeypatch.setattr(fcntl, "flock", another_takes_its_place)
    assert cache.prune(unused=ALL).partial == 0
    assert part.read_bytes() == b"second"


def test_what_has_just_arrived_is_in_use_however_long_ago_it_was_begun(
    directory_store: Store, cache: BlobCache
) -> None:
    digest = sha256(b"abc")
    directory_store.put(f"blobs/sha256/{digest[:2]}/{digest}", b"abc")
    part = cache.partial_path(digest)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    os.utime(part, (1, 1))
    assert [*fetch(directory_store, [Blob(digest=digest, size=3)], cache, label="net")]
    assert cache.prune(unused=timedelta(days=7)).blobs == 0
