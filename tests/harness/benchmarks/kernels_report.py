"""`results/kernels.md`, drawn from the measurements."""

from collections.abc import Iterator
from typing import Any

from tests.harness.benchmarks.common import table

Result = dict[str, Any]


def markdown(results: Result) -> str:
    """The whole page; parts that were not measured are left out."""
    sections = ["# Kernel benchmark\n\n`make bench PART=kernels`; the figures behind it are in `kernels.json`, what was"
                " tried and given up in `../kernels.md`."]  # fmt: skip
    parts = {part: entry["found"] for part, entry in results.items()}
    sections.append(_conditions(results))
    if {"encode", "search", "layers", "chain", "dtypes", "encoders", "encoder_graphs"} <= parts.keys():
        rows = acceptance(parts)
        sections.append("## Acceptance\n\n" + table(["figure", "target", "measured", "met"], rows))
    drawn = {
        "chain": _chain,
        "packed": _packed,
        "encode": _encode,
        "entropy": _entropy,
        "encoders": _encoders,
        "compiled": _compiled,
        "layers": _layers,
        "dtypes": _dtypes,
        "calls": _calls,
        "int8_chain": _int8,
        "int8_layers": _int8_layers,
    }
    sections += [draw(parts) for part, draw in drawn.items() if part in parts]
    return "\n\n".join(sections) + "\n"


def _conditions(results: Result) -> str:
    rows = [
        [part, made["gpu"], made["torch"], made["triton"], made["commit"], made["date"]]
        for part, entry in results.items()
        if (made := entry["made_on"])
    ]
    return table(["part", "GPU", "torch", "triton", "commit", "date"], rows)


def acceptance(parts: Result) -> list[list[str]]:
    """Each figure that was asked for: (figure, target, measured, yes or no)."""
    encode, chain, graphs = parts["encode"], parts["chain"], parts["encoder_graphs"]["SAM-H"]
    eager = parts["encoders"]["SAM-H"]
    lines = [
        _most("encode + statistics of 640 M float32 weights, ms", 1.0, encode["encode float32"]["median"] / 1e3),
        _least("the same, of copy bandwidth", 0.75, encode["encode float32"]["of_copy"]),
        _least("bfloat16 weights, of copy bandwidth", 0.75, encode["encode bfloat16"]["of_copy"]),
        _most("SAM-H searched, encoded, validated: GPU ms", 5.0, parts["search"]["gpu_ms"]),
        _least("decode to bfloat16, of copy bandwidth", 0.8, encode["decode to bfloat16"]["of_copy"]),
        _least("decode to float32, of copy bandwidth", 0.8, encode["decode to float32"]["of_copy"]),
        _least("the same of packed weights; least of four", 0.8, min(_packed_decodes(encode))),
    ]
    lines += [
        _most(f"SAM-H's 128 linears at {tokens} tokens, of cuBLAS", limit, chain[tokens]["ratio"])
        for tokens, limit in (("1", 1.0), ("16", 1.0), ("4096", 1.04), ("8192", 1.02))
    ]
    lines += [_every_layer(parts["layers"], tokens, limit) for tokens, limit in LIMITS.items()]
    lines += [
        _least("SAM-H encoder against float32, graph", 4.0, graphs["float32"] / graphs["ours"]),
        _most("SAM-H encoder against bfloat16, graph", 1.03, graphs["ours"] / graphs["bfloat16"]),
        _least("SAM-H encoder against float32, eager", 4.0, eager["float32"]["ms"] / eager["ours"]["ms"]),
        _most("SAM-H encoder against bfloat16, eager", 1.03, eager["ours"]["ms"] / eager["bfloat16"]["ms"]),
        _most("SAM-H weight memory, of bfloat16", 0.52, eager["ours"]["weights_mb"] / eager["bfloat16"]["weights_mb"]),
        _most("greatest relative error of an output, float32", 1e-5, _error(parts["dtypes"], "float32")),
        _most("the same, bfloat16", 5e-3, max(found["error"] for found in parts["layers"].values())),
    ]
    return lines


def _packed_decodes(encode: Result) -> Iterator[float]:
    return (found["of_copy"] for name, found in encode.items() if name.startswith("decode packed"))


LIMITS = {"1": 1.0, "16": 1.0, "256": 1.4, "4096": 1.15, "8192": 1.15}
"""Tokens to the greatest time, of cuBLAS's, that any layer may take."""


