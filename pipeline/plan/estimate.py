"""Estimate what a run would do and cost from headers and a sample of the weights, for `birkhoff plan`.

Sizes follow from the targets: B dB cost about B/6.02 bits per weight, plus an offset that depends on the distribution
of the weights, which headers do not tell. So a size is a range between two trained models: the demo, whose weight decay
and L1 term made its weights sparse, and MiniLM-L6, whose nearly Gaussian weights are the costliest. A budget's target
is the one whose sizes fit. Times and memory are those of CPU workers on the planning machine; a GPU is faster.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from birkhoff.codec.dtype_names import is_float
from birkhoff.codec.errors import BirkhoffError, FormatError
from birkhoff.codec.native.library import native
from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.checkpoint.digests import known_digest
from birkhoff.pipeline.download.resolve import NotDownloaded, peek
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ManifestError, SourceError, failure_of
from birkhoff.pipeline.paths import source_cache
from birkhoff.pipeline.plan.budget import lowest_step
from birkhoff.pipeline.plan.grid import Grid
from birkhoff.pipeline.plan.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan.models import Planned, check_rules, coded_alike, matches_plan, plan_checkpoint
from birkhoff.pipeline.plan.output_search import PROBES, START_DB
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.registry.documents import VersionManifest
from birkhoff.pipeline.registry.versions import Version, latest_version, models
from birkhoff.pipeline.shard.task import TensorPlan
from birkhoff.pipeline.store.base import Store

_DB_PER_BIT = 6.02

_BITS_ABOVE = {True: (-0.70, 0.045), False: (-0.61, 0.24)}
"""Bits per weight above B/6.02, with and without the path search: the demo, and large matrices of MiniLM-L6, at 27
to 36 dB."""

_PAPER_BITS = 6.0, 9.2
"""Bits per weight of the published codec, including tensors that it leaves raw."""

_MATCH_BITS = 3.3, 4.75
"""Bits per weight of our codec at the published codec's error."""

_LOSSLESS = 0.88, 1.0
"""Bytes that remain of float weights in byte planes; integers do not shrink."""

_ENTRY_BYTES = 30
"""Bytes of a tensor in headers, shard records and manifest."""

_WEIGHTS_PER_SECOND = 3e7
"""Throughput of one CPU worker in total: two take 10 s for SAM-H, whatever the profile."""

_WEIGHTS_PER_SECOND_IN_PYTHON = {True: 6e6, False: 2e7}
"""The same without the native library, with and without the path search."""

_START_SECONDS = 3.0
"""Time before and after that; with Ray it is 5 s."""

_PROCESS_BYTES = 450 << 20
"""Memory of a process with torch and Ray loaded."""

_SHARD_COPIES = 5
"""Memory of a shard being encoded, over its source bytes: source, coordinates, decoded tensor, probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One model's expected run. All figures are estimates, except `shards`."""

    stored_bytes: tuple[int, int]
    """Least and most."""
    target_db: float | None
    tensor_db: tuple[float, float] | None
    """Least and greatest target of coded tensors; None if the published codec's error or statistics decide."""
    shards: int
    shared_shards: int
    """Of them, those that the store has or another model makes: see `Shared`."""
    retargeted_shards: int
    """Shards with the headers of another model's, not shared because their targets differ."""
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Based:
    """A planned model with its base."""

    planned: Planned
    label: str | None = None
    """The base; None without one."""
    shares: tuple[tuple[float, float], ...] = ()
    """Of the coded tensors' direct bytes, what they take as differences to it, by the model's target in dB, rising."""
    note: str = ""
    newer: str | None = None
    """What the model's base means by now, if its version is a difference to an older one and stays so."""

    def share_at(self, target_db: float | None) -> float:
        """The share at a target; None is the only one that there is."""
        if not self.shares:
            return 1.0
        targets, shares = zip(*self.shares, strict=True)
        return float(np.interp(targets[0] if target_db is None else target_db, targets, shares))


BaseOf = Callable[[Planned, Version | None], Based]
"""Finds a model's base; takes the model's latest version."""


