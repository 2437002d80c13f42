"""A user's model that runs in milliseconds: three layers, its weights, its inputs, a manifest and a store."""

import json
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.checkpoint.digests import checkpoint_digest
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.statistics.task import StatisticsTask
from tests.pipeline.command import captured

CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(64, 48, 1))

def batches():
    return [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(number)) for number in range(3)]
"""

HESSIANS = {"2.weight": 288, "4.weight": 64}
"""Matrices of the model that are large enough to have a Hessian, and their columns; `0.weight` has 864 weights."""

CODED = {*HESSIANS, "0.weight", "2.bias"}
"""Tensors of the model that are coded by the output; the other biases have fewer than 64 weights."""


class Place:
    """A folder with the model, manifests of it, and a store."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        (folder / "net.py").write_text(CODE)
        scope: dict = {}
        exec(CODE, scope)
        torch.save(scope["build"]().state_dict(), folder / "net.pth")

    @property
    def subject(self) -> Subject:
        return Subject(builder=f"{self.folder}/net.py:build", inputs=f"{self.folder}/net.py:batches")

    def task(self, subject: Subject | None = None, **more: object) -> StatisticsTask:
        checkpoint = open_checkpoint(self.folder / "net.pth")
        return StatisticsTask(
            model="net",
            source_sha256=checkpoint_digest(checkpoint),
            checkpoint=checkpoint,
            subject=subject or self.subject,
            **more,  # type: ignore[arg-type]
        )

    def compress(self, *models: str, executor: str = "inline") -> tuple[int, list[dict], str]:
        """Compress the model once for each of these words of a manifest, as net, net1, ..."""
        source = "source: net.pth, builder: net.py:build, inputs: net.py:batches, floor_output_db: 3"
        lines = [f"  - {{name: net{number or ''}, {source}, {said}}}" for number, said in enumerate(models)]
        (self.folder / "m.yaml").write_text("\n".join(["models:", *lines]))
        code, out, err = self.run("compress", str(self.folder / "m.yaml"), "--executor", executor, "--json")
        return code, json.loads(out), err

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments)

    def files(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "store").glob(pattern))
