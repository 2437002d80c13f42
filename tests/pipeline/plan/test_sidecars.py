"""Small files that go with the weights: found, named, stored, kept, checked, and what forged ones meet."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import IntegrityError, ManifestError, exit_code
from birkhoff.pipeline.plan import sidecars
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.registry.documents import MAX_FILE_BYTES, FileRecord, VersionManifest, blob_key
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.command import captured
from tests.pipeline.publishing import publish_tensors

CONFIG = {"model_type": "sam", "auto_map": {"AutoModel": "evil.Model"}, "vision_config": {"attn_implementation": "a/b"}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, with something that does not belong."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"a.weight": torch.randn(64, 96)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text('{"size": 1024}')
    (folder / "notes.txt").write_text("mine")
    return folder


class Place:
    def __init__(self, folder: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.store, self._capsys = folder, store, capsys

    def compress(self, source: str, files: str = "") -> dict[str, object]:
        """The row of the model's line in the table."""
        lines = ["profile: fast", "models:", "  - name: net", f"    source: {source}"]
        (self.folder / "m.yaml").write_text("\n".join([*lines, files and f"    files: {files}", ""]))
        code, out, err = self.run("compress", str(self.folder / "m.yaml"), "--executor", "inline", "--json")
        assert code in (0, exit_code_of_source()), err
        (row,) = json.loads(out)
        return row

    def run(self, *arguments: str) -> tuple[int, str, str]:
        words = [*arguments, "--store", self.store.url]
        return captured(self._capsys, *words)

    def names(self) -> list[str]:
        return [record.name for record in resolve(self.store, "net").manifest.files or ()]


def exit_code_of_source() -> int:
    from birkhoff.pipeline.errors import SourceError

    return exit_code(SourceError(""))


@pytest.fixture
def place(
    tmp_path: Path, directory_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    return Place(tmp_path, directory_store, capsys)


def test_files_of_transformers_go_with_local_safetensors_and_decide_about_a_new_version(
    place: Place, source: Path
) -> None:
    row = place.compress("source/model.safetensors")
    assert place.names() == ["config.json", "preprocessor_config.json"]
    with open_artifact("net", place.store.url) as artifact:
        assert artifact.file("config.json") == (source / "config.json").read_bytes()
        assert artifact.file("notes.txt") is None
    root = Path(place.store.url.removeprefix("file://"))
    beside = {".store", "runs", "names", "aliases"}
    kept = [p for p in root.rglob("*") if p.is_file() and not beside & set(p.parts)]
    assert row["stored_bytes"] == sum(path.stat().st_size for path in kept)
    assert place.compress("source/model.safetensors")["status"] == "up to date"
    (source / "config.json").write_text(json.dumps({**CONFIG, "more": 1}))
    changed = place.compress("source/model.safetensors")
    assert (changed["version"], changed["status"], changed["shards_reused"]) == ("v2", "published", 1)
    store_key = blob_key(resolve(place.store, "net").manifest.stored[-1].blob)
    place.store.delete(store_key)
    assert place.compress("source/model.safetensors")["status"] == "published"  # its blob had gone
    assert place.store.head(store_key).size == len('{"size": 1024}')
    assert place.compress("source/model.safetensors", "[]")["version"] == "v3"
    assert place.names() == []


def test_named_files_go_with_any_source_under_their_own_names(place: Place, source: Path) -> None:
    torch.save({"a.weight": torch.randn(64, 96)}, place.folder / "net.pth")
    shutil.copy(source / "config.json", place.folder)
    place.compress("net.pth")
    assert place.names() == []  # beside a .pth it may be anybody's
    place.compress("net.pth", "[source/notes.txt, config.json]")
    assert place.names() == ["config.json", "notes.txt"]
    row = place.compress("net.pth", "[gone.json]")
    assert row["status"] == "failed"
    assert "gone.json: no such file; correct `files`" in str(row["error"])


def test_files_are_bounded(place: Place, source: Path) -> None:
    with (source / "config.json").open("ab") as file:
        file.write(b" " * (MAX_FILE_BYTES - file.tell()))
    assert sidecars.beside(source / "model.safetensors")[0].record.bytes == MAX_FILE_BYTES
    (source / "preprocessor_config.json").write_bytes(b" " * (MAX_FILE_BYTES + 1))
    row = place.compress("source/model.safetensors")
    assert f"preprocessor_config.json: expected a file of 1 to {MAX_FILE_BYTES} bytes" in str(row["error"])
    (source / "preprocessor_config.json").write_bytes(b"")
    assert "it is empty" in str(place.compress("source/model.safetensors")["error"])


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ("[run.py]", "'run.py' cannot go with the weights"),
        ("[a/config.json, b/Config.json]", "two files are named 'Config.json'"),
        ("['..']", "'..' cannot go"),
        (f"[{', '.join(f'{n}.json' for n in range(17))}]", "at most 16 items"),
        ("config.json", "tuple"),
    ],
)
def test_a_manifest_names_files_that_can_be_stored(tmp_path: Path, files: str, complaint: str) -> None:
    (tmp_path / "m.yaml").write_text(f"models:\n  - name: net\n    source: a.pth\n    files: {files}\n")
    with pytest.raises(ManifestError, match=r"line 4: models\[0\].files") as caught:
        load_manifest(tmp_path / "m.yaml")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/x.json", "a/b.json", ".json", ".hidden.json", "run.py", "a\\b.json", "a..json", "a.json\n",
     "CON\0.json", "x" * 96 + ".json", "model.safetensors"],
)  # fmt: skip
def test_a_forged_name_is_no_manifest(directory_store: Store, name: str) -> None:
    document = json.loads(publish_tensors(directory_store, "net", {"a": torch.randn(64, 96)}).manifest.to_bytes())
    good = {"name": "config.json", "blob": "0" * 64, "bytes": 1}
    read_document(VersionManifest, "m", json.dumps({**document, "files": [good]}).encode())
    for files in (
        [{**good, "name": name}],
        [good, {**good, "name": "CONFIG.json"}],
        [{**good, "bytes": MAX_FILE_BYTES + 1}],
        [{**good, "name": f"{n}.json"} for n in range(17)],
    ):
        with pytest.raises(IntegrityError, match="VersionManifest"):
            read_document(VersionManifest, "m", json.dumps({**document, "files": files}).encode())


