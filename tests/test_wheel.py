"""The wheel: built, installed into an environment of its own, and used outside this tree.

Nothing is fetched: the environment sees the libraries of this one, and the package only as the wheel brings it.
"""

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff import __version__
from tests.pages import ROOT

pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks, as `pip wheel .` does it."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip(f"not a clone: {files.stderr.strip()}")
    names = [name for name in files.stdout.split("\0") if name and not name.startswith(("tests/", "docs/"))]
    archive = subprocess.run(["tar", "-cf", "-", *names], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-xf", "-", "-C", tree], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built)]
    ended = subprocess.run([*command, str(tree)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's commands, in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # As lines of a .pth file would not: libraries of this environment, without its editable install of the package.
    libraries = [entry for entry in Path(sysconfig.get_path("purelib")).iterdir() if "birkhoff" not in entry.name]
    for entry in libraries:
        if entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    ended = subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder / "bin"


def test_it_holds_the_package_and_what_it_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    read = (".py", ".pyi", ".c", ".jinja", ".css", ".js", ".json")
    expected = {
        f"birkhoff/{name.removeprefix('src/birkhoff/')}"
        for name in tracked
        if name.startswith(("codec/", "kernels/", "pipeline/", "src/birkhoff/")) and name.endswith(read)
    }
    assert sorted(expected - names) == []
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    assert PROJECT["version"] == __version__
    assert f"-{__version__}-" in wheel.name


def test_it_compresses_pulls_and_loads_in_a_clean_environment(environment: Path, tmp_path: Path) -> None:
    save_file({"0.weight": torch.randn(64, 64)}, tmp_path / "net.safetensors")
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    variables = {"PATH": f"{environment}:/usr/bin:/bin", "HOME": str(tmp_path), "BIRKHOFF_STORE": "file://./store"}

    def run(*words: str) -> str:
        ended = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    assert run("birkhoff", "--version") == f"birkhoff {__version__}\n"
    run("birkhoff", "compress", "m.yaml", "--executor", "inline")
    run("birkhoff", "pull", "net", "-o", "pulled")
    code = "import birkhoff, torch; net = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)); "
    code += "print(birkhoff.load_into(net, 'pulled'), birkhoff.__file__)"
    assert run("python", "-c", code).startswith(f"['0'] {environment.parent}")


def test_extras_name_no_other_package_and_all_is_what_users_take() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == ["birkhoff-compression[embedded,hub,gcs,azure,oms,eval,lvis]"]
    listed = (ROOT / "docs" / "install.md").read_text()
    assert [name for name in extras if f"`{name}`" not in listed] == []
