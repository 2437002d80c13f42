"""The page of a report: one file, without network, light and dark, readable without scripts.

Names of models and tensors may be hostile. The template escapes everything. The page's content security policy allows
only the script beside this file, by its digest, and forbids all requests.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from birkhoff.pipeline.plan.shards import block_of
from birkhoff.pipeline.report.charts import HEIGHT, WIDTH, Chart, charts, share_path
from birkhoff.pipeline.report.document import LayerRecord, ModelRecord, RunReport
from birkhoff.pipeline.shard.task import PROBE_LIMIT
from birkhoff.pipeline.text import fixed, shape, short, size

_HERE = Path(__file__).parent
_OPEN_MODELS = 3
"""Maximum number of models whose sections start open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The tensors of one module block, summed up in one row."""

    name: str
    tensors: int
    lossless: int
    weights: int
    bits: float
    sqnr_min: float | None
    target: float | None
    error: float
    probe_min: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The section of one model."""

    model: ModelRecord
    anchor: str
    charts: list[Chart]
    modules: list[tuple[str, int]]
    """Top-level modules shown under the charts, each with its number of coded tensors."""
    blocks: list[Block]
    coded: int
    lossless: int
    data: dict[str, Any]
    """The tensors, packed for the script."""


@dataclass(slots=True, kw_only=True)
class Skipped:
    """Tensors of the run that were kept lossless for the same reason."""

    reason: str
    tensors: int = 0
    weights: int = 0
    stored_bytes: float = 0
    models: set[str] = field(default_factory=set)


def render(report: RunReport) -> str:
    """Return the page as HTML text."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            sections=[_section(index, model) for index, model in enumerate(report.models)],
            skipped=skipped(report.models),
            stages=_stages(report.models),
            opened=len(report.models) <= _OPEN_MODELS,
            best_ratio=max((model.ratio or 0 for model in report.models), default=0),
            style=style,
            script=script,
            style_digest=digest(style),
            script_digest=digest(script),
            probe_limit=PROBE_LIMIT,
            decimals=fixed(2),
            three=fixed(3),
            tenths=fixed(1),
            plain=str,
            width=WIDTH,
            height=HEIGHT,
        )
    )


def environment() -> jinja2.Environment:
    """Return the environment of the templates beside this file. It escapes everything and refuses undefined names."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        size=size, short=short, shape=shape, two=fixed(2), one=fixed(1), count=_count, bar=share_path, duration=duration
    )
    return found


def digest(text: str) -> str:
    """Return the SHA-256 of a style or script, as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def duration(seconds: float) -> str:
    """Format seconds as `42.1 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _count(value: float) -> str:
    """Format a count as `640.0 M`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f}"


def _section(index: int, model: ModelRecord) -> Section:
    coded = [layer for layer in model.layers if layer.reason is None]
    return Section(
        model=model,
        anchor=f"model-{index}",
        charts=charts(coded),
        modules=[(name, len(list(group))) for name, group in groupby(layer.name.split(".", 1)[0] for layer in coded)],
        blocks=[_block(name, list(group)) for name, group in groupby(model.layers, key=lambda y: block_of(y.name))],
        coded=len(coded),
        lossless=len(model.layers) - len(coded),
        data=_packed(model.layers),
    )


def _block(name: str, layers: Sequence[LayerRecord]) -> Block:
    coded = [layer for layer in layers if layer.reason is None]
    weights = sum(layer.weights for layer in layers)
    bits = sum(layer.weights * layer.bits_per_weight for layer in layers)
    return Block(
        name=name or "(top)",
        tensors=len(layers),
        lossless=len(layers) - len(coded),
        weights=weights,
        bits=bits / max(1, weights),
        sqnr_min=_least(layer.sqnr_db for layer in coded),
        target=_least(layer.target_db for layer in coded),
        error=max((layer.max_abs_error for layer in coded), default=0.0),
        probe_min=_least(layer.probe_db for layer in coded),
    )


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def skipped(models: Iterable[ModelRecord]) -> list[Skipped]:
    """Return lossless tensors by reason, the most bytes first. Equal tensors of two models count twice."""
    found: dict[str, Skipped] = {}
    for model in models:
        for layer in model.layers:
            if layer.reason is not None:
                entry = found.setdefault(layer.reason, Skipped(reason=layer.reason))
                entry.tensors += 1
                entry.weights += layer.weights
                entry.stored_bytes += layer.bits_per_weight * layer.weights / 8
                entry.models.add(model.name)
    return sorted(found.values(), key=lambda entry: -entry.stored_bytes)


def _stages(models: Iterable[ModelRecord]) -> list[tuple[str, float]]:
    """Return the run's worker seconds by stage, longest first."""
    total: dict[str, float] = {}
    for model in models:
        for stage, seconds in model.stages.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return sorted(total.items(), key=lambda item: -item[1])


def _packed(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """Return tensors as columns for the script, which unpacks names and texts.

    A name is [number of characters shared with the name before, the rest]. A text is an index into `texts`.
    """
    texts: dict[str, int] = {}

    def index(text: str) -> int:
        return texts.setdefault(text, len(texts))

    names: list[int | str] = []
    before = ""
    for layer in layers:
        same = _shared(before, layer.name)
        # The script counts characters in UTF-16 units.
        names += [len(before[:same].encode("utf-16-le", "surrogatepass")) // 2, layer.name[same:]]
        before = layer.name
    columns = {
        "names": names,
        "shapes": [index(shape(layer.shape)) for layer in layers],
        "codecs": [index(layer.codec) for layer in layers],
        "reasons": [index(layer.reason or "") for layer in layers],
        "bits": [layer.bits_per_weight for layer in layers],
        "sqnr": [layer.sqnr_db for layer in layers],
        "targets": [layer.target_db for layer in layers],
        "errors": [layer.max_abs_error for layer in layers],
        "probes": [layer.probe_db for layer in layers],
    }
    return {**columns, "texts": list(texts)}


def _shared(a: str, b: str) -> int:
    """Return how many leading characters two texts share."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
