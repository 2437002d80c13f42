"""The codec on trained weights, beside the published codec, fixed-rate quantisers and MPEG NNC.

    python -m tests.harness.benchmarks codec [--nnc-python PYTHON] [--nnc-sweep FILE]

Everything is decoded and checked before it is timed. Times are processor time of one thread each, which other work on
the machine disturbs least. Results go to `results/codec.md` and `results/codec.json`. NNC runs under a Python of its
own (`nncodec` wants an older numpy); its sweep over step sizes takes some ten minutes and can be kept in a file.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from birkhoff.codec import packed, paper
from birkhoff.codec.dtypes import dtype_name
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.metrics import fidelity, sqnr_db
from birkhoff.codec.profiles import DEFAULT_PROFILE, PROFILES, Header
from birkhoff.codec.tensor import decode_tensor, is_matrix, lattice_of
from tests.codec.by_profile import encode_tensor
from tests.harness.benchmarks import baselines, codec_report, common, measure, nnc, rates
from tests.harness.benchmarks.checkpoints import DEMO, Checkpoint, demo_sam, minilm

TARGETS_DB = (15.0, 18.0, 20.5, 24.0, 27.0, 30.0, 33.0, 36.0, 39.0)
LARGE = 100_000


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.benchmarks codec", description="Benchmark of the codec."
    )
    parser.add_argument(
        "--nnc-python", type=Path, help="a Python that has torch and nncodec; without it NNC is left out"
    )
    parser.add_argument("--nnc-sweep", type=Path, help="file of NNC's sweep: read if it is there, else written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        results = collect(options.nnc_python, options.nnc_sweep)
    except BirkhoffError as error:
        print(error, file=sys.stderr)
        return 1
    common.write("codec", codec_report.markdown(results), results)
    return 0


def collect(nnc_python: Path | None, nnc_sweep: Path | None) -> dict[str, Any]:
    """All measurements, as the JSON file holds them."""
    language, segmenter = minilm(), demo_sam()
    large = max(language.tensors.values(), key=torch.numel)
    results: dict[str, Any] = {
        "conditions": common.conditions("torch", "numpy", "zstandard", "hqq"),
        "rows": {model.name: rows(model) for model in (language, segmenter)},
        "two_processes": {
            name: measure.two_processes(language, PROFILES[name]) for name in ("fast", "balanced", "small", "fine")
        },
        "peak_memory": {name: measure.peak_memory(large, PROFILES[name]) for name in ("fast", "balanced")},
        "peak_memory_of": list(large.shape),
        "large_tensors": large_tensors(language),
        "agreement": agreement(segmenter),
        "rates": {
            "Gaussian weights, 1024 x 1024": rates.table({"w": gaussian()}),
            f"MiniLM's matrices of {LARGE} weights or more": rates.table(matrices(language)),
        },
        "in_memory": [row for model in (language, segmenter) for row in in_memory(model)],
    }
    if nnc_python or (nnc_sweep and nnc_sweep.exists()):
        found = _sweep(language, nnc_python, nnc_sweep)
        results["conditions"]["nncodec"] = found.version
        results["rate_distortion"] = [rate_distortion(language, found, target) for target in TARGETS_DB]
        results["nnc"] = nnc_rows(language, found)
    return results


def gaussian() -> Tensor:
    """Independent weights of one distribution: what Shannon's bound is known of."""
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def matrices(model: Checkpoint) -> dict[str, Tensor]:
    """The large ones."""
    return {name: t for name, t in model.tensors.items() if t.dim() == 2 and t.numel() >= LARGE}


def rows(model: Checkpoint) -> list[dict[str, Any]]:
    """Our profiles, the published codec and the baselines on one checkpoint."""
    found = [measure.ours(model, profile) for profile in PROFILES.values()]
    found += [measure.theirs(model, baseline) for baseline in baselines.all_baselines()]
    return [row.record() for row in found]


def in_memory(model: Checkpoint) -> list[dict[str, Any]]:
    """The packed forms of every matrix that a profile codes: bits, and SQNR against the original and what is stored."""
    table = []
    for name, bits in ((name, bits) for name in ("balanced", "fine") for bits in (12, 10)):
        sums = {"energy": 0.0, "original": 0.0, "stored": 0.0, "bytes": 0, "weights": 0}
        each: list[float] = []
        for key, weight in model.tensors.items():
            stored = encode_tensor(key, weight, PROFILES[name]).tensor
            if not is_matrix(stored):
                continue
            code = lattice_of(stored)
            form = packed.pack(code, 12 if bits == 12 else 10)
            original, again = fidelity(weight, form.decode()), fidelity(code.decode(), form.decode())
            sums["energy"] += original.energy
            sums["original"] += original.error
            sums["stored"] += again.error
            sums["bytes"] += form.nbytes
            sums["weights"] += weight.numel()
            each.append(again.sqnr_db)
        table.append(
            {
                "model": model.name,
                "profile": name,
                "form": f"packed{bits}",
                "bits": 8 * sums["bytes"] / sums["weights"],
                "original_db": sqnr_db(sums["energy"], sums["original"]),
                "stored_db": sqnr_db(sums["energy"], sums["stored"]),
                "least_stored_db": min(each),
            }
        )
    return table


def large_tensors(model: Checkpoint) -> dict[str, Any]:
    """Matrices of at least `LARGE` weights that the published codec codes: bits a weight of both at its error."""
    weights, bits = 0, {"match-paper": 0, "paper": 0}
    for name, tensor in model.tensors.items():
        if tensor.dim() == 2 and tensor.numel() >= LARGE and paper.published_error(tensor, per_row=True) is not None:
            weights += tensor.numel()
            for profile in bits:
                stored = encode_tensor(name, tensor, PROFILES[profile]).tensor
                bits[profile] += 8 * (stored.nbytes + len(stored.entry()))
    return {"weights": weights, **{profile: total / weights for profile, total in bits.items()}}


