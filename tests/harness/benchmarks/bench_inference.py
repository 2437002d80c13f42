"""Benchmark of running: image encoders as the original, as ours, and as other packages quantise them.

    python -m tests.harness.benchmarks inference [--models demo,SAM-B,...] [--device cpu] [--work DIR] [--out DIR]

Each form is stored, loaded again from disk, verified, then timed with all others of the same model in turn. The SAM-B,
-L and -H encoders have their full architecture and random weights: bytes, times and memory are those of the published
ones, the output SQNR is no statement about their masks. The demo model's weights are trained.

A machine's results replace those of the same models and the same kind of device in `results/inference.json`;
`results/inference.md` is drawn from it.
"""

import argparse
import ctypes
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.codec.metrics import fidelity
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.runtime.timing import compare
from tests.harness.benchmarks import common, encoders, inference_report
from tests.harness.benchmarks.checkpoints import DEMO, demo_sam
from tests.harness.benchmarks.encoder_forms import Form, State, forms, linears
from tests.harness.benchmarks.encoders import ENCODERS
from tests.harness.benchmarks.measure import status

PACKAGES = ("torch", "triton", "transformers", "torchao", "hqq", "bitsandbytes")
DEMO_PICTURES = 8
LOADS = 3


class WrongResultError(SystemExit):
    """A form computes something else than it should: nothing is timed."""


def settings_of(name: str) -> Mapping[str, Any]:
    """Configuration of a model's image encoder."""
    if name in ENCODERS:
        return ENCODERS[name]
    found: Mapping[str, Any] = json.loads((DEMO / "demo_sam.json").read_text())["vision_config"]
    return found


def weights_of(name: str, device: str) -> State:
    """The encoder's float32 weights: the demo's trained ones, or random."""
    if name in ENCODERS:
        state: State = encoders.build(ENCODERS[name], device).state_dict()
        return {key: tensor.cpu() for key, tensor in state.items()}
    return {key: tensor for key, tensor in demo_sam().tensors.items() if key.startswith("vision_encoder.")}


def pixels_of(name: str) -> Tensor:
    """Input: one picture of noise at full size, or a batch of the demo's size."""
    side = settings_of(name).get("image_size", 1024)
    count = 1 if name in ENCODERS else DEMO_PICTURES
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def measure(name: str, device: str, profiles: Sequence[str], work: Path, rounds: int) -> list[dict[str, Any]]:
    """Every form of one encoder; rows as the JSON holds them."""
    skeleton = partial(encoders.build, settings_of(name), "meta")
    state, pixels = weights_of(name, device), pixels_of(name).to(device)
    found: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    outputs: dict[str, Tensor] = {}
    made = forms(device, skeleton, profiles)
    for form in made:
        folder = work / name / (form.shares or form.name).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=form.shares is not None)
        try:
            row, model, output = _one(form, state, pixels, folder, skeleton, outputs)
        except Exception as error:  # whatever another package raises on this machine
            if not form.foreign:
                raise
            found[form.name] = {"model": name, "form": form.name, "error": " ".join(f"{error!r}".split())[:200]}
            print(f"{name}: {form.name} left out: {found[form.name]['error']}", flush=True)
            continue
        models[form.name], outputs[form.name], found[form.name] = model, output, {"model": name, **row}
        print(f"{name}: {form.name} stored in {row['store_s']:.1f} s, verified", flush=True)
    _time(found, models, pixels, device, rounds, {form.name: form for form in made})
    return list(found.values())


def _one(
    form: Form, state: State, pixels: Tensor, folder: Path, skeleton: Callable[[], nn.Module], before: dict[str, Tensor]
) -> tuple[dict[str, Any], nn.Module, Tensor]:
    """Store, load and verify one form; `before` holds the outputs of the forms before it, the original's first."""
    begin = time.perf_counter()
    stored = form.store(state, folder)
    row = {"form": form.name, "about": form.about, "dtype": str(form.dtype).removeprefix("torch."),
           "disk_bytes": stored, "store_s": time.perf_counter() - begin}  # fmt: skip
    model, row["load_s"] = _loaded(form, folder, skeleton, str(pixels.device))
    encoders.keep_positions(model)
    values = pixels.to(form.dtype)
    output = model(pixel_values=values).last_hidden_state.float()
    original = next(iter(before.values()), output)
    row["output_sqnr_db"] = _checked(form, model, original, output, values, skeleton)
    return row | _memory(model, values), model, output