def _every_layer(layers: Result, tokens: str, limit: float) -> list[str]:
    ratios = [found["ratio"] for name, found in layers.items() if name.split()[-1] == tokens]
    line = _most(f"every layer at {tokens} tokens, of cuBLAS; greatest", limit, max(ratios))
    over = sum(ratio > limit for ratio in ratios)
    return [*line[:3], f"{line[3]}, {over} of {len(ratios)} above" if over else line[3]]


def _error(dtypes: Result, kind: str) -> float:
    return max(found["error"] for name, found in dtypes.items() if name.startswith(kind))


def _most(figure: str, limit: float, value: float) -> list[str]:
    return [figure, f"<= {limit:g}", f"{value:.3g}", "yes" if value <= limit else "**no**"]


def _least(figure: str, limit: float, value: float) -> list[str]:
    return [figure, f">= {limit:g}", f"{value:.3g}", "yes" if value >= limit else "**no**"]


def _chain(parts: Result) -> str:
    rows = []
    for tokens, found in parts["chain"].items():
        cublas, ours = found["cublas"]["median"] / 1e3, found["ours"]["median"] / 1e3
        rows.append([tokens, f"{cublas:.3f}", f"{ours:.3f}", f"{found['ratio']:.3f}"])
    head = ["tokens", "cuBLAS bfloat16, ms", "HyperLinear, ms", "ratio"]
    return "## All 128 linears of SAM-H in one graph\n\n" + table(head, rows)


def _packed(parts: Result) -> str:
    kinds = ("ours", "packed12", "packed10")
    rows = []
    for name, found in parts["packed"].items():
        cublas = found["cublas"]["median"]
        cells = [f"{time:.1f} ({time / cublas:.2f})" for time in (found[kind]["median"] for kind in kinds)]
        rows.append([*name.split(), f"{cublas:.1f}", *cells])
    head = ["layers of SAM-H", "tokens", "cuBLAS bfloat16", "HyperLinear", "packed12", "packed10"]
    text = (
        "Microseconds a layer (ratio to cuBLAS), cold weights, CUDA graphs; `all`: the mean of the 128 in a row. Packed"
        " weights are decoded, then multiplied."
    )
    return f"## Packed forms\n\n{text}\n\n{table(head, rows)}"


def _encode(parts: Result) -> str:
    rows = [
        [name, f"{found['median'] / 1e3:.3f}", f"{found['tb_per_s']:.2f}", f"{found['of_copy']:.2f}"]
        for name, found in parts["encode"].items()
    ]
    page = "## Encode and decode, 640 M weights\n\n" + table(["kernel", "ms", "TB/s", "of copy"], rows)
    if search := parts.get("search"):
        millions = search["weights"] / 1e6
        page += (
            f"\n\nAll {search['tensors']} linear weights of SAM-H ({millions:.0f} M) to 30 dB, step search included: "
        )
        page += f"{search['gpu_ms']:.2f} ms on the GPU, {search['wall_ms']:.0f} ms of the clock."
    if feedback := parts.get("feedback"):
        rows = [
            [row["matrix"], "paths" if row["path"] else "nodes", f"{row['ms']:.0f}", f"{row['eager_ms']:.0f}"]
            for row in feedback["rows"]
        ]
        page += "\n\nMatrices of one layer of SAM-H rounded with error feedback:\n\n"
        page += table(["matrix", "as", "ms", "eager loop, ms"], rows)
        if both := feedback.get("both"):
            rows = [
                [row["matrix"], "paths" if row["path"] else "nodes", f"{row['ms']:.0f}", f"{row['host_ms']:.0f}"]
                for row in both
            ]
            page += "\n\nWith feedback between rows too:\n\n"
            page += table(["matrix", "as", "ms", "one thread of the host, ms"], rows)
    return page


def _entropy(parts: Result) -> str:
    found = parts["entropy"]
    rows = [
        [
            said,
            f"{found[name]['median_ms']:.1f}",
            f"{found[name]['least_ms']:.1f}",
            f"{found[name]['g_weights_per_s']:.1f}",
        ]
        for name, said in _STORED.items()
    ]
    head = f"## Stored streams\n\nAll linear weights of SAM-H ({found['weights'] / 1e6:.0f} M, drawn) at 30 dB, "
    head += f"{found['bytes'] / 1e6:.0f} MB in {found['streams']} streams; times of the clock, with the host's work."
    return head + "\n\n" + table(["from, to", "ms, median", "least", "G weights/s"], rows)