def test_pull_verify_and_collection_treat_them_as_every_blob(place: Place, source: Path) -> None:
    place.compress("source/model.safetensors")
    manifest = resolve(place.store, "net").manifest
    collect(place.store, grace=timedelta(0), delete=True)
    code, out, _ = place.run("verify", "net", "--json")
    assert (code, json.loads(out)["blobs"]) == (0, 3)
    folder = place.folder / "pulled"
    code, out, _ = place.run("pull", "net", "-o", str(folder), "--json")
    assert json.loads(out)["fetched_bytes"] == sum(record.bytes for record in manifest.stored)
    assert (folder / "files/config.json").read_bytes() == (source / "config.json").read_bytes()
    (folder / "files/config.json").unlink()
    (folder / "files/config.json").write_text("{}")
    assert place.run("verify", str(folder))[0] == exit_code(IntegrityError(""))
    assert place.run("pull", "net", "-o", str(folder))[0] == 0
    assert place.run("verify", str(folder))[0] == 0
    place.compress("source/model.safetensors", "[source/preprocessor_config.json]")
    assert place.run("pull", "net", "-o", str(folder))[0] == 0
    assert [path.name for path in (folder / "files").iterdir()] == ["preprocessor_config.json"]
    place.compress("source/model.safetensors", "[]")
    assert place.run("pull", "net", "-o", str(folder))[0] == 0
    assert not (folder / "files").exists()
    blob = Path(place.store.url.removeprefix("file://")) / blob_key(manifest.stored[1].blob)
    blob.write_bytes(blob.read_bytes()[::-1])
    code, _, err = place.run("verify", f"net@{manifest.digest}")
    assert code == exit_code(IntegrityError(""))
    assert manifest.stored[1].blob in err


def test_manifests_without_files_keep_their_digest(directory_store: Store) -> None:
    manifest = publish_tensors(directory_store, "net", {"a": torch.randn(64, 96)}).manifest
    assert b"files" not in manifest.to_bytes()
    more = manifest.model_copy(update={"files": (FileRecord(name="config.json", blob="0" * 64, bytes=1),)})
    assert more.digest != manifest.digest


def test_settings_name_no_code(tmp_path: Path) -> None:
    assert sidecars.settings_in(json.dumps(CONFIG).encode()) == {"model_type": "sam", "vision_config": {}}
    for body in (b"", b"[]", b"{}", b'{"model_type": 3}', b"\xff", b"[" * 100_000):
        assert sidecars.settings_in(body) is None
