"""What a store, or a pulled folder, may hold that nobody of ours wrote: each is refused in one line that says what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import StoredArtifact, open_artifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, StoreError
from birkhoff.pipeline.registry.aliases import promote
from birkhoff.pipeline.registry.documents import (
    SourceRecord,
    VersionManifest,
    alias_key,
    blob_key,
    name_key,
    sha256,
    shard_key,
    version_key,
)
from birkhoff.pipeline.registry.history import history_rows
from birkhoff.pipeline.registry.leases import sweeping
from birkhoff.pipeline.registry.trust import Trust
from birkhoff.pipeline.registry.versions import Version, publish, resolve
from birkhoff.pipeline.shard.run import find_record
from birkhoff.pipeline.store.base import Store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.publishing import unmeasured

BOMBS = {
    "deep": b'{"a":' * 100_000,
    "deep list": b"[" * 200_000,
    "long number": b'{"digest":' + b"9" * 10_000 + b"}",
    "twice": b'{"digest":"a","digest":"b"}',
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "large": b'"' + b" " * MAX_DOCUMENT_BYTES + b'"',
}


@pytest.fixture
def store(directory_store: Store) -> Store:
    return directory_store


@pytest.fixture
def version(store: Store) -> Version:
    """net@v1, of one shard with the bytes `abc`."""
    shard = unmeasured(b"abc", source_bytes=9, tensors=1, key=sha256(b"key"))
    store.create(blob_key(shard.blob), b"abc")
    store.create(shard_key(shard.key), shard.to_bytes())
    source = SourceRecord(file="f", sha256=sha256(b"f"), bytes=9, format="test")
    return publish(
        store, VersionManifest(model="net", source=source, profile="p", recipe={}, code="0", shards=(shard,))
    )


def one_line(error: BaseException) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < 500
    return text


@pytest.mark.parametrize("bomb", BOMBS)
class TestBombs:
    def test_as_an_alias(self, store: Store, version: Version, bomb: str) -> None:
        store.put(alias_key("net", "latest"), BOMBS[bomb])
        for use in (lambda: resolve(store, "net"), lambda: history_rows(store, "net"), lambda: _promote(store)):
            with pytest.raises(
                IntegrityError, match=r"aliases/latest\.json: (not a AliasRecord|larger than)"
            ) as caught:
                use()
            one_line(caught.value)

    def test_as_a_name(self, store: Store, version: Version, bomb: str) -> None:
        store.put(name_key("net", "v1"), BOMBS[bomb])
        with pytest.raises(IntegrityError, match=r"names/v1\.json: (not a NameRecord|larger than)") as caught:
            resolve(store, "net@v1")
        one_line(caught.value)

    def test_as_a_manifest_of_the_right_digest(self, store: Store, bomb: str) -> None:
        digest = sha256(BOMBS[bomb])
        store.put(version_key("net", digest), BOMBS[bomb])
        with pytest.raises(IntegrityError, match=r"manifest\.json: (not a VersionManifest|larger than)") as caught:
            resolve(store, f"net@{digest}")
        one_line(caught.value)

    def test_as_a_shard_record_it_is_made_anew(
        self, store: Store, version: Version, bomb: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.put(shard_key(sha256(b"key")), BOMBS[bomb])
        assert find_record(store, sha256(b"key")) is None
        assert "it is encoded again" in caplog.text

    def test_as_a_lease(self, store: Store, bomb: str) -> None:
        store.put("runs/open/x.json", BOMBS[bomb])
        with pytest.raises(StoreError, match=r"has open runs \(1, one of them runs/open/x\.json\)"), sweeping(store):
            pass

    @pytest.mark.parametrize("file", ["manifest.json", "version.json"])
    def test_in_a_pulled_folder(self, store: Store, version: Version, tmp_path: Path, bomb: str, file: str) -> None:
        cache = BlobCache(tmp_path / "cache")
        pull(find(store, "net", cache, Trust()), store, tmp_path / "net", cache)
        (tmp_path / "net" / file).write_bytes(BOMBS[bomb])
        refused = pytest.raises(IntegrityError, match=rf"net/{file}.*(pull again|larger than)")
        with refused as caught, open_artifact(tmp_path / "net"):
            pass
        one_line(caught.value)


def _promote(store: Store) -> None:
    promote(store, "net", "v1", "latest")


class TestPathsAndPointers:
    @pytest.mark.parametrize(
        "reference",
        ["../net", "net/../net", "/net", "net@../../x", "net@", "..", "", "net@v1/../v2", "net\n", "a" * 101],
    )
    def test_references(self, store: Store, version: Version, reference: str) -> None:
        if reference == "net@":  # says nothing, so `latest`
            assert resolve(store, reference).digest == version.digest
            return
        with pytest.raises(ArtifactNotFoundError, match=r"is no MODEL\[@VERSION\|ALIAS\|DIGEST\]"):
            resolve(store, reference)

    @pytest.mark.parametrize("name", ["../v1", "v1/../../x", "latest", "v0", "v1\n", "", "v" + "9" * 10])
    def test_an_alias_at_no_version(self, store: Store, version: Version, name: str) -> None:
        body = json.loads(store.get(alias_key("net", "latest")))
        store.put(alias_key("net", "latest"), json.dumps({**body, "version": name}).encode())
        with pytest.raises(IntegrityError, match=r"aliases/latest\.json: not a AliasRecord"):
            resolve(store, "net")

    @pytest.mark.parametrize("field", ["blob", "key"])
    @pytest.mark.parametrize(
        "value", ["../../../etc/passwd", "/etc/passwd", "ab" * 33, "AB" * 32, "", "ab" * 32 + "\n"]
    )
    def test_a_manifest_that_points_outside(self, store: Store, version: Version, field: str, value: str) -> None:
        body = json.loads(version.manifest.to_bytes())
        body["shards"][0][field] = value
        forged = json.dumps(body).encode()
        store.put(version_key("net", sha256(forged)), forged)
        with pytest.raises(IntegrityError, match=r"manifest\.json: not a VersionManifest"):
            resolve(store, f"net@{sha256(forged)}")

    def test_a_manifest_of_another_model(self, store: Store, version: Version) -> None:
        store.put(version_key("other", version.digest), version.manifest.to_bytes())
        with pytest.raises(IntegrityError, match="a version of model 'net', not of 'other': misplaced"):
            resolve(store, f"other@{version.digest}")

    def test_a_manifest_under_another_digest(self, store: Store, version: Version) -> None:
        store.put(version_key("net", version.digest), version.manifest.to_bytes() + b" ")
        with pytest.raises(IntegrityError, match="the stored manifest is damaged"):
            resolve(store, "net@v1")


class TestSizesThatLie:
    @pytest.mark.parametrize("body", [b"", b"ab", b"abcd", b"abd", bytes(1 << 20)], ids=len)
    def test_a_blob_of_another_size(self, store: Store, version: Version, tmp_path: Path, body: bytes) -> None:
        store.put(blob_key(sha256(b"abc")), body)
        (shard,) = version.manifest.shards
        with pytest.raises(IntegrityError, match=f"blob {shard.blob} is damaged: {min(len(body), 4)} bytes") as caught:
            StoredArtifact(store, version).blob(shard)
        one_line(caught.value)
        cache, folder = BlobCache(tmp_path / "cache"), tmp_path / "net"
        if body == b"abcd":  # pulled are the bytes that the manifest names, and these are whole
            pull(find(store, "net", cache, Trust()), store, folder, cache)
            assert (folder / "shard-00001-of-00001.safetensors").read_bytes() == b"abc"
            return
        with pytest.raises(BirkhoffError, match=shard.blob):
            pull(find(store, "net", cache, Trust()), store, folder, cache)
        assert not (folder / "manifest.json").exists()

    def test_reading_takes_no_more_memory_than_a_document_may_have(self, tmp_path: Path) -> None:
        """600 MB in the place of an alias: the peak of a fresh process stays far below."""
        folder = tmp_path / "store/models/net/aliases"
        folder.mkdir(parents=True)
        with (folder / "latest.json").open("wb") as file:
            file.truncate(600 << 20)
        code = (
            "import resource, sys\n"
            "from birkhoff.pipeline.registry.versions import resolve\n"
            "from birkhoff.pipeline.store.open import open_store\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try: resolve(open_store(sys.argv[1]), 'net')\n"
            "except Exception as error: print(error)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, (tmp_path / "store").as_uri()],
            capture_output=True,
            text=True,
            timeout=PATIENT_SECONDS,
        )
        message, grown = done.stdout.splitlines()
        assert "larger than 16777216 bytes: not a document of this program" in message
        assert int(grown) < 100 << 10  # KiB
