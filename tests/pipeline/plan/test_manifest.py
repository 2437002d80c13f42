from pathlib import Path

import pytest

from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.registry.documents import BudgetRecord

GOOD = """\
store: file:///tmp/x
profile: fine
models:
  - name: a
    source: sub/a.pth
  - name: b
    source: /abs/b.safetensors
    profile: small
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return path


def test_sources_are_relative_to_the_manifest(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, GOOD))
    urls = [part.urls for model in manifest.models for part in model.source]
    assert urls == [(str(tmp_path / "sub/a.pth"),), ("/abs/b.safetensors",)]
    assert (manifest.profile, manifest.models[1].profile) == ("fine", "small")


FORMS = {
    "file:///abs/x%20y.pth": [{"urls": ("/abs/x y.pth",)}],
    "file://./x.pth": [{"urls": ("{here}/x.pth",)}],
    "HTTPS://a.org/x.pth?download=true#top": [{"urls": ("https://a.org/x.pth?download=true",)}],
    "http://127.0.0.1:8000/x.pth": [{"urls": ("http://127.0.0.1:8000/x.pth",)}],
    "s3://models/sam/x.pth": [{"urls": ("s3://models/sam/x.pth",)}],
    "{urls: [https://a.org/x.pth, x.pth], sha256: %s}" % ("AB" * 32): [
        {"urls": ("https://a.org/x.pth", "{here}/x.pth"), "sha256": "ab" * 32}
    ],
    "{urls: [http://a.org/x.pth], allow_http: true}": [{"urls": ("http://a.org/x.pth",), "allow_http": True}],
    "[a.pth, {urls: [b.pth], keep: ['mask*', iou], prefix: d.}]": [
        {"urls": ("{here}/a.pth",)},
        {"urls": ("{here}/b.pth",), "keep": ("mask*", "iou"), "prefix": "d."},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_source(tmp_path: Path, form: str) -> None:
    manifest = load_manifest(write(tmp_path, GOOD.replace("sub/a.pth", form)))
    expected = [
        {**part, "urls": tuple(url.replace("{here}", str(tmp_path)) for url in part["urls"])} for part in FORMS[form]
    ]
    assert [part.model_dump(exclude_defaults=True) for part in manifest.models[0].source] == expected


def source_case(form: str, message: str) -> tuple[str, str]:
    """`form` stands on lines of its own below `source:`, from line 6 on."""
    body = "".join(f"\n      {line}" for line in form.splitlines())
    return GOOD.replace(" sub/a.pth", body), message


BAD = {
    "source number": source_case("7", r"line 5: models\[0\]\.source: expected a path or URL, a mapping with"),
    "source empty": source_case('""', r"line 5: models\[0\]\.source: expected a path or URL"),
    "source none": source_case("[]", r"line 5: models\[0\]\.source: .*at least 1"),
    "source typo": source_case(
        "urls: [a.pth]\nsha265: ab", r"line 7: models\[0\]\.source\.sha265: .* did you mean 'sha256'\?; known: urls,"
    ),
    "source no urls": source_case("sha256: ab", r"models\[0\]\.source\.(urls: Field required|sha256: expected 64 hex)"),
    "source url type": source_case(
        "- a.pth\n- urls: [3]", r"line 7: models\[0\]\.source\[1\]\.urls\[0\]: Input should be"
    ),
    "source digest": source_case("urls: [a.pth]\nsha256: abc", r"line 7: models\[0\]\.source\.sha256: expected 64 hex"),
    "source glob": source_case("urls: [a.pth]\nkeep: ['']", r"line 7: models\[0\]\.source\.keep: an empty glob"),
    "source globs": source_case("urls: [a.pth]\nkeep: []", r"line 7: models\[0\]\.source\.keep: .*at least 1"),
    "source scheme": source_case("ftp://a.org/x.pth", r"models\[0\]\.source: unknown scheme 'ftp'"),
    "source plain http": source_case(
        "http://a.org/x.pth", r"models\[0\]\.source: http://a.org/x.pth: plain http .*allow_http"
    ),
    "source credentials": source_case("https://me:secret@a.org/x.pth", r"models\[0\]\.source: expected no credentials"),
    "source s3 key": source_case("s3://bucket/", r"models\[0\]\.source: .*expected a relative path"),
    "source no name": source_case("https://a.org/folder/", r"models\[0\]\.source: .* ends in a file name"),
    "source no host": source_case("https:///x.pth", r"models\[0\]\.source: expected https://HOST/PATH/FILE"),
    "source sneaky name": source_case("https://a.org/..%2Fx.pth", r"models\[0\]\.source: .* ends in a file name"),
    "typo": (GOOD.replace("source: sub", "sauce: sub"), r"line 5: models\[0\].sauce: unknown key 'sauce', .*'source'"),
    "missing": (GOOD.replace("    source: sub/a.pth\n", ""), r"line 4: models\[0\].source: Field required"),
    "profile": (GOOD.replace("fine", "fin"), r"line 2: profile: unknown profile 'fin', did you mean 'fine'"),
    "twice": (
        GOOD.replace("name: b", "name: a"),
        r"line 6: models\[1\]\.name: model names must differ; models\[0\] is 'a' too$",
    ),
    "two budgets": (f"target_ratio: 7\nmax_bytes: 64MiB\n{GOOD}", r"line 2: max_bytes: .* two budgets"),
    "budget and profile": (f"target_ratio: 7\n{GOOD}", r"line 3: profile: 'fine' \(.*\) and a budget are two qual"),
    "model's budget and profile": (
        GOOD + "    max_bytes: 1MiB\n",
        r"line 8: models\[1\]\.profile: 'small' .* and a budget are two qualities",
    ),
    "allocation of no target": (
        f"profile: paper\nallocation: size\n{GOOD}".replace("profile: fine\n", ""),
        r"line 2: allocation: shares a target in dB, and profile 'paper' has none",
    ),
    "model's allocation of no target": (
        GOOD.replace("fine", "match-paper").replace("    profile: small\n", "    allocation: header\n"),
        r"line 8: models\[1\]\.allocation: shares a target in dB, and profile 'match-paper' has none",
    ),
    "a floor under what promises no tensor anything": (
        f"allocation: output\ntarget_ratio: 7\nfloor_db: 12\n{GOOD}".replace("profile: fine\n", ""),
        r"line 3: floor_db: is for allocations with a target for each tensor.*set `floor_agreement`",
    ),
    "allocation": (
        f"allocation: sise\ntarget_ratio: 7\n{GOOD}",
        r"line 1: allocation: Input should be 'uniform', 'size', 'header', 'scale' or 'output'",
    ),
    "floor without budget": (f"floor_db: 12\n{GOOD}", r"line 1: floor_db: goes with a budget"),
    "floor too low": (f"floor_db: 2\ntarget_ratio: 7\n{GOOD}", r"line 1: floor_db: Input should be greater than"),
    "ratio": (GOOD + "    target_ratio: 1\n", r"line 9: models\[1\]\.target_ratio: Input should be greater than 1"),
    "ratio infinite": (f"target_ratio: .inf\n{GOOD}", r"line 1: target_ratio: "),
    "ratio text": (f"target_ratio: '7'\n{GOOD}", r"line 1: target_ratio: Input should be a valid number"),
    "size": (f"max_bytes: 64 apples\n{GOOD}", r"line 1: max_bytes: expected a size such as 64MiB .* got '64 apples'"),
    "no size": (f"max_bytes: 0\n{GOOD}", r"line 1: max_bytes: Input should be greater than 0"),
    "override of both": (
        GOOD + "overrides:\n  - {tensors: x, target_db: 36, lossless: true}\n",
        r"line 10: overrides\[0\]\.tensors: an override says one of",
    ),
    "override of nothing": (
        GOOD + "    overrides:\n      - {tensors: x}\n",
        r"line 10: models\[1\]\.overrides\[0\]\.tensors: an override says one of",
    ),
    "override not lossless": (
        GOOD + "overrides: [{tensors: x, lossless: false}]",
        r"overrides\[0\]\.lossless: .* True",
    ),
    "override range": (GOOD + "overrides: [{tensors: x, target_db: 60}]", r"overrides\[0\]\.target_db: .* equal to 48"),
    "override typo": (
        GOOD + "overrides:\n  - {tensor: x, target_db: 36}\n",
        r"line 10: overrides\[0\]\.tensor: unknown key 'tensor', did you mean 'tensors'\?; known: tensors, target_db",
    ),
    "several": (
        GOOD.replace("name: a", "nam: a").replace("small", "smal"),
        r"line 4: models\[0\]\.nam: unknown key .*; wrong too: line 8: models\[1\]\.profile$",
    ),
    "name": (GOOD.replace("name: b", "name: ../b"), r"line 6: models\[1\].name: a name is 1 to 100"),
    "type": (GOOD.replace("name: b", "name: 7"), r"line 6: models\[1\].name: Input should be a valid string"),
    "no models": ("models: []\n", r"line 1: models: the list is empty; give at least one model"),
    "not a mapping": ("- 1\n- 2\n", "line 1: manifest: holds a list; expected `models:`"),
    "empty": ("# nothing\n", "line 1: manifest: is empty; expected `models:`"),
    "not yaml": ("models: [", "line 1: expected the node content"),
    "key twice": ("models: []\nmodels: []\n", "line 2: key 'models' given twice"),
    "alias bomb": ("a: &a [x, x]\nmodels: [*a, *a]\n", "line 2: aliases are not allowed"),
    "alias in itself": ("models: &a [*a]\n", "line 1: aliases are not allowed"),
    "nested": (f"models: {'[' * 100_000}", "nested too deeply to be a manifest"),
    "nested mappings": ("a: {" * 20_000, "nested too deeply to be a manifest"),
    "too long": (f"{GOOD}# {'x' * (1 << 20)}\n", "larger than 1048576 bytes: not a manifest"),
    "long number": (f"keep: {'9' * 5000}\n{GOOD}", r"line 1: '9+' is no int"),
    "absolute name": (GOOD.replace("name: b", "name: /b"), r"line 6: models\[1\].name: a name is 1 to 100"),
    "name of a folder above": (GOOD.replace("name: b", "name: .."), r"line 6: models\[1\].name: a name is 1 to 100"),
    "name with a NUL": (GOOD.replace("name: b", 'name: "b\\0"'), r"line 6: models\[1\].name: a name is 1 to 100"),
    "python object": ("models: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "secret": (GOOD.replace("file:///tmp/x", "s3://key:secret@bucket/p"), "line 1: store: .*AWS_ACCESS_KEY_ID"),
    "store": (GOOD.replace("file:///tmp/x", "ftp://x"), "line 1: store: .*expected s3://"),
}


@pytest.mark.parametrize("kind", BAD)
def test_each_mistake_names_file_line_and_key(tmp_path: Path, kind: str) -> None:
    text, message = BAD[kind]
    path = write(tmp_path, text)
    with pytest.raises(ManifestError, match=message) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)


QUALITIES = {
    "nothing": ("", "", ("balanced", None, "scale")),
    "the manifest's profile": ("profile: fine", "", ("fine", None, "scale")),
    "the model's profile": ("profile: fine", "profile: fast", ("fast", None, "scale")),
    "the manifest's budget": ("target_ratio: 7", "", ("ratio 7", BudgetRecord(target_ratio=7), "scale")),
    "the model's budget": (
        "profile: fine",
        "max_bytes: 64MiB",
        ("64.0MiB", BudgetRecord(max_bytes=64 << 20), "scale"),
    ),
    "another budget": ("max_bytes: 1GB", "target_ratio: 6.5", ("ratio 6.5", BudgetRecord(target_ratio=6.5), "scale")),
    "a profile over a budget": ("max_bytes: 1GB", "profile: balanced", ("balanced", None, "scale")),
    "bytes alone": ("max_bytes: 5000", "", ("4.9KiB", BudgetRecord(max_bytes=5000), "scale")),
    "an allocation": ("profile: fine\nallocation: size", "", ("fine", None, "size")),
    "an allocation alone": ("allocation: uniform", "", ("balanced", None, "uniform")),
    "the model's allocation": ("profile: small", "allocation: uniform", ("small", None, "uniform")),
    "the model's allocation of a budget": (
        "max_bytes: 1KB",
        "allocation: size",
        ("1000B", BudgetRecord(max_bytes=1000), "size"),
    ),
    "a profile over an allocation": ("allocation: size", "profile: small", ("small", None, "scale")),
    "uniform": ("max_bytes: 1KB\nallocation: uniform", "", ("1000B", BudgetRecord(max_bytes=1000), "uniform")),
}


@pytest.mark.parametrize("kind", QUALITIES)
def test_what_a_model_says_of_quality_replaces_what_the_manifest_says(tmp_path: Path, kind: str) -> None:
    whole, model, expected = QUALITIES[kind]
    text = f"{whole}\nmodels:\n  - name: a\n    source: a.pth\n    {model}\n"
    manifest = load_manifest(write(tmp_path, text))
    found = manifest.fidelity(manifest.models[0])
    assert (found.profile.name, found.budget, found.profile.allocation) == expected


def test_a_budget_beside_fast_encodes_fast(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, "profile: fast\ntarget_ratio: 7\n" + GOOD.replace("profile: fine\n", "")))
    assert not manifest.fidelity(manifest.models[0]).profile.path


def test_rules_know_their_place_and_the_models_come_last(tmp_path: Path) -> None:
    text = GOOD + "    overrides: [{tensors: 'x.*', lossless: true}]\noverrides:\n  - {tensors: '*', target_db: 36}\n"
    path = write(tmp_path, text)
    manifest = load_manifest(path)
    assert [rule.override for rule in manifest.fidelity(manifest.models[1]).rules] == [36.0, "lossless"]
    assert [rule.place for rule in manifest.fidelity(manifest.models[1]).rules] == [
        f"{path}, line 11: overrides[0].tensors",
        f"{path}, line 9: models[1].overrides[0].tensors",
    ]
    assert [rule.override for rule in manifest.fidelity(manifest.models[0]).rules] == [36.0]


def test_a_missing_manifest_names_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(ManifestError, match=r"nope\.yaml: no such manifest; .* has m\.yaml"):
        load_manifest(tmp_path / "nope.yaml")


def test_shipped_manifests_load() -> None:
    folder = Path(__file__).parents[3] / "manifests"
    found = sorted(folder.glob("*.yaml"))
    assert found
    for path in found:
        assert load_manifest(path).models
