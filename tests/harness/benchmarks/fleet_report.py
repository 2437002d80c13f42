"""What the fleet benchmark found, as JSON and as tables; what counts as reached is decided here alone."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.harness.benchmarks import common

Record = dict[str, Any]

GB = 1e9
FLEET_WALL_S = 20.0
FLEET_STORED_SHARE = 0.52
FLEET_WORKERS_BYTES = 8e9
SECOND_RUN_S = 5.0
ONE_WALL_S = 60.0
ONE_WALLS_S = {"SAM-H": 20.0, "SAM-B": 8.0}
ONE_PEAK_BYTES = 3e9


def record(*, form: str, store: str, scale: float, runs: Sequence[Record]) -> Record:
    """Everything about one invocation; `runs` hold figures, models and problems."""
    return {
        "form": form,
        "store": store.partition(":")[0],
        "scale": scale,
        "machine": machine(),
        "versions": {
            name: common.installed(name) for name in ("birkhoff-compression", "torch", "ray", "numpy", "boto3")
        },
        "commit": commit(),
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": list(runs),
    }


def machine() -> Record:
    """The host in words; GPUs only where they are visible."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / GB, 1),
        "gpus": gpus,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def commit() -> str:
    """The commit that was measured, `+` behind it where sources differ from it; `unknown` outside a repository."""
    try:
        return common.commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def criteria(found: Record) -> list[tuple[str, str, str]]:
    """(what, figure, verdict) of every criterion that this record can answer."""
    if found["scale"] != 1.0:
        return []
    if found["form"] == "fleet":
        return _fleet_criteria(found)
    return [line for run in found["runs"] if "wall_s" in run["figures"] for line in _one_criteria(found, run)]


def _fleet_criteria(found: Record) -> list[tuple[str, str, str]]:
    run = found["runs"][0]
    figures, whole = run["figures"], len(run["models"]) >= 18
    meant = bool(found["machine"]["gpus"]) and found["machine"]["cores"] >= 16 and whole
    lines = []
    if "wall_s" in figures:
        verdict = _verdict(figures["wall_s"], FLEET_WALL_S) if meant else "for one H200 with 16 cores, all models"
        lines.append((f"all published and validated, <= {FLEET_WALL_S:.0f} s", f"{figures['wall_s']:.1f} s", verdict))
        workers = figures.get("peak_bytes_by_role", {}).get("worker", 0)
        verdict = _verdict(workers, FLEET_WORKERS_BYTES) if meant else verdict
        lines.append((f"workers together, <= {FLEET_WORKERS_BYTES / GB:.0f} GB", f"{workers / GB:.2f} GB", verdict))
    if "stored_share" in figures:
        share = figures["stored_share"]
        verdict = _verdict(share, FLEET_STORED_SHARE) if whole else "for all models"
        lines.append((f"stored against single artifacts, <= {FLEET_STORED_SHARE:.0%}", f"{share:.1%}", verdict))
    if "second_run_s" in figures:
        seconds, new = figures["second_run_s"], figures["second_run_new_blobs"]
        verdict = "missed" if new else _verdict(seconds, SECOND_RUN_S)
        lines.append((f"second run, no new blobs, <= {SECOND_RUN_S:.0f} s", f"{seconds:.1f} s, {new} blobs", verdict))
    return lines


def _one_criteria(found: Record, run: Record) -> list[tuple[str, str, str]]:
    name, figures = run["models"][0]["model"], run["figures"]
    if found["machine"]["gpus"] or found["machine"]["cores"] > 2:
        return []
    limit = ONE_WALLS_S.get(name, ONE_WALL_S)
    wall, peak = figures["wall_s"], figures["driver_and_workers_peak_bytes"]
    return [
        (f"{name} on 2 cores, <= {limit:.0f} s", f"{wall:.1f} s", _verdict(wall, limit)),
        (f"{name}, driver and workers <= 3 GB", f"{peak / GB:.2f} GB", _verdict(peak, ONE_PEAK_BYTES)),
    ]


def progress_line(name: str, figures: Record, problems: Sequence[str]) -> str:
    """One line for a model that was run by itself."""
    if "wall_s" not in figures:
        return f"{name}: {'; '.join(problems)}"
    peak = figures["driver_and_workers_peak_bytes"] / GB
    return f"{name}: {figures['wall_s']:.1f} s, peak {peak:.2f} GB{''.join('; ' + text for text in problems)}"


def table(found: Record) -> str:
    """The record as Markdown, models first, criteria last."""
    parts = [_heading(found), _model_table(found)]
    if found["form"] == "fleet":
        parts.append(_figures_table(found["runs"][0]["figures"]))
    judged = criteria(found)
    if judged:
        parts.append(_markdown(("criterion", "measured", "verdict"), judged))
    problems = [f"- problem: {text}" for run in found["runs"] for text in run["problems"]]
    return "\n\n".join([part for part in parts if part] + (["\n".join(problems)] if problems else []))


