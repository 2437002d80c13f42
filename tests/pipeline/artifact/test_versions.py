"""Versions that were published before: they verify, say what they said, and their shards are found again."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from birkhoff.codec.container import parse, serialise
from birkhoff.codec.profiles import ENCODER_VERSION
from birkhoff.codec.tensor import recode
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.artifact.make_versions import FIXTURE, MODELS, PLANNED
from tests.pipeline.command import captured

SAID: dict[str, Any] = json.loads((FIXTURE / "said.json").read_text())


class Place:
    """The fixture's files, copied, and the command line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self.manifest, self._capsys = folder / "store", folder / "manifest.yaml", capsys

    def run(self, *words: str) -> Any:
        code, out, err = captured(self._capsys, *words, "--json", "--store", self.store.as_uri())
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    shutil.copytree(FIXTURE, tmp_path / "versions")
    return Place(tmp_path / "versions", capsys)


@pytest.mark.parametrize("model", MODELS)
def test_it_verifies_against_its_source(place: Place, model: str) -> None:
    found = place.run("verify", model, "--against", str(FIXTURE / "net.safetensors"))
    assert found["compared"] == found["tensors"] == len(SAID[model]["inspect"])


@pytest.mark.parametrize("model", MODELS)
def test_inspect_says_what_it_said(place: Place, model: str) -> None:
    """Under the keys there were; none of these tensors has what later ones say besides."""
    rows = place.run("inspect", model)
    assert not any(row.pop("nominal") for row in rows)
    assert rows == SAID[model]["inspect"]


def test_plan_says_what_it_said(place: Place) -> None:
    """Only the decibels of a budget are more: what it is foretold to take follows the format that is written now."""
    shutil.rmtree(place.store)
    rows = {row["model"]: {key: row[key] for key in PLANNED} for row in place.run("plan", str(place.manifest))}
    before = {model: dict(said["plan"]) for model, said in SAID.items()}
    now, then = (plans["sized"].pop("predicted_tensor_db") for plans in (rows, before))
    assert now[0] > then[0]
    assert now[1] > then[1]
    assert rows == before


@pytest.mark.parametrize("encoder", [3, ENCODER_VERSION])
def test_its_shards_are_reused_by_the_encoder_that_made_them(
    place: Place, encoder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget searches anew where no version is left, so that it is not held to the very target it found; the
    published codec's recipe says more than it did.
    """
    monkeypatch.setattr("birkhoff.codec.profiles.ENCODER_VERSION", encoder)
    if encoder == 3:  # its keys
        monkeypatch.setattr("birkhoff.pipeline.shard.run.FORMAT_VERSION", 1)
        monkeypatch.setattr("birkhoff.pipeline.shard.run.blake3", sha256)
    models = ["plain", "matched"]
    with open_store(place.store.as_uri()) as store:
        before = {model: resolve(store, model).manifest for model in models}
        shutil.rmtree(place.store / "models")
        only = [word for model in models for word in ("--only", model)]
        rows = place.run("compress", str(place.manifest), "--executor", "inline", *only)
        reused = {model: len(manifest.shards) if encoder == 3 else 0 for model, manifest in before.items()}
        assert {row["model"]: row["shards_reused"] for row in rows} == reused
        for model in models if encoder == 3 else ():
            made = resolve(store, model).manifest
            assert made.model_copy(update={"code": before[model].code}) == before[model]


def test_recoded_containers_come_out_as_they_went_in_and_are_smaller() -> None:
    blobs = [path.read_bytes() for path in (FIXTURE / "store" / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) > 5
    sizes = [0, 0]
    for blob in blobs:
        recoded = serialise([recode(coded) for coded in parse(blob)])
        assert serialise(parse(recoded)) == recoded
        sizes = [sizes[0] + len(blob), sizes[1] + len(recoded)]
    assert sizes[1] < 0.95 * sizes[0]
