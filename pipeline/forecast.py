"""What a run would do and cost, from headers alone: for `birkhoff plan`.

Sizes follow from the targets: B dB cost about B/6.02 bits a weight, how far from that depends on the distribution of
the weights, which headers do not tell. So a size is a range between two trained models: the demo, whose decay and
L1 term made sparse weights, and MiniLM-L6, whose weights are nearly Gaussian, the costliest shape there is. A budget's
target is the one whose sizes fit. Times and memory are those of CPU workers on the machine that plans; a GPU is faster.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from birkhoff.codec.budget import Grid
from birkhoff.codec.dtype_names import is_float
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import Override, Profile
from birkhoff.pipeline.artifact import VersionManifest
from birkhoff.pipeline.digests import recalled_digest
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.fetch import NotDownloaded, peek
from birkhoff.pipeline.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan import ModelPlan, TensorPlan, dense_bytes
from birkhoff.pipeline.planned import Planned, check_rules, made_so, plan_checkpoint
from birkhoff.pipeline.publish import Version, latest_version
from birkhoff.pipeline.shard import ShardTask
from birkhoff.pipeline.source_types import StoredTensor
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.workplace import source_cache

_DB_PER_BIT = 6.02

_BITS_ABOVE = {True: (-0.54, 0.11), False: (-0.48, 0.24)}
"""Bits a weight above B/6.02, with and without the path search: demo model and MiniLM-L6, at 27, 30 and 36 dB."""

_PAPER_BITS = 6.0, 9.2
"""Bits a weight of the published codec, tensors that it leaves raw included."""

_MATCH_BITS = 3.6, 4.8
"""Bits a weight of ours at its error."""

_LOSSLESS = 0.88, 1.0
"""Bytes that byte planes leave of float weights; integers stay what they are."""

_ENTRY_BYTES = 270
"""A tensor's part of headers, shard records and manifest."""

_WEIGHTS_PER_SECOND = {True: 6e6, False: 2e7}
"""Of one CPU worker, everything included, with and without the path search."""

_START_SECONDS = 8.0
"""Ray and the workers' imports."""

_PROCESS_BYTES = 450 << 20
"""A process with torch and Ray loaded."""

_SHARD_COPIES = 5
"""Memory of a shard at work over its source bytes: source, coordinates, decoded tensor, probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One model's expected run. Bytes and seconds are estimates but for `shards` and `shared_shards`."""

    stored_bytes: tuple[int, int]
    """Least and most."""
    target_db: float | None
    tensor_db: tuple[float, float] | None
    """Least and greatest target of coded tensors; None where the published codec's error decides."""
    shards: int
    shared_shards: int
    seconds: float
    memory_bytes: int


def forecast(planned: Planned, seen: Counter[object], found_db: float | None = None) -> Forecast:
    """Estimate one model; `seen` holds the shards of the models before it, and takes those of this one.

    `found_db` is the target that the model's budget has led to before, if it has.
    """
    plan, profile = planned.plan, planned.profile
    if planned.budget is not None:
        profile = replace(profile, target_db=_fitting(planned) if found_db is None else found_db)
    signatures = [
        ShardTask(model="", index=index, tensors=shard, profile=profile, overrides=_own(plan, shard)).signature
        for index, shard in enumerate(plan.shards)
    ]
    shared = [seen[signature] > 0 for signature in signatures]
    seen.update(signatures)
    weights = sum(_weights(shard) for shard, twin in zip(plan.shards, shared, strict=True) if not twin)
    workers = os.cpu_count() or 1
    largest = max((sum(map(dense_bytes, shard)) for shard in plan.shards), default=0)
    return Forecast(
        stored_bytes=_stored(planned, profile),
        target_db=profile.target_db,
        tensor_db=_tensor_db(plan, profile),
        shards=len(plan.shards),
        shared_shards=sum(shared),
        seconds=round(_START_SECONDS + weights / _WEIGHTS_PER_SECOND[profile.path] / workers, 1),
        memory_bytes=(1 + workers) * _PROCESS_BYTES + workers * _SHARD_COPIES * largest,
    )


def _own(plan: ModelPlan, shard: Iterable[StoredTensor]) -> dict[str, Override]:
    """The overrides of a shard's tensors."""
    return {tensor.name: plan.overrides[tensor.name] for tensor in shard if tensor.name in plan.overrides}


def _stored(planned: Planned, profile: Profile) -> tuple[int, int]:
    """Least and most bytes of the version; no more than a budget allows, which is kept or the model fails."""
    files = sum(record.bytes for record in planned.file_records)
    low, high = (_model_bytes(planned.plan, profile, end) + files for end in (0, 1))
    limit = planned.budget.limit(planned.checkpoint.nbytes) if planned.budget else high
    return min(low, limit), min(high, limit)


def _tensor_db(plan: ModelPlan, profile: Profile) -> tuple[float, float] | None:
    coded = (item.tensor for item in plan.tensors if item.action == "coded")
    targets = [profile.of_tensor(tensor.shape, plan.overrides.get(tensor.name)).target_db for tensor in coded]
    known = [target for target in targets if target is not None]
    return (min(known), max(known)) if known else None


def _fitting(planned: Planned) -> float:
    """About the target that a budget will find, dB: the highest whole one whose sizes fit, or the lowest there is."""
    assert planned.budget is not None
    limit, profile = planned.budget.limit(planned.checkpoint.nbytes), planned.profile
    knots = Grid.of(profile).knots
    trials = [(knot, replace(profile, target_db=knot)) for knot in knots]
    sizes = [sum(_model_bytes(planned.plan, trial, end) for end in (0, 1)) / 2 for _, trial in trials]
    return next((knot for knot, size in zip(reversed(knots), reversed(sizes), strict=True) if size <= limit), knots[0])