def agreement(model: Checkpoint) -> list[dict[str, Any]]:
    """By profile: ratio, agreement of masks with the original model's (IoU, box prompts), mean IoU with the truth."""
    sys.path.append(str(DEMO))
    import evaluate
    from model import from_state

    pictures = evaluate.held_out()
    original = evaluate.predict_masks(from_state(model.tensors), pictures)
    table = [{"profile": "original", "ratio": 1.0, "agreement": 1.0, "iou": evaluate.mean_iou(original, pictures)}]
    headers = [Header(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in model.tensors.items()]
    for profile in PROFILES.values():
        coder = measure.Ours(profile=profile.of_model(headers), overrides={})
        coded = coder.encode(model.tensors)
        masks = evaluate.predict_masks(from_state(coder.decode(coded)), pictures)
        same = float(evaluate.ious(masks, original)[pictures.valid].mean())
        ratio = model.file_bytes / len(coded)
        iou = evaluate.mean_iou(masks, pictures)
        table.append({"profile": profile.name, "ratio": ratio, "agreement": same, "iou": iou})
    return table


def _sweep(model: Checkpoint, python: Path | None, file: Path | None) -> nnc.Sweep:
    if file and file.exists():
        return nnc.read(json.loads(file.read_text()))
    if python is None:
        raise nnc.WorkerFailedError(f"--nnc-sweep {file} is not there: give --nnc-python to make it")
    found = nnc.sweep({name: model.tensors[name] for name in model.lossy()}, python)
    if file:
        file.write_text(json.dumps(asdict(found)))
    return found


def rate_distortion(model: Checkpoint, sweep: nnc.Sweep, target: float) -> dict[str, Any]:
    """Ours with paths and without beside NNC, tensor by tensor at the error that ours with paths made."""
    tensors = {name: model.tensors[name] for name in model.lossy()}
    weights = sum(tensor.numel() for tensor in tensors.values())
    result: dict[str, Any] = {"target_db": target}
    for kind, path in (("path", True), ("single", False)):
        profile = replace(PROFILES[DEFAULT_PROFILE], target_db=target, path=path)
        stored = [encode_tensor(name, tensor, profile).tensor for name, tensor in tensors.items()]
        reached = [fidelity(t, decode_tensor(s)).sqnr_db for t, s in zip(tensors.values(), stored, strict=True)]
        seconds = common.processor_seconds(
            lambda profile=profile: [encode_tensor(name, tensor, profile) for name, tensor in tensors.items()], 3
        )
        size = sum(s.nbytes + len(s.entry()) for s in stored)
        theirs, their_seconds = (
            sum(sweep.at(name, db, key) for name, db in zip(tensors, reached, strict=True))
            for key in ("bytes", "encode_s")
        )
        result[kind] = {
            "bits": 8 * size / weights,
            "nnc_bits": 8 * theirs / weights,
            "weights_per_s": weights / seconds,
            "nnc_weights_per_s": weights / their_seconds,
            "sqnr_db": sum(reached) / len(reached),
        }
    return result


def nnc_rows(model: Checkpoint, sweep: nnc.Sweep) -> list[dict[str, Any]]:
    """NNC on the whole checkpoint: one qp for all, and every tensor at one SQNR; the rest float32, as everywhere."""
    rest = sum(tensor.nbytes for name, tensor in model.tensors.items() if name not in sweep.tensors)
    table = []
    for qp in range(-40, -20):
        points = sweep.uniform(qp)
        if points is None:
            continue
        energy, error = (sum(p[key] for p in points.values()) for key in ("energy", "error"))
        sizes = sum(p["bytes"] for p in points.values())
        overrides = {name: measure.at(p["sqnr_db"]) for name, p in points.items()}
        ours = len(measure.Ours(profile=PROFILES["balanced"], overrides=overrides).encode(model.tensors))
        table.append(
            _nnc_row(model, f"NNC, qp {qp}", rest + sizes, sqnr_db(energy, error), list(points.values()), ours)
        )
    for target in (27.0, 30.0, 36.0):
        at = [
            {key: sweep.at(name, target, key) for key in ("bytes", "max_abs", "encode_s", "decode_s")}
            | {"sqnr_db": target}
            for name in sweep.tensors
        ]
        profile = replace(PROFILES["balanced"], target_db=target)
        ours = len(measure.Ours(profile=profile, overrides={}).encode(model.tensors))
        table.append(_nnc_row(model, f"NNC, {target:g} dB", rest + sum(p["bytes"] for p in at), target, at, ours))
    return table


def _nnc_row(
    model: Checkpoint, name: str, size: float, sqnr: float, points: list[dict[str, float]], ours: int
) -> dict[str, Any]:
    each = sorted(p["sqnr_db"] for p in points)
    return measure.Row(
        name=name,
        about="MPEG NNC, dependent quantisation",
        weights=model.weights,
        bytes=math.ceil(size),
        source_bytes=model.file_bytes,
        sqnr_db=sqnr,
        least_db=each[0],
        median_db=each[len(each) // 2],
        max_abs=max(p["max_abs"] for p in points),
        encode_s=sum(p["encode_s"] for p in points),
        decode_s=sum(p["decode_s"] for p in points),
        at_equal_error=8 * ours / model.weights,
    ).record()
