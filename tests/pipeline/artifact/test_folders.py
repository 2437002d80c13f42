"""Pulled folders: links in them, files that are not of `pull`, names that stand for other things, and bounds."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import birkhoff
from birkhoff.codec import rest
from birkhoff.codec.container import CodedTensor, serialise
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import VERSION_FILE, blob_files, blob_id, pull
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, OutputError
from birkhoff.pipeline.registry.documents import (
    FileRecord,
    NameRecord,
    ShardRecord,
    SourceRecord,
    VersionManifest,
    blob_key,
    name_key,
    sha256,
    utc_now,
    version_key,
)
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.registry.versions import Version, publish, resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_contents, publish_tensors, unmeasured


@pytest.fixture
def store(directory_store: Store) -> Store:
    return directory_store


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache")


def fetch(store: Store, reference: str, folder: Path, cache: BlobCache) -> None:
    pull(find(store, reference, cache, ANY), store, folder, cache)


def named(manifest: VersionManifest) -> list[str]:
    """The files of a version's shards in a pulled folder, in the manifest's order."""
    files = blob_files(manifest)
    return [files[blob_id(shard)] for shard in manifest.shards]


def with_file(store: Store, version: Version, body: bytes, name: str = "config.json") -> Version:
    store.put(blob_key(sha256(body)), body)
    record = FileRecord(name=name, blob=sha256(body), bytes=len(body))
    return publish(store, version.manifest.model_copy(update={"files": (record,)}))


class TestLinks:
    @pytest.mark.parametrize("name", ["files", "files/config.json", "version.json", "manifest.json", "notes"])
    def test_a_folder_with_links_in_it_is_refused_by_name(
        self, store: Store, cache: BlobCache, tmp_path: Path, name: str
    ) -> None:
        publish_contents(store, "net", "one")
        elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
        (elsewhere / "sub").mkdir(parents=True)
        for file in ("thesis.txt", "version.json"):
            (elsewhere / file).write_text("{}")
        folder.mkdir()
        (folder / "version.json").write_text("{}")
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(elsewhere if name == "files" else elsewhere / "version.json")
        before = sorted(path.name for path in elsewhere.iterdir())
        with pytest.raises(OutputError, match=f"{name} is a symbolic link, which `pull` never follows; remove"):
            fetch(store, "net", folder, cache)
        assert sorted(path.name for path in elsewhere.iterdir()) == before
        assert (elsewhere / "version.json").read_text() == "{}"

    def test_the_folder_itself_may_be_one(self, store: Store, cache: BlobCache, tmp_path: Path) -> None:
        """The user named it."""
        publish_contents(store, "net", "one")
        (tmp_path / "disk").mkdir()
        (tmp_path / "folder").symlink_to(tmp_path / "disk")
        fetch(store, "net", tmp_path / "folder", cache)
        assert (tmp_path / "disk" / "manifest.json").is_file()


class TestWhatIsRemoved:
    def test_what_an_earlier_pull_recorded_and_nothing_else(
        self, store: Store, cache: BlobCache, tmp_path: Path
    ) -> None:
        folder = tmp_path / "folder"
        with_file(store, publish_contents(store, "net", "one", "two", "three"), b"{}")
        fetch(store, "net", folder, cache)
        own = {"shard-00009-of-00009.safetensors": b"mine", "files/notes.md": b"mine", "other.txt": b"mine"}
        for name, body in own.items():
            (folder / name).write_bytes(body)
        publish_contents(store, "net", "four")
        fetch(store, "net", folder, cache)
        left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert left == {*own, "shard-00001-of-00001.safetensors", "version.json", "manifest.json"}
        assert all((folder / name).read_bytes() == body for name, body in own.items())
        assert json.loads((folder / VERSION_FILE).read_text())["files"] == ["shard-00001-of-00001.safetensors"]

    @pytest.mark.parametrize(
        "name", ["../thesis.txt", "/etc/passwd", "files/../../thesis.txt", "other.txt", "files/a/b.md"]
    )
    def test_a_record_names_what_pull_could_have_made_or_does_not_count(
        self, store: Store, cache: BlobCache, tmp_path: Path, name: str
    ) -> None:
        folder = tmp_path / "folder"
        (folder / "files" / "a").mkdir(parents=True)
        for path in (tmp_path / "thesis.txt", folder / "other.txt", folder / "files" / "a" / "b.md"):
            path.write_text("mine")
        (folder / VERSION_FILE).write_text(json.dumps({"files": [name, 3, None, "shard-1", ["x"]]}))
        publish_contents(store, "net", "one")
        fetch(store, "net", folder, cache)
        assert (tmp_path / "thesis.txt").is_file()
        assert (folder / "other.txt").is_file()
        assert (folder / "files" / "a" / "b.md").is_file()

    def test_a_folder_from_before_the_record_goes_by_its_manifest(
        self, store: Store, cache: BlobCache, tmp_path: Path
    ) -> None:
        folder = tmp_path / "folder"
        publish_contents(store, "net", "one", "two")
        fetch(store, "net", folder, cache)
        note = json.loads((folder / VERSION_FILE).read_text())
        del note["files"]
        (folder / VERSION_FILE).write_text(json.dumps(note))
        (folder / "shard-00009-of-00009.safetensors").write_bytes(b"mine")
        publish_contents(store, "net", "three")
        fetch(store, "net", folder, cache)
        assert sorted(path.name for path in folder.glob("shard-*")) == [
            "shard-00001-of-00001.safetensors",
            "shard-00009-of-00009.safetensors",
        ]

    def test_what_a_pull_that_broke_off_had_recorded_still_goes(
        self, store: Store, cache: BlobCache, tmp_path: Path
    ) -> None:
        folder = tmp_path / "folder"
        publish_contents(store, "net", "one", "two", "three")
        fetch(store, "net", folder, cache)
        second = publish_contents(store, "net", "four", "five")
        lost = second.manifest.shards[1]
        body = store.get(blob_key(lost.blob))
        store.delete(blob_key(lost.blob))
        with pytest.raises(IntegrityError):
            fetch(store, "net", folder, cache)
        store.put(blob_key(lost.blob), body)
        third = publish_contents(store, "net", "six")
        fetch(store, "net", folder, cache)
        assert [path.name for path in folder.glob("shard-*")] == ["shard-00001-of-00001.safetensors"]
        with open_artifact(folder) as artifact:
            assert artifact.manifest.digest == third.digest

    def test_an_edit_of_a_small_file_stays_in_its_folder(self, store: Store, cache: BlobCache, tmp_path: Path) -> None:
        with_file(store, publish_contents(store, "net", "one"), b'{"x": 1}')
        for name in "AB":
            fetch(store, "net", tmp_path / name, cache)
        with (tmp_path / "A/files/config.json").open("r+") as file:
            file.write('{"x": 2}')
        assert (tmp_path / "B/files/config.json").read_text() == '{"x": 1}'


class TestANamedStore:
    """A folder in the working directory is not taken for a model of a store that was named."""

    @pytest.fixture
    def planted(self, store: Store, cache: BlobCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        publish_tensors(store, "m", {"w": torch.zeros(64, 64)})
        publish_tensors(store, "evil", {"w": torch.ones(64, 64)})
        folder = tmp_path / "here"
        folder.mkdir()
        for name in ("m", "m@latest"):
            fetch(store, "evil", folder / name, cache)
        monkeypatch.chdir(folder)
        monkeypatch.delenv("BIRKHOFF_STORE", raising=False)
        return folder

    @pytest.mark.parametrize("reference", ["m", "m@latest"])
    def test_it_wins(self, planted: Path, store: Store, reference: str) -> None:
        assert not birkhoff.load_state_dict(reference, store.url)["w"].any()
        with open_artifact(reference, store.url) as artifact:
            assert artifact.manifest.model == "m"

    @pytest.mark.parametrize("reference", ["./m", "./m@latest", Path("m"), "../here/m"])
    def test_what_can_only_be_a_folder_is_one(self, planted: Path, store: Store, reference: str | Path) -> None:
        assert birkhoff.load_state_dict(reference, store.url)["w"].all()

    @pytest.mark.parametrize("reference", ["m", "m@latest"])
    def test_without_one_the_folder_wins(self, planted: Path, reference: str) -> None:
        assert birkhoff.load_state_dict(reference)["w"].all()

    def test_a_model_that_is_not_there_hints_at_the_folder(self, planted: Path, store: Store) -> None:
        (planted / "m").rename(planted / "gone")
        with pytest.raises(ArtifactNotFoundError, match=r"for the folder of that name write \./gone"):
            birkhoff.load_state_dict("gone", store.url)

    def test_of_a_command(self, planted: Path, store: Store) -> None:
        words = [sys.executable, "-m", "birkhoff", "inspect", "m@latest", "--store", store.url]
        ran = subprocess.run(words, cwd=planted, capture_output=True, text=True, check=True)
        assert ran.stdout.lstrip().startswith("m@v1")


class TestBounds:
    def test_an_artifact_decodes_to_no_more_than_its_manifest_says(self, store: Store) -> None:
        size = 64 << 20
        coded = CodedTensor(
            name="z", codec="planes", dtype="U8", shape=(size,), parts=rest.pack_elements(bytes(size), 1)
        )
        blob = serialise([coded])
        assert len(blob) < 10_000
        store.put(blob_key(sha256(blob)), blob)
        source = SourceRecord(file="f", sha256="0" * 64, bytes=1, format="t")
        for claimed, fine in ((10, False), (size - 1, False), (size, True)):
            record = unmeasured(blob, source_bytes=claimed, tensors=1)
            manifest = VersionManifest(
                model=f"m{claimed}", source=source, profile="fast", recipe={}, code="0", shards=(record,)
            )
            publish(store, manifest)
            if fine:
                assert birkhoff.load_state_dict(f"m{claimed}", store.url)["z"].numel() == size
            else:
                with pytest.raises(IntegrityError, match=f"decodes to {size} bytes, its manifest says {claimed}:"):
                    birkhoff.load_state_dict(f"m{claimed}", store.url)

    def test_naming_the_files_takes_time_by_their_number(self) -> None:
        def record(number: int) -> ShardRecord:
            return unmeasured(b"%d" % number, source_bytes=1, tensors=1)

        def seconds(count: int) -> float:
            shards = tuple(record(number) for number in range(count))
            source = SourceRecord(file="f", sha256="0" * 64, bytes=1, format="t")
            manifest = VersionManifest(model="m", source=source, profile="p", recipe={}, code="0", shards=shards)
            began = time.process_time()
            assert len(set(named(manifest))) == count
            return time.process_time() - began

        assert seconds(8000) < 40 * max(seconds(800), 0.01)  # by the square it would be 100 times

    def test_equal_shards_share_a_file_and_versions_do_not_share_numbers(self) -> None:
        one, two = (unmeasured(body, source_bytes=1, tensors=1) for body in (b"1", b"2"))
        source = SourceRecord(file="f", sha256="0" * 64, bytes=1, format="t")
        first = VersionManifest(model="m", source=source, profile="p", recipe={}, code="0", shards=(one, two, one))
        second = first.model_copy(update={"shards": (two, one)})
        for _ in range(2):
            assert [name[6:11] for name in named(first)] == ["00001", "00002", "00001"]
            assert [name[6:11] for name in named(second)] == ["00001", "00002"]

    def test_a_manifest_that_is_spelled_otherwise(self, store: Store) -> None:
        """What was read is written out again by `pull`: it must come to the same bytes."""
        version = publish_contents(store, "net", "one")
        body = json.dumps(json.loads(version.manifest.to_bytes()), indent=1).encode()
        store.put(version_key("net", sha256(body)), body)
        name = NameRecord(digest=sha256(body), created=utc_now(), publisher="p")
        store.put(name_key("net", "v2"), name.to_bytes())
        with pytest.raises(IntegrityError, match="not in the spelling of this package; publish the version again"):
            resolve(store, "net@v2")
