"""The charts of a report as SVG path data. It contains numbers only, so no text of a checkpoint enters a path.

A chart has `WIDTH` x `HEIGHT` units and is stretched to its place. Strokes keep their width (`non-scaling-stroke`), so
a point is a stroke of length 0 with round or square ends. At ten characters per tensor, a fleet's page stays below its
size limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from birkhoff.pipeline.report.document import LayerRecord

WIDTH, HEIGHT = 1000, 100
_MARGIN = 6
"""Margin above and below the outermost point, in units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One panel: path data, the range of its axis, and a description in words."""

    key: str
    """Selects its style: `bits`, `sqnr`, `error` or `probe`."""
    title: str
    legend: str
    """What its marks mean."""
    marks: str
    """Path of the values."""
    target: str = ""
    """Path of the target line."""
    low: str
    high: str
    """Labels of the ends of the axis."""
    words: str
    """The chart in words and figures, also for screen readers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps values to units from the top. A `log` axis takes only values above 0."""

    low: float
    high: float
    log: bool = False

    def y(self, value: float) -> int:
        """Return the distance from the top, in units."""
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else self._plain(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(HEIGHT - _MARGIN - share * (HEIGHT - 2 * _MARGIN))

    def _plain(self, value: float) -> tuple[float, float, float]:
        return self.low, self.high, value


def charts(coded: Sequence[LayerRecord]) -> list[Chart]:
    """Return panels over a model's lossy tensors, in the checkpoint's order. Panels without values are left out."""
    panels = (_bits(coded), _sqnr(coded), _error(coded), _probe(coded))
    return [panel for panel in panels if panel is not None]


def _bits(coded: Sequence[LayerRecord]) -> Chart | None:
    values = [layer.bits_per_weight for layer in coded]
    if not values:
        return None
    axis = Axis(low=0.0, high=max(values) or 1.0)
    # Steps from the bottom look like bars that touch.
    steps = [f"M0 {axis.y(0.0)}"]
    for index, value in enumerate(values):
        steps.append(f"V{axis.y(value)}H{_edge(index + 1, len(values))}")
    return Chart(
        key="bits",
        title="Bits a weight",
        legend="one step a tensor",
        marks="".join(steps) + f"V{axis.y(0.0)}Z",
        low="0",
        high=f"{axis.high:.1f}",
        words=_words(values, "bits", 2),
    )


def _sqnr(coded: Sequence[LayerRecord]) -> Chart | None:
    values = [layer.sqnr_db for layer in coded]
    found = [value for value in values if value is not None]
    targets = [layer.target_db for layer in coded]
    wanted = [target for target in targets if target is not None]
    if not found:
        return None
    axis = Axis(low=min(found + wanted), high=max(found + wanted))
    return Chart(
        key="sqnr",
        title="SQNR against its target",
        legend="dots" + (", the target dashed" if wanted else "; no tensor was promised one"),
        marks=_dots(values, axis),
        target=_line(targets, axis),
        low=f"{axis.low:.1f}",
        high=f"{axis.high:.1f}",
        words=_words(found, "dB", 2) + (f", {_margin(coded)}" if wanted else ""),
    )


def _error(coded: Sequence[LayerRecord]) -> Chart | None:
    values = [layer.max_abs_error or None for layer in coded]
    found = [value for value in values if value]
    if not found:
        return None
    axis = Axis(low=min(found), high=max(found), log=True)
    return Chart(
        key="error",
        title="Greatest error of a weight",
        legend="squares, logarithmic",
        marks=_dots(values, axis),
        low=_short(axis.low),
        high=_short(axis.high),
        words=_words(found, "in the weights' unit", None),
    )


def _probe(coded: Sequence[LayerRecord]) -> Chart | None:
    values = [layer.probe_db for layer in coded]
    found = [value for value in values if value is not None]
    if not found:
        return None
    axis = Axis(low=min(found), high=max(found))
    half = max(1, round(WIDTH / len(values) / 2.4))
    marks = [
        f"M{_middle(index, len(values)) - half} {axis.y(value)}h{2 * half}"
        for index, value in enumerate(values)
        if value is not None
    ]
    return Chart(
        key="probe",
        title="SQNR of HyperLinear's output on random inputs",
        legend="strokes, coded matrices only",
        marks="".join(marks),
        low=f"{axis.low:.1f}",
        high=f"{axis.high:.1f}",
        words=_words(found, "dB", 2),
    )


def _dots(values: Sequence[float | None], axis: Axis) -> str:
    count = len(values)
    return "".join(f"M{_middle(i, count)} {axis.y(value)}h0" for i, value in enumerate(values) if value is not None)


def _line(values: Sequence[float | None], axis: Axis) -> str:
    """Return a line over runs of equal values, with gaps for None."""
    parts, before = [], None
    for index, value in enumerate(values):
        end = _edge(index + 1, len(values))
        if value is None:
            before = None
            continue
        if before is None:
            parts.append(f"M{_edge(index, len(values))} {axis.y(value)}")
        elif value != before:
            parts.append(f"V{axis.y(value)}")
        # A run that continues overwrites its end.
        if value == before and parts[-1].startswith("H"):
            parts[-1] = f"H{end}"
        else:
            parts.append(f"H{end}")
        before = value
    return "".join(parts)


def _middle(index: int, count: int) -> int:
    return round((index + 0.5) * WIDTH / count)


def _edge(index: int, count: int) -> int:
    return round(index * WIDTH / count)


def _margin(coded: Sequence[LayerRecord]) -> str:
    least = min(
        layer.sqnr_db - layer.target_db for layer in coded if layer.sqnr_db is not None and layer.target_db is not None
    )
    return f"at least {least:.2f} dB above the target"


def _words(values: Sequence[float], unit: str, digits: int | None) -> str:
    ordered = sorted(values)
    picked = (ordered[0], ordered[-1], ordered[len(ordered) // 2])
    least, most, median = (_short(value) if digits is None else f"{value:.{digits}f}" for value in picked)
    return f"{least} to {most} {unit}, median {median}"


def _short(value: float) -> str:
    """Format a value like `1.2e-4`."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def share_path(share: float, scale: float = WIDTH) -> str:
    """Return a bar of `share` (0 to 1) of the width, full height."""
    return f"M0 0H{round(min(1.0, max(0.0, share)) * scale)}V{HEIGHT}H0Z"
