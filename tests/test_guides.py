"""Guides held to more than `test_pages` holds them: examples of published packages, and the table of errors.

Each line of the troubleshooting table is produced by its command.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from birkhoff.pipeline.store.open import open_store
from tests.pages import read
from tests.pipeline.command import execute
from tests.pipeline.publishing import publish_tensors

LOAD = read("docs/how-to/load.md")
ERRORS = read("docs/how-to/troubleshoot.md").text.split("| error | remedy |")[1]
TABLE = re.findall(r"^\| `([^`]+)` \| ", ERRORS.split("\n\n")[0], re.M)


class Sam(nn.Module):
    """In the place of a published model: what the example needs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Linear(64, 64)


def predictor(sam: nn.Module) -> tuple[str, nn.Module]:
    return "predictor", sam


STANDINS: dict[str, dict[str, dict[str, object]]] = {
    "sam-b": {"segment_anything": {"sam_model_registry": {"vit_b": Sam}, "SamPredictor": predictor}},
    "sam2.1-t": {
        "sam2": {},
        "sam2.build_sam": {"build_sam2": lambda _config, device: Sam().to(device)},
        "sam2.sam2_image_predictor": {"SAM2ImagePredictor": predictor},
    },
}
"""What the examples import, by the model that they load."""

PACKAGES = {"sam-b": "segment_anything", "sam2.1-t": "sam2"}
PREDICTORS = {"sam-b": "SamPredictor", "sam2.1-t": "SAM2ImagePredictor"}


@pytest.mark.parametrize("model", STANDINS)
def test_the_examples_of_published_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (block,) = [block for block in LOAD.blocks if f'"{model}@latest"' in block.text]
    for name, members in STANDINS[model].items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(members)
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    source = Sam()
    save_file(source.state_dict(), tmp_path / "sam.safetensors")
    (tmp_path / "m.yaml").write_text(f"models: [{{name: {model}, source: sam.safetensors}}]\n")
    assert command(["compress", str(tmp_path / "m.yaml"), "--executor", "inline"]) == 0
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(block.text, names)
    loaded = names["sam2" if "sam2" in model else "sam"]
    assert isinstance(loaded, Sam)
    assert names["predictor"] == ("predictor", loaded)
    x = torch.randn(4, 64)
    assert torch.allclose(loaded.image_encoder(x), source.image_encoder(x), atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("model", STANDINS)
def test_the_examples_with_the_packages_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Each block alone in a process of its own, word for word, on the model's own names and shapes."""
    (block,) = [block for block in LOAD.blocks if f'"{model}@latest"' in block.text]
    for package in ("torchvision", PACKAGES[model]):
        ran = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"{package} cannot be imported: {ran.stderr.splitlines()[-1]}")
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    *built, _, _ = [line for line in block.text.splitlines() if line]
    variable = "sam2" if "sam2" in model else "sam"
    (tmp_path / "source.py").write_text(
        "\n".join([*built, "import sys, torch", f"torch.save({variable}.state_dict(), sys.argv[1])"])
    )
    subprocess.run([sys.executable, tmp_path / "source.py", tmp_path / "sam.pth"], check=True)
    with open_store((tmp_path / "store").as_uri()) as store:
        publish_tensors(store, model, torch.load(tmp_path / "sam.pth", weights_only=True), shard_weights=1 << 24)
    (tmp_path / "block.py").write_text(f"{block.text}print(type(predictor).__name__)\n")
    ran = subprocess.run([sys.executable, tmp_path / "block.py"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split()[-1:]) == (0, [PREDICTORS[model]]), ran.stderr


def command(words: list[str]) -> int:
    return execute(*words)


class Trouble:
    """Small checkpoints and manifests, each wrong in its own way, beside one that is published."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        save_file({"a.weight": weight}, folder / "net.safetensors")

    def compress(self, source: str = "net.safetensors", more: str = "", key: str = "source") -> int:
        path = self.folder / "m.yaml"
        path.write_text(f"models:\n  - name: net\n    {key}: {source}\n{more}")
        return command(["compress", str(path), "--executor", "inline"])

    def unsafe(self) -> int:
        torch.save({"a": _Evil()}, self.folder / "evil.pth")
        return self.compress("evil.pth")

    def infinite(self) -> int:
        save_file({"a.weight": torch.full((64, 64), float("nan"))}, self.folder / "nan.safetensors")
        return self.compress("nan.safetensors")

    def cut(self) -> int:
        (self.folder / "cut.safetensors").write_bytes((self.folder / "net.safetensors").read_bytes()[:-100])
        return self.compress("cut.safetensors")

    def s3(self, endpoint: str, *, keys: bool = True) -> int:
        self.patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if keys else ():
            self.patch.setenv(name, "x")
        return command(["list", "--store", "s3://bucket"])

    def damaged(self) -> int:
        assert self.compress() == 0
        assert command(["pull", "net", "-o", str(self.folder / "p")]) == 0
        (blob,) = (self.folder / "p").glob("*.safetensors")
        body = bytearray(blob.read_bytes())
        body[300] ^= 1
        blob.unlink()
        blob.write_bytes(body)
        return command(["verify", str(self.folder / "p")])

    def unknown(self) -> int:
        assert self.compress() == 0
        return command(["pull", "nett", "-o", str(self.folder / "p")])

    def protected(self) -> int:
        assert self.compress() == 0
        assert command(["promote", "net@v1", "stable", "--protect"]) == 0
        assert self.compress(more="    profile: fast\n") == 0
        return command(["promote", "net@v2", "stable"])


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


PRODUCED: dict[str, tuple[int, Callable[[Trouble], int]]] = {
    "unknown key": (3, lambda t: t.compress(key="sorce")),
    "absent.pth": (4, lambda t: t.compress("absent.pth")),
    "its pickle": (5, Trouble.unsafe),
    "holds NaN": (6, Trouble.infinite),
    "truncated": (4, Trouble.cut),
    "budget ratio": (21, lambda t: t.compress(more="    target_ratio: 90\n")),
    "has no model": (10, Trouble.unknown),
    "Could not connect": (8, lambda t: t.s3("http://127.0.0.1:9")),
    "Unable to locate": (9, lambda t: t.s3("http://127.0.0.1:9", keys=False)),
    "plain http": (7, lambda t: t.s3("http://192.0.2.1:9000")),
    "is damaged": (11, Trouble.damaged),
    "alias stable": (17, Trouble.protected),
}


def test_every_row_of_the_table_of_errors_has_its_test() -> None:
    assert [next(start for start in PRODUCED if start in row) for row in TABLE] == list(PRODUCED)


@pytest.mark.parametrize("row", TABLE)
def test_the_errors_of_the_table_are_what_the_command_prints(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "BIRKHOFF_STORE": (tmp_path / "store").as_uri(),
        "BIRKHOFF_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(name, value)
    expected, produce = next(made for start, made in PRODUCED.items() if start in row)
    code = produce(Trouble(tmp_path, monkeypatch))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(said)) == (expected, 1), said
    assert row in said[0]
