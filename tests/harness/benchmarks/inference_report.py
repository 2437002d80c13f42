"""`results/inference.md`, drawn from the measurements."""

from typing import Any

from tests.harness.benchmarks.common import table

Result = dict[str, Any]

_MODELS = ("demo", "SAM-B", "SAM-L", "SAM-H")
_HEAD = ("form", "on disk, MB", "load, s", "weights, MB", "peak, MB", "call, ms", "CUDA graph, ms", "output SQNR, dB")

_ABOUT = """# Inference benchmark

`make bench PART=inference`. Image encoders, one picture of 1024 x 1024 (the demo model: eight of 128 x 128). Loaded
from files in the page cache; peak is the weights and what a call takes beside them; calls are eager, all forms in turn,
medians. `int8`, `packed12` and `packed10`: the artifact of `ours, balanced` loaded with that `compute` or `memory`; the
last two code it once more while they load. SAM-B, -L and -H have random weights: their output SQNR, against the float32
original, compares forms and says nothing of masks."""


def markdown(results: Result) -> str:
    """The whole page: a table for every device and model."""
    sections = [_ABOUT]
    for name, entry in sorted(results.items(), key=lambda item: _place(item[0])):
        made = entry["made_on"]
        rows = [row for row in entry["rows"] if "error" not in row]
        sections.append(f"## {name}\n\n{_conditions(made)}\n\n{table(list(_HEAD), [_cells(row) for row in rows])}")
        left_out = [f"- {row['form']}: `{row['error']}`" for row in entry["rows"] if "error" in row]
        if left_out:
            sections.append("Did not run there:\n\n" + "\n".join(left_out))
    return "\n\n".join(sections) + "\n"


def _place(name: str) -> tuple[bool, int]:
    """GPUs first, models by size."""
    kind, _, model = name.partition(" ")
    return kind == "cpu", _MODELS.index(model)


def _conditions(made: dict[str, str]) -> str:
    return "; ".join(f"{key} {value}" for key, value in made.items())


def _cells(row: Result) -> list[str]:
    return [
        row["form"],
        f"{row['disk_bytes'] / 1e6:.1f}",
        f"{row['load_s']:.3f}",
        f"{row['weights_bytes'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['latency_ms']:.2f}",
        f"{row['graph_ms']:.2f}" if "graph_ms" in row else "",
        f"{row['output_sqnr_db']:.1f}" if row["output_sqnr_db"] is not None else "",
    ]
