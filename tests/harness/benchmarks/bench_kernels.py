"""Benchmarks of the kernels on one GPU; every part verifies before it times.

    python -m tests.harness.benchmarks kernels [--parts encode,layers,...] [--out DIR]

Times are of CUDA graph replays with weights that are not in the cache, candidates taking turns; medians, with the 20th
and 80th percentiles in the JSON. Results of the parts that ran replace theirs in `results/kernels.json`, and
`results/kernels.md` is drawn from it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from birkhoff.codec import lattice, planes, rate
from birkhoff.codec.container import parse, serialise
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output import feedback
from birkhoff.codec.output.columns import eager_round_block
from birkhoff.codec.output.hessian import Hessian, normalised
from birkhoff.codec.output.hessian import rows_of as feedback_rows_of
from birkhoff.codec.output.rows import factor_of
from birkhoff.codec.packed import Bits, PackedTensor, rows_of
from birkhoff.codec.tensor import encoded_code
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.decode import op as decode
from birkhoff.kernels.encode import op as encode
from birkhoff.kernels.encode import triton as encode_triton
from birkhoff.kernels.entropy import op as entropy
from birkhoff.kernels.feedback import op as _feedback_op  # noqa: F401  registers the GPU's kernels
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.kernels.linear import launch
from birkhoff.kernels.linear.plan import Plan, Problem
from birkhoff.kernels.runtime.timing import compare
from birkhoff.kernels.trellis import op as trellis  # noqa: F401  registers the GPU's search
from birkhoff.kernels.tune import tune
from tests.harness.benchmarks import encoders, int8_parts, kernels_report
from tests.harness.benchmarks.common import RESULTS, commit, installed
from tests.harness.benchmarks.encoders import ENCODERS

Result = dict[str, Any]

SAM_H = {"qkv": (3840, 1280), "proj": (1280, 1280), "lin1": (5120, 1280), "lin2": (1280, 5120)}
SHAPES: dict[str, list[tuple[int, int]]] = {
    "SAM-B": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "SAM-L": [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)],
    "SAM-H": list(SAM_H.values()),
    "SAM2-L": [
        *[(432, 144), (144, 144), (576, 144), (144, 576), (864, 144), (288, 144)],
        *[(864, 288), (288, 288), (1152, 288), (288, 1152), (1728, 288), (576, 288)],
        *[(1728, 576), (576, 576), (2304, 576), (576, 2304), (3456, 576), (1152, 576)],
        *[(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608), (256, 64), (1024, 256), (256, 1024)],
    ],
    "mask decoder": [(256, 256), (128, 256), (256, 128), (2048, 256), (256, 2048), (32, 256), (4, 256)],
}
TOKENS = [1, 16, 256, 4096, 8192]
WEIGHTS = 640_000_000
BITS: tuple[Bits, ...] = (12, 10)
"""Packed forms, by bits a pair."""


def random_layer(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> HyperLinear:
    """A layer of random step numbers, whose weights have a spread of about 1/sqrt(K)."""
    layer = HyperLinear(columns, rows, device="cuda", dtype=dtype)
    layer.theta = torch.randint(-(1 << 15), 1 << 15, layer.theta.shape, device="cuda", dtype=torch.int16).view(
        torch.uint16
    )
    layer.step = torch.tensor(columns**-0.5 / 74, device="cuda")
    return layer


def random_packed(rows: int, columns: int, bits: Bits, dtype: torch.dtype = torch.bfloat16) -> PackedHyperLinear:
    """The same in the packed form: random bytes, the scales of groups within a factor of four."""
    layer = PackedHyperLinear(columns, rows, bits=bits, device="cuda", dtype=dtype)
    for plane, least in ((layer.low, 0), (layer.high, 0), (layer.scale, 224)):
        plane.random_(least, 256)
    layer.step = torch.tensor(columns**-0.5 * 3 / rows_of(bits), device="cuda")
    return layer


def packed_tensor(layer: PackedHyperLinear, rows: slice) -> PackedTensor:
    """Rows of the layer as the codec knows them; a random layer has no escapes."""
    low, high, scale = (plane[rows].cpu() for plane in (layer.low, layer.high, layer.scale))
    return PackedTensor(
        bits=layer.bits,
        low=low,
        high=high,
        scale=scale,
        step=float(layer.step),
        columns=layer.in_features,
        escape_index=layer.escape_index.cpu(),
        escape_value=layer.escape_value.cpu(),
    )


def dense_twin(layer: CompressedLinear, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """An `nn.Linear` of the layer's decoded weight."""
    twin = nn.Linear(layer.in_features, layer.out_features, device="meta", dtype=dtype)
    twin.weight = nn.Parameter(layer.dense_weight(dtype), requires_grad=False)
    twin.bias = nn.Parameter(torch.zeros(layer.out_features, device="cuda", dtype=dtype), requires_grad=False)
    return twin


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def close(value: float, expected: float) -> bool:
    return abs(value - expected) <= 1e-4 * abs(expected)


