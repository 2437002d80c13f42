"""The start of a container is read in memory of its own size, whatever size is claimed."""

from pathlib import Path

from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import CachedArtifact, PulledArtifact, StoredArtifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_contents

HUGE = 1 << 45


def test_a_store_is_not_believed_how_long_a_container_is(store: Store) -> None:
    version = publish_contents(store, "net", "a container")
    (shard,) = version.manifest.shards
    claimed = shard.model_copy(update={"bytes": HUGE + 1})
    assert StoredArtifact(store, version).read_head(claimed, HUGE) == b"a container"
    assert store.get(blob_key(shard.blob), length=HUGE) == b"a container"
    assert store.read(blob_key(shard.blob), length=HUGE)[0] == b"a container"


def test_neither_are_a_cache_and_a_folder(directory_store: Store, tmp_path: Path) -> None:
    (shard,) = publish_contents(directory_store, "net", "a container").manifest.shards
    cache = BlobCache(tmp_path / "cache")
    found = find(directory_store, "net", cache, ANY)
    pull(found, directory_store, tmp_path / "out", cache)
    for artifact in (CachedArtifact(found, directory_store, cache), PulledArtifact(tmp_path / "out")):
        assert artifact.read_head(shard, HUGE) == b"a container"
        assert artifact.read_head(shard, 3) == b"a c"
