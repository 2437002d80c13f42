"""Blobs that are read into memory of the manifest's size: the right bytes, or an error, and no memory for a claim."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from birkhoff.pipeline.artifact import readers
from birkhoff.pipeline.artifact.blob import Blob
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import VERSION_FILE, pull
from birkhoff.pipeline.artifact.readers import Artifact, CachedArtifact, PulledArtifact, StoredArtifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError
from birkhoff.pipeline.files import fill_checked
from birkhoff.pipeline.registry.documents import sha256
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_contents

HUGE = 1 << 45
BODY = b"a container"


@pytest.fixture
def artifacts(directory_store: Store, tmp_path: Path) -> list[Artifact]:
    """The same version in a store, in the cache and in a folder."""
    publish_contents(directory_store, "net", BODY.decode())
    cache = BlobCache(tmp_path / "cache")
    found = find(directory_store, "net", cache, ANY)
    pull(found, directory_store, tmp_path / "out", cache)
    return [
        StoredArtifact(directory_store, resolve(directory_store, "net")),
        CachedArtifact(found, directory_store, cache),
        PulledArtifact(tmp_path / "out"),
    ]


def test_every_place_gives_the_same_bytes(artifacts: list[Artifact]) -> None:
    for artifact in artifacts:
        (shard,) = artifact.arriving()
        out = bytearray(len(BODY) + 2)
        artifact.read_into(shard, memoryview(out)[1:-1])
        assert out == b"\0" + BODY + b"\0"


@pytest.mark.parametrize("size", [0, 3, len(BODY) + 1])
def test_a_size_that_lies_is_refused(artifacts: list[Artifact], size: int) -> None:
    for artifact in artifacts[:2]:
        (shard,) = artifact.manifest.shards
        claimed = shard.model_copy(update={"bytes": size})
        with pytest.raises(IntegrityError, match=rf"blob {shard.blob} (is damaged: \d+|has 11) bytes"):
            artifact.read_into(claimed, memoryview(bytearray(size)))


def damaged(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"another one")


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [damaged, gone])
def test_a_cached_file_that_is_wrong_is_fetched_again(artifacts: list[Any], harm: Callable[[Path], None]) -> None:
    artifact = artifacts[1]
    (shard,) = artifact.arriving()
    path = artifact._cache.path(shard.blob)
    harm(path)
    out = bytearray(len(BODY))
    artifact.read_into(shard, memoryview(out))
    assert out == BODY == path.read_bytes()


def test_a_folders_file_that_is_wrong_is_named(artifacts: list[Any]) -> None:
    artifact = artifacts[2]
    (shard,) = artifact.arriving()
    (path,) = artifact._folder.glob("shard-*")
    damaged(path)
    with pytest.raises(IntegrityError, match=f"blob {shard.blob} is damaged: 11 bytes with digest"):
        artifact.read_into(shard, memoryview(bytearray(len(BODY))))
    gone(path)
    for read in (lambda: list(artifact.arriving()), lambda: artifact.read_into(shard, memoryview(bytearray(11)))):
        with pytest.raises(IntegrityError, match=f"{path}: No such file or directory; pull again"):
            read()


def test_a_folder_is_not_believed_how_long_a_file_is(artifacts: list[Any], tmp_path: Path) -> None:
    """Whoever forges a manifest forges its digest beside it too."""
    folder = tmp_path / "forged"
    shutil.copytree(artifacts[2]._folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = HUGE
    body = json.dumps(manifest).encode()
    note = json.loads((folder / VERSION_FILE).read_text()) | {"digest": sha256(body)}
    for name, text in (("manifest.json", body), (VERSION_FILE, json.dumps(note).encode())):
        (folder / name).chmod(0o644)
        (folder / name).write_bytes(text)
    with pytest.raises(
        IntegrityError, match=f"shard-00001-of-00001.safetensors has 11 bytes, its manifest says {HUGE}"
    ):
        next(PulledArtifact(folder).arriving())


def test_the_cache_alone_is_looked_at_before_memory_is_set_aside(artifacts: list[Any]) -> None:
    """Offline: a store would be asked for what is missing, and refuse a size that lies."""
    artifact = artifacts[1]
    artifact._store = None
    (shard,) = artifact.arriving()
    claimed = shard.model_copy(update={"bytes": HUGE})
    artifact.manifest = artifact.manifest.model_copy(update={"shards": (claimed,)})
    with pytest.raises(IntegrityError, match=f"has 11 bytes, its manifest says {HUGE}: one of them is forged"):
        list(artifact.arriving())
    gone(artifact._cache.path(shard.blob))
    with pytest.raises(ArtifactNotFoundError):
        list(artifact.arriving())


def test_a_shard_arrives_once_all_that_it_needs_is_here(artifacts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own container and its bases', which may be shared; two shards may be one container."""
    artifact = artifacts[1]
    needs = {"a": ("a", "base"), "b": ("b",), "c": ("c", "base", "other"), "same": ("b",)}
    shards = [SimpleNamespace(name=name, blob=own[0], bytes=1, needs=own) for name, own in needs.items()]
    artifact.manifest = SimpleNamespace(shards=shards, bases=())
    order = ["other", "c", "b", "base", "a"]
    seen: list[str] = []

    def fetch(*_: object, **__: object) -> Iterator[Blob]:
        for digest in order:
            seen.append(digest)
            yield Blob(digest=digest, size=1)

    monkeypatch.setattr(readers, "fetch", fetch)
    found = [(shard.name, list(seen)) for shard in artifact.arriving()]
    assert found == [("b", order[:3]), ("same", order[:3]), ("c", order[:4]), ("a", order)]


def test_a_file_that_comes_in_pieces_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(buffer[:3])

    path = tmp_path / "file"
    path.write_bytes(BODY)
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Slow(self))
    out = bytearray(len(BODY))
    assert fill_checked(memoryview(out), path, sha256(BODY))
    assert out == BODY


def test_only_a_file_of_these_bytes_fills(tmp_path: Path) -> None:
    path, out = tmp_path / "file", memoryview(bytearray(3))
    assert not fill_checked(out, path, sha256(b"abc"))
    for body, right in ((b"abc", True), (b"abd", False), (b"ab", False), (b"abcd", False), (b"", False)):
        path.write_bytes(body)
        assert fill_checked(out, path, sha256(b"abc")) == right
    path.write_bytes(b"")
    assert fill_checked(memoryview(bytearray()), path, sha256(b""))
