"""Writes the fixture of stored versions; run once, by the code before the change that it is to outlive, then kept.

python -m tests.pipeline.artifact.make_versions
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.pipeline.command import execute

FIXTURE = Path(__file__).parent / "fixtures" / "versions"

MODELS = {
    "plain": "allocation: uniform, overrides: [{tensors: '*.0.*', target_db: 24}, {tensors: '*pos*', lossless: true}]",
    "matched": "profile: match-paper",
    "published": "profile: paper, overrides: [{tensors: '*.1.*', target_db: 36}, {tensors: '*.bias', target_db: 36}]",
    "sized": "target_ratio: 3, allocation: size, overrides: [{tensors: '*.conv.*', target_db: 40}]",
}
"""Between them every kind of decision: by profile, by the tensor's size, by the published codec's error, by rule."""

MANIFEST = "shard_mib: 1\nmodels:\n" + "".join(
    f"  - {{name: {name}, source: net.safetensors, {words}}}\n" for name, words in MODELS.items()
)

PLANNED = ("profile", "overrides", "groups", "predicted_tensor_db")
"""What `plan` says of a model, whatever the machine."""


def weights() -> dict[str, torch.Tensor]:
    """Tensors that take every branch of a decision: long and short, flat, whole numbers, narrow types, constants."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.03

    return {
        "encoder.blocks.0.weight": normal(96, 64),
        "encoder.blocks.0.bias": normal(96),
        "encoder.blocks.1.weight": normal(96, 64),
        "encoder.blocks.1.bias": normal(96),
        "encoder.conv.half": normal(16, 8, 3, 4).half(),
        "encoder.conv.narrow": normal(40, 30).bfloat16(),
        "encoder.pos_embed": normal(1, 48, 24),
        "encoder.tiny": normal(8, 8),
        "encoder.few": normal(3, 3),
        "decoder.mask": torch.full((40, 40), 0.5),
        "decoder.coarse": normal(32, 40) * 200,
        "decoder.steps": torch.arange(1100).view(11, 100),
        "decoder.flags": normal(40, 40) > 0,
        "decoder.count": torch.tensor(7),
    }


def main() -> None:
    """The source, the manifest, the store that `compress` makes of them, and what `plan` and `inspect` say of each."""
    shutil.rmtree(FIXTURE, ignore_errors=True)
    FIXTURE.mkdir(parents=True)
    save_file(weights(), FIXTURE / "net.safetensors")
    manifest = FIXTURE / "manifest.yaml"
    manifest.write_text(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BIRKHOFF_HOME"] = f"{folder}/home"
        store = Path(folder, "store").as_uri()
        planned = printed("plan", str(manifest), "--json", "--store", store)
        assert execute("compress", str(manifest), "--executor", "inline", "--store", store) == 0
        assert (
            execute("gc", "--yes", "--grace", "0s", "--store", store) == 0
        )  # passes of a budget that were not the last
        said = {
            row["model"]: {
                "plan": {key: row[key] for key in PLANNED},
                "inspect": printed("inspect", row["model"], "--json", "--store", store),
            }
            for row in planned
        }
        for part in ("models", "shards", "blobs"):
            shutil.copytree(Path(folder, "store", part), FIXTURE / "store" / part)
    (FIXTURE / "said.json").write_text(json.dumps(said, indent=1) + "\n")


def printed(*words: str) -> Any:
    """The JSON that a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert execute(*words) == 0
    return json.loads(out.getvalue())


if __name__ == "__main__":
    main()
