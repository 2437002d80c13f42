"""`results/codec.md`, drawn from the measurements."""

from itertools import starmap
from typing import Any

from tests.harness.benchmarks import rates
from tests.harness.benchmarks.common import table

Result = dict[str, Any]

ROW_HEAD = [
    "codec", "bits/weight", "ratio", "SQNR dB", "least", "median", "max error", "encode MB/s", "decode MB/s",
    "ours at its error, bits/weight",
]  # fmt: skip


def markdown(results: Result) -> str:
    """The whole page."""
    sections = [
        "# Codec benchmark\n\n`make bench PART=codec`; the figures behind it are in `codec.json`. Every result was "
        "decoded and checked before it was timed. All times, NNC's too, are processor time of single threads (medians "
        "of three, NNC's of one), which stands for wall time on cores of their own.",
        _conditions(results["conditions"]),
        "## Acceptance\n\n" + table(["figure", "target", "measured", "met"], acceptance(results)),
        *(_whole_model(name, rows, results) for name, rows in results["rows"].items()),
        _agreement(results["agreement"]),
        _cores(results),
        _large(results["large_tensors"]),
        _rates(results["rates"]),
        _in_memory(results["in_memory"]),
        _rate_distortion(results),
    ]
    return "\n\n".join(sections) + "\n"


def _conditions(conditions: dict[str, str]) -> str:
    return table(["condition", ""], [[key, value] for key, value in conditions.items()])


def acceptance(results: Result) -> list[list[str]]:
    """Each figure that was asked for: (figure, target, measured, yes or no)."""
    rows = {row["name"]: row for row in results["rows"]["MiniLM-L6"]}
    masks = {row["profile"]: row for row in results["agreement"]}
    encode, decode = results["two_processes"]["fast"]
    lines = [
        _line("MiniLM ratio, match-paper", 6.7, rows["match-paper"]["ratio"]),
        _line("MiniLM ratio, 30 dB (balanced)", 6.1, rows["balanced"]["ratio"]),
        _line(
            "large matrices at the published error, bits/weight", 4.62, results["large_tensors"]["match-paper"], True
        ),
        _line("demo SAM ratio, balanced against paper", masks["paper"]["ratio"], masks["balanced"]["ratio"]),
        _line(
            "demo SAM agreement, balanced against paper",
            masks["paper"]["agreement"],
            masks["balanced"]["agreement"],
            digits=4,
        ),
        _fewer_bits(results),
        _line("fast, 2 cores: encode, M weights/s", 60, encode / 1e6),
        _line("fast, 2 cores: decode, M weights/s", 100, decode / 1e6),
        _line("fast: peak memory, times the tensor", 3, results["peak_memory"]["fast"], True),
        _line("balanced: peak memory, times the tensor", 3, results["peak_memory"]["balanced"], True),
    ]
    gaussian = {row["target_db"]: row for row in next(iter(results["rates"].values()))}
    for target_db, bits in ((6.0, 1.42), (12.0, 2.20), (18.0, 3.12), (30.0, 5.10)):
        name = f"Gaussian weights at {target_db:g} dB, bits/weight"
        lines.append(_line(name, bits, gaussian[target_db]["paths"], True, digits=3))
    for name, kind, target in (("encode", 0, 150), ("decode", 1, 500)):
        speed = results["two_processes"]["balanced"][kind]
        lines.append(_line(f"balanced, 2 cores: {name}, M weights/s", target, speed / 1e6))
    for point in results.get("rate_distortion", []):
        path = point["path"]
        name = f"paths at {point['target_db']:g} dB: bits/weight against NNC"
        lines.append(_line(name, path["nnc_bits"], path["bits"], True, digits=3))
        if point["target_db"] == 30:
            faster = path["weights_per_s"] / path["nnc_weights_per_s"]
            lines.append(_line("paths at 30 dB: encoding speed over NNC's, one thread each", 50, faster))
    return lines


def _line(name: str, target: float, value: float, below: bool = False, digits: int = 2) -> list[str]:
    met = value <= target if below else value >= target
    return [name, f"{'≤' if below else '≥'} {target:.{digits}f}", f"{value:.{digits}f}", "yes" if met else "no"]


def _fewer_bits(results: Result) -> list[str]:
    compared = [row for rows in results["rows"].values() for row in rows if row["at_equal_error"]]
    worse = [row["name"] for row in compared if row["at_equal_error"] >= row["bits"]]
    least = min(1 - row["at_equal_error"] / row["bits"] for row in compared)
    name = f"fewer bits than every fixed-rate baseline at its error ({len(compared)} rows)"
    return [name, "all", f"at least {100 * least:.0f} % fewer", f"no: {', '.join(worse)}" if worse else "yes"]


def _whole_model(name: str, rows: list[Result], results: Result) -> str:
    rows = rows + (results.get("nnc", []) if name == "MiniLM-L6" else [])
    note = (
        f"{rows[0]['weights'] / 1e6:.2f} M weights, {rows[0]['source_bytes'] / 1e6:.1f} MB of float32. Every byte "
        "counts: our container whole; a baseline's codes, scales and zero points, and its other tensors as float32. "
        "SQNR is over the tensors that baselines code (two dimensions, 1024 weights or more), least and median over "
        "those that changed. Speeds are of float32 bytes, one thread, whole model, container included."
    )
    about = "\n".join(f"- {row['name']}: {row['about']}" for row in rows)
    return f"## {name}\n\n{note}\n\n{table(ROW_HEAD, [_cells(row) for row in rows])}\n\n{about}"


