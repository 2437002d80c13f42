"""One row of the benchmark `family`, in a process of its own: `python -m tests.harness.benchmarks.family_row NAME DIR`.

Prints the row as one line of JSON. A step that fails leaves its reason in its cell, and those that need it theirs.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import nn

from birkhoff.codec.metrics import fidelity
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline.artifact.export import export
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.segment.adapters.base import Segmenter, View
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.everything import everything, points_asked, published
from tests.family import members
from tests.family.members import Member, MissingError
from tests.harness.benchmarks import family
from tests.harness.benchmarks.publishing import compress_here

_MODEL = "member"
GRID = 4
"""`everything` asks at GRID x GRID points."""


class _Row:
    """The row's cells, filled one step after another."""

    def __init__(self, member: Member, work: Path) -> None:
        self.member, self.work = member, work
        self.cells: dict[str, Any] = {"name": member.name}
        self.store = (work / "store").absolute().as_uri()
        self.model: Any = None
        self.segmenter: Segmenter | None = None
        self.view: View | None = None
        self.compressed: Segmenter | None = None
        self.view_of_compressed: View | None = None

    def step(self, name: str, work: Callable[[], Any]) -> None:
        """Run a step; its cell is what it gives, or why it did not come to an end."""
        begin = time.perf_counter()
        try:
            self.cells[name] = work()
        except Exception as error:  # whatever the publishers' code raises belongs into the table
            reason = " ".join(str(error).split())[:160]
            self.cells[name] = {
                "reason": reason if isinstance(error, MissingError) else f"{type(error).__name__}: {reason}"
            }
        self.cells.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)

    def fill(self) -> None:
        """All steps, in the order of the table."""
        with contextlib.ExitStack() as stack:
            try:
                clone = stack.enter_context(self.member.code())
            except MissingError as error:
                self.cells["builds"] = {"reason": str(error)}
                return
            self.cells["code"] = _code(self.member, clone)
            self.step("builds", self._build)
            if self.model is None:
                return
            image = members.picture(*self.member.size)
            self.pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
            self.cells["side"] = self.member.side
            self.step("compresses", self._compress)
            self.step("masks", lambda: self._masks(image))
            self.model = self.segmenter = None  # memory for the model of the artifact
            self.step("loads", lambda: self._load(clone))
            self.step("sqnr_db", self._sqnr)
            self.step("everything", self._everything)
            self.compressed = None
            self.step("exports", self._export)

    def _build(self) -> dict[str, Any]:
        model = self.member.model()
        if self.member.drawn:
            _trusting(model)
        self.model = model
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        published = "no layout"
        if self.member.layout is not None:
            layout = {spec.name: spec.shape for spec in family.layout(self.member.layout)}
            differing = {key for key in layout.keys() | shapes.keys() if layout.get(key) != shapes.get(key)}
            published = f"{len(differing)} differ" if differing else "equal"
        weights = sum(parameter.numel() for parameter in model.parameters())
        return {"tensors": len(shapes), "weights": weights, "published": published}

    def _masks(self, image: Any) -> dict[str, Any]:
        """Pixels that differ from the predictor's masks, both cut at its median logit."""
        if self.member.side is not None:
            members.shrunk(self.model, self.member.side)
        expected = self.member.predict(self.model, image)
        self.segmenter = segmenter_of(self.model, self.member.adapter)
        self.view = self.segmenter.look(self.pixels)
        return {"adapter": self.segmenter.family, **members.differences(self.segmenter, self.view, expected)}

    def _compress(self) -> dict[str, Any]:
        source = _saved(self.model, self.work)
        # Random weights find no shapes, so agreement of their masks would prove nothing and is refused.
        entry: dict[str, Any] = {"name": _MODEL, "source": str(source), "proof": not self.member.drawn}
        if self.member.adapter is not None:
            entry["adapter"] = self.member.adapter
        manifest = Manifest.model_validate({"models": [entry]})
        run = compress_here(manifest, self.store)
        size = source.stat().st_size
        source.unlink()
        if run.version is None:
            raise RuntimeError(str(run.error))
        return {"bytes": size, "stored": run.version.stored_bytes}

    def _load(self, clone: Path | None) -> dict[str, Any]:
        builder = {
            "builder": "tests.harness.benchmarks.family_row:build",
            "own configuration": str(self.work / "source" / "config.json"),
        }.get(self.member.known_by)
        self.compressed = compressed_segmenter(
            _MODEL, self.store, builder=builder, upstream=clone, adapter=self.member.adapter, device="cpu"
        )
        model = self.compressed.model
        if self.member.side is not None:
            members.shrunk(model, self.member.side)
            self.compressed = segmenter_of(model, self.member.adapter)
        ours = sum(isinstance(module, CompressedLinear) for module in model.modules())
        plain = sum(isinstance(module, nn.Linear) for module in model.modules())
        kind = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
        return {"as": kind, "by": self.member.known_by, "compressed": ours, "dense": plain}

    def _sqnr(self) -> float:
        assert self.view is not None, "the original gave no embedding"
        assert self.compressed is not None, "nothing was loaded"
        self.view_of_compressed = self.compressed.look(self.pixels)
        return round(fidelity(self.view.embedding, self.view_of_compressed.embedding).sqnr_db, 1)

    def _everything(self) -> dict[str, int]:
        assert self.view_of_compressed is not None, "nothing was loaded"
        assert self.compressed is not None
        how = published(self.compressed.family, across=GRID)
        with mock.patch.object(self.compressed, "look", return_value=self.view_of_compressed):  # embedded already
            found = everything(self.compressed, self.pixels[0], how)
        return {"masks": len(found.masks), "points": points_asked(how)}

    def _export(self) -> str:
        """The dense checkpoint of the artifact, loaded into the publishers' code as strictly as that can."""
        blank = self.member.blank()
        transformers = hasattr(blank, "save_pretrained")
        path = self.work / ("model.safetensors" if transformers else "model.pth")
        with open_artifact(_MODEL, self.store) as artifact:
            export(artifact, path)
        if not transformers:
            blank.load_state_dict(torch.load(path, weights_only=True), strict=True)
            return "strict"
        blank.config.save_pretrained(self.work)
        _, told = type(blank).from_pretrained(self.work, output_loading_info=True)
        wrong = {key: sorted(names)[:3] for key, names in told.items() if names}
        if wrong:
            raise RuntimeError(f"from_pretrained says {wrong}")
        assert load_file(path)
        return "strict"


