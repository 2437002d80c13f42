"""What commands say to people: near names, folders that are not there, facts with units, no tables of nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import birkhoff
from birkhoff.pipeline.cli import main
from birkhoff.pipeline.errors import ArtifactNotFoundError
from birkhoff.pipeline.text import some, suggestion
from tests.pipeline.command import captured

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BIRKHOFF_STORE", raising=False)
    monkeypatch.chdir(tmp_path)


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    return captured(capsys, *arguments)


def manifest(folder: Path, source: str = "net.safetensors") -> str:
    save_file({"a.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}, folder / "net.safetensors")
    (folder / "fleet.yaml").write_text(f"models: [{{name: net, source: {source}}}]\n")
    return str(folder / "fleet.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect demo-sma", "has no model 'demo-sma', did you mean 'demo-sam'?; it has: demo-sam; nor is there a"),
        ("pull demo-sma -o p", "has no model 'demo-sma', did you mean 'demo-sam'?; it has: demo-sam"),
        ("verify demo-sam@latset", "has no version or alias 'latset', did you mean 'latest'?; it has: latest, v1"),
        (
            "inspect ./pulled/demo",
            "pulled/demo: no such folder; name one that `birkhoff pull` wrote, or a model: M",
        ),
        ("inspect /etc/passwd", "/etc/passwd: not a folder; name one"),
        (
            "export . -o x.pth",
            "holds no manifest.json: not a folder of `birkhoff pull`; pull into it, or name",
        ),
    ],
)
def test_a_name_that_is_not_there(words: str, said: str, demo_store: str, capsys: Capture) -> None:
    code, _, err = run(capsys, *words.split(), "--store", demo_store)
    assert (code, said in err, err.count("\n")) == (10, True, 1), err


def test_a_mistyped_folder_in_python(demo_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRKHOFF_STORE", demo_store)
    with pytest.raises(ArtifactNotFoundError, match=r"^pulled/demo: no such folder; name one that"):
        birkhoff.load_state_dict("pulled/demo")
    with pytest.raises(ArtifactNotFoundError, match=r"has no model 'pulled'; .* nor is there a folder 'pulled' here"):
        birkhoff.load_into(torch.nn.Linear(2, 2), "pulled")


@pytest.mark.parametrize(
    "words", ["list", "pull net -o p", "inspect net", "history net", "gc", "report", "promote net", "diff net net@v1"]
)
def test_a_folder_store_that_is_not_there_is_named_and_not_made(words: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "with space"
    code, out, err = run(capsys, *words.split(), "--store", folder.as_uri())
    assert (code, out, err.count("\n")) == (7, "", 1)
    assert f"there is no folder {folder}; check --store and BIRKHOFF_STORE" in err
    assert not folder.exists()


def test_a_folder_store_is_made_by_compress_and_planned_for_before(tmp_path: Path, capsys: Capture) -> None:
    store = ["--store", (tmp_path / "store").as_uri()]
    code, out, _ = run(capsys, "plan", manifest(tmp_path), "--json", *store)
    assert (code, json.loads(out)[0]["status"], (tmp_path / "store").exists()) == (0, "new", False)
    assert run(capsys, "compress", manifest(tmp_path), "--executor", "inline", *store)[0] == 0
    assert run(capsys, "list", *store)[0] == 0


def test_a_manifest_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    manifest(tmp_path)
    for number in range(12):
        (tmp_path / f"x{number:02}.yaml").touch()
    code, _, err = run(capsys, "plan", str(tmp_path / "flete.yaml"))
    assert code == 3
    assert f"flete.yaml: no such manifest, did you mean fleet.yaml?; {tmp_path} has fleet.yaml, x00.yaml," in err
    assert err.endswith("x08.yaml and 3 more\n")
    assert "there is no folder" in run(capsys, "plan", str(tmp_path / "no" / "fleet.yaml"))[2]
    (tmp_path / "empty").mkdir()
    assert "has no YAML file" in run(capsys, "plan", str(tmp_path / "empty" / "fleet.yaml"))[2]


def test_lists_in_messages_say_that_they_are_cut() -> None:
    assert some([]) == "none"
    assert some(["a", "b"], 2) == "a, b"
    assert some(["a", "b", "c"], 2) == "a, b and 1 more"
    assert (suggestion("nett", ["net"]), suggestion("x", ["net"])) == (" 'nett', did you mean 'net'?", " 'x'")


def test_a_store_may_stand_before_the_command(demo_store: str, capsys: Capture) -> None:
    code, out, _ = run(capsys, "--store", demo_store, "list", "--json")
    assert (code, [row["model"] for row in json.loads(out)]) == (0, ["demo-sam"])
    code, out, _ = run(capsys, "--store", "file:///nowhere", "list", "--json", "--store", demo_store)
    assert (code, len(json.loads(out))) == (0, 1)  # the nearer one holds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["key", "new", "k"], "`birkhoff key` takes no store"),
        ([], "expected a command: birkhoff list --store file:///x"),
    ],
)
def test_a_store_before_what_takes_none(words: list[str], said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)) as caught:
        main.app(["--store", "file:///x", *words], standalone_mode=False)
    assert getattr(caught.value, "exit_code", None) == 2
    assert not Path("k").exists()


def test_facts_are_said_with_units_and_json_has_them_raw(demo_store: str, capsys: Capture) -> None:
    store = ["--store", demo_store]
    code, out, _ = run(capsys, "pull", "demo-sam", "-o", "a", *store)
    assert code == 0
    assert re.fullmatch(
        r"pulled: model demo-sam, version v1, digest [0-9a-f]{12}, fetched [0-9.]+ KiB, output a\n", out
    )
    facts = json.loads(run(capsys, "pull", "demo-sam", "-o", "a", "--json", *store)[1])
    assert facts["fetched_bytes"] == 0
    assert len(facts["digest"]) == 64
    assert ", fetched 0 B, " in run(capsys, "pull", "demo-sam", "-o", "a", *store)[1]
    out = run(capsys, "verify", "demo-sam", *store)[1]
    assert re.fullmatch(r"verified: artifact demo-sam@v1, digest \w{12}, blobs \d+, [0-9.]+ KiB, tensors 213\n", out)
    assert "compared" in json.loads(run(capsys, "verify", "demo-sam", "--json", *store)[1])
    assert re.match(r"cache: folder .*, blobs \d+, [0-9.]+ (K|M)iB", run(capsys, "cache")[1])


def test_a_move_says_that_the_default_chose_its_alias(
    demo_store: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(demo_store.removeprefix("file://"), tmp_path / "store")
    store = ["--store", (tmp_path / "store").as_uri()]
    assert "alias stable (the default), version v1" in run(capsys, "promote", "demo-sam", *store)[1]
    assert "alias stable, version v1" in run(capsys, "promote", "demo-sam", "stable", *store)[1]
    assert json.loads(run(capsys, "promote", "demo-sam", "--json", *store)[1])["alias"] == "stable"
    assert "alias stable (the default)" in run(capsys, "rollback", "demo-sam", "--to", "v1", *store)[1]
    for command in ("promote", "rollback"):
        assert "The alias to move. Default: stable." in run(capsys, command, "--help")[1]


def test_a_pull_has_a_folder_by_default_and_replaces_nothing_there(
    demo_store: str, tmp_path: Path, capsys: Capture
) -> None:
    store = ["--store", demo_store]
    assert ", output pulled/demo-sam\n" in run(capsys, "pull", "demo-sam@v1", *store)[1]
    assert (tmp_path / "pulled" / "demo-sam" / "manifest.json").is_file()
    (tmp_path / "pulled" / "demo-sam" / "mine.txt").write_text("kept")
    (row,) = json.loads(run(capsys, "pull", "demo-*", "--json", *store)[1])
    assert (row["status"], row["output"], row["fetched_bytes"]) == ("pulled", "pulled/demo-sam", 0)
    assert (tmp_path / "pulled" / "demo-sam" / "mine.txt").read_text() == "kept"
    shutil.rmtree(tmp_path / "pulled" / "demo-sam")
    (tmp_path / "pulled" / "demo-sam").mkdir()
    (tmp_path / "pulled" / "demo-sam" / "notes.txt").write_text("mine")
    code, _, err = run(capsys, "pull", "demo-sam", *store)
    assert (code, "holds notes.txt and was not made by `pull`" in err) == (16, True), err
    assert [path.name for path in (tmp_path / "pulled" / "demo-sam").iterdir()] == ["notes.txt"]


def test_a_model_whose_code_is_unknown_is_said_to_be_unproven(tmp_path: Path, capsys: Capture) -> None:
    store = ["--store", (tmp_path / "store").as_uri()]
    said = "no proof of masks for net: no adapter runs such a model; name its `adapter`, or the `builder` and `inputs`"
    code, _, err = run(capsys, "plan", manifest(tmp_path), *store)
    assert (code, err.count(said)) == (0, 1)
    assert "no adapter runs" in json.loads(run(capsys, "plan", manifest(tmp_path), "--json", *store)[1])[0]["unproven"]
    compress = ["compress", manifest(tmp_path), "--executor", "inline", *store]
    code, _, err = run(capsys, *compress)
    assert (code, err.count(said)) == (0, 1), err
    assert "no adapter runs" in json.loads(run(capsys, "report", "--json", *store)[1])["models"][0]["unproven"]
    assert "no proof" not in run(capsys, *compress)[2]  # up to date: said when it was published
    path = Path(manifest(tmp_path))
    path.write_text(path.read_text().replace("{name: net", "{name: net, proof: false"))
    assert "no proof" not in run(capsys, "plan", str(path), *store)[2]


@pytest.mark.parametrize(
    ("key", "code"), [("proof: true", 12), ("target_agreement: 0.9", 12), ("allocation: output", 18)]
)
def test_plan_refuses_a_proof_that_compress_refuses(key: str, code: int, tmp_path: Path, capsys: Capture) -> None:
    path = Path(manifest(tmp_path))
    path.write_text(path.read_text().replace("{name: net", f"{{name: net, {key}"))
    store = ["--store", (tmp_path / "store").as_uri()]
    planned, out, said = run(capsys, "plan", str(path), *store)
    compressed, _, told = run(capsys, "compress", str(path), "--executor", "inline", *store)
    assert (planned, compressed, out) == (code, code, "")
    assert "no adapter runs such a model" in said
    assert said.splitlines()[0] in told


def test_nothing_is_drawn_where_there_is_nothing(tmp_path: Path, capsys: Capture) -> None:
    store = ["--store", (tmp_path / "store").as_uri()]
    compress = ["compress", manifest(tmp_path, "absent.safetensors"), "--executor", "inline", *store]
    code, out, err = run(capsys, *compress)
    assert (code, out) == (4, "")
    assert "error: net: " in err
    assert json.loads(run(capsys, *compress, "--json")[1])[0]["status"] == "failed"
    assert run(capsys, "plan", manifest(tmp_path, "absent.safetensors"), *store)[1] == ""
    assert run(capsys, "compress", manifest(tmp_path), "--executor", "inline", *store)[0] == 0
    code, out, err = run(capsys, "gc", *store)
    assert (code, out) == (0, "")
    assert re.fullmatch(r"nothing to delete: \d+ objects are in use or too young to go\n", err)
    assert all(row["objects"] == 0 for row in json.loads(run(capsys, "gc", "--json", *store)[1]))
    (tmp_path / "store" / "blobs" / "sha256" / "ab").mkdir(exist_ok=True)
    (tmp_path / "store" / "blobs" / "sha256" / "ab" / ("ab" * 32)).write_bytes(b"x" * 2048)
    code, out, err = run(capsys, "gc", "--grace", "0s", *store)
    assert (code, "blob" in out, "version" in out) == (0, True, False)
    assert "--yes frees 2.0 KiB; nothing was deleted" in err


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("compress", "MANIFEST is not set; say, for example: make compress MANIFEST=demo.yaml"),
        ("pull", "MODEL is not set; say, for example: make pull MODEL=demo-sam"),
        ("submit", "ADDRESS is not set; say, for example: make submit ADDRESS=http://HEAD:8265 MANIFEST=demo.yaml"),
        ("fuzz", "TARGET is not set; say, for example: make fuzz TARGET=manifest"),
    ],
)
def test_make_says_what_it_lacks(target: str, said: str, tmp_path: Path) -> None:
    _clone_for_make(tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    ended = subprocess.run(["make", target], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert ended.returncode == 2
    assert re.search(re.escape(said) + r"\.  Stop", ended.stderr), ended.stderr


def _clone_for_make(folder: Path) -> None:
    """The Makefile, and empty files for all that its set-up depends on."""
    (folder / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    needed = re.search(r"^\$\(READY\): (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert needed is not None
    for path in needed[1].split():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_make_setup_says_what_it_does(tmp_path: Path) -> None:
    _clone_for_make(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "Downloading with $*" | grep -v -e --quiet\n')
    python.chmod(0o755)
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    ended = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert ended.returncode == 0, ended.stderr
    said = [line.split()[0] for line in ended.stdout.splitlines()]
    assert said == ["setup", "Downloading"] * 4 + ["setup"]  # no terminal, and not silent for minutes
    assert ended.stdout.count("--progress-bar off") == 3
    steps = [line for line in ended.stdout.splitlines() if line.startswith("setup ")]
    assert [line.split(":")[0] for line in steps] == [*(f"setup {step}/4" for step in range(1, 5)), "setup done"]
    assert "-m pip" not in re.sub("Downloading with .*", "", ended.stdout)  # commands themselves are not echoed
