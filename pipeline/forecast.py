"""What a run would do and cost, from headers alone: for `birkhoff plan`.

Sizes follow from the targets: B dB cost about B/6.02 bits a weight, less what the path gains (see `_BITS_ABOVE`, fitted
to MiniLM-L6 and the demo model); a budget's target is the one whose sizes fit. Times and memory are those of CPU
workers on the machine that plans; a GPU is faster.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from birkhoff.codec.budget import Grid
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import Override, Profile
from birkhoff.pipeline.artifact import VersionManifest
from birkhoff.pipeline.compress import Planned, check_rules, latest_version, made_so, plan_entry
from birkhoff.pipeline.digests import recalled_digest
from birkhoff.pipeline.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan import ModelPlan, TensorPlan, dense_bytes
from birkhoff.pipeline.publish import Version
from birkhoff.pipeline.shard import ShardTask
from birkhoff.pipeline.source_types import StoredTensor
from birkhoff.pipeline.store import Store

_DB_PER_BIT = 6.02

_BITS_ABOVE = {True: 0.07, False: 0.23}
"""Bits a weight above B/6.02, with and without the path search."""

_PAPER_BITS = 6.5
"""Bits a weight of the published codec, near enough for any checkpoint."""

_LOSSLESS = 0.92
"""Bytes that byte planes leave of float weights."""

_ENTRY_BYTES = 220
"""A tensor's part of the headers."""

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

    stored_bytes: int
    target_db: float | None
    shards: int
    shared_shards: int
    seconds: float
    memory_bytes: int


def forecast(planned: Planned, seen: Counter[object]) -> Forecast:
    """Estimate one model; `seen` holds the shards of the models before it, and takes those of this one."""
    plan, profile = planned.plan, planned.profile
    if planned.budget is not None:
        profile = replace(profile, target_db=_fitting(planned))
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
        stored_bytes=_model_bytes(plan, profile) + sum(record.bytes for record in planned.file_records),
        target_db=profile.target_db,
        shards=len(plan.shards),
        shared_shards=sum(shared),
        seconds=round(_START_SECONDS + weights / _WEIGHTS_PER_SECOND[profile.path] / workers, 1),
        memory_bytes=(1 + workers) * _PROCESS_BYTES + workers * _SHARD_COPIES * largest,
    )


def _own(plan: ModelPlan, shard: Iterable[StoredTensor]) -> dict[str, Override]:
    """The overrides of a shard's tensors."""
    return {tensor.name: plan.overrides[tensor.name] for tensor in shard if tensor.name in plan.overrides}


def _fitting(planned: Planned) -> float:
    """About the target that a budget will find, dB: the highest whole one whose sizes fit, or the lowest there is."""
    assert planned.budget is not None
    limit, profile = planned.budget.limit(planned.checkpoint.nbytes), planned.profile
    knots = Grid.of(profile).knots
    sizes = [_model_bytes(planned.plan, replace(profile, target_db=knot)) for knot in knots]
    return next((knot for knot, size in zip(reversed(knots), reversed(sizes), strict=True) if size <= limit), knots[0])


def _weights(tensors: Iterable[StoredTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _model_bytes(plan: ModelPlan, profile: Profile) -> int:
    return round(sum(_stored_bytes(item, profile, plan.overrides.get(item.tensor.name)) for item in plan.tensors))


def _stored_bytes(item: TensorPlan, profile: Profile, override: Override | None) -> float:
    if item.action == "lossless":
        return dense_bytes(item.tensor) * _LOSSLESS + _ENTRY_BYTES
    bits, target = _PAPER_BITS, profile.of_tensor(item.tensor.shape, override).target_db
    if target is not None:
        bits = target / _DB_PER_BIT + _BITS_ABOVE[profile.path]
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


def plan_rows(manifest: Manifest, store: Store | None, mirror: Path | None) -> list[dict[str, object]]:
    """One row per model of a manifest, its tensors by action and reason under `groups`; downloads nothing.

    A model whose source cannot be read has its `error` and nothing else. Without a store, all models are `new`.
    """
    seen: Counter[object] = Counter()
    plans = [_plan(manifest, entry, mirror) for entry in manifest.models]
    check_rules(manifest, [None if isinstance(found, BirkhoffError) else found for found in plans])
    return [_plan_row(manifest, entry, found, store, seen) for entry, found in zip(manifest.models, plans, strict=True)]


def _plan(manifest: Manifest, entry: ModelEntry, mirror: Path | None) -> Planned | BirkhoffError:
    try:
        return plan_entry(manifest, entry, mirror=mirror, download=False)
    except BirkhoffError as error:
        return error


def _plan_row(
    manifest: Manifest,
    entry: ModelEntry,
    planned: Planned | BirkhoffError,
    store: Store | None,
    seen: Counter[object],
) -> dict[str, object]:
    try:
        if isinstance(planned, BirkhoffError):
            raise planned
        digest = recalled_digest(planned.checkpoint)
    except BirkhoffError as error:
        profile = manifest.fidelity(entry).profile.name
        return {"model": entry.name, "profile": profile, "status": "?", "error": str(error)}
    expected = forecast(planned, seen)
    latest = latest_version(store, entry.name) if store is not None else None
    return {
        "model": entry.name,
        "profile": planned.profile.name,
        "budget_bytes": planned.budget.limit(planned.checkpoint.nbytes) if planned.budget else None,
        "predicted_target_db": _found(latest, planned) or expected.target_db if planned.budget else None,
        "status": status(latest.manifest if latest else None, digest, planned),
        "source_bytes": planned.checkpoint.nbytes,
        "predicted_stored_bytes": expected.stored_bytes,
        "predicted_ratio": round(planned.checkpoint.nbytes / expected.stored_bytes, 2),
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
