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
    assert [model.source for model in manifest.models] == [str(tmp_path / "sub/a.pth"), "/abs/b.safetensors"]
    assert (manifest.profile, manifest.models[1].profile) == ("fine", "small")


BAD = {
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
