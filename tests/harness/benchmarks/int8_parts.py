"""The parts of the kernel benchmark about HyperLinear on int8 tensor cores; see `bench_kernels`.

Times of int8 include the quantisation of the tokens. Neighbours in the same run: `torch._scaled_mm` with row-wise
scales on fp8 and `torch._int_mm`, both the product alone, on tokens that are quantised already. Layers of other
packages, which quantise theirs, have a part of their own (`int8_neighbours`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from birkhoff.codec import reference
from birkhoff.codec.metrics import fidelity
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.encode import op as encode
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.int8 import launch as int8_launch
from birkhoff.kernels.int8.plan import LEAST_ROWS
from birkhoff.kernels.linear.plan import Plan
from birkhoff.kernels.runtime.timing import Times, compare
from birkhoff.kernels.tune import problem_of, tune
from birkhoff.pipeline.proof.int8 import LEAST_DB
from tests.harness.benchmarks import int8_neighbours

Result = dict[str, Any]
Shapes = Mapping[str, Sequence[tuple[int, int]]]

TOKENS = (16, 64, 256, 1024, 4096, 8192)
LAYER_TOKENS = (256, 4096, 8192)
"""Of the chain, and of single layers."""
NEIGHBOURS_AT = 4096
"""Tokens at which other packages are measured: they compile and tune for each number."""
TUNED = (1, 16, 64, 256, 1024, 2048, 4096, 8192)
_E4M3_MOST = 448.0


class WrongResultError(SystemExit):
    """Something computes what it should not: nothing is timed."""


def random_layer(rows: int, columns: int) -> Int8HyperLinear:
    """A layer of normally distributed coordinates as a trained weight has at 30 dB, in bfloat16."""
    layer = Int8HyperLinear(columns, rows, device="cuda", dtype=torch.bfloat16)
    layer.plane[:, :columns] = torch.randn(rows, columns, device="cuda").mul_(10).round_().clamp_(-128, 127)
    layer.step = torch.tensor(columns**-0.5 / 10, device="cuda")
    return layer


def twin(layer: Int8HyperLinear) -> nn.Linear:
    """An `nn.Linear` of the layer's decoded weight."""
    dense = nn.Linear(layer.in_features, layer.out_features, device="meta", dtype=torch.bfloat16)
    dense.weight = nn.Parameter(layer.dense_weight(torch.bfloat16), requires_grad=False)
    dense.bias = nn.Parameter(torch.zeros(layer.out_features, device="cuda", dtype=torch.bfloat16), requires_grad=False)
    return dense


def checked(layer: Int8HyperLinear, x: Tensor) -> float:
    """Relative error against float64 on the same quantised tokens, last rows; stops where it exceeds bfloat16's."""
    y = layer(x)[-300:].detach()
    expected = reference.int8_linear(x[-300:].double(), *layer.code()[:3], layer.bias)
    error = float((y.double() - expected).norm() / expected.norm())
    if not error <= 5e-3 or not bool(torch.isfinite(layer(x)).all()):
        raise WrongResultError(f"kernels: int8 {tuple(layer.plane.shape)} on {len(x)} tokens is off by {error:.2g}")
    return error


def bench_tune(shapes: Shapes) -> Result:
    """The best plan of every shape; its lines are those of `kernels/int8/tuned_h200.py`."""
    device = torch.device("cuda", 0)
    lines: list[str] = []
    seen: Result = {}
    for rows, columns in sorted({shape for each in shapes.values() for shape in each}):
        best: list[str] = []
        for tokens in TUNED:
            chosen, times = tune(problem_of(rows, columns, tokens, int8=True), device)
            best.append(f"{tokens}: {as_code(chosen)}")
            order = sorted(times, key=lambda plan: times[plan].median)
            seen[f"{rows}x{columns} {tokens}"] = [[as_code(plan), round(times[plan].median, 2)] for plan in order]
        lines.append(f"    ({rows}, {columns}): {{{', '.join(best)}}},")
    return {"lines": lines, "seen": seen}


def as_code(plan: Plan) -> str:
    """The call that makes a plan, as in `kernels/int8/tuned_h200.py`."""
    if plan.path == "int8_hopper":
        options = [f", {name}=True" for name in ("in_turn", "split") if getattr(plan, name)]
        return f"int8_hopper({plan.block_m}, {plan.block_n}{''.join(options)})"
    if plan.path == "int8_fused":
        return f"int8_fused({plan.block_m}, {plan.block_n}, {plan.block_k}, {plan.warps})"
    return f"int8_tiles({plan.block_m}, {plan.block_n}, {plan.block_k}, {plan.warps}, {plan.stages})"


