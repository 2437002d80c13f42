"""Stored versions of format 1 become format 2 without loss and without their source."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from birkhoff.codec.container import parse
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.artifact.recode import recode_version
from birkhoff.pipeline.errors import IntegrityError, PreconditionError
from birkhoff.pipeline.registry.documents import blob_key, shard_key
from birkhoff.pipeline.registry.labels import label, read_labels
from birkhoff.pipeline.registry.names import names
from birkhoff.pipeline.registry.versions import publish, resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.artifact.make_versions import FIXTURE, MODELS
from tests.pipeline.command import captured


@pytest.fixture
def stored(tmp_path: Path) -> Store:
    shutil.copytree(FIXTURE / "store", tmp_path / "store")
    with open_store((tmp_path / "store").as_uri()) as store:
        yield store


def tensors(store: Store, reference: str) -> dict[str, torch.Tensor]:
    return dict(StoredArtifact(store, resolve(store, reference)).tensors())


def versions_of(store: Store, reference: str) -> set[int]:
    artifact = StoredArtifact(store, resolve(store, reference))
    return {coded.version for shard in artifact.manifest.shards for coded in parse(artifact.blob(shard))}


@pytest.mark.parametrize("model", MODELS)
def test_the_same_weights_in_another_format_under_a_new_name(stored: Store, model: str) -> None:
    before = resolve(stored, model)
    label(stored, model, {"licence": "MIT"})
    assert versions_of(stored, model) == {1}
    done = recode_version(stored, model)
    assert done.before.digest == before.digest
    assert done.shards == len(before.manifest.shards)
    after = resolve(stored, model)
    assert (after.name, after.digest) == (done.after.name, done.after.digest) != (before.name, before.digest)
    assert versions_of(stored, model) == {2}
    assert versions_of(stored, f"{model}@{before.name}") == {1}
    old, new = tensors(stored, f"{model}@{before.name}"), tensors(stored, model)
    assert list(old) == list(new)
    for name, tensor in old.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), new[name].reshape(-1).view(torch.uint8))
    kept = {"shards", "code"}
    assert after.manifest.model_dump(exclude=kept) == before.manifest.model_dump(exclude=kept)
    assert read_labels(stored, model, after.digest) == {"licence": "MIT"}
    for a, b in zip(before.manifest.shards, after.manifest.shards, strict=True):
        own = {"key", "blob", "bytes"}
        assert a.model_dump(exclude=own) == b.model_dump(exclude=own)
        assert a.key != b.key
        assert stored.get(shard_key(b.key)) == b.to_bytes()


def test_what_is_of_the_present_format_stays_what_it_is(stored: Store) -> None:
    recode_version(stored, "plain")
    held = list(names(stored, "plain"))
    again = recode_version(stored, "plain")
    assert (again.shards, again.after.digest) == (0, again.before.digest)
    assert list(names(stored, "plain")) == held


def test_an_older_version_does_not_become_latest_by_the_way(stored: Store) -> None:
    old = resolve(stored, "plain")
    newer = publish(stored, old.manifest.model_copy(update={"code": "0.1.1"}))
    with pytest.raises(PreconditionError, match="is not the newest version of plain"):
        recode_version(stored, f"plain@{old.name}")
    assert resolve(stored, "plain").digest == newer.digest
    done = recode_version(stored, f"plain@{old.name}", make_latest=True)
    assert resolve(stored, "plain").digest == done.after.digest


def test_a_damaged_blob_is_not_recoded(stored: Store) -> None:
    before = resolve(stored, "plain")
    key = blob_key(before.manifest.shards[-1].blob)
    body = bytearray(stored.get(key))
    body[-1] ^= 1
    stored.put(key, bytes(body))
    with pytest.raises(IntegrityError, match="is damaged"):
        recode_version(stored, "plain")
    assert resolve(stored, "plain").digest == before.digest


def test_the_command_and_what_readers_say_of_its_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    shutil.copytree(FIXTURE / "store", tmp_path / "store")

    def run(*words: str) -> Any:
        code, out, err = captured(capsys, *words, "--json", "--store", (tmp_path / "store").as_uri())
        assert code == 0, err
        return json.loads(out)

    facts = run("recode", "plain")
    assert facts["format"] == 2
    assert facts["shards"] > 0
    assert facts["from"] != facts["version"]
    verified = run("verify", "plain", "--against", str(FIXTURE / "net.safetensors"))
    assert verified["compared"] == verified["tensors"]
    said = json.loads((FIXTURE / "said.json").read_text())["plain"]["inspect"]
    kept = said[0].keys() - {"bits_per_weight", "action"}
    now = run("inspect", "plain")
    assert [{key: row[key] for key in kept} for row in now] == [{key: row[key] for key in kept} for row in said]
    assert run("recode", "plain")["shards"] == 0
