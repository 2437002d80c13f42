"""Reports for the tests: of a small real run with hostile names, and one the size of the whole family."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.report.document import LayerRecord, ModelRecord, RunReport, ShardTiming, Totals
from birkhoff.pipeline.report.stored import read_report, runs
from birkhoff.pipeline.run.environment import environment
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks import family
from tests.pipeline.command import captured

HOSTILE = "<script>alert(1)</script>.\U0001f600\"'&weight"
"""A tensor's name that would run code in a page that does not escape it; beyond the 16-bit characters of scripts."""


class Fleet:
    """Two models of one checkpoint, a third whose checkpoint is missing, a store, and the command line on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.folder, self.url = folder, (folder / "store").as_uri()
        generator = torch.Generator().manual_seed(0)
        self.tensors = {"encoder.constant": torch.ones(64, 64), "encoder.bias": torch.randn(64, generator=generator)}
        for block in range(3):
            for name in ("qkv", "lin"):
                self.tensors[f"encoder.blocks.{block}.{name}.weight"] = torch.randn(96, 64, generator=generator)
        self.tensors["decoder.conv.weight"] = torch.randn(64, 16, 3, 3, generator=generator)
        self.tensors[HOSTILE] = torch.randn(64, 64, generator=generator)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        command = [*arguments, "--store", self.url]
        return captured(self._capsys, *command)

    def compress(self, *arguments: str, missing: bool = False) -> tuple[int, str, str]:
        save_file(self.tensors, self.folder / "net.safetensors")
        models = ["{name: net, source: net.safetensors}", "{name: fine, source: net.safetensors, profile: fine}"]
        more = ["{name: gone, source: gone.safetensors}"] if missing else []
        (self.folder / "m.yaml").write_text(f"shard_mib: 1\nmodels: [{', '.join(models + more)}]\n")
        return self.run("compress", str(self.folder / "m.yaml"), "--executor", "inline", *arguments)

    def store(self) -> Store:
        return open_store(self.url)

    def runs(self) -> list[str]:
        with self.store() as store:
            return runs(store)

    def report(self, run: str = "latest") -> RunReport:
        with self.store() as store:
            return read_report(store, run)


def family_report(seed: int = 0) -> RunReport:
    """A report with every tensor of the family's checkpoints under its real name, its figures drawn at random."""
    generator = random.Random(seed)
    models = tuple(_model(member, generator) for member in family.members())
    shards = sum(model.shards or 0 for model in models)
    slow = ShardTiming(
        model="SAM-H",
        index=3,
        first=models[2].layers[7].name,
        tensors=14,
        source_bytes=31 << 20,
        stored_bytes=5 << 20,
        seconds=5.25,
        stages={"read": 0.25, "encode": 5.0},
        reused=False,
    )
    return RunReport(
        run="20260102T030405.678Z-9abc",
        started="2026-01-02T03:04:05+00:00",
        seconds=298.4,
        store="s3://models/fleet",
        settings={"profile": "balanced", "shard_mib": 32, "executor": "ray", "reuse": "trust"},
        environment=environment(),
        totals=Totals(
            models=len(models),
            published=len(models),
            source_bytes=sum(model.source_bytes or 0 for model in models),
            stored_bytes=sum(model.stored_bytes or 0 for model in models),
            unique_bytes=1_029_184_111,
            new_bytes=1_029_184_111,
            shards=shards,
            shards_reused=283,
            sqnr_db_min=30.0,
            sqnr_db_median=30.02,
        ),
        models=models,
        slowest=(slow,) * 20,
    )


def _model(member: family.Member, generator: random.Random) -> ModelRecord:
    specs = [spec for file in member.files for _, spec in family.tensors_of(family.files()[file])]
    layers = tuple(_layer(index, spec, generator) for index, spec in enumerate(specs))
    source = sum(spec.nbytes for spec in specs)
    stored = round(sum(layer.bits_per_weight * layer.weights / 8 for layer in layers))
    return ModelRecord(
        name=member.name,
        profile="balanced",
        status="published",
        seconds=290 + generator.random() * 9,
        source=member.files[0],
        source_sha256=f"{generator.getrandbits(256):064x}",
        version="v1",
        digest=f"{generator.getrandbits(256):064x}",
        source_bytes=source,
        stored_bytes=stored,
        ratio=round(source / stored, 3),
        sqnr_db_min=30.0,
        sqnr_db_median=30.02,
        probe_error=3.1e-7,
        shards=len(layers) // 14 + 1,
        stages={"read": 3.1, "encode": 25.5, "validate": 14.2, "upload": 1.0},
        layers=layers,
    )


def _layer(index: int, spec: family.TensorSpec, generator: random.Random) -> LayerRecord:
    dtype = "int64" if spec.kind == "counter" else "float32"
    decision = PROFILES["balanced"].decide(spec.shape, dtype)
    action, reason = decision.action, decision.reason
    common = {"name": spec.name, "shape": spec.shape, "dtype": dtype, "shard": index // 14}
    if action == "lossless":
        bits = round(25 + generator.random() * 7, 3)
        return LayerRecord(**common, codec="planes", bits_per_weight=bits, reason=reason)
    return LayerRecord(
        **common,
        codec="lattice",
        bits_per_weight=round(5 + generator.gauss(0, 0.3), 3),
        sqnr_db=round(30 + abs(generator.gauss(0, 0.02)), 3),
        target_db=30.0,
        max_abs_error=float(f"{math.exp(generator.gauss(-6, 1)):.4g}"),
        probe_db=round(30 + generator.gauss(0, 0.3), 2) if len(spec.shape) == 2 else None,
    )


def page_data(page: str) -> list[dict[str, object]]:
    """What a page hands to its script."""
    begin = page.index('id="data">') + len('id="data">')
    found: list[dict[str, object]] = json.loads(page[begin : page.index("</script>", begin)])
    return found
