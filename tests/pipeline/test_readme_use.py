"""The README's examples of running a model, as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline import cli

ROOT = Path(__file__).parents[2]


def example(first_line):
    """The one Python block of the README that starts so."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return found


def test_transformers(demo_store, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BIRKHOFF_STORE", demo_store)
    names = {"birkhoff": birkhoff}
    exec(example("from transformers import"), names)
    assert isinstance(names["model"].vision_encoder.layers[0].attn.qkv, HyperLinear)


class Sam(nn.Module):
    """In the place of a published model: what the example needs of it."""

    def __init__(self):
        super().__init__()
        self.image_encoder = nn.Linear(64, 64)


def test_segment_anything(tmp_path, monkeypatch, capsys):
    package = type(birkhoff)("segment_anything")
    package.sam_model_registry = {"vit_b": Sam}
    package.SamPredictor = lambda sam: ("predictor", sam)
    monkeypatch.setitem(__import__("sys").modules, "segment_anything", package)
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    source = Sam()
    save_file(source.state_dict(), tmp_path / "sam.safetensors")
    (tmp_path / "m.yaml").write_text("models: [{name: sam-b, source: sam.safetensors}]\n")
    words = ["compress", str(tmp_path / "m.yaml"), "--executor", "inline"]
    assert cli.run(lambda: cli.app(words, standalone_mode=False), debug=False) == 0
    capsys.readouterr()
    names = {"birkhoff": birkhoff}
    exec(example("from segment_anything import"), names)
    assert names["predictor"] == ("predictor", names["sam"])
    x = torch.randn(4, 64)
    assert torch.allclose(names["sam"].image_encoder(x), source.image_encoder(x), atol=0.2)


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_the_commands_stand_as_the_readme_shows_them(command, demo_store, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text().replace("\\\n    ", "")
    lines = re.findall(r"^\.venv/bin/birkhoff (.*)$", text, flags=re.MULTILINE)
    shown = next(line for line in lines if line.startswith(command) and "held-out" in line)
    monkeypatch.syspath_prepend(str(ROOT / "manifests" / "demo"))
    import held_out

    held_out.write(tmp_path / "held-out", held_out.held_out(4))
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIRKHOFF_STORE", demo_store)
    assert cli.run(lambda: cli.app(shown.split(), standalone_mode=False), debug=False) == 0, capsys.readouterr().err
    assert "worst" in capsys.readouterr().out or (tmp_path / "masks.png").is_file()