_STORED = {
    "encode": "float32 weights on the GPU to streams in pinned memory, single nodes",
    "pack": "coordinates of paths to streams, all matrices together",
    "pack each": "the same, matrix by matrix",
    "decode": "streams in pinned memory to int8 planes on the GPU",
    "plan": "of that, the host's reading of levels, tables and directories",
    "copy to the GPU": "of that, the copy of the bytes",
}
"""What `bench_entropy` times, in its words."""


def _encoders(parts: Result) -> str:
    rows = []
    for name, found in parts["encoders"].items():
        graphs = parts.get("encoder_graphs", {}).get(name, {})
        for label, values in found.items():
            rows.append(
                [
                    f"{name}, {label}",
                    f"{graphs[label]:.2f}" if label in graphs else "",
                    f"{values['ms']:.2f}",
                    f"{values['weights_mb']:.0f}",
                    f"{values['peak_extra_mb']:.0f}",
                ]
            )
    head = ["encoder, 1024 x 1024", "graph, ms", "eager, ms", "weights, MB", "memory beside them, MB"]
    return "## Image encoders\n\n" + table(head, rows)


def _compiled(parts: Result) -> str:
    rows = [
        [f"{name}, {label}", f"{values['ms']:.2f}", f"{values['first_call_s']:.0f}"]
        for name, found in parts["compiled"].items()
        for label, values in found.items()
    ]
    return "## Image encoders under torch.compile\n\n" + table(["encoder", "ms", "first call, s"], rows)


def _layers(parts: Result) -> str:
    rows: dict[str, list[str]] = {}
    for name, found in parts["layers"].items():
        *shape, _tokens = name.split()
        cell = f"{found['cublas']['median']:.1f} > {found['ours']['median']:.1f} ({found['ratio']:.2f})"
        rows.setdefault(" ".join(shape), []).append(cell)
    head = ["layer (out x in)", *(f"{tokens} tokens" for tokens in LIMITS)]
    text = "Microseconds of cuBLAS in bfloat16 > of HyperLinear (ratio); cold weights, CUDA graphs."
    return f"## Layers\n\n{text}\n\n" + table(head, [[name, *cells] for name, cells in rows.items()])


def _dtypes(parts: Result) -> str:
    rows = [
        [name, f"{found['cublas']:.1f}", f"{found['ours']:.1f}", f"{found['ratio']:.2f}", f"{found['error']:.1e}"]
        for name, found in parts["dtypes"].items()
    ]
    head = ["type, layer of SAM-H, tokens", "cuBLAS, us", "HyperLinear, us", "ratio", "error"]
    return "## Other types\n\n" + table(head, rows)


INT8_CHAIN = {"64": 1.05, "256": 1.05, "1024": 1.05, "4096": 0.75, "8192": 0.7}
"""Tokens to the greatest time of SAM-H's linears on int8, quantisation included, of cuBLAS's in bfloat16."""

INT8_LAYER = 1.1
"""The same of any layer at 4096 and 8192 tokens."""


def int8_acceptance(parts: Result) -> list[list[str]]:
    """As `acceptance`; figures of parts that were not measured are left out."""
    lines = [
        _most(f"SAM-H's 128 linears at {tokens} tokens, of cuBLAS", limit, parts["int8_chain"][tokens]["int8"]["ratio"])
        for tokens, limit in INT8_CHAIN.items()
    ]
    if layers := parts.get("int8_layers"):
        lines += [_every_layer(layers, tokens, INT8_LAYER) for tokens in ("4096", "8192")]
        lines.append(
            _most("greatest relative error of a layer", 5e-3, max(found["error"] for found in layers.values()))
        )
    if "ours, int8" in (graphs := parts.get("encoder_graphs", {}).get("SAM-H", {})):
        lines.append(_most("SAM-H encoder as a graph, of bfloat16", 0.95, graphs["ours, int8"] / graphs["bfloat16"]))
    if "ours, int8" in (eager := parts.get("encoders", {}).get("SAM-H", {})):
        ratio = eager["ours, int8"]["ms"] / eager["bfloat16"]["ms"]
        lines.append(_most("the same, eager", 1.0, ratio))
        lines.append(
            _most("its weights, of HyperLinear's", 1.0, eager["ours, int8"]["weights_mb"] / eager["ours"]["weights_mb"])
        )
    if fidelity := parts.get("int8_fidelity"):
        lost = fidelity["normal"]["float"] - fidelity["normal"]["int8"]
        lines.append(_most("dB that rounding normal activations costs, weights at 30 dB", 1.0, lost))
        proven = [found["float"] - found["by its proof"] for found in fidelity.values() if "by its proof" in found]
        if proven:
            lines.append(_most("the same of any activations, layers chosen by their proof; greatest", 1.0, max(proven)))
    for profile, found in parts.get("int8_masks", {}).items():
        lost = found["float"]["mean"] - found["int8"]["mean"]
        lines.append(_most(f"LiteMedSAM, {profile}: agreement lost", 0.01, lost))
    return lines


