"""Commands over several models, and the commands that bring versions elsewhere: rows, exit codes, what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from birkhoff.pipeline.cli import several
from birkhoff.pipeline.cli.several import expand
from birkhoff.pipeline.errors import ArtifactNotFoundError
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured, execute
from tests.pipeline.publishing import publish_contents, publish_tensors


class Place:
    """A store with sam-a (v1, v2), sam-b (v1) and other (v1), and a home of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.url, self.other = (folder / "store").as_uri(), (folder / "other store").as_uri()
        patch.setenv("BIRKHOFF_STORE", self.url)
        patch.setenv("BIRKHOFF_HOME", str(folder / "home"))
        with open_store(self.url) as store:
            for seed, model in enumerate(("sam-a", "sam-a", "sam-b", "other")):
                weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
                publish_tensors(store, model, {"a.weight": weight})

    def run(self, *words: object) -> tuple[int, str, str]:
        return captured(self._capsys, *map(str, words))

    def json(self, *words: object, code: int = 0) -> Any:
        found, out, err = self.run(*words, "--json")
        assert found == code, err
        return json.loads(out)

    def lose(self, model: str) -> None:
        """Delete the one blob of a model's latest version."""
        with open_store(self.url) as store:
            (record,) = resolve(store, model).manifest.stored
            store.delete(blob_key(record.blob))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, monkeypatch, capsys)


class TestGlobs:
    def test_they_stand_for_the_models_that_match(self, place: Place) -> None:
        with open_store(place.url) as store:
            assert expand(store, ["sam-*"]) == ["sam-a", "sam-b"]
            assert expand(store, ["*@v1"]) == ["other@v1", "sam-a@v1", "sam-b@v1"]
            assert expand(store, ["sam-[b]", "other", "sam-*", "no*such?"][:3]) == ["sam-b", "other", "sam-a"]
            with pytest.raises(ArtifactNotFoundError, match=r"has no model 'no\*'; it has: other, sam-a, sam-b"):
                expand(store, ["sam-a", "no*"])

    def test_one_reference_is_no_table(self, place: Place) -> None:
        assert isinstance(place.json("verify", "sam-a"), dict)
        assert [row["artifact"] for row in place.json("verify", "sam-a*")] == ["sam-a@v2"]

    def test_two_folders_of_one_name(self) -> None:
        several.check_models_differ(["a@v1", "b@v1"])
        with pytest.raises(typer.BadParameter, match="a is named twice"):
            several.check_models_differ(["a@v1", "a@v2"])


class TestPull:
    def test_each_into_a_folder_of_its_name(self, place: Place) -> None:
        rows = place.json("pull", "sam-*", "other", "-o", place.folder / "out")
        assert [(row["model"], row["version"], row["status"]) for row in rows] == [
            ("sam-a", "v2", "pulled"),
            ("sam-b", "v1", "pulled"),
            ("other", "v1", "pulled"),
        ]
        for row in rows:
            assert row["output"] == str(place.folder / "out" / row["model"])
            assert execute("verify", row["output"]) == 0

    def test_one_that_fails_ends_nothing(self, place: Place) -> None:
        place.lose("sam-a")
        rows = place.json("pull", "sam-*", "-o", place.folder / "out", code=14)
        assert [(row["model"], row["status"]) for row in rows] == [("sam-a", "failed"), ("sam-b", "pulled")]
        assert "is missing from file://" in rows[0]["error"]
        code, out, err = place.run("pull", "sam-*", "-o", place.folder / "out")
        assert (code, "failed" in out, err.startswith("error: sam-a: sam-a@v2: blob ")) == (14, True, True)

    def test_where_all_fail_alike_that_is_the_code(self, place: Place) -> None:
        assert [row["status"] for row in place.json("pull", "*@v9", "-o", place.folder / "out", code=10)] == [
            "failed"
        ] * 3
        place.lose("sam-a")
        place.lose("sam-b")
        assert len(place.json("verify", "sam-*", code=11)) == 2

    def test_offline_takes_names_and_no_globs(self, place: Place) -> None:
        out = place.folder / "out"
        assert place.run("pull", "sam-*", "-o", out)[0] == 0
        rows = place.json("pull", "sam-a", "sam-b", "-o", place.folder / "again", "--offline")
        assert [(row["status"], row["fetched_bytes"], row["missing_blobs"]) for row in rows] == [
            ("pulled", 0, None)
        ] * 2
        with pytest.raises(typer.BadParameter, match="a glob needs the store"):
            _raw("pull", "sam-*", "-o", str(out), "--offline")


def _raw(*words: str) -> None:
    from birkhoff.pipeline.cli import main

    main.app(list(words), standalone_mode=False)