def _cells(row: Result) -> list[str]:
    megabytes = 4e-6 * row["weights"]
    decibels = [("lossless" if row[key] is None else f"{row[key]:.2f}") for key in ("sqnr_db", "least_db", "median_db")]
    speeds = [f"{megabytes / row[key]:.0f}" for key in ("encode_s", "decode_s")]
    equal = f"{row['at_equal_error']:.3f}" if row["at_equal_error"] else ""
    return [
        row["name"],
        f"{row['bits']:.3f}",
        f"{row['ratio']:.2f}",
        *decibels,
        f"{row['max_abs']:.2g}",
        *speeds,
        equal,
    ]


def _agreement(rows: list[Result]) -> str:
    cells = [[r["profile"], f"{r['ratio']:.2f}", f"{r['agreement']:.4f}", f"{r['iou']:.4f}"] for r in rows]
    note = "Held-out pictures, box prompts. Agreement is the mean IoU of masks with those of the original weights."
    return f"## Masks of the demo SAM\n\n{note}\n\n" + table(["profile", "ratio", "agreement", "IoU with truth"], cells)


def _cores(results: Result) -> str:
    cells = [[name, *(f"{speed / 1e6:.0f}" for speed in speeds)] for name, speeds in results["two_processes"].items()]
    memory = ", ".join(f"{name} {value:.2f}" for name, value in results["peak_memory"].items())
    return (
        "## Two cores\n\nTwo processes of one thread, each coding all of MiniLM at the same time: the sum of "
        "their rates in processor time; entropy coding and container included.\n\n"
        + table(["profile", "encode, M weights/s", "decode, M weights/s"], cells)
        + f"\n\nPeak memory while encoding {results['peak_memory_of']} float32, the tensor included, times the tensor: "
        f"{memory}."
    )


def _large(found: Result) -> str:
    return (
        f"## Large matrices\n\nMiniLM's matrices of 100 000 weights or more that the published codec codes "
        f"({found['weights'] / 1e6:.1f} M weights): {found['match-paper']:.3f} bits a weight at the published codec's "
        f"error tensor by tensor, which itself takes {found['paper']:.3f}."
    )


def _rates(tables: dict[str, list[Result]]) -> str:
    note = (
        "Bits a weight at the SQNR in the first column, every byte counted. Retention is Shannon's bits over the bits "
        "used; the bound is that of independent weights, grouped by the levels of their rows and columns. EntQuant "
        "(arXiv 2601.22787) with int8 symbols, a scale for each row and an ideal ANS coder; Dynamics as Code with "
        "numbers of fixed length in Hilbert's order: both as `rates.py` says."
    )
    return "\n\n".join([f"## Bits, and what is retained\n\n{note}", *starmap(rates.markdown, tables.items())])


def _in_memory(rows: list[Result]) -> str:
    head = [
        "model",
        "profile",
        "form",
        "bits/weight",
        "dB against the original",
        "against the stored",
        "least of a matrix",
    ]
    cells = [
        [
            row["model"], row["profile"], row["form"], f"{row['bits']:.3f}", f"{row['original_db']:.2f}",
            f"{row['stored_db']:.2f}", f"{row['least_stored_db']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    note = (
        "What `load_into(..., memory=...)` holds of the matrices: beside 8 bits a weight, which is exactly what is "
        "stored, the packed forms, which code it once more. SQNR of all matrices together, and of the worst against "
        "what is stored."
    )
    return f"## In memory\n\n{note}\n\n{table(head, cells)}"


def _rate_distortion(results: Result) -> str:
    points = results.get("rate_distortion")
    if not points:
        return "## Against NNC\n\nNot run: give `--nnc-python`, a Python that has torch and nncodec."
    head = [
        "dB", "paths, bits", "NNC, bits", "difference", "paths, M/s", "NNC, M/s", "faster",
        "single nodes, bits", "NNC, bits", "single, M/s",
    ]  # fmt: skip
    note = (
        "MiniLM's coded tensors, bits a weight. NNC's bits are taken tensor by tensor at the very error that ours "
        "made, linear between its step sizes (1.5 dB apart). One thread each."
    )
    return f"## Against NNC\n\n{note}\n\n{table(head, [_point(point) for point in points])}"


def _point(point: Result) -> list[str]:
    path, single = point["path"], point["single"]
    return [
        f"{point['target_db']:g}",
        f"{path['bits']:.3f}",
        f"{path['nnc_bits']:.3f}",
        f"{path['bits'] - path['nnc_bits']:+.3f}",
        f"{path['weights_per_s'] / 1e6:.1f}",
        f"{path['nnc_weights_per_s'] / 1e6:.2f}",
        f"{path['weights_per_s'] / path['nnc_weights_per_s']:.0f}x",
        f"{single['bits']:.3f}",
        f"{single['nnc_bits']:.3f}",
        f"{single['weights_per_s'] / 1e6:.1f}",
    ]