def bench_chain(shapes: Sequence[tuple[int, int]]) -> Result:
    """All 128 linears of SAM-H in one graph: bfloat16, int8, and what torch multiplies fp8 and bytes with."""
    layers = [random_layer(*shape) for _ in range(32) for shape in shapes]
    twins = [twin(layer) for layer in layers]
    in_float = [in_the_first_form(layer) for layer in layers]
    fp8 = [layer.plane.float().to(torch.float8_e4m3fn) for layer in layers]
    found: Result = {}
    for tokens in TOKENS:
        xs = {
            columns: torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            for columns in {columns for _, columns in shapes}
        }
        for layer in layers[: len(shapes)]:
            checked(layer, xs[layer.in_features])
        chains = {"cublas": twins, "float": in_float, "int8": layers}
        calls: dict[str, list[Callable[[], object]]] = {
            name: [partial(_all, [partial(layer, xs[layer.in_features]) for layer in chain])]
            for name, chain in chains.items()
        }
        x8 = {columns: x.to(torch.float8_e4m3fn) for columns, x in xs.items()}
        calls["fp8"] = [partial(_all, [partial(_fp8_product, x8[weight.shape[1]], weight) for weight in fp8])]
        if tokens > 16:  # what `_int_mm` asks for
            q = {columns: reference.quantise_tokens(x, layers[0].extra)[0] for columns, x in xs.items()}
            products = [partial(torch._int_mm, q[layer.in_features], layer.plane.T) for layer in layers]
            calls["int_mm"] = [partial(_all, products)]
        times = compare(calls, rounds=15)
        found[str(tokens)] = {name: asdict(value) | {"ratio": _ratio(times, name)} for name, value in times.items()}
    return found


def bench_neighbours(shapes: Sequence[tuple[int, int]], seconds: float = 60) -> Result:
    """Each of SAM-H's linears by the packages that are installed, beside cuBLAS and ours.

    They tune and compile for every shape: after `seconds` no further shape is begun.
    """
    found: Result = {}
    makers, until = int8_neighbours.present(), time.monotonic() + seconds
    for name, make in makers.items():
        for rows, columns in shapes:
            if time.monotonic() > until:
                return found
            key = f"{rows}x{columns} {NEIGHBOURS_AT}"
            found[key] = found.get(key, {}) | _bench_neighbour(name, make, rows, columns)
            if "failed" in found[key].get(name, {}):
                break  # a graph that could not be captured leaves torch in disorder
    return found


def _bench_neighbour(name: str, make: int8_neighbours.Make, rows: int, columns: int) -> Result:
    try:
        layers = [random_layer(rows, columns) for _ in range(8)]
        twins = [twin(layer) for layer in layers]
        x = torch.randn(NEIGHBOURS_AT, columns, device="cuda", dtype=torch.bfloat16)
        checked(layers[0], x)
        made = [make(linear) for linear in twins]
        expected = twins[0](x).double()
        error = float((made[0](x).double() - expected).norm() / expected.norm())
        if not error <= int8_neighbours.LIMIT:
            return {name: {"failed": f"off by {error:.2g}"}}
        calls = {"cublas": twins, "int8": layers, name: made}
        times = compare({key: [partial(form, x) for form in forms] for key, forms in calls.items()}, rounds=9)
    except Exception as error:  # whatever another package raises: it is reported
        return {name: {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}}
    return {key: asdict(value) | {"ratio": _ratio(times, key)} for key, value in times.items()}


def _all(calls: Sequence[Callable[[], object]]) -> list[object]:
    return [call() for call in calls]


def _fp8_product(x8: Tensor, weight: Tensor) -> Tensor:
    """Row-wise scales, as dynamic quantisation of tokens gives them; the scales themselves are not computed."""
    ones = torch.ones(max(len(x8), len(weight)), 1, device=x8.device)
    y: Tensor = torch._scaled_mm(x8, weight.T, ones[: len(x8)], ones[: len(weight)].T, out_dtype=torch.bfloat16)
    return y


def _ratio(times: Mapping[str, Times], name: str) -> float:
    return times[name].median / times["cublas"].median


def in_the_first_form(layer: Int8HyperLinear) -> HyperLinear:
    """The same weights as HyperLinear."""
    i, j = reference.coordinates_of(layer.plane, layer.in_features)
    made = HyperLinear(layer.in_features, layer.out_features, device="cuda", dtype=torch.bfloat16)
    made.theta = ((i.to(torch.int32) + 128) * 256 + j.to(torch.int32) + 128).to(torch.uint16)
    made.step = layer.step
    return made


def bench_layers(shapes: Shapes) -> Result:
    """What `compute="int8"` makes of every linear shape, against cuBLAS in bfloat16."""
    found: Result = {}
    for model, each in shapes.items():
        for rows, columns in each:
            for tokens in LAYER_TOKENS:
                found[f"{model} {rows}x{columns} {tokens}"] = _bench_layer(rows, columns, tokens)
    return found