class TestWhatAStoreLacks:
    def copied_by_hand(self, place: Place) -> str:
        """A store that has the models of another one, and not their blobs."""
        shutil.copytree(place.folder / "store" / "models", place.folder / "by-hand" / "models")
        return (place.folder / "by-hand").as_uri()

    def test_a_pull_from_the_cache_says_so(self, place: Place) -> None:
        first = place.json("pull", "sam-a", "-o", place.folder / "out")
        assert (first["missing_blobs"], first["missing_bytes"]) == (0, 0)
        url = self.copied_by_hand(place)
        code, out, err = place.run("pull", "sam-a", "-o", place.folder / "again", "--store", url)
        assert (code, "fetched 0 B" in out, "missing blobs 1" in out) == (0, True, True)
        assert f"warning: sam-a@v2: 1 of its 1 blobs are missing in {url}; they were in this machine's cache" in err
        found = place.json("pull", "sam-a", "-o", place.folder / "third", "--store", url)
        assert (found["missing_blobs"], found["missing_bytes"]) == (1, first["fetched_bytes"])

    def test_a_pull_of_what_is_there_asks_nothing_more(self, place: Place) -> None:
        assert place.run("pull", "sam-a", "-o", place.folder / "out")[2] == ""
        assert place.run("pull", "sam-a", "-o", place.folder / "out")[2] == ""

    def test_a_listing_says_so(self, place: Place) -> None:
        whole = place.json("list")
        assert [(row["missing_blobs"], row["missing_bytes"], row["problem"]) for row in whole] == [(0, 0, None)] * 3
        assert "problem" not in place.run("list")[1]
        url = self.copied_by_hand(place)
        rows = place.json("list", "--store", url)
        assert {row["problem"] for row in rows} == {"1 of its 1 blobs are missing"}
        assert all(row["missing_blobs"] == 1 and row["missing_bytes"] > 3000 for row in rows)
        assert "1 of its 1 blobs are missing" in place.run("list", "sam-a", "--store", url)[1]

    def test_a_model_whose_manifest_is_gone_does_not_hide_the_others(self, place: Place) -> None:
        with open_store(place.url) as store:
            digest = resolve(store, "sam-a").digest
            store.delete(f"models/sam-a/versions/{digest}/manifest.json")
        rows = {row["model"]: row for row in place.json("list")}
        assert (rows["sam-a"]["problem"], rows["sam-a"]["ratio"]) == ("its manifest is missing", None)
        assert rows["sam-b"]["problem"] is None

    def test_a_model_without_latest_is_shown_by_its_newest(self, place: Place) -> None:
        assert place.run("remove", "sam-a@latest")[0] == 0
        assert [(row["model"], row["version"]) for row in place.json("list")][1] == ("sam-a", "v2")

    def test_versions_that_other_aliases_point_at_are_listed(self, place: Place) -> None:
        assert place.run("promote", "sam-a@v1", "stable")[0] == 0
        rows = [(row["model"], row["version"], row["aliases"]) for row in place.json("list")]
        assert rows[1:3] == [("sam-a", "v1", ["stable"]), ("sam-a", "v2", ["latest"])]
        assert len(rows) == 4
        assert "stable" in place.run("list")[1]

    def test_copy_mends_it(self, place: Place) -> None:
        url = self.copied_by_hand(place)
        rows = place.json("copy", "*", "--to", url)
        assert [(row["status"], row["copied_blobs"]) for row in rows] == [("copied", 1)] * 3
        assert {row["problem"] for row in place.json("list", "--store", url)} == {None}


