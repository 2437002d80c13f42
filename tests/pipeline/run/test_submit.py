"""`make submit`: what goes to a cluster, and what never does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "manifests/cluster/submit.py"
PRIVATE = (
    *(".env", ".birkhoff/embedded/filer.db", ".venv/bin/python", ".git/config", "publisher.key", "publisher.key.pub"),
    *("server.pem", "manifests/credentials.json", "manifests/secrets.yaml", "manifests/service-account-prod.json"),
    *("pulled/net/model.bin", "manifests/store/blobs/sha256/ab/cd", "manifests/cluster/environment", "pipeline/.netrc"),
    *(
        "manifests/id_ed25519",
        "src/hf_token",
        "tests/conftest.py",
        "README.md",
        "dense.safetensors",
        "pipeline/notes.txt",
    ),
)
"""Written into the clone, and the tracked ones among them staged too; what is tracked and goes is below."""
GOES = ("pipeline/run/tokens.py", "codec/codec.py", "manifests/fleet.yaml", "pyproject.toml", "src/birkhoff/codec")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with everything in it that may lie in one."""
    root = tmp_path / "clone"
    for name in (*PRIVATE, *GOES[:-1], "manifests/cluster/submit.py", "manifests/mine.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    (root / "src/birkhoff").mkdir(parents=True)
    (root / GOES[-1]).symlink_to("../../codec")
    (tmp_path / "outside").write_text("of somebody else")
    (root / "pipeline/link").symlink_to(tmp_path / "outside")
    (root / "manifests/cluster/submit.py").write_text(SCRIPT.read_text())
    for name in (".git", ".venv"):  # the real one, which `git add` makes
        subprocess.run(["rm", "-r", str(root / name)], check=True)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / ".gitignore").write_text("pulled/\n")
    subprocess.run(
        ["git", "-C", str(root), "add", "--all", "--", ".", ":!pipeline/notes.txt", ":!manifests/mine.yaml"], check=True
    )
    return root


def load(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit_of_clone", root / "manifests/cluster/submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_git_tracks_goes_and_nothing_private(clone: Path) -> None:
    found = {str(path) for path in load(clone).chosen(clone)}
    assert found == {*GOES, "manifests/cluster/submit.py"}


def test_a_dry_run_lists_every_file_and_a_manifest_that_is_named(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = load(clone).main(["--address", "http://x:8265", "--dry-run", str(clone / "manifests/mine.yaml")])
    head, *lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert head.startswith("submit: 7 files, ")
    assert {line.split()[0] for line in lines} == {*GOES, "manifests/cluster/submit.py", "manifests/mine.yaml"}


def test_the_job_gets_what_was_listed_and_its_exit_code_comes_back(clone: Path, tmp_path: Path) -> None:
    """With a `ray` that shows what it was given."""
    temporary = tmp_path / "temporary"  # its own: another run's folder is none of this one's
    temporary.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    ray = tmp_path / "bin/ray"
    ray.write_text('#!/bin/sh\necho "given: $*"\ncd "$6" && find . ! -type d | sort\nexit 14\n')
    ray.chmod(0o755)
    ended = subprocess.run(
        [
            *(tmp_path / "bin/python", clone / "manifests/cluster/submit.py", "--address", "http://x:8265"),
            *("/fleet/m.yaml", "--store", "gs://bucket"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert ended.returncode == 14, ended.stderr
    listed, _, sent = ended.stdout.partition("given: ")
    assert "  pipeline/run: 1 files, " in listed
    words, *files = sent.splitlines()
    assert words.endswith("python -m birkhoff compress /fleet/m.yaml --address auto --scheduled --store gs://bucket")
    assert {name.removeprefix("./") for name in files} == {*GOES, "manifests/cluster/submit.py"}
    assert not list(temporary.iterdir())


def test_without_git_nothing_goes(clone: Path) -> None:
    subprocess.run(["rm", "-r", str(clone / ".git")], check=True)
    with pytest.raises(SystemExit, match="is no clone"):
        load(clone).chosen(clone)


def test_of_this_repository_go_the_packages_and_no_test() -> None:
    root = SCRIPT.parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    found = {str(path) for path in load(root).chosen(root)}
    assert {
        "pipeline/registry/signing.py",
        "src/birkhoff/__main__.py",
        "manifests/demo.yaml",
        "codec/profiles.py",
    } <= found
    assert not [name for name in found if name.startswith(("tests/", ".")) or name.endswith((".key", ".pem", ".png"))]
    tracked = subprocess.run(
        ["git", "-C", str(root), "ls-files", "codec", "kernels", "pipeline", "src"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(tracked.stdout.split()) <= found  # nothing that runs is taken for private