def require(right: bool, otherwise: str) -> None:
    """Nothing wrong is timed."""
    if not right:
        raise SystemExit(f"kernels: {otherwise}")


def check_layer(layer: CompressedLinear, x: Tensor, limit: float) -> float:
    """Relative error against the decoded float32 weight in float64, first rows; stops above `limit`."""
    weight = layer.dense_weight(torch.float32).double()
    error = relative_error(layer(x)[:300].detach(), functional.linear(x[:300].double(), weight))
    require(error <= limit, f"{tuple(weight.shape)} on {len(x)} tokens is off by {error:.2g}, limit {limit:g}")
    return error


def bench_encode() -> Result:
    """Encode and decode 640 M weights: bytes moved over time, against a copy of the same size in float32."""
    weight = torch.randn(WEIGHTS // 1280, 1280, device="cuda") * 0.03
    step = torch.tensor(0.0033, device="cuda")
    code, error = encode.quantise(weight, float(step))
    expected = lattice.quantise(weight[-4096:].cpu(), float(step))
    same = torch.equal(code.i[-4096:].cpu(), expected.i) and torch.equal(code.j[-4096:].cpu(), expected.j)
    require(same, "indices differ from the codec's")
    require(close(error.error, fidelity(weight, code.decode()).error), "the error measured in passing is wrong")
    theta = code.theta()
    half = weight.to(torch.bfloat16)
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "copy": (weight.clone, 8),
        "encode float32": (partial(encode_triton.encode_pass, weight, step), 5),
        "encode bfloat16": (partial(encode_triton.encode_pass, half, step), 3),
        "decode to bfloat16": (partial(decode.decode_theta, theta, step, 1280, torch.bfloat16), 3),
        "decode to float32": (partial(decode.decode_theta, theta, step, 1280, torch.float32), 5),
        **_packed_decodes(),
    }
    times = compare({name: [call] for name, (call, _) in calls.items()}, rounds=20)
    rates = {name: WEIGHTS * size / times[name].median / 1e6 for name, (_, size) in calls.items()}
    return {
        name: {**asdict(times[name]), "tb_per_s": rates[name], "of_copy": rates[name] / rates["copy"]} for name in calls
    }


