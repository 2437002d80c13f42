from pathlib import Path

import pytest

from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.manifest import load_manifest

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
    "twice": (GOOD.replace("name: b", "name: a"), r"line 1: manifest: model names must differ; used twice: a"),
    "name": (GOOD.replace("name: b", "name: ../b"), r"line 6: models\[1\].name: a name is 1 to 100"),
    "type": (GOOD.replace("name: b", "name: 7"), r"line 6: models\[1\].name: Input should be a valid string"),
    "no models": ("models: []\n", r"models: .*at least 1"),
    "not a mapping": ("- 1\n- 2\n", "manifest: Input should be"),
    "empty": ("", "manifest: Input should be"),
    "not yaml": ("models: [", "line 1: expected the node content"),
    "key twice": ("models: []\nmodels: []\n", "line 2: key 'models' given twice"),
    "alias bomb": ("a: &a [x, x]\nmodels: [*a, *a]\n", "line 2: aliases are not allowed"),
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


def test_a_missing_manifest_names_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(ManifestError, match=r"nope\.yaml: no such manifest; .* has m\.yaml"):
        load_manifest(tmp_path / "nope.yaml")


def test_shipped_manifests_load() -> None:
    folder = Path(__file__).parents[2] / "manifests"
    found = sorted(folder.glob("*.yaml"))
    assert found
    for path in found:
        assert load_manifest(path).models