def _weights(tensors: Iterable[StoredTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _model_bytes(plan: ModelPlan, profile: Profile, end: int) -> int:
    """Bytes of all tensors at one end of the range: 0 for the least, 1 for the most."""
    return round(sum(_tensor_bytes(item, profile, plan.overrides.get(item.tensor.name), end) for item in plan.tensors))


def _tensor_bytes(item: TensorPlan, profile: Profile, override: Override | None, end: int) -> float:
    if item.action == "lossless":
        share = _LOSSLESS[end] if is_float(item.tensor.dtype) else 1.0
        return dense_bytes(item.tensor) * share + _ENTRY_BYTES
    own = profile.of_tensor(item.tensor.shape, override)
    if own.target_db is not None:
        bits = own.target_db / _DB_PER_BIT + _BITS_ABOVE[own.path][end]
    else:
        bits = (_MATCH_BITS if own.matches_published else _PAPER_BITS)[end]
    return prod(item.tensor.shape) * bits / 8 + _ENTRY_BYTES


def status(manifest: VersionManifest | None, source_sha256: str | None, planned: Planned) -> str:
    """What a run would find: `up to date`, `changed`, `new`, or `to be read` where no digest is remembered."""
    if manifest is None:
        return "new"
    if not made_so(manifest, planned):
        return "changed"
    if source_sha256 is None:
        return "to be read"
    return "up to date" if manifest.source.sha256 == source_sha256 else "changed"


def plan_rows(
    manifest: Manifest, store: Store | None, mirror: Path | None
) -> tuple[list[dict[str, object]], list[BirkhoffError | None]]:
    """One row per model of a manifest, its tensors by action and reason under `groups`, and the models' errors.

    Downloads nothing: a model still to be downloaded has a `note` instead of figures, one whose source cannot be had
    its `error`. Without a store, all models are `new`.
    """
    seen: Counter[object] = Counter()
    found = [_plan(manifest, entry, mirror) for entry in manifest.models]
    check_rules(manifest, [plan if isinstance(plan, Planned) else None for plan in found])
    rows = [_plan_row(manifest, entry, plan, store, seen) for entry, plan in zip(manifest.models, found, strict=True)]
    return rows, [plan if isinstance(plan, BirkhoffError) else None for plan in found]


def _plan(manifest: Manifest, entry: ModelEntry, mirror: Path | None) -> Planned | NotDownloaded | BirkhoffError:
    try:
        found = peek(entry.source, cache=source_cache(), mirror=mirror)
        if not isinstance(found, NotDownloaded):
            return plan_checkpoint(manifest, entry, found)
        return SourceError(f"cannot be downloaded: {found.problem}") if found.problem else found
    except BirkhoffError as error:
        return error


def _plan_row(
    manifest: Manifest,
    entry: ModelEntry,
    planned: Planned | NotDownloaded | BirkhoffError,
    store: Store | None,
    seen: Counter[object],
) -> dict[str, object]:
    row: dict[str, object] = {"model": entry.name, "profile": manifest.fidelity(entry).profile.name}
    if isinstance(planned, BirkhoffError):
        return row | {"status": "failed", "error": str(planned)}
    if isinstance(planned, NotDownloaded):
        return row | {"status": "to be downloaded", "note": str(planned)}
    latest = latest_version(store, entry.name) if store is not None else None
    state = status(latest.manifest if latest else None, recalled_digest(planned.checkpoint), planned)
    expected = forecast(planned, seen, _found(latest, planned))
    low, high = expected.stored_bytes
    if latest is not None and state == "up to date":
        low = high = latest.stored_bytes
    middle = (low + high) // 2
    return row | {
        "budget_bytes": planned.budget.limit(planned.checkpoint.nbytes) if planned.budget else None,
        "predicted_target_db": expected.target_db if planned.budget else None,
        "predicted_tensor_db": expected.tensor_db,
        "status": state,
        "source_bytes": planned.checkpoint.nbytes,
        "predicted_stored_bytes": middle,
        "predicted_stored_bytes_range": (low, high),
        "predicted_ratio": round(planned.checkpoint.nbytes / middle, 2),
        "predicted_ratio_range": tuple(round(planned.checkpoint.nbytes / size, 2) for size in (high, low)),
        "shards": expected.shards,
        "shared_shards": expected.shared_shards,
        "predicted_seconds": expected.seconds,
        "predicted_memory_bytes": expected.memory_bytes,
        "skipped": [f"{key} ({kind})" for key, kind in planned.checkpoint.skipped],
        "overrides": dict(planned.plan.overrides),
        "groups": _groups(planned.plan),
    }


def _found(latest: Version | None, planned: Planned) -> float | None:
    """The target in dB that the same budget has led to before, if it has."""
    target = latest.manifest.recipe.get("target_db") if latest and made_so(latest.manifest, planned) else None
    return target if isinstance(target, float) else None


def _groups(plan: ModelPlan) -> list[dict[str, object]]:
    groups: dict[tuple[str, str], list[StoredTensor]] = {}
    for item in plan.tensors:
        groups.setdefault((item.action, item.reason), []).append(item.tensor)
    return [
        {
            "action": action,
            "reason": reason,
            "tensors": len(tensors),
            "weights": _weights(tensors),
            "bytes": sum(map(dense_bytes, tensors)),
        }
        for (action, reason), tensors in groups.items()
    ]