def _packed_decodes() -> dict[str, tuple[Callable[[], object], float]]:
    """Decoding 640 M packed weights: calls, and bytes a weight that they move."""
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for bits in BITS:
        layer = random_packed(WEIGHTS // 1280, 1280, bits)
        last = packed_tensor(layer, slice(-4096, None))
        for dtype in (torch.bfloat16, torch.float32):
            name = f"decode packed{bits} to {str(dtype).removeprefix('torch.')}"
            same = torch.equal(layer.dense_weight(dtype)[-4096:].cpu(), last.decode(dtype))
            require(same, f"{name}: other weights than the codec's")
            calls[name] = partial(layer.dense_weight, dtype), bits / 16 + 1 / 128 + dtype.itemsize
    return calls


def bench_search() -> Result:
    """All linear weights of SAM-H to 30 dB: search, encoding and validation; time on the GPU, and of the whole call."""
    weights = [torch.randn(shape, device="cuda") * 0.03 for _ in range(32) for shape in SAM_H.values()]
    found = encode.encode_all(weights, 30.0)
    for weight, (code, error) in zip(weights[:4], found[:4], strict=True):
        truth = fidelity(weight, code.decode())
        require(30.0 <= truth.sqnr_db <= 30.3 and close(error.error, truth.error), "a matrix misses its target")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    encode.encode_all(weights, 30.0)
    torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    graph = compare({"all": [lambda: [encode.start(weight, 30.0) for weight in weights]]}, rounds=10)["all"]
    return {"weights": sum(map(Tensor.numel, weights)), "gpu_ms": graph.median / 1e3, "wall_ms": 1e3 * wall,
            "tensors": len(weights)}  # fmt: skip


def bench_entropy() -> Result:
    """All linear weights of SAM-H at 30 dB: to bytes in pinned memory, and from these to planes on the GPU.

    Encoded from float32 weights, as single nodes; of paths the packing alone is timed. Decoded are paths.
    """
    shapes, device = list(SAM_H.values()), torch.device("cuda", 0)
    weights = [torch.randn(shape, device=device) * 0.03 for _ in range(32) for shape in shapes]
    paths = [rate.encode(weight, 30.0, path=1) for weight in weights[: len(shapes)]]
    nodes = planes.pack_all([(encode.encode(weight, 30.0)[0], 0) for weight in weights])
    for path, codes in ((0, [encode.encode(weight, 30.0)[0] for weight in weights[: len(shapes)]]),
                        (1, [code for code, _ in paths])):  # fmt: skip
        expected = [planes.reference_pack(code, path=path) for code in codes]
        same = nodes[: len(shapes)] if path == 0 else planes.pack_all([(code, 1) for code in codes])
        require(_as_bytes(same) == _as_bytes(expected), f"bytes of path {path} differ from the codec's")
    stored = [
        encoded_code("w", w, code, error, path=1).tensor for w, (code, error) in zip(weights, paths, strict=False)
    ]
    tensors = [replace(one, name=f"{k} {number}") for k in range(32) for number, one in enumerate(stored)]
    blob = torch.frombuffer(bytearray(serialise(tensors)), dtype=torch.uint8).pin_memory()
    coded = parse(memoryview(blob.numpy()))
    same = [code.equals(paths[k % len(shapes)][0]) for k, code in enumerate(entropy.lattices_of(coded, device))]
    require(all(same), "coordinates differ from the codec's")
    copy = torch.empty_like(blob, device=device)
    count = sum(map(Tensor.numel, weights))
    many = [(paths[k % len(shapes)][0], 1) for k in range(len(weights))]
    times = {
        "encode": _walls(lambda: planes.pack_all([(code, 0) for code, _ in encode.encode_all(weights, 30.0)]), 5),
        "pack": _walls(lambda: planes.pack_all(many), 5),
        "pack each": _walls(lambda: [planes.pack(code, path=1) for code, _ in many], 3),
        "decode": _walls(lambda: entropy.lattices_of(coded, device), 9),
        "plan": _walls(lambda: entropy.plan(coded, 128), 5),
        "copy to the GPU": _walls(lambda: copy.copy_(blob, non_blocking=True), 5),
    }
    return {
        "weights": count,
        "bytes": len(blob),
        "streams": sum(len(one.parts) - 2 for one in coded),
        **{
            name: {
                "median_ms": times[len(times) // 2],
                "least_ms": times[0],
                "g_weights_per_s": count / times[len(times) // 2] / 1e6,
            }
            for name, times in times.items()
        },
    }


def _as_bytes(packed: Sequence[planes.Packed]) -> list[object]:
    return [(list(map(bytes, streams)), escapes) for streams, escapes in packed]


def _walls(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of calls, each waited for, in order of their length."""
    return sorted(1e3 * _call_seconds(run) for _ in range(count))


def bench_feedback() -> Result:
    """One layer's matrices of SAM-H rounded with error feedback, as nodes and as paths: ms of the whole call."""
    rows: list[Result] = []
    for name, (count, columns) in SAM_H.items():
        weight = torch.randn(count, columns, device="cuda") * 0.03
        x = torch.randn(6000, 64, device="cuda") @ torch.randn(64, columns, device="cuda")
        hessian = Hessian(columns=normalised(x.T @ x + torch.eye(columns, device="cuda")).float())
        factor = feedback.factorise(hessian.columns)
        for path in (False, True):
            found = hessian.error(weight, feedback.quantise(weight, 0.02, factor, path=path))
            with mock.patch.object(feedback, "round_block", eager_round_block):
                wanted = hessian.error(weight, feedback.quantise(weight, 0.02, factor, path=path))
                eager_ms = _call_ms(partial(feedback.quantise, weight, 0.02, factor, path=path))
            require(abs(found / wanted - 1) < 0.02, "the kernels lose more than the eager loop")
            milliseconds = _call_ms(partial(feedback.quantise, weight, 0.02, factor, path=path))
            rows.append({"matrix": name, "path": path, "ms": milliseconds, "eager_ms": eager_ms})
    both = [
        row
        for name, (count, columns) in SAM_H.items()
        if feedback_rows_of(count)
        for row in _both_sides(name, count, columns)
    ]
    return {"rows": rows, "both": both}


def _both_sides(name: str, count: int, columns: int) -> list[Result]:
    """The same with feedback between rows too, against the host's code, once, on one thread."""
    weight, found = torch.randn(count, columns, device="cuda") * 0.03, []
    hessian = Hessian(columns=_of_correlated(columns), rows=_of_correlated(count))
    factor = feedback.factorise(hessian.columns)
    alone = hessian.error(weight, feedback.quantise(weight, 0.02, factor))
    for path in (False, True):
        between = factor_of(hessian, weight.device, feedback.lanes_of(count, columns) if path else 0)
        require(between is not None, "no factor of the rows")
        assert between is not None
        quantise = partial(feedback.quantise, weight, 0.02, factor, between, path=path)
        error, host = hessian.error(weight, quantise()), torch.device("cpu")
        begin = time.perf_counter()
        code = feedback.quantise(weight.cpu(), 0.02, factor.to(host), between.to(host), path=path)
        host_ms = 1e3 * (time.perf_counter() - begin)
        wanted = hessian.error(weight, code.to(weight.device))
        require(error < wanted * (1.05 if path else 1.02), "the kernel loses more than the host's code")
        found.append(
            {"matrix": name, "path": path, "ms": _call_ms(quantise), "host_ms": host_ms, "left": error / alone}
        )
    return found


def _of_correlated(size: int) -> Tensor:
    mixed = torch.randn(2 * size, 64, device="cuda") @ torch.randn(64, size, device="cuda")
    return normalised(mixed.T @ mixed + 10 * torch.eye(size, device="cuda")).float()


def _call_ms(call: Callable[[], object]) -> float:
    """Best of three, once it is compiled."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])


def bench_tune() -> Result:
    """The best plan of every shape; its lines are those of `kernels/linear/tuned_h200.py`."""
    device = torch.device("cuda", 0)
    lines: list[str] = []
    seen: Result = {}
    for rows, columns in sorted({shape for shapes in SHAPES.values() for shape in shapes}):
        best: list[str] = []
        for tokens in (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192):
            aligned = columns % 8 == 0
            problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=torch.bfloat16, aligned=aligned)
            chosen, times = tune(problem, device)
            best.append(f"{tokens}: {as_code(chosen)}")
            order = sorted(times, key=lambda plan: times[plan].median)
            seen[f"{rows}x{columns} {tokens}"] = [[as_code(plan), round(times[plan].median, 2)] for plan in order]
        lines.append(f"    ({rows}, {columns}): {{{', '.join(best)}}},")
    return {"lines": lines, "seen": seen}


def as_code(plan: Plan) -> str:
    """The call that makes a plan, as in `kernels/linear/tuned_h200.py`."""
    match plan.path:
        case "small_m":
            return f"small_m({plan.block_n}, {plan.warps}, {plan.unroll})"
        case "hopper":
            return f"hopper({plan.block_m}, split=True)" if plan.split else f"hopper({plan.block_m})"
        case "tiles":
            unroll = f", {plan.unroll}" if plan.unroll > 1 else ""
            return f"tiles({plan.block_m}, {plan.block_n}, {plan.warps}, {plan.stages}{unroll})"
        case _:
            return "DECODE"


def bench_layers() -> Result:
    """HyperLinear against cuBLAS in bfloat16 on every linear shape."""
    found: Result = {}
    for model, shapes in SHAPES.items():
        for rows, columns in shapes:
            for tokens in TOKENS:
                found[f"{model} {rows}x{columns} {tokens}"] = _bench_layer(rows, columns, tokens)
    return found


def _bench_layer(rows: int, columns: int, tokens: int) -> Result:
    count = max(2, min(8 if tokens >= 2048 else 48, (128 << 20) // (rows * columns)))
    layers = [random_layer(rows, columns) for _ in range(count)]
    twins = [dense_twin(layer) for layer in layers]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    error = check_layer(layers[0], x, 5e-3)
    calls = {"cublas": [partial(twin, x) for twin in twins], "ours": [partial(layer, x) for layer in layers]}
    times = compare(calls, rounds=9)
    problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=x.dtype, aligned=launch.is_aligned(x))
    plan = launch.plan_for(problem, x.device)
    return {"cublas": asdict(times["cublas"]), "ours": asdict(times["ours"]), "error": error, "plan": as_code(plan),
            "ratio": times["ours"].median / times["cublas"].median}  # fmt: skip


def bench_chain() -> Result:
    """All 128 linears of SAM-H in one graph."""
    layers = [random_layer(*shape) for _ in range(32) for shape in SAM_H.values()]
    twins = [dense_twin(layer) for layer in layers]
    found: Result = {}
    for tokens in (1, 16, 64, 256, 1024, 4096, 8192):
        inputs = {
            columns: torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16) for columns in (1280, 5120)
        }
        for layer in layers[:4]:
            check_layer(layer, inputs[layer.in_features], 5e-3)
        calls: dict[str, list[Callable[[], object]]] = {
            name: [lambda chain=chain, xs=inputs: [layer(xs[layer.in_features]) for layer in chain]]
            for name, chain in (("cublas", twins), ("ours", layers))
        }
        times = compare(calls, rounds=15)
        found[str(tokens)] = {name: asdict(value) for name, value in times.items()}
        found[str(tokens)]["ratio"] = times["ours"].median / times["cublas"].median
    return found


def bench_packed() -> Result:
    """PackedHyperLinear beside HyperLinear and cuBLAS in bfloat16: each shape of SAM-H, and all 128 layers in a row."""
    makers: dict[str, Callable[[int, int], CompressedLinear]] = {
        "ours": random_layer,
        **{f"packed{bits}": partial(random_packed, bits=bits) for bits in BITS},
    }
    found: Result = {}
    for name, shapes in {**{name: [shape] for name, shape in SAM_H.items()}, "all": list(SAM_H.values())}.items():
        repeats = 32 if name == "all" else (256 << 20) // math.prod(shapes[0])
        layers: dict[str, list[CompressedLinear]] = {
            kind: [make(*shape) for _ in range(repeats) for shape in shapes] for kind, make in makers.items()
        }
        twins = [dense_twin(layer) for layer in layers["ours"]]
        for tokens in TOKENS:
            xs = {k: torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes}
            for chain in layers.values():
                for layer in chain[: len(shapes)]:
                    check_layer(layer, xs[layer.in_features], 5e-3)
            calls = {
                kind: [partial(layer, xs[layer.in_features]) for layer in chain]
                for kind, chain in {"cublas": twins, **layers}.items()
            }
            found[f"{name} {tokens}"] = {kind: asdict(times) for kind, times in compare(calls, rounds=9).items()}
    return found


def bench_dtypes() -> Result:
    """float32, TF32 and float16 on SAM-H's shapes."""
    found: Result = {}
    for label, dtype, tf32, limit in (
        ("float32", torch.float32, False, 1e-5),
        ("tf32", torch.float32, True, 2e-3),
        ("float16", torch.float16, False, 1e-3),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for name, (rows, columns) in SAM_H.items():
            layer = random_layer(rows, columns, dtype)
            twin = dense_twin(layer, dtype)
            for tokens in (16, 4096):
                x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
                error = check_layer(layer, x, limit)
                times = compare({"cublas": [partial(twin, x)] * 3, "ours": [partial(layer, x)] * 3}, rounds=7)
                found[f"{label} {name} {tokens}"] = {
                    "cublas": times["cublas"].median, "ours": times["ours"].median, "error": error,
                    "ratio": times["ours"].median / times["cublas"].median,
                }  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


FORMS: dict[str, type[HyperLinear] | type[Int8HyperLinear]] = {"ours": HyperLinear, "ours, int8": Int8HyperLinear}
"""Compressed models by their label in the results, and the layer that each is made of."""


def compress(
    model: nn.Module, kind: type[HyperLinear] | type[Int8HyperLinear] = HyperLinear, target_db: float = 30.0
) -> nn.Module:
    """Replace every `nn.Linear` by a compressed layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                code, _ = encode.encode(child.weight.detach().float(), target_db)
                setattr(parent, name, kind.from_lattice(code, child.bias, dtype=child.weight.dtype))
    return model


def bench_encoders(compiled: Sequence[str] = ()) -> Result:
    """Image encoders at 1024 x 1024, batch 1: eager, or compiled by torch with its default settings."""
    return {name: _bench_encoder(name, compiled=bool(compiled)) for name in (compiled or ENCODERS)}


def _bench_encoder(name: str, *, compiled: bool) -> Result:
    pixels = torch.randn(1, 3, 1024, 1024, device="cuda")
    found: Result = {}
    outputs: dict[str, Tensor] = {}
    runs: dict[str, Callable[[], Any]] = {}
    models = {"bfloat16": encoders.build(ENCODERS[name], "cuda").bfloat16(), **_compressed(name)}
    if not compiled:
        models["float32"] = encoders.build(ENCODERS[name], "cuda")
    decoded = encoders.build(ENCODERS[name], "cuda").bfloat16()
    for dense, coded in zip(_linears(decoded), _linears(models["ours"]), strict=True):
        dense.weight.data = coded.dense_weight(torch.bfloat16)
    for label, model in models.items():
        run: Callable[..., Any] = torch.compile(model) if compiled else model
        runs[label] = partial(run, pixel_values=pixels.to(next(model.parameters()).dtype))
        begin = time.perf_counter()
        outputs[label] = runs[label]().last_hidden_state
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs[label]()
        found[label] = {
            "weights_mb": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 1e6,
            "peak_extra_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
            "first_call_s": first,
        }
    reference = decoded(pixel_values=pixels.bfloat16()).last_hidden_state
    for label in FORMS:
        found[label]["error_against_decoded"] = relative_error(outputs[label], reference)
        found[label]["error_against_original"] = relative_error(outputs[label], outputs["bfloat16"])
    for label, seconds in encoders.wall(runs).items():
        found[label]["ms"] = 1e3 * seconds
    return found


def _compressed(name: str) -> dict[str, nn.Module]:
    """An encoder in bfloat16 in each of FORMS."""
    return {label: compress(encoders.build(ENCODERS[name], "cuda").bfloat16(), kind) for label, kind in FORMS.items()}


def bench_encoder_graphs() -> Result:
    """The same encoders as CUDA graphs: what the GPU takes, without launches and stalls."""
    found: Result = {}
    pixels = torch.randn(1, 3, 1024, 1024, device="cuda")
    for name in ENCODERS:
        models = {
            "float32": encoders.build(ENCODERS[name], "cuda"),
            "bfloat16": encoders.build(ENCODERS[name], "cuda").bfloat16(),
            **_compressed(name),
        }
        runs: dict[str, list[Callable[[], object]]] = {}
        for label, model in models.items():
            encoders.keep_positions(model)
            runs[label] = [partial(model, pixel_values=pixels.to(next(model.parameters()).dtype))]
        found[name] = {label: times.median / 1e3 for label, times in compare(runs, rounds=11).items()}
    return found


def _linears(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, CompressedLinear))]


def bench_calls() -> Result:
    """Seconds of the first calls of a process, and microseconds of host time of a later one, beside `nn.Linear`."""
    found: Result = {}
    layers = {name: random_layer(*shape) for name, shape in SAM_H.items()}
    twins = {name: dense_twin(layer) for name, layer in layers.items()}
    small, ragged = random_layer(256, 256), random_layer(144, 144)
    inputs = {
        (tokens, columns): torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        for tokens in (4, 16, 256, 4096)
        for columns in (144, 256, 1280, 5120)
    }
    for tokens in (16, 256, 4096):
        found[f"first call, {tokens} tokens, s"] = _call_seconds(partial(layers["proj"], inputs[tokens, 1280]))
    qkv, proj, lin2 = layers["qkv"], layers["proj"], layers["lin2"]
    packed = random_packed(*SAM_H["proj"], 12)
    many = inputs[4096, 1280]
    by_op = torch.ops.birkhoff.hyperlinear.default
    held = qkv.theta, qkv.step, qkv.escape_index, qkv.escape_value, qkv.bias
    for label, run in {
        "few tokens": partial(small, inputs[4, 256]),
        "portable kernel": partial(ragged, inputs[256, 144]),
        "Hopper kernel": partial(qkv, many),
        "Hopper kernel, cut": partial(lin2, inputs[4096, 5120]),
        "decoded first": partial(proj, many),
        "int8": partial(int8_parts.random_layer(*SAM_H["qkv"]), many),
        "packed": partial(packed, many),
        "Hopper kernel, as an op": partial(by_op, many, *held),
        "nn.Linear, few tokens": partial(twins["proj"], inputs[4, 1280]),
        "nn.Linear, many tokens": partial(twins["qkv"], many),
    }.items():
        found[f"host time, {label}, us"] = 1e6 * _host_seconds(run)
    return found


def _call_seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _host_seconds(run: Callable[[], object], count: int = 100, rounds: int = 15) -> float:
    """Median of what a call takes until it returns, in runs of fewer calls than fill the queue of launches."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        seconds.append((time.perf_counter() - begin) / count)
    torch.cuda.synchronize()
    return sorted(seconds)[rounds // 2]


def _in_a_folder(part: Callable[[Path], Result]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return part(Path(folder))


PARTS: dict[str, Callable[[], Result]] = {
    "calls": bench_calls,
    "encode": bench_encode,
    "search": bench_search,
    "entropy": bench_entropy,
    "feedback": bench_feedback,
    "tune": bench_tune,
    "layers": bench_layers,
    "chain": bench_chain,
    "packed": bench_packed,
    "dtypes": bench_dtypes,
    "encoders": bench_encoders,
    "encoder_graphs": bench_encoder_graphs,
    "compiled": partial(bench_encoders, ["SAM-B"]),
    "int8_tune": partial(int8_parts.bench_tune, SHAPES),
    "int8_chain": partial(int8_parts.bench_chain, list(SAM_H.values())),
    "int8_layers": partial(int8_parts.bench_layers, SHAPES),
    "int8_fidelity": int8_parts.bench_fidelity,
    "int8_neighbours": partial(int8_parts.bench_neighbours, list(SAM_H.values())),
    "int8_masks": lambda: _in_a_folder(int8_parts.bench_masks),
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "encode": ("encode",),
    "decode": ("encode", "packed"),
    "entropy": ("entropy",),
    "feedback": ("feedback",),
    "trellis": ("search",),
    "linear": ("calls", "layers", "chain", "dtypes", "encoders", "encoder_graphs", "compiled"),
    "packed": ("packed",),
    "int8": (
        *("int8_chain", "int8_layers", "int8_fidelity", "int8_masks", "int8_neighbours", "encoders", "encoder_graphs"),
    ),
}
"""The parts that measure each family of `kernels/`; `--parts` takes their names too."""


def parts_of(names: str) -> list[str]:
    """Parts by their own names and those of families, in the order given, none twice."""
    found = (part for name in names.split(",") for part in FAMILIES.get(name, (name,)))
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for on the current CUDA device; without one nothing is measured, and that is said."""
    parser = argparse.ArgumentParser(prog="bench kernels", description=__doc__)
    parser.add_argument(
        "--parts",
        default="calls,encode,search,entropy,layers,chain,packed,dtypes,encoders,encoder_graphs,compiled,int8_chain,"
        "int8_layers,int8_fidelity",
        help="int8_masks needs the packages of `make setup-family`, int8_neighbours gemlite and torchao; int8_tune and "
        "tune take as long as all others",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--work", type=Path, help="where int8_masks publishes its models, or finds them")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernels: no CUDA device, nothing is measured", file=sys.stderr)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    results: Result = json.loads(path.read_text()) if path.exists() else {}
    for part in parts_of(options.parts):
        begin = time.perf_counter()
        with torch.inference_mode():
            found = int8_parts.bench_masks(options.work) if part == "int8_masks" and options.work else PARTS[part]()
        seconds = round(time.perf_counter() - begin, 1)
        made = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": installed("triton"),
            "commit": options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": seconds,
        }
        results[part] = {"made_on": made, "found": found}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {seconds} s", flush=True)
    (options.out / "kernels.md").write_text(kernels_report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
