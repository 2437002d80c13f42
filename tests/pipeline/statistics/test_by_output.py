"""`allocation: output` from manifest to version: what it brings, what is reused, and what goes wrong on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from birkhoff.pipeline.registry.documents import VersionManifest
from birkhoff.pipeline.statistics import task as tasks
from tests.pipeline.statistics.places import CODED, Place

OUTPUT = "allocation: output"


def manifest_of(place: Place, digest: str, model: str = "net") -> VersionManifest:
    (path,) = place.files(f"models/{model}/versions/{digest}/manifest.json")
    return VersionManifest.model_validate_json(path.read_bytes())


def test_a_version_is_made_says_so_and_is_up_to_date(place: Place) -> None:
    code, (row,), err = place.compress(OUTPUT)
    assert code == 0, err
    assert (row["status"], row["allocation"], row["target_db"]) == ("published", "output", 30.0)
    assert {"build", "statistics", "encode", "validate", "prove"} <= row["stages"].keys()
    manifest = manifest_of(place, row["digest"])
    assert manifest.gains_db is not None
    assert manifest.gains_db.keys() == CODED
    assert manifest.recipe["statistics"] in [path.stem for path in place.files("statistics/*/*.json")]

    again = place.compress(OUTPUT)[1][0]
    assert (again["status"], again["digest"], again["stages"]) == ("up to date", row["digest"], {})
    rows = {tensor["name"]: tensor for tensor in json.loads(place.run("inspect", "net", "--json")[1])}
    for name, gain in manifest.gains_db.items():
        assert rows[name]["nominal"] is True
        assert rows[name]["target_db"] == pytest.approx(30.0 + gain, abs=0.011)
        assert rows[name]["why"] == "by output sensitivity"
    assert not any(tensor["nominal"] for name, tensor in rows.items() if name not in CODED)
    assert "(balanced, allocation output)" in place.run("inspect", "net")[1]
    assert json.loads(place.run("history", "net", "--json")[1])[0]["allocation"] == "output"
    assert place.run("verify", "net", "--against", str(place.folder / "net.pth"))[0] == 0
    (model,) = json.loads(place.run("report", "--json")[1])["models"]
    assert model["allocation"] == "output"
    layers = {layer["name"]: layer for layer in model["layers"]}
    assert layers["2.weight"].get("target_db") is None
    assert layers["2.weight"]["nominal_db"] == rows["2.weight"]["target_db"]


def test_siblings_and_later_versions_reuse_the_statistics(place: Place) -> None:
    code, rows, err = place.compress(OUTPUT, f"{OUTPUT}, profile: small")
    assert code == 0, err
    assert sum("statistics" in row["stages"] for row in rows) == 1
    kept = place.files("statistics/*/*.json")
    assert len(kept) == 1
    code, (row,), _ = place.compress(f"{OUTPUT}, profile: fine")
    assert code == 0
    assert "statistics" not in row["stages"]
    assert place.files("statistics/*/*.json") == kept
    place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline")
    code, _, err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline", "--profile", "fast")
    assert code == 0, err


def test_what_was_done_is_said_in_a_line(place: Place) -> None:
    place.compress(OUTPUT)
    (place.folder / "m.yaml").write_text((place.folder / "m.yaml").read_text() + "    # another run\n")
    shutil.rmtree(place.folder / "store")
    err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline")[2]
    said = "net: targets follow from the sensitivity of its outputs on 3 of your batches with 4 probes each, "
    assert f"{said}taken in " in err
    text = (place.folder / "m.yaml").read_text()
    (place.folder / "m.yaml").write_text(text.replace(OUTPUT, f"{OUTPUT}, profile: fine"))
    err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline")[2]
    assert f"{said}found in the store" in err


def test_inline_and_on_ray_the_same_inputs_give_the_same_version(place: Place) -> None:
    code, (inline,), err = place.compress(OUTPUT)
    assert code == 0, err
    objects = bodies(place)
    shutil.rmtree(place.folder / "store")
    code, (ray,), err = place.compress(OUTPUT, executor="ray")
    assert code == 0, err
    assert ray["status"] == "published"
    assert ray["digest"] == inline["digest"]
    assert bodies(place) == objects


def bodies(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.files("blobs/**/*") if path.is_file()}


def test_feedback_and_shares_bring_the_outputs_nearer_at_equal_bytes(place: Place) -> None:
    budget = "max_bytes: 12800"
    code, (plain, felt), err = place.compress(f"{budget}, allocation: uniform, floor_db: 6", f"{budget}, {OUTPUT}")
    assert code == 0, err
    assert felt["stored_bytes"] <= 12800
    assert felt["output_db"] > plain["output_db"] + 1


BUDGETS = ("target_ratio: 5", "max_bytes: 20KiB", "target_output_db: 25")


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_turns_the_one_knob_and_is_kept_by_the_next_run(place: Place, budget: str) -> None:
    code, (row,), err = place.compress(f"{budget}, {OUTPUT}")
    assert code == 0, err
    manifest = manifest_of(place, row["digest"])
    assert manifest.recipe["target_db"] == row["target_db"]
    if budget == BUDGETS[0]:
        assert row["ratio"] >= 5
    elif budget == BUDGETS[1]:
        assert row["stored_bytes"] <= 20 << 10
    else:
        assert row["output_db"] >= 25
    digests = {tensor["target_db"] for tensor in json.loads(place.run("inspect", "net", "--json")[1])}
    assert len(digests - {None}) == len(CODED)
    assert place.compress(f"{budget}, {OUTPUT}")[1][0]["status"] == "up to date"


def test_low_means_are_allowed_which_no_promise_could_be(place: Place) -> None:
    code, (row,), err = place.compress(f"target_output_db: 6, {OUTPUT}")
    assert code == 0, err
    assert row["target_db"] < 15  # the floor of other allocations
    assert row["output_db"] >= 6


def test_overrides_are_promises_beside_it(place: Place) -> None:
    rules = '[{tensors: "2.weight", target_db: 40}]'
    code, (row,), err = place.compress(f"{OUTPUT}, overrides: {rules}")
    assert code == 0, err
    assert manifest_of(place, row["digest"]).gains_db.keys() == CODED - {"2.weight"}
    rows = {tensor["name"]: tensor for tensor in json.loads(place.run("inspect", "net", "--json")[1])}
    assert (rows["2.weight"]["nominal"], rows["2.weight"]["why"]) == (False, "by override")
    assert rows["2.weight"]["sqnr_db"] >= 40
    assert rows["4.weight"]["nominal"]


@pytest.mark.parametrize("damage", ["flipped", "gone", "record"])
def test_damaged_statistics_are_named_and_taken_anew(
    place: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = place.compress(OUTPUT)[1][0]
    wanted = place.compress(f"{OUTPUT}, profile: fine")[1][0]["digest"]
    (record,) = place.files("statistics/*/*.json")
    digest = json.loads(record.read_text())["hessians"]["2.weight"]["blob"]
    blob = place.folder / f"store/blobs/sha256/{digest[:2]}/{digest}"
    for version in place.files("models/*"):
        shutil.rmtree(version)
    for shards in place.files("shards"):
        shutil.rmtree(shards)
    whole = record.read_bytes(), blob.read_bytes()
    if damage == "record":
        record.write_bytes(whole[0].replace(b'"rms"', b'"rmt"'))
    elif damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(whole[1][:-1] + b"!")
    code, (row,), err = place.compress(f"{OUTPUT}, profile: fine")
    assert code == 0, err
    assert "are taken anew" in caplog.text
    assert "statistics" in row["stages"]
    assert (record.read_bytes(), blob.read_bytes()) == whole
    assert row["digest"] == wanted != first["digest"]


def test_statistics_that_break_in_the_middle_fail_the_model_by_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from birkhoff.pipeline.run import passes

    take = passes.Passes.take

    def breaks(self: passes.Passes, index: int, result: passes.Result) -> list:
        more = take(self, index, result)
        if isinstance(result, tasks.Statistics):
            digest = result.record.hessians["2.weight"].blob
            (place.folder / f"store/blobs/sha256/{digest[:2]}/{digest}").unlink()
        return more

    with monkeypatch.context() as patched:
        patched.setattr(passes.Passes, "take", breaks)
        code, (row,), err = place.compress(OUTPUT)
    assert (code, row["status"]) == (11, "failed")
    assert "the Hessian of '2.weight', was deleted since the run began; run again" in err
    assert not place.files("models/net/names/*")
    assert place.compress(OUTPUT)[0] == 0


def test_a_run_that_was_killed_after_its_statistics_goes_on_from_them(place: Place) -> None:
    place.compress("allocation: uniform, profile: fast")  # writes the manifest
    text = (place.folder / "m.yaml").read_text()
    (place.folder / "m.yaml").write_text(text.replace("allocation: uniform, profile: fast", OUTPUT))
    program = (
        "import sys, time\nfrom birkhoff.pipeline.statistics import take\nkeep = take.keep_statistics\n"
        "def slow(*a):\n    keep(*a)\n    print('KEPT', flush=True)\n    time.sleep(600)\n"
        "take.keep_statistics = slow\nfrom birkhoff.__main__ import main\nmain()\n"
    )
    words = [sys.executable, "-c", program, "compress", str(place.folder / "m.yaml"), "--executor", "inline"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "KEPT"
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_ino for path in place.files("statistics/*/*.json")}
    assert len(kept) == 1
    code, (row,), err = place.compress(OUTPUT)
    assert code == 0, err
    assert "statistics" not in row["stages"]
    assert {path: path.stat().st_ino for path in place.files("statistics/*/*.json")} == kept


def test_another_way_of_taking_them_makes_a_version_that_is_not_up_to_date(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place.compress(OUTPUT)[1][0]
    monkeypatch.setattr("birkhoff.codec.output.statistics.STATISTICS_VERSION", 10**6)
    row = place.compress(OUTPUT)[1][0]
    assert (row["status"], "statistics" in row["stages"]) == ("published", True)
    assert row["digest"] != before["digest"]
    assert len(place.files("statistics/*/*.json")) == 2


def test_a_model_that_nothing_runs_is_refused(place: Place) -> None:
    (place.folder / "m.yaml").write_text(f"models: [{{name: net, source: net.pth, {OUTPUT}}}]")
    code, _, err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline")
    assert code == 18
    assert "`allocation: output` needs a model that runs, and no adapter runs such a model" in err


def test_a_plan_says_that_a_run_takes_statistics_first(place: Place) -> None:
    place.compress(OUTPUT)
    (row,) = json.loads(place.run("plan", str(place.folder / "m.yaml"), "--json")[1])
    assert row["status"] in ("up to date", "to be read")  # whether the digest of so young a file is remembered
    assert row["allocation"] == "output"
    assert "follow from the sensitivity of its outputs" in row["note"]
    assert row["predicted_tensor_db"] is None
    place.compress(f"{OUTPUT}, target_ratio: 5")
    (row,) = json.loads(place.run("plan", str(place.folder / "m.yaml"), "--json")[1])
    assert row["predicted_ratio"] >= 5
    assert place.run("plan", str(place.folder / "m.yaml"))[0] == 0


def objects_of(place: Place) -> set[Path]:
    kinds = ("blobs", "shards", "statistics", "models")
    return {path for kind in kinds for path in place.files(f"{kind}/**/*") if path.is_file()}


def test_a_collection_keeps_them_and_a_copy_leaves_them(place: Place) -> None:
    row = place.compress(OUTPUT)[1][0]
    before = objects_of(place)
    assert place.run("gc", "--grace", "0s", "--yes")[0] == 0
    assert objects_of(place) == before
    other = (place.folder / "other").as_uri()
    assert place.run("copy", "net@v1", "--to", other)[0] == 0
    assert not list((place.folder / "other").glob("statistics"))
    assert len(list((place.folder / "other" / "blobs").glob("**/*"))) < len(place.files("blobs/**/*"))
    assert place.run("verify", "net", "--store", other, "--against", str(place.folder / "net.pth"))[0] == 0
    archive = place.folder / "net.tar"
    assert place.run("save", "net@v1", "-o", str(archive))[0] == 0
    third = (place.folder / "third").as_uri()
    assert place.run("load", str(archive), "--store", third)[0] == 0
    assert json.loads(place.run("list", "--store", third, "--json")[1])[0]["digest"] == row["digest"]
    code, out, _ = place.run("pull", "net", "-o", str(place.folder / "pulled"), "--store", third, "--json")
    assert code == 0, out
    assert place.run("verify", str(place.folder / "pulled"))[0] == 0


def test_a_version_of_which_a_step_was_forged_is_found_out(place: Place) -> None:
    """The step says what the target means: a finer or coarser one is another version than the manifest's."""
    row = place.compress(OUTPUT)[1][0]
    manifest = manifest_of(place, row["digest"])
    assert manifest.gains_db is not None
    forged = manifest.model_copy(update={"gains_db": {name: gain + 1 for name, gain in manifest.gains_db.items()}})
    folder = place.folder / "store/models/net"
    (folder / f"versions/{forged.digest}").mkdir()
    (folder / f"versions/{forged.digest}/manifest.json").write_bytes(forged.to_bytes())
    code, out, err = place.run("verify", f"net@{forged.digest}", "--against", str(place.folder / "net.pth"))
    assert code == 12, out
    assert "is stored with the step" in err


DEMO = Path(__file__).parents[3] / "manifests" / "demo" / "demo_sam.safetensors"


@pytest.mark.slow
def test_the_demos_masks_agree_better_at_equal_bytes(place: Place) -> None:
    words = ("allocation: header, floor_db: 6", OUTPUT)
    lines = [
        f"  - {{name: demo{number}, source: {DEMO}, profile: fast, target_ratio: 7, {said}}}"
        for number, said in enumerate(words)
    ]
    (place.folder / "m.yaml").write_text("\n".join(["models:", *lines]))
    code, out, err = place.run("compress", str(place.folder / "m.yaml"), "--executor", "inline", "--json")
    assert code == 0, err
    header, felt = json.loads(out)
    assert min(header["ratio"], felt["ratio"]) >= 7
    assert felt["agreement_mean"] > header["agreement_mean"]
    assert felt["output_db"] > header["output_db"] + 3