def _loaded(form: Form, folder: Path, skeleton: Callable[[], nn.Module], device: str) -> tuple[nn.Module, float]:
    """The model, and the median seconds from files in the page cache to a model on the device."""
    seconds = []
    for _ in range(LOADS + 1):
        model = None
        gc.collect()
        encoders.settle()
        begin = time.perf_counter()
        model = form.load(folder, skeleton, device)
        encoders.settle()
        seconds.append(time.perf_counter() - begin)
    return model, sorted(seconds[1:])[LOADS // 2]


def _checked(
    form: Form, model: nn.Module, original: Tensor, output: Tensor, values: Tensor, skeleton: Callable[[], nn.Module]
) -> float | None:
    """Output SQNR in dB, None for the original itself; stops where a result cannot be right."""
    if not bool(output.isfinite().all()):
        raise WrongResultError(f"inference: {form.name} computes NaN or Inf")
    measured = fidelity(original, output).sqnr_db
    if measured < form.least_db:
        raise WrongResultError(f"inference: {form.name} is at {measured:.1f} dB, expected {form.least_db:g} at least")
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        _check_decoded(form, model, output, values, skeleton)
    return None if math.isinf(measured) else measured


def _check_decoded(
    form: Form, model: nn.Module, output: Tensor, values: Tensor, skeleton: Callable[[], nn.Module]
) -> None:
    """Ours must give what `nn.Linear` gives with the decoded weights, within the rounding of the dtype."""
    twin = skeleton()
    kept = dict(model.state_dict())
    for name, _ in linears(twin):
        layer = model.get_submodule(name)
        if isinstance(layer, CompressedLinear):
            kept[f"{name}.weight"] = layer.dense_weight(form.dtype)
    twin.load_state_dict({key: kept[key] for key in twin.state_dict()}, assign=True)
    same = fidelity(twin(pixel_values=values).last_hidden_state.float(), output).sqnr_db
    least = 25.0 if form.dtype == torch.bfloat16 else 90.0
    if any(isinstance(module, Int8HyperLinear) for module in model.modules()):
        least = 20.0  # what rounding the inputs of every layer leaves of a whole encoder
    if same < least:
        raise WrongResultError(f"inference: {form.name} is {same:.1f} dB off its decoded weights, {least:g} expected")


def _memory(model: nn.Module, values: Tensor) -> dict[str, float]:
    """Bytes of the weights, and what a call takes beside them at its peak."""
    weights = sum(_nbytes(tensor) for tensor in [*model.parameters(), *model.buffers(), *_beside(model)])
    if values.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(pixel_values=values)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        model(pixel_values=values)
        extra = max(0, status("VmHWM") - before)  # the kernel counts pages in batches
    return {"weights_bytes": weights, "peak_bytes": weights + extra}


def _beside(model: nn.Module) -> Iterator[Tensor]:
    """Scales that baselines keep outside parameters and buffers: hqq in `meta`, bitsandbytes in `state`."""
    for module in model.modules():
        meta = getattr(module, "meta", None)
        if isinstance(meta, dict):
            yield from (value for value in meta.values() if isinstance(value, Tensor))
        scale = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scale, Tensor):
            yield scale


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds; of a packed one those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    quantised = getattr(tensor, "quant_state", None)
    statistics = sum(t.nbytes for t in quantised.as_dict(packed=True).values()) if quantised is not None else 0
    return tensor.nbytes + statistics


def _time(
    found: dict[str, dict[str, Any]],
    models: dict[str, nn.Module],
    pixels: Tensor,
    device: str,
    rounds: int,
    made: Mapping[str, Form],
) -> None:
    """Latency of a call, all forms in turn; on a GPU also as CUDA graphs, without launches."""
    runs = {name: partial(model, pixel_values=pixels.to(made[name].dtype)) for name, model in models.items()}
    for name, seconds in encoders.wall(runs, rounds).items():
        found[name]["latency_ms"] = 1e3 * seconds
    if device.startswith("cuda"):
        captured = {name: [run] for name, run in runs.items() if made[name].captured}
        for name, times in compare(captured, rounds=rounds).items():
            found[name]["graph_ms"] = times.median / 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on one device and write the results."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench inference", description=__doc__)
    parser.add_argument("--models", default="demo,SAM-B,SAM-L,SAM-H" if cuda else "demo,SAM-B")
    parser.add_argument("--device", default="cuda:0" if cuda else "cpu")
    parser.add_argument("--profiles", default="balanced,fine", help="of ours")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="where the stored models go; a temporary folder where left out")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--commit", help="what to record where there is no git")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "inference.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    for name in options.models.split(","):
        with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.work) as work:
            rows = measure(name, options.device, options.profiles.split(","), Path(work), options.rounds)
        made_on = common.conditions(*PACKAGES, commit_hash=options.commit) | {"calls timed": str(options.rounds)}
        if kind == "cuda":
            made_on["gpu"] = torch.cuda.get_device_name()
            torch.cuda.empty_cache()
        results[f"{kind} {name}"] = {"made_on": made_on, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "inference.md").write_text(inference_report.markdown(results))
    print((options.out / "inference.md").read_text())
    return 0