def _bench_layer(rows: int, columns: int, tokens: int) -> Result:
    count = max(2, min(8 if tokens >= 2048 else 48, (128 << 20) // (rows * columns)))
    layers = [random_layer(rows, columns) for _ in range(count)]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    error = checked(layers[0], x)
    made = [layer if rows >= LEAST_ROWS else in_the_first_form(layer) for layer in layers]
    calls = {"cublas": [partial(twin(layer), x) for layer in layers], "int8": [partial(layer, x) for layer in made]}
    times = compare(calls, rounds=9)
    plan = int8_launch.plan_for(problem_of(rows, columns, tokens, int8=True), x.device)
    return {
        **{name: asdict(value) for name, value in times.items()},
        "error": error,
        "plan": as_code(plan) if rows >= LEAST_ROWS else "float",
        "ratio": _ratio(times, "int8"),
    }


ACTIVATIONS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda m, k: torch.randn(m, k),
    "GELU of normal": lambda m, k: functional.gelu(torch.randn(m, k)),
    "Student's t, 4 degrees": lambda m, k: torch.distributions.StudentT(4.0).sample((m, k)),
    "normal, 1 column in 100 ten times larger": lambda m, k: (
        torch.randn(m, k) * (1 + 9.0 * (torch.arange(k) % 100 == 0))
    ),
}


def bench_fidelity() -> Result:
    """Output SQNR in dB against the source weight, coded at 30 dB, by activation and by how the layer computes."""
    torch.manual_seed(0)
    weight = torch.randn(1280, 1280) * 0.02
    code, _ = encode.encode(weight.cuda(), 30.0)
    in_float, in_int8 = HyperLinear.from_lattice(code), Int8HyperLinear.from_lattice(code)
    plane = reference.plane_of(code)[0][:, :1280].float()
    found: Result = {}
    for name, draw in ACTIVATIONS.items():
        x = draw(4096, 1280).cuda()
        exact = functional.linear(x.double(), weight.cuda().double())
        computed = {
            "float": in_float(x),
            "int8": in_int8(x),
            "bfloat16": in_float(x.bfloat16()),
            "int8 in bfloat16": in_int8(x.bfloat16()),
            "by its proof": _by_proof(in_float(x), in_int8(x)),
            "J/256 dropped, in float": x @ (plane * code.step).T,
            "fp8 both, row-wise": _as_fp8(x) @ _as_fp8(in_float.dense_weight(torch.float32)).T,
        }
        found[name] = {label: fidelity(exact, y.double()).sqnr_db for label, y in computed.items()}
        for label, wanted in (("int8", name == "normal"), ("by its proof", True)):
            lost = found[name]["float"] - found[name][label]
            if wanted and not lost < 1:
                raise WrongResultError(f"kernels: {label} costs {lost:.2f} dB on {name} activations")
    return found


def _by_proof(exact: Tensor, rounded: Tensor) -> Tensor:
    """The output of a layer whose inputs the proof saw: as `compute="proven"` chooses."""
    return rounded if fidelity(exact.double(), rounded.double()).sqnr_db >= LEAST_DB else exact


def _as_fp8(x: Tensor) -> Tensor:
    """Rows rounded to e4m3 by their greatest, and back."""
    scale = x.abs().amax(1, keepdim=True) / _E4M3_MOST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def bench_masks(work: Path, profiles: Sequence[str] = ("balanced", "fine")) -> Result:
    """LiteMedSAM's masks, computed in float and in int8 on the same bytes, against the original's and each other's.

    Published into `work`, unless it lies there from a run before.
    """
    from birkhoff.pipeline.load.builders import original_model
    from birkhoff.pipeline.segment.adapters.families import segmenter_of
    from birkhoff.pipeline.segment.compressed import compressed_segmenter
    from tests.harness.benchmarks import bench_lite_medsam as lite

    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = segmenter_of(original_model(lite.weights(), device=device), None)
    reference_ = f"{lite.MODEL}@latest"
    found: Result = {}
    for profile in profiles:
        store = (work / profile).absolute().as_uri()
        if not (work / profile).exists():
            lite.publish(profile, store)
        in_float, in_int8 = (
            compressed_segmenter(reference_, store, device=device, compute=compute) for compute in ("float", "int8")
        )
        layers = [module for module in in_int8.model.modules() if isinstance(module, CompressedLinear)]
        found[profile] = {
            "float": lite.agreement(original, in_float),
            "int8": lite.agreement(original, in_int8),
            "between": lite.agreement(in_float, in_int8),
            "layers": len(layers),
            "int8_layers": sum(isinstance(layer, Int8HyperLinear) for layer in layers),
        }
    return found
