"""What `--json` writes: one document a command, as the published schema says, also of what fails."""

import functools
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from birkhoff.pipeline.cli import schema
from birkhoff.pipeline.errors import EXIT_CODES, failure_facts
from tests.pipeline.artifact.registries import running
from tests.pipeline.artifact.test_oms import key_pair
from tests.pipeline.cli.test_walk import FACTLESS, leaves
from tests.pipeline.command import captured

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]

LINES = {
    "compress": "compress manifests/demo.yaml --profile fast --executor inline",
    "plan": "plan manifests/demo_budget.yaml",
    "plan --check-sources": "plan manifests/demo.yaml --check-sources",
    "promote": "promote demo-sam stable",
    "rollback": "rollback demo-sam other",
    "remove": "remove demo-sam@gone",
    "label": "label demo-sam licence=MIT",
    "history": "history demo-sam",
    "diff": "diff demo-sam demo-sam --all",
    "gc": "gc",
    "list": "list",
    "inspect": "inspect demo-sam",
    "verify": "verify demo-sam",
    "verify (several)": "verify demo-*",
    "export": "export demo-sam -o OUT/x.safetensors",
    "pull": "pull demo-sam -o OUT/p",
    "pull (several)": "pull demo-* -o OUT/several",
    "copy": "copy demo-sam --to file://OUT/there",
    "copy (several)": "copy demo-* --to file://OUT/there",
    "push": "push demo-sam oci://REGISTRY/demo:v1",
    "save": "save demo-sam -o OUT/demo.tar",
    "load": "load OUT/demo.tar --alias gone",
    "recode": "recode demo-sam",
    "cache": "cache",
    "cache prune": "cache prune --dry-run",
    "segment": "segment OUT/held/0000.png --model demo-sam --against manifests/demo/demo_sam.safetensors --point 5,5 "
    "-o OUT/masks.png",
    "evaluate": "evaluate demo-sam --against manifests/demo/demo_sam.safetensors --images OUT/held --limit 1 --grid 1",
    "evaluate --inputs": "evaluate demo-sam --against manifests/demo/demo_sam.safetensors "
    "--inputs OUT/inputs.py:batches --metric OUT/inputs.py:metric",
    "key new": "key new OUT/k.key",
    "key show": "key show OUT/k.key.pub",
    "sign": "sign demo-sam --key OUT/k.key",
    "oms sign": "oms sign demo-sam --key OUT/oms.pem",
    "oms sign (folder)": "oms sign OUT/p --key OUT/oms.pem",
    "oms verify": "oms verify OUT/p --key OUT/oms.pub",
    "report": "report",
    "report --list": "report --list",
    "store env": "store env",
    "doctor": "doctor",
}
"""A line for each definition of the schema; OUT is a folder of the test's."""

INPUTS = """
import torch
def batches(): return [{"pixel_values": torch.zeros(1, 3, 128, 128), "input_boxes": torch.tensor([[[8.0, 8, 90, 90]]])}]
def metric(original, compressed): return {"boxes": len(original)}
"""
"""What `--inputs` and `--metric` name."""

STORELESS = {"plan --check-sources", "cache", "cache prune", "key new", "key show", "oms verify", "store env"}