def save(found: Record, folder: Path) -> None:
    """Put a record beside those of other forms, stores and machines, and draw the page anew.

    Models that were run by themselves replace their own former runs only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fleet.json"
    records: dict[str, Record] = json.loads(path.read_text()) if path.is_file() else {}
    key = _key(found)
    before = records.get(key)
    if before is not None and found["form"] != "fleet":
        again = {run["models"][0]["model"] for run in found["runs"] if run["models"]}
        kept = [run for run in before["runs"] if run["models"] and run["models"][0]["model"] not in again]
        found = {**found, "runs": kept + list(found["runs"])}
    records[key] = found
    path.write_text(json.dumps(records, indent=1) + "\n")
    pages = "\n\n".join(f"## {name}\n\n{table(one)}" for name, one in records.items())
    page = f"# Fleet benchmark\n\n{_PREFACE}\n\n{pages}\n"
    (folder / "fleet.md").write_text(page)


_PREFACE = """Drawn from `fleet.json` by `python -m tests.harness.benchmarks fleet`. The weights are synthetic, so
ratios are no result; seconds, memory and sharing are. Wall time runs from the command's start to its end, Ray's start
included. Memory is sampled over all processes; what they share counts once. (Up to commit 590bfcc the samples held the
processes up: two cores took a tenth longer.) Load is the machine's in the minute before; above 0.5 others were at work
too. A commit with `+` had changes that were not committed."""


def _key(found: Record) -> str:
    place = " + ".join(found["machine"]["gpus"]) or "no GPU"
    scale = "" if found["scale"] == 1.0 else f", scale {found['scale']}"
    return f"{found['form']}, {found['machine']['cores']} cores, {place}, {found['store']} store{scale}"


def _heading(found: Record) -> str:
    host, versions = found["machine"], ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpus = ", ".join(host["gpus"]) or "no GPU"
    return (
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, {gpus}; "
        f"Python {host['python']}, {versions}; commit {found['commit']}; {found['taken']}."
    )


def _model_table(found: Record) -> str:
    alone = found["form"] != "fleet"
    lines = []
    for run in found["runs"]:
        for row in run["models"]:
            line = [row["model"], _mb(row["source_bytes"]), _mb(row["stored_bytes"]), f"{row['ratio']:.2f}"]
            line += [str(row["shards"]), str(row["shards_reused"]), f"{row['seconds']:.1f}"]
            lines.append(line + (_alone(run["figures"]) if alone else []))
    titles = ["model", "source MB", "stored MB", "ratio", "shards", "reused", "done at s"]
    return (
        _markdown(titles + (["wall s", "load", "peak GB", "again s", "commit"] if alone else []), lines)
        if lines
        else ""
    )


def _alone(figures: Record) -> list[str]:
    again = figures.get("second_run_s")
    return [
        f"{figures['wall_s']:.1f}",
        f"{figures['load_before']:.1f}",
        f"{figures['driver_and_workers_peak_bytes'] / GB:.2f}",
        "" if again is None else f"{again:.1f}",
        figures["commit"],
    ]


def _figures_table(figures: Record) -> str:
    if "wall_s" not in figures:
        return ""
    wall, roles = figures["wall_s"], figures["peak_bytes_by_role"]
    lines = [
        ("wall", f"{wall:.1f} s, {figures['source_bytes'] / wall / 1e6:.0f} MB/s of checkpoints"),
        ("load before", f"{figures['load_before']:.1f}"),
        ("checkpoints written in", f"{figures['data_s']:.1f} s"),
        ("shards", f"{figures['shards']}, {figures['shards_reused']} of them taken from another model"),
        ("worker seconds", _stages(figures["stages_worker_s"])),
        ("peak of driver and workers", f"{figures['driver_and_workers_peak_bytes'] / GB:.2f} GB"),
        ("peak of all processes", f"{figures['all_processes_peak_bytes'] / GB:.2f} GB"),
        ("peak by role", ", ".join(f"{name} {size / GB:.2f} GB" for name, size in sorted(roles.items()))),
    ]
    if "stored_bytes" in figures:
        stored, single = figures["stored_bytes"], figures["sum_of_single_bytes"]
        lines.append(
            ("stored", f"{_mb(stored)} MB; {_mb(single)} MB without sharing, which saved {_mb(single - stored)}")
        )
    if "verified" in figures:
        lines.append(("verified", ", ".join(one["model"] for one in figures["verified"])))
    if "storage_share" in figures:
        raw, share = figures["raw_bytes_per_s"] / 1e6, figures["storage_share"]
        lines.append(("storage bandwidth", f"{share:.0%} of the {raw:.0f} MB/s that bare writes of the blobs reach"))
    return _markdown(("figure", "value"), lines)


def _stages(stages: dict[str, float]) -> str:
    total = sum(stages.values()) or 1.0
    return ", ".join(f"{name} {seconds:.1f} ({seconds / total:.0%})" for name, seconds in stages.items())


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return common.table(list(titles), [list(line) for line in lines])


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "missed"


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f}"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