class TestShipping:
    def test_copy_says_what_it_did(self, place: Place) -> None:
        assert place.run("label", "sam-a", "licence=MIT")[0] == 0
        found = place.json("copy", "sam-a", "--to", place.other, "--alias", "stable")
        with open_store(place.url) as store:
            version = resolve(store, "sam-a")
        size = sum(record.bytes for record in version.manifest.stored)
        assert found == {
            "model": "sam-a",
            "version": "v2",
            "digest": version.digest,
            "renamed_from": None,
            "blobs": 1,
            "copied_blobs": 1,
            "copied_bytes": size,
            "aliases": ["stable"],
            "labels": {"licence": "MIT"},
            "signed_for": [],
            "store": place.other,
        }
        code, out, err = place.run("copy", "sam-a", "--to", place.other)
        assert (code, "copied blobs" in out, "copied 0 B" in out, err) == (0, False, True, "")
        assert place.run("verify", "sam-a@stable", "--store", place.other)[0] == 0

    def test_a_copy_says_which_store_its_signatures_name(self, place: Place, tmp_path: Path) -> None:
        key = str(tmp_path / "k.key")
        assert place.run("key", "new", key)[0] == 0
        assert place.run("sign", "sam-a@v2", "--key", key)[0] == 0
        code, out, err = place.run("copy", "sam-a@v2", "--to", place.other)
        assert (code, "signed for" in out) == (0, False)
        assert f"its signatures name {place.url}, not {place.other}; readers there say that with --signed-for" in err
        there = ("sam-a@v2", "--store", place.other, "--require-signature", f"{key}.pub")
        assert place.run("verify", *there)[0] == 20
        assert place.run("verify", *there, "--signed-for", place.url)[0] == 0
        back = (tmp_path / "back").as_uri()
        assert place.run("copy", *there, "--to", back)[0] == 20
        assert place.run("copy", *there, "--to", back, "--signed-for", place.url)[0] == 0
        assert place.run("save", *there, "-o", str(tmp_path / "x.tar"), "--signed-for", place.url)[0] == 0
        assert place.json("copy", "sam-a@v2", "--to", place.other)["signed_for"] == [place.url]
        assert place.run("copy", "sam-a@v2", "--to", place.other, "--sign", key)[2] == ""
        assert place.run("verify", *there)[0] == 0

    def test_copy_to_itself(self, place: Place) -> None:
        with pytest.raises(typer.BadParameter, match="is the store it comes from"):
            _raw("copy", "sam-a", "--to", place.url)

    def test_a_name_that_is_taken_and_a_protected_alias(self, place: Place) -> None:
        with open_store(place.other) as other:
            publish_contents(other, "sam-a", "its", "own")
            publish_contents(other, "sam-a", "later")
        code, _, err = place.run("copy", "sam-a", "--to", place.other)
        assert (code, "give it the next free one with --rename" in err) == (7, True)
        found = place.json("copy", "sam-a", "--to", place.other, "--rename")
        assert (found["version"], found["renamed_from"]) == ("v3", "v2")
        assert place.run("promote", "sam-a@v1", "--protect", "--store", place.other)[0] == 0
        code, _, err = place.run("copy", "sam-b", "sam-a@v1", "--to", place.other, "--alias", "stable")
        assert (code, "sam-a: " in err) == (14, True)

    def test_save_and_load(self, place: Place) -> None:
        file = place.folder / "sam-a.tar"
        saved = place.json("save", "sam-a@v1", "-o", file)
        assert saved["bytes"] == file.stat().st_size
        loaded = place.json("load", file, "--store", place.other, "--alias", "stable")
        assert {key: loaded[key] for key in ("model", "version", "digest")} == {
            key: saved[key] for key in ("model", "version", "digest")
        }
        assert place.run("verify", "sam-a@stable", "--store", place.other)[0] == 0
        code, _, err = place.run("load", place.folder / "no.tar", "--store", place.other)
        assert (code, "name a file that `birkhoff save` wrote" in err) == (10, True)
        file.write_bytes(file.read_bytes()[:-700])
        assert place.run("load", file, "--store", place.other)[0] == 11

    def test_unsigned_is_refused_where_a_signature_is_asked_for(self, place: Place) -> None:
        key = place.folder / "key"
        assert place.run("key", "new", key)[0] == 0
        for command in (["copy", "sam-a", "--to", place.other], ["save", "sam-a", "-o", place.folder / "x.tar"]):
            assert place.run(*command, "--require-signature", f"{key}.pub")[0] == 20
        assert place.run("sign", "sam-a", "--key", key)[0] == 0
        assert (
            place.run("copy", "sam-a", "--to", place.other, "--require-signature", f"{key}.pub", "--sign", key)[0] == 0
        )
        pull = (
            "pull",
            "sam-a",
            "-o",
            place.folder / "out",
            "--store",
            place.other,
            "--require-signature",
            f"{key}.pub",
        )
        assert place.run(*pull)[0] == 0

    def test_remove(self, place: Place) -> None:
        removed = place.json("remove", "sam-a@v1")
        assert (removed["version"], removed["alias"], len(removed["digest"])) == ("v1", None, 64)
        code, _, err = place.run("remove", "sam-a@v2")
        assert (code, "is what latest points at; move the alias first" in err) == (17, True)
        gone = place.json("remove", "sam-a@latest")
        assert (gone["version"], gone["alias"]) == ("v2", "latest")
        assert place.run("remove", "sam-a@v2")[0] == 0
        assert [row["model"] for row in place.json("list")] == ["other", "sam-b"]
        events = [(row["event"], row["version"]) for row in place.json("history", "sam-a")]
        assert {("retired", "v1"), ("removed", "v2"), ("retired", "v2")} < set(events)
        for reference in ("sam-b", "sam-b@", "sam-b@" + "0" * 64, "a/b@v1"):
            with pytest.raises(typer.BadParameter, match="expected MODEL@v3 for a version or MODEL@ALIAS"):
                _raw("remove", reference)