def test_the_schema_is_current_and_has_every_command() -> None:
    import jsonschema  # what it imports takes two seconds of each process that collects this file

    kept = Path(schema.__file__).parent / "output.schema.json"
    assert json.loads(kept.read_text()) == json.loads(json.dumps(schema.document())), (
        "run: birkhoff schema > pipeline/cli/output.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(schema.document())
    with_json = {path for path, _ in leaves() if path not in FACTLESS}
    assert with_json <= set(schema.outputs())
    assert set(LINES) == set(schema.outputs())


@functools.cache
def published() -> tuple[dict[str, Any], Any]:
    """The schema as it is, and what holds a document against a schema by its dialect; checked once."""
    import jsonschema  # what it imports takes two seconds of each process that collects this file

    whole = schema.document()
    validator = jsonschema.validators.validator_for(whole)
    validator.check_schema(whole)
    return whole, validator


def check(name: str, found: Any) -> None:
    """Hold a document against its definition, and to have no key that the definition does not name."""
    whole, validator = published()
    validator({**whole, "anyOf": [{"$ref": f"#/$defs/{name.replace(' ', '%20')}"}]}).validate(found)
    form = whole["$defs"][name]
    if "properties" in form.get("items", form) and name != "report":  # the report's own schema refuses other keys
        known = set((form["items"] if form["type"] == "array" else form)["properties"])
        for row in found if isinstance(found, list) else [found]:
            assert set(row) <= known, f"{name}: the schema does not name {set(row) - known}"


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def store(demo_store: str, tmp_path: Path) -> str:
    """A store of the test's own with the demo model and the report of a run."""
    folder = tmp_path / "store"
    shutil.copytree(Path(demo_store.removeprefix("file://")), folder)
    return folder.as_uri()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def test_every_command_writes_what_the_schema_says(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, stack: ExitStack
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("birkhoff.pipeline.store.seaweedfs.tool_environment", lambda: {"AWS_REGION": "us-east-1"})
    (tmp_path / "held").mkdir()
    picture(tmp_path / "held" / "0000.png")
    (tmp_path / "inputs.py").write_text(INPUTS)
    key_pair(tmp_path, "oms")
    installed = shutil.which("docker-registry") is not None
    registry = stack.enter_context(running(tmp_path / "registry")).host if installed else None
    for name, line in LINES.items():
        if name == "push" and registry is None:
            continue  # there is no registry to push to
        if name.startswith("oms") and importlib.util.find_spec("model_signing") is None:
            continue  # the extra oms is not installed
        words = line.replace("OUT", str(tmp_path)).replace("REGISTRY", str(registry)).split()
        if name == "rollback":
            captured(capsys, "promote", "demo-sam@v1", "other", "--store", store)
            words += ["--to", "v1"]
        if name == "remove":
            captured(capsys, "promote", "demo-sam@v1", "gone", "--store", store)
        if name == "report":
            changed = ["compress", "manifests/demo.yaml", "--profile", "small", "--executor", "inline"]
            assert captured(capsys, *changed, "--store", store)[0] == 0
        code, out, err = captured(capsys, *words, "--json", *([] if name in STORELESS else ["--store", store]))
        assert code == 0, (name, err)
        check(name, strict(out))


def picture(path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)


def test_a_failed_model_says_its_kind_code_and_remedy(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: gone.safetensors}]\n")
    common = [str(tmp_path / "m.yaml"), "--store", (tmp_path / "store").as_uri(), "--json"]
    for words in (["compress", *common, "--executor", "inline"], ["plan", *common]):
        code, out, _ = captured(capsys, *words)
        check(words[0], strict(out))
        (row,) = strict(out)
        assert (code, row["failure"]["code"], row["failure"]["kind"]) == (4, 4, "SourceError")
        assert row["failure"]["message"] == row["error"]
        assert row["failure"]["remedy"] == "check the path"


@pytest.mark.parametrize("path", [path for path, _ in leaves() if path not in FACTLESS])
def test_every_command_writes_its_errors_too(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    code, out, err = captured(capsys, *path.split(), "--no-such-option", "--json")
    found = strict(out)
    check("error", found)
    assert (code, found["error"]["kind"], found["error"]["code"]) == (2, "UsageError", 2)
    assert "No such option" in found["error"]["message"]
    assert "No such option" in err


@pytest.mark.parametrize(
    ("words", "kind", "remedy"),
    [
        ("list", "StoreError", "check --store and BIRKHOFF_STORE, or publish there with `compress`, which makes it"),
        ("--json inspect x", "StoreError", "check --store and BIRKHOFF_STORE, or publish there with `compress`"),
        ("compress absent.yaml", "ManifestError", ""),
        ("key show absent.pub", "TrustError", "name a key file, or make one with `birkhoff key new birkhoff.key`"),
    ],
)
def test_an_error_has_kind_code_message_and_remedy(
    words: str, kind: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "none").as_uri())
    code, out, err = captured(capsys, *words.split(), "--json")
    found = strict(out)["error"]
    check("error", strict(out))
    assert (found["kind"], found["code"]) == (kind, code)
    assert code in EXIT_CODES.values()
    assert err == f"error: {found['message']}\n"
    assert (found["remedy"] or "").startswith(remedy)


def test_a_bug_is_written_too(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("birkhoff.pipeline.store.default.open_default_store", fail)
    code, out, _ = captured(capsys, "list", "--json")
    assert (code, strict(out)["error"]["kind"], strict(out)["error"]["code"]) == (70, "ZeroDivisionError", 70)


def test_a_remedy_is_the_last_clause_of_a_line() -> None:
    assert failure_facts("E", 1, "a: gone; check the path")["remedy"] == "check the path"
    assert failure_facts("E", 1, "a: gone")["remedy"] is None
    assert failure_facts("E", 1, "no model; check it; nor is there a folder")["remedy"] == (
        "check it; nor is there a folder"
    )


@pytest.mark.parametrize("place", ["before", "after"])
def test_global_options_stand_before_or_after_the_command(
    place: str, demo_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BIRKHOFF_ALLOW_HTTP", raising=False)
    more = ["--store", demo_store, "--quiet", "--json", "--debug", "--allow-http"]
    code, out, err = captured(capsys, *([*more, "list"] if place == "before" else ["list", *more]))
    assert (code, strict(out)[0]["model"], err) == (0, "demo-sam", "")
    monkeypatch.setenv("BIRKHOFF_ALLOW_HTTP", "")
    code, out, err = captured(capsys, *more[:2], "verify", "demo-sam", "--quiet")
    assert (code, out, err) == (0, "", "")
    assert captured(capsys, "verify", "demo-sam", *more[:2])[1].startswith("verified: ")


def test_quiet_leaves_warnings_errors_and_what_was_asked_for(
    demo_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    assert "demo-sam" in captured(capsys, "--quiet", "list", "--store", demo_store)[1]
    assert captured(capsys, "inspect", "absent", "--store", demo_store, "--quiet")[2].startswith("error: ")
    monkeypatch.chdir(ROOT)
    line = ["compress", "manifests/demo.yaml", "--profile", "fast", "--executor", "inline", "--store", demo_store]
    assert captured(capsys, *line, "--quiet") == (0, "", "")
    assert "nothing to do" in captured(capsys, *line)[2]