def build() -> nn.Module:
    """`--builder` of the rows that no tensors tell: the member that this process is of."""
    return members.member(os.environ["BIRKHOFF_FAMILY_ROW"]).build()


def _code(member: Member, clone: Path | None) -> str:
    """Where the code is from: package and version, or clone and commit."""
    if clone is None:
        top = member.packages[0].partition(".")[0]
        name = packages_distributions()[top][0]
        return f"{name} {version(name)}"
    told = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=clone, capture_output=True, text=True)
    return f"{str(member.clone).partition('/')[0]} at {told.stdout.strip() or 'an unknown commit'}"


def _saved(model: Any, work: Path) -> Path:
    """The weights as their publishers give them: a flat `.pth`, or a folder of transformers."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(work / "source")
        return work / "source" / "model.safetensors"
    path = work / "source.pth"
    torch.save(model.state_dict(), path)
    return path


def _trusting(model: nn.Module) -> None:
    """Random weights that trust their masks and are sure of them: else `everything` drops all, and shows nothing."""
    with torch.no_grad():
        for name, module in model.named_modules():
            layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
            if name.endswith("iou_prediction_head"):
                layers[-1].bias.fill_(5.0)
            elif name.rpartition(".")[0].endswith("output_hypernetworks_mlps"):
                layers[-1].weight.mul_(30)
                layers[-1].bias.mul_(30)


def main(arguments: list[str]) -> int:
    """Print the row of the member named, with files below a folder."""
    name, work = arguments
    os.environ["BIRKHOFF_FAMILY_ROW"] = name
    warnings.simplefilter("ignore")
    row = _Row(members.member(name), Path(work))
    with contextlib.redirect_stdout(sys.stderr):
        row.fill()
    print(json.dumps(row.cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