def _int8(parts: Result) -> str:
    text = (
        "Tokens are quantised within the times; fp8 (`torch._scaled_mm`, row-wise) and `torch._int_mm` are the product"
        " alone, on tokens that are quantised already, in the same run."
    )
    names = {"cublas": "cuBLAS bfloat16", "float": "HyperLinear", "int8": "int8", "fp8": "fp8", "int_mm": "_int_mm"}
    rows = []
    for tokens, found in parts["int8_chain"].items():
        cells = (found.get(name) for name in names)
        rows.append([tokens, *(f"{c['median'] / 1e3:.3f} ({c['ratio']:.2f})" if c else "" for c in cells)])
    sections = [
        f"## On int8 tensor cores\n\n{text}",
        table(["figure", "target", "measured", "met"], int8_acceptance(parts)),
        "All 128 linears of SAM-H in one graph, ms (of cuBLAS):",
        table(["tokens", *names.values()], rows),
    ]
    if neighbours := parts.get("int8_neighbours"):
        sections += _neighbours(neighbours)
    if fidelity := parts.get("int8_fidelity"):
        labels = list(next(iter(fidelity.values())))
        cells = [[name, *(f"{found[label]:.2f}" for label in labels)] for name, found in fidelity.items()]
        sections += [
            "Output SQNR in dB against the source weight, 1280 x 1280, normal, coded at 30 dB:",
            table(["activations", *labels], cells),
        ]
    if masks := parts.get("int8_masks"):
        kinds = {"float": "float, and the original", "int8": "int8, and the original", "between": "int8 and float"}
        sections += [
            "LiteMedSAM, the same bytes loaded twice, IoU of masks (mean, 5th percentile):",
            table(
                ["profile", *kinds.values()],
                [
                    [profile, *(f"{found[kind]['mean']:.4f}, {found[kind]['fifth']:.3f}" for kind in kinds)]
                    for profile, found in masks.items()
                ],
            ),
        ]
    return "\n\n".join(sections)


def _neighbours(found: Result) -> list[str]:
    names = list(dict.fromkeys(name for each in found.values() for name in each if name != "cublas"))
    rows = []
    for shape, each in found.items():
        cells = [each.get(name, {}) for name in ("cublas", *names)]
        rows.append([shape, *(cell.get("failed") or _us(cell) for cell in cells)])
    text = "Layers of SAM-H by other packages, tokens quantised within the times, us (of cuBLAS):"
    return [text, table(["layer, tokens", "cuBLAS bfloat16", *names], rows)]


def _us(cell: Result) -> str:
    return f"{cell['median']:.1f} ({cell['ratio']:.2f})" if cell else ""


def _int8_layers(parts: Result) -> str:
    rows: dict[str, list[str]] = {}
    tokens: dict[str, None] = {}
    for name, found in parts["int8_layers"].items():
        *shape, count = name.split()
        tokens[count] = None
        cell = f"{found['cublas']['median']:.1f} > {found['int8']['median']:.1f} ({found['ratio']:.2f})"
        rows.setdefault(" ".join(shape), []).append(cell)
    head = ["layer (out x in)", *(f"{count} tokens" for count in tokens)]
    text = "Microseconds of cuBLAS in bfloat16 > of int8, quantisation included (ratio); cold weights, CUDA graphs."
    return f"### Layers on int8\n\n{text}\n\n" + table(head, [[name, *cells] for name, cells in rows.items()])


def _calls(parts: Result) -> str:
    rows = [[name, f"{value:.3g}"] for name, value in parts["calls"].items()]
    return "## Calls\n\n" + table(["compiled kernels cached on disk", ""], rows)
