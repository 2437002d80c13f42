"""History and diff on real shards, and the commands about versions from end to end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.registry.signing import new_key
from tests.pipeline.command import captured


class Place:
    """A checkpoint that changes, a store, and the command line on both."""

    def __init__(self, folder: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder, self._store, self._capsys = folder, store, capsys
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(96, 128, generator=generator) for name in ("a.weight", "b.weight", "c.weight")
        } | {"a.bias": torch.randn(96, generator=generator)}
        (folder / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments, "--store", self._store)

    def json(self, *arguments: str) -> list[dict[str, object]]:
        code, out, err = self.run(*arguments, "--json")
        assert code == 0, err
        found = json.loads(out)
        return found if isinstance(found, list) else [found]

    def compress(self, *arguments: str) -> dict[str, object]:
        save_file(self.tensors, self._folder / "net.safetensors")
        (row,) = self.json("compress", str(self._folder / "m.yaml"), "--executor", "inline", *arguments)
        return row

    def refused(self, code: int, message: str, *arguments: str) -> None:
        found, out, err = self.run(*arguments)
        assert (found, message in err, err.count("\n"), out) == (code, True, 1, ""), err


@pytest.fixture(params=["directory", "s3"])
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    store = request.getfixturevalue("s3_environment") if request.param == "s3" else (tmp_path / "store").as_uri()
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    return Place(tmp_path, store, capsys)


def test_the_commands_from_promote_to_gc(place: Place) -> None:
    first = place.compress()
    (moved,) = place.json("promote", "net")
    assert (moved["alias"], moved["version"], moved["from"], moved["changed"]) == ("stable", "v1", None, True)
    place.tensors["b.weight"] = place.tensors["b.weight"] * 1.5
    second = place.compress()
    place.json("promote", "net@latest", "stable", "--protect")
    place.refused(17, "stable of net is protected at v2; --force", "rollback", "net")
    (back,) = place.json("rollback", "net", "--force")
    assert (back["from"], back["version"], back["protected"]) == ("v2", "v1", True)
    place.json("promote", "net@" + str(second["digest"]), "stable", "--no-protect", "--force")
    place.json("rollback", "net", "stable", "--to", "v1")
    rows = place.json("history", "net")
    moves = [row for row in rows if row["alias"] == "stable"]
    assert [(row["event"], row["from"], row["version"], row["gen"]) for row in moves] == [
        ("moved", None, "v1", 1),
        ("moved", "v1", "v2", 2),
        ("rolled back", "v2", "v1", 3),
        ("moved", "v1", "v2", 4),
        ("rolled back", "v2", "v1", 5),
    ]
    assert [row["version"] for row in rows if row["alias"] == "latest"] == ["v1", "v2"]
    published = [row for row in rows if row["event"] == "published"]
    assert [(row["version"], row["digest"]) for row in published] == [
        ("v1", first["digest"]),
        ("v2", second["digest"]),
    ]
    text = " ".join(place.run("history", "net")[1].split())
    ratios = [float(str(row["ratio"])) for row in published]
    shape = "▄▄" if ratios[0] == ratios[1] else "▁█" if ratios[0] < ratios[1] else "█▁"
    assert f"ratio {shape} {ratios[0]:.2f} to {ratios[1]:.2f}, SQNR min dB " in text
    assert [row["sqnr_db_min"] for row in published] == [first["sqnr_db_min"], second["sqnr_db_min"]]
    assert all(row["ratio"] for row in published)
    assert [row["time"] for row in rows] == sorted(str(row["time"]) for row in rows)
    place.json("promote", "net@v2")
    assert all(row["objects"] == 0 for row in place.json("gc", "--yes"))
    planned = place.json("gc", "--keep", "1", "--grace", "0s")
    assert [row["retired"] for row in planned if row["kind"] == "name"] == [["v1"]]
    done = place.json("gc", "--keep", "1", "--grace", "0s", "--yes")
    assert [(row["kind"], row["objects"], row["kept"]) for row in done] == [
        ("name", 1, 1),
        ("version", 1, 1),
        ("shard", 1, 3),
        ("blob", 1, 3),
        ("run", 0, 4),
    ]
    assert [(row["objects"], row["bytes"]) for row in planned[1:]] == [
        (row["objects"], row["bytes"]) for row in done[1:]
    ]
    place.json("verify", "net@stable")
    place.refused(10, "has no version or alias 'v1'; it has: latest, stable, v2", "promote", "net@v1")
    assert [row["version"] for row in place.json("history", "net") if row["event"] == "published"] == ["v2"]


def test_diff_tells_what_was_added_removed_changed_and_recoded(place: Place) -> None:
    place.compress()
    place.tensors["b.weight"] = place.tensors["b.weight"] * 1.5
    place.tensors["d.weight"] = place.tensors.pop("c.weight").clone()
    place.compress()
    place.compress("--profile", "fine")
    rows = {row["name"]: row for row in place.json("diff", "net@v1", "net@v2", "--all")}
    assert {name: row["change"] for name, row in rows.items()} == {
        "a.bias": "same",
        "a.weight": "same",
        "b.weight": "changed",
        "d.weight": "added",
        "c.weight": "removed",
    }
    changed, added, removed = rows["b.weight"], rows["d.weight"], rows["c.weight"]
    # Its step is the same, as that of all tensors of its size.
    assert changed["max_abs_error_b"] == pytest.approx(float(str(changed["max_abs_error_a"])), rel=0.2)
    assert changed["sqnr_db_b"] == pytest.approx(float(str(changed["sqnr_db_a"])) + 3.52, abs=0.3)
    assert (changed["shape"], changed["dtype"], changed["action_a"]) == ([96, 128], "float32", changed["action_b"])
    assert (added["sqnr_db_a"], removed["sqnr_db_b"]) == (None, None)
    assert added["bits_per_weight_b"] == removed["bits_per_weight_a"]
    assert [row["name"] for row in place.json("diff", "net@v1", "net@v2")] == ["b.weight", "d.weight", "c.weight"]
    recoded = place.json("diff", "net@v2", "net")
    assert {row["change"] for row in recoded} == {"recoded"}
    assert all(float(str(row["sqnr_db_b"])) > float(str(row["sqnr_db_a"])) for row in recoded)
    assert place.json("diff", "net", "net@v3") == []
    code, out, _ = place.run("diff", "net@v1", "net@v2")
    assert (code, "net@v1 (A) and net@v2 (B): 2 same, 1 changed, 1 added, 1 removed" in out) == (0, True)
    place.refused(10, "'v9'", "diff", "net@v1", "net@v9")


def test_all_commands_agree_on_what_a_version_takes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "birkhoff.pipeline.files._SETTLED_SECONDS", -1.0
    )  # the digest of a file just written is recalled too
    first = place.compress()
    place.tensors["b.weight"] = place.tensors["b.weight"] * 1.5
    second = place.compress()
    new_key(tmp_path / "k")
    place.json("promote", "net@v1", "--sign", str(tmp_path / "k"))
    assert place.compress("--sign", str(tmp_path / "k"))["stored_bytes"] == second["stored_bytes"]
    for row, version in ((first, "v1"), (second, "v2")):
        want = row["stored_bytes"], row["ratio"]
        listed = [each for each in place.json("list", "net") if each["version"] == version]
        history = [each for each in place.json("history", "net") if each["version"] == version and each["ratio"]]
        assert [(each["stored_bytes"], each["ratio"]) for each in (*listed, *history)] == [want] * 2
    listed = [(row["version"], row["stored_bytes"]) for row in place.json("list")]  # v1 by its alias `stable`
    assert listed == [("v1", first["stored_bytes"]), ("v2", second["stored_bytes"])]
    (plan,) = place.json("plan", str(tmp_path / "m.yaml"))
    assert (plan["status"], plan["predicted_stored_bytes"]) == ("up to date", second["stored_bytes"])
    (report,) = place.json("report")
    assert [model["stored_bytes"] for model in report["models"]] == [second["stored_bytes"]]
    assert f"ratio {second['ratio']:.2f}" in place.run("inspect", "net")[1]


def test_tables_and_refusals_are_for_people(place: Place) -> None:
    place.compress()
    code, out, err = place.run("history", "net")
    assert (code, "published" in out, "moved" in out, err) == (0, True, True, "")
    code, out, err = place.run("gc")
    assert (code, out, "nothing to delete" in err) == (0, "", True)
    assert place.run("promote", "net", "canary")[1].startswith("promoted: model net, alias canary, version v1")
    assert place.run("promote", "net", "canary")[1].startswith("nothing to do: ")
    place.refused(10, "has no model 'nope'; it has: net", "history", "nope")
    place.refused(10, "no alias 'stable'; it has: canary, latest", "rollback", "net")
    place.refused(17, "neither a version such as v3 nor a digest", "promote", "net", "v3")
    place.refused(10, "has no model 'nope'", "promote", "nope@v1")