UnprovenOf = Callable[[Planned], str | None]
"""Returns why a model cannot be proven, or None; raises what `compress` would raise about it."""


def _no_base(planned: Planned, _: Version | None) -> Based:
    return Based(planned=planned)


def _shards_alike(manifest: VersionManifest, planned: Planned, plan: ModelPlan) -> bool:
    """Return whether a version of the same source has the shards of a plan."""
    return [shard.tensors for shard in manifest.shards] == [*map(len, plan.shards)] and coded_alike(manifest, planned)


class Shared:
    """Finds the shards of a model that the store has, or that a model before it makes.

    Shards count as shared with a model before if headers and decisions are equal: weights are not read. The store has
    them for certain if one of its versions was made from the same source by the same recipe.
    """

    def __init__(self, store: Store | None) -> None:
        self._store, self._seen, self._headers = store, set[object](), set[object]()
        self._versions: list[VersionManifest] | None = None

    def of(self, planned: Planned, plan: ModelPlan, sha256: str | None) -> list[bool]:
        """Return for each shard of a plan whether it is shared. Raises StoreError, IntegrityError."""
        signatures = [task.signature for task in plan.tasks("")]
        stored = sha256 is not None and any(
            manifest.source.sha256 == sha256 and _shards_alike(manifest, planned, plan) for manifest in self._latest()
        )
        found = [stored or signature in self._seen for signature in signatures]
        self._seen.update(signatures)
        return found

    def alike(self, plan: ModelPlan) -> int:
        """Return how many shards have the headers of an earlier model's; call it before `of`."""
        headers = [tuple((t.tensor.name, t.tensor.dtype, t.tensor.shape) for t in shard) for shard in plan.shards]
        found = sum(shard in self._headers for shard in headers)
        self._headers.update(headers)
        return found

    def _latest(self) -> list[VersionManifest]:
        if self._versions is None:
            self._versions = [] if self._store is None else _latest_manifests(self._store)
        return self._versions


def _latest_manifests(store: Store) -> list[VersionManifest]:
    """Return the manifest that each model's `latest` points at. Raises StoreError."""
    found = []
    for model in models(store):
        with suppress(IntegrityError):  # a damaged version of another model shares nothing
            version = latest_version(store, model)
            found += [] if version is None else [version.manifest]
    return found


def forecast(based: Based, seen: Shared, sha256: str | None, found_db: float | None = None) -> Forecast:
    """Estimate one model.

    Args:
        based: The model, with what is known of its base.
        seen: Knows the models before this one, and takes note of this one.
        sha256: Digest of its source, if it is known without reading the file.
        found_db: The target that the model's budget led to before, if it did.
    """
    planned = based.planned
    plan = planned.plan
    if planned.budget is not None:
        plan = plan.at(_fitting(based) if found_db is None else found_db)
    alike, shared = seen.alike(plan), seen.of(planned, plan, sha256)
    weights = sum(_weights(shard) for shard, duplicate in zip(plan.shards, shared, strict=True) if not duplicate)
    workers = processors()
    rate = _WEIGHTS_PER_SECOND if native() else _WEIGHTS_PER_SECOND_IN_PYTHON[plan.profile.path]
    largest = max((sum(item.tensor.dense_bytes for item in shard) for shard in plan.shards), default=0)
    return Forecast(
        stored_bytes=_stored(planned, plan, based.share_at(plan.profile.target_db)),
        target_db=plan.profile.target_db,
        tensor_db=_tensor_db(plan),
        shards=len(plan.shards),
        shared_shards=sum(shared),
        retargeted_shards=max(0, alike - sum(shared)),
        seconds=round(_START_SECONDS + weights / rate / workers, 1),
        memory_bytes=(1 + workers) * _PROCESS_BYTES + workers * _SHARD_COPIES * largest,
    )


def _stored(planned: Planned, plan: ModelPlan, share: float) -> tuple[int, int]:
    """Return the least and most bytes of the version. A budget limits both, because the model fails otherwise."""
    files = sum(record.bytes for record in planned.file_records)
    low, high = (_model_bytes(plan, end, share) + files for end in (0, 1))
    limit = _limit(planned)
    return (low, high) if limit is None else (min(low, limit), min(high, limit))


