"""Labels of versions: what can be one, who changes them, and that a version stays what it is."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from birkhoff.pipeline.cli import versions
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, LabelError, exit_code
from birkhoff.pipeline.registry.labels import MAX_LABELS, MAX_VALUE, change_labels, label, labels_key, read_labels
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured, execute
from tests.pipeline.publishing import publish_contents


def test_they_are_set_and_taken_away_and_the_version_stays(store: Store) -> None:
    before = publish_contents(store, "net", "a")
    assert read_labels(store, "net", before.digest) == {}
    version, held = label(store, "net", {"licence": "MIT", "data-set": "SA-1B, July"})
    assert (version.name, list(held.items())) == ("v1", [("data-set", "SA-1B, July"), ("licence", "MIT")])
    assert label(store, "net@v1", {"licence": "Apache-2.0"}, drop=["data-set", "no.such"])[1] == {
        "licence": "Apache-2.0"
    }
    after = resolve(store, "net")
    assert (after.digest, after.stored_bytes) == (before.digest, before.stored_bytes)
    assert read_labels(store, "net", before.digest) == {"licence": "Apache-2.0"}
    assert label(store, "net", {}, drop=["licence"])[1] == {}


def test_of_many_that_set_one_each_none_is_lost(store: Store) -> None:
    digest = publish_contents(store, "net", "a").digest
    wanted = {f"key{number}": str(number) for number in range(12)}
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda item: change_labels(store, "net", digest, dict([item])), wanted.items()))
    assert read_labels(store, "net", digest) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "x"),
        ("Licence", "x"),
        ("-a", "x"),
        ("a b", "x"),
        ("a/b", "x"),
        ("a\n", "x"),
        ("é", "x"),
        ("a" * 64, "x"),
        ("a", ""),
        ("a", "x\n"),
        ("a", "\x1b[31m"),
        ("a", "\u202ex"),
        ("a", "x" * (MAX_VALUE + 1)),
    ],
)
def test_what_cannot_be_one(directory_store: Store, key: str, value: str) -> None:
    digest = publish_contents(directory_store, "net", "a").digest
    with pytest.raises(LabelError, match="expected 1 to") as error:
        change_labels(directory_store, "net", digest, {key: value})
    assert exit_code(error.value) == 23
    assert str(error.value).isprintable()
    assert read_labels(directory_store, "net", digest) == {}


def test_there_can_be_so_many(directory_store: Store) -> None:
    digest = publish_contents(directory_store, "net", "a").digest
    change_labels(directory_store, "net", digest, {f"k{number}": "x" * MAX_VALUE for number in range(MAX_LABELS)})
    with pytest.raises(LabelError, match=f"{MAX_LABELS + 1} labels; a version has at most {MAX_LABELS}"):
        change_labels(directory_store, "net", digest, {"one-more": "x"})
    assert len(change_labels(directory_store, "net", digest, {"one-more": "x"}, drop=["k0"])) == MAX_LABELS


@pytest.mark.parametrize("body", [b"", b"[]", b'{"labels": {"A": "x"}}', b'{"labels": {"a": 1}}', b"x" * (17 << 20)])
def test_what_a_stranger_stored_there_is_named(directory_store: Store, body: bytes) -> None:
    digest = publish_contents(directory_store, "net", "a").digest
    directory_store.put(labels_key("net", digest), body)
    with pytest.raises(IntegrityError, match=r"labels\.json: (not a LabelRecord|larger than)"):
        read_labels(directory_store, "net", digest)


def test_there_is_no_such_version(directory_store: Store) -> None:
    publish_contents(directory_store, "net", "a")
    with pytest.raises(ArtifactNotFoundError, match="no version or alias 'v7'"):
        label(directory_store, "net@v7", {"a": "b"})


class TestCommands:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "net.safetensors")

    def compress(self, folder: Path, labels: str) -> int:
        (folder / "m.yaml").write_text(
            f"labels: {{team: maps, licence: none}}\nmodels: [{{name: net, source: net.safetensors, labels: {labels}}}]"
        )
        return execute("compress", str(folder / "m.yaml"), "--executor", "inline")

    def test_a_manifest_says_them_without_a_new_version(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.compress(tmp_path, "{licence: MIT}") == 0
        assert execute("label", "net", "approved-by=jo") == 0
        (row,) = json.loads(captured(capsys, "list", "--json")[1])
        assert row["labels"] == {"approved-by": "jo", "licence": "MIT", "team": "maps"}
        assert self.compress(tmp_path, "{licence: Apache-2.0}") == 0
        assert "up to date" in capsys.readouterr().out
        (after,) = json.loads(captured(capsys, "list", "net", "--json")[1])
        assert after == row | {"labels": row["labels"] | {"licence": "Apache-2.0"}}

    def test_a_manifest_that_says_them_wrongly(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.compress(tmp_path, "{Licence: MIT}") == 3
        assert "models[0].labels: label 'Licence': expected 1 to 63 of a-z" in capsys.readouterr().err
        assert self.compress(tmp_path, "{licence: 1}") == 3

    def test_where_they_are_shown(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with open_store((tmp_path / "store").as_uri()) as store:
            publish_contents(store, "other", "a")
        assert self.compress(tmp_path, "{}") == 0
        shown = "licence=none, team=maps"
        for command in (["list"], ["list", "net"], ["history", "net"], ["inspect", "net"], ["label", "net"]):
            assert shown in captured(capsys, *command)[1]
        code, out, _ = captured(capsys, "label", "net", "--json")
        assert (code, json.loads(out)["labels"]) == (0, {"licence": "none", "team": "maps"})
        history = json.loads(captured(capsys, "history", "net", "--json")[1])
        assert [row["labels"] for row in history if row["event"] == "published"] == [json.loads(out)["labels"]]
        assert {row["model"]: row["labels"] for row in json.loads(captured(capsys, "list", "--json")[1])}["other"] == {}
        assert "labels" not in captured(capsys, "list", "other")[1]

    def test_what_is_no_pair(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.compress(tmp_path, "{}") == 0
        with pytest.raises(typer.BadParameter, match="expected KEY=VALUE, got 'licence'"):
            versions._pair("licence")
        assert execute("label", "net", "licence=") == 23