def _limit(planned: Planned) -> int | None:
    """Return the most bytes that a budget allows; None without one in bytes."""
    budget = planned.budget
    return None if budget is None or budget.by_output else budget.limit(planned.checkpoint.nbytes)


def _tensor_db(plan: ModelPlan) -> tuple[float, float] | None:
    targets = [None if item.decision.nominal else item.decision.target_db for item in plan.tensors]
    known = [target for target in targets if target is not None]
    return (min(known), max(known)) if known else None


def _fitting(based: Based) -> float:
    """Return roughly the target that a budget will find, dB: the highest whole one whose sizes fit, or the lowest."""
    planned = based.planned
    assert planned.budget is not None
    if planned.budget.by_output:
        return START_DB  # its search starts there; headers do not tell where it ends
    limit, plan = planned.budget.limit(planned.checkpoint.nbytes), planned.plan
    grid = Grid.of(plan.profile)
    lowest = grid.target(lowest_step(plan, planned.budget.least_db))
    knots = [knot for knot in grid.knots if knot >= lowest] or [grid.high]
    sizes = [sum(_model_bytes(plan.at(knot), end, based.share_at(knot)) for end in (0, 1)) / 2 for knot in knots]
    return next((knot for knot, size in zip(reversed(knots), reversed(sizes), strict=True) if size <= limit), knots[0])


def _weights(tensors: Iterable[TensorPlan]) -> int:
    return sum(prod(item.tensor.shape) for item in tensors)


def _model_bytes(plan: ModelPlan, end: int, share: float = 1.0) -> int:
    """Return bytes of all tensors at one end of the range (0: least, 1: most); `share` scales the coded ones."""
    parts = ((_tensor_bytes(item, end), item.decision.action == "coded") for item in plan.tensors)
    return round(sum(share * size if coded else size for size, coded in parts))


def _tensor_bytes(item: TensorPlan, end: int) -> float:
    decision = item.decision
    if decision.action == "lossless":
        share = _LOSSLESS[end] if is_float(item.tensor.dtype) else 1.0
        return item.tensor.dense_bytes * share + _ENTRY_BYTES
    if decision.target_db is not None:
        bits = decision.target_db / _DB_PER_BIT + _BITS_ABOVE[decision.path][end]
    else:
        bits = (_MATCH_BITS if decision.matches_published else _PAPER_BITS)[end]
    return prod(item.tensor.shape) * bits / 8 + _ENTRY_BYTES


def status(manifest: VersionManifest | None, source_sha256: str | None, planned: Planned) -> str:
    """Return what a run would find: `up to date`, `changed`, `new`, or `to be read` if no digest is remembered."""
    if manifest is None:
        return "new"
    if not matches_plan(manifest, planned):
        return "changed"
    if source_sha256 is None:
        return "to be read"
    return "up to date" if manifest.source.sha256 == source_sha256 else "changed"


def plan_rows(
    manifest: Manifest,
    store: Store | None,
    mirror: Path | None,
    base_of: BaseOf = _no_base,
    unproven_of: UnprovenOf = lambda _: None,
) -> tuple[list[dict[str, object]], list[BirkhoffError | None]]:
    """Return one row per model, with its tensors grouped by action and reason under `groups`, and the models' errors.

    Downloads nothing: a model that is not downloaded yet has a `note` instead of figures, one that a run would refuse
    its `error`. Without a store, all models are `new`. `base_of` finds the bases of models that name one.
    """
    seen = Shared(store)
    found = [_plan(manifest, entry, mirror, unproven_of) for entry in manifest.models]
    check_rules(manifest, [plan[0] if isinstance(plan, tuple) else None for plan in found])
    rows: list[dict[str, object]] = []
    errors: list[BirkhoffError | None] = []
    for entry, plan in zip(manifest.models, found, strict=True):
        try:
            rows.append(_plan_row(manifest, entry, plan, store, seen, base_of))
            errors.append(plan if isinstance(plan, BirkhoffError) else None)
        except (ArtifactNotFoundError, ManifestError, SourceError, FormatError) as error:  # an error of its base
            rows.append(_failed(manifest, entry, error))
            errors.append(error)
    return rows, errors


def _failed(manifest: Manifest, entry: ModelEntry, error: BirkhoffError) -> dict[str, object]:
    row: dict[str, object] = {"model": entry.name, "profile": manifest.fidelity(entry).profile.name}
    return row | {"status": "failed", "error": str(error), "failure": failure_of(error)}


def _plan(
    manifest: Manifest, entry: ModelEntry, mirror: Path | None, unproven_of: UnprovenOf
) -> tuple[Planned, str | None] | NotDownloaded | BirkhoffError:
    """Plan one model. Returns the plan, and why the model cannot be proven."""
    try:
        found = peek(entry.source, cache=source_cache(), mirror=mirror)
        if not isinstance(found, NotDownloaded):
            planned = plan_checkpoint(manifest, entry, found).scaled()
            return planned, unproven_of(planned)
        return SourceError(f"cannot be downloaded: {found.problem}") if found.problem else found
    except BirkhoffError as error:
        return error


def _plan_row(
    manifest: Manifest,
    entry: ModelEntry,
    found: tuple[Planned, str | None] | NotDownloaded | BirkhoffError,
    store: Store | None,
    seen: Shared,
    base_of: BaseOf,
) -> dict[str, object]:
    row: dict[str, object] = {"model": entry.name, "profile": manifest.fidelity(entry).profile.name}
    if isinstance(found, BirkhoffError):
        return _failed(manifest, entry, found)
    if isinstance(found, NotDownloaded):
        return row | {"status": "to be downloaded", "note": str(found)}
    planned, row["unproven"] = found
    latest = latest_version(store, entry.name) if store is not None else None
    based = base_of(planned, latest)
    planned = based.planned
    digest = known_digest(planned.checkpoint)
    state = status(latest.manifest if latest else None, digest, planned)
    expected = forecast(based, seen, digest, _found(latest, planned))
    share = based.share_at(expected.target_db)
    low, high = expected.stored_bytes
    if latest is not None and state == "up to date":
        low = high = latest.stored_bytes
    middle = (low + high) // 2
    searched = planned.budget is not None and planned.budget.by_output and _found(latest, planned) is None
    notes = [based.note] if based.note else []
    if based.shares:
        part = (
            f"as differences to {based.label} its coded tensors take about {share:.0%} of what they take by themselves"
        )
        notes.append(part)
    if searched and state != "up to date":
        notes.append(f"up to {PROBES} proofs search its target; the figures are for {START_DB:g} dB, where they start")
    if planned.takes_statistics:
        notes.append("targets of single tensors follow from the sensitivity of its outputs, which a run measures first")
    if expected.retargeted_shards and planned.plan.profile.allocation == "header":
        notes.append(
            f"{expected.retargeted_shards} of its shards have the tensors of another model but other targets, which "
            "depend on the mean over all layers; `allocation: uniform` gives both the same"
        )
    if notes:
        row["note"] = "; ".join(notes)
    return row | {
        "base": based.label,
        "base_share": round(share, 3) if planned.base is not None else None,
        "newer_base": based.newer,
        "allocation": planned.plan.profile.allocation,
        "budget_bytes": _limit(planned),
        "predicted_target_db": expected.target_db if planned.budget and not searched else None,
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
        "overrides": planned.plan.overrides,
        "groups": _groups(planned.plan),
    }


def _found(latest: Version | None, planned: Planned) -> float | None:
    """Return the target in dB that the same budget led to before; None if it did not."""
    target = latest.manifest.recipe.get("target_db") if latest and matches_plan(latest.manifest, planned) else None
    return target if isinstance(target, float) else None


def _groups(plan: ModelPlan) -> list[dict[str, object]]:
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for item in plan.tensors:
        groups.setdefault((item.decision.action, item.decision.reason), []).append(item)
    return [
        {
            "action": action,
            "reason": reason,
            "tensors": len(items),
            "weights": _weights(items),
            "bytes": sum(item.tensor.dense_bytes for item in items),
        }
        for (action, reason), items in groups.items()
    ]
