"""Find the base of a model, to which its tensors are stored as differences: the one named, or the nearest in the
store."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from birkhoff.codec.container import CodedTensor, Entry, fits
from birkhoff.codec.errors import FormatError
from birkhoff.codec.profiles import TARGET_DB_RANGE
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.readers import StoredArtifact, heads
from birkhoff.pipeline.checkpoint.digests import known_digest
from birkhoff.pipeline.checkpoint.open import read_tensor
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ManifestError
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.plan.estimate import Based
from birkhoff.pipeline.plan.grid import Grid
from birkhoff.pipeline.plan.manifest import AUTO, Manifest
from birkhoff.pipeline.plan.models import Planned, matches_plan
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.registry.documents import BaseRecord, ShardRecord
from birkhoff.pipeline.registry.versions import Version, is_fixed, is_whole, latest_version, models, resolve
from birkhoff.pipeline.shard.task import BaseShard, TensorPlan
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.bases")

SAMPLED = 4
"""Tensors of a model that are compared with a base's, spread over all sizes."""

WORTH = 0.95
"""Largest size relative to direct coding, at which a base found by `auto` is taken."""

_EVERY = 3
"""Every so manyth target of a budget's grid is asked for its share."""

_USUAL_DB = 36.0
"""Target assumed for an estimate, if a tensor's target is the published codec's error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseVersion:
    """A version as a base: its shards, and each tensor's entry with the index of its shard."""

    artifact: StoredArtifact
    record: BaseRecord
    entries: dict[str, tuple[Entry, int]]

    def shards_for(self, planned: Planned) -> tuple[BaseShard, ...]:
        """Return its shards that have tensors fitting a model's, with these tensors."""
        names: dict[int, list[str]] = {}
        for plan in self.fitting(planned):
            names.setdefault(self.entries[plan.tensor.name][1], []).append(plan.tensor.name)
        found = self.artifact.manifest.shards
        return tuple(
            BaseShard(key=found[index].key, blob=found[index].blob, bytes=found[index].bytes, tensors=tuple(held))
            for index, held in sorted(names.items())
        )

    def fitting(self, planned: Planned) -> list[TensorPlan]:
        """Return a model's coded tensors whose name and shape this base has."""
        return [plan for plan in planned.plan.tensors if plan.decision.action == "coded" and self._fits(plan)]

    def _fits(self, plan: TensorPlan) -> bool:
        with LOADING:
            from birkhoff.codec.pairs import matrix_shape

        entry, _ = self.entries.get(plan.tensor.name, (None, 0))
        return entry is not None and fits(entry, plan.tensor.shape, matrix_shape(plan.tensor.shape)[1])

    def tensor(self, name: str) -> CodedTensor:
        """Return a stored tensor. Raises IntegrityError."""
        shard: ShardRecord = self.artifact.manifest.shards[self.entries[name][1]]
        return next(coded for coded in self.artifact.coded_of(shard) if coded.name == name)

    def on(self, planned: Planned) -> Planned:
        """Return a model with this base."""
        return planned.on(self.record, self.shards_for(planned))


def open_base(store: Store, version: Version) -> BaseVersion:
    """Return a version as a base, with its headers read.

    Raises:
        ManifestError: Its tensors are differences themselves.
        FormatError, StoreError, IntegrityError: It cannot be read.
    """
    manifest = version.manifest
    if is_derived(version):
        of = manifest.base.label if manifest.base is not None else "another version"
        raise ManifestError(
            f"base: {version.reference} is itself a difference, to {of}, and differences have no chains; name {of}"
        )
    artifact = StoredArtifact(store, version)
    entries = {entry.name: (entry, index) for index, head in enumerate(heads(artifact)) for entry in head.entries}
    return BaseVersion(artifact=artifact, record=record_of(version), entries=entries)


def is_derived(version: Version) -> bool:
    """Whether tensors of a version are differences, so that it can be no base."""
    return any(shard.bases for shard in version.manifest.shards)


def record_of(version: Version) -> BaseRecord:
    """What a manifest says of a version that is its base."""
    return BaseRecord(model=version.model, version=version.name, digest=version.digest)


def find_base(store: Store, planned: Planned, before: Version | None, *, again: bool = False) -> BaseVersion | None:
    """Return the base of a planned model in the store; None without one.

    The choice of `auto` is kept for later runs, so that a version does not change with what others publish; `again`
    searches again. `before` is the model's latest version.

    Raises:
        ArtifactNotFoundError: There is no such version.
        SourceError: The source cannot be read for the comparison.
        ManifestError, FormatError, IntegrityError, StoreError: As `open_base`.
    """
    reference = planned.entry.base
    if reference is None:
        return None
    if reference != AUTO:
        try:
            return open_base(store, resolve(store, reference))
        except ArtifactNotFoundError as error:
            raise ArtifactNotFoundError(f"base: {error}") from None
    if before is not None and not again:
        if before.manifest.base is None and matches_plan(before.manifest, planned):
            return None
        if before.manifest.base is not None and (held := kept_base(store, before.manifest.base)) is not None:
            return held
    return best_base(store, planned)


def forecast_base(manifest: Manifest, store: Store | None, planned: Planned, before: Version | None) -> Based:
    """Return what a run would find as a model's base, for `plan`. Raises what `find_base` raises."""
    entry = planned.entry
    if entry.base is None:
        return Based(planned=planned)
    within = manifest.base_of(entry)
    if within is not None:
        version = latest_version(store, within.name) if store is not None else None
        note = f"its size follows from {within.name}, which is compressed first"
        if version is None or store is None:
            return Based(planned=planned, label=within.name, note=note)
        found: BaseVersion | None = open_base(store, version)
    elif store is None:
        raise ArtifactNotFoundError(f"base: {entry.base!r} is not a model of the manifest, and there is no store")
    else:
        found = find_base(store, planned, before)
    if found is None:
        note = "no version of the store is so near that differences to it would save anything"
        return Based(planned=planned, note=note)
    based = Based(planned=found.on(planned), label=found.record.label, shares=shares(found, planned))
    newer = None if store is None else newer_base(store, planned, before, found.record)
    if before is None or before.manifest.base is None or newer is None:
        return based
    stays = planned.on(before.manifest.base, based.planned.plan.bases)
    if not matches_plan(before.manifest, stays) or known_digest(planned.checkpoint) not in (
        None,
        before.manifest.source.sha256,
    ):
        return based  # it is made again anyhow, and then with what its base is now
    return replace(based, planned=stays, label=before.manifest.base.label, newer=newer.label)


def newer_base(store: Store, planned: Planned, before: Version | None, now: BaseRecord | None) -> BaseRecord | None:
    """What a model's base means by now, if its latest version is a difference to an older version of the same.

    Promoting a base, or publishing another version of it, changes no version that is a difference to it. Only a
    manifest that names another model, or one version by its name or digest, asks for another. `now` is the base that
    the manifest's words lead to.
    """
    held, reference = before.manifest.base if before is not None else None, planned.entry.base
    if held is None or reference is None:
        return None
    if reference == AUTO:  # which keeps to what it has found until it is asked to look again
        newest = latest_version(store, held.model)
        now = None if newest is None or is_derived(newest) else record_of(newest)
    elif is_fixed(reference):
        return None
    return now if now is not None and now.model == held.model and now.digest != held.digest else None


def kept_base(store: Store, record: BaseRecord) -> BaseVersion | None:
    """Return the base that a version was made with; None if it is gone or incomplete."""
    try:
        version = resolve(store, f"{record.model}@{record.digest}")
    except ArtifactNotFoundError:
        return None
    return open_base(store, version) if is_whole(store, version.manifest) else None


def best_base(store: Store, planned: Planned) -> BaseVersion | None:
    """Return the newest version of another model with the smallest differences; None if none saves enough.

    Names and shapes tell which models can be a base, a few tensors of each how near they are. One that cannot be read
    is named in a warning, and passed over.

    Raises SourceError, StoreError: the source or the store cannot be read.
    """
    found: list[tuple[float, str, BaseVersion]] = []
    for model in models(store):
        interrupt.check()
        if model == planned.entry.name:
            continue
        try:
            version = latest_version(store, model)
            base = None if version is None or is_derived(version) else open_base(store, version)
            if base is not None and base.fitting(planned):
                found.append((share(base, planned), model, base))
        except (ArtifactNotFoundError, FormatError, IntegrityError) as error:
            log.warning("%s: %s is no base, for it cannot be read: %s", planned.entry.name, model, error)
    best = min(found, default=None, key=lambda item: item[:2])
    return best[2] if best is not None and best[0] <= WORTH else None


def share(base: BaseVersion, planned: Planned) -> float:
    """Estimate from a few tensors the size of the coded tensors as differences, relative to direct coding.

    Under a budget it is that at the target of its profile. Raises SourceError, and as `open_base`.
    """
    return _shares(base, planned, [planned.plan])[0]


def shares(base: BaseVersion, planned: Planned) -> tuple[tuple[float, float], ...]:
    """The same by the model's target in dB: of a budget at those that it may lead to. Raises as `share`."""
    if planned.budget is None:
        return ((planned.plan.profile.target_db or 0.0, share(base, planned)),)
    targets = Grid.of(planned.plan.profile).knots[::_EVERY]
    return tuple(zip(targets, _shares(base, planned, [planned.plan.at(db) for db in targets]), strict=True))


def _shares(base: BaseVersion, planned: Planned, plans: Sequence[ModelPlan]) -> list[float]:
    """The share under each of some plans of the same tensors."""
    with LOADING:
        from birkhoff.codec.difference.encode import path_of
        from birkhoff.codec.difference.find import estimates
        from birkhoff.codec.pairs import matrix_shape
        from birkhoff.codec.tensor import lattice_of

    fitting = base.fitting(planned)
    whole = sum(math.prod(plan.tensor.shape) for plan in planned.plan.tensors if plan.decision.action == "coded")
    covered = sum(math.prod(plan.tensor.shape) for plan in fitting)
    smaller, direct = [0.0] * len(plans), [0.0] * len(plans)
    decided = [{item.tensor.name: item.decision for item in plan.tensors} for plan in plans]
    for plan in _spread(fitting):
        interrupt.check()
        name, coded = plan.tensor.name, base.tensor(plan.tensor.name)
        matrix = read_tensor(plan.tensor).reshape(matrix_shape(plan.tensor.shape))
        low, high = TARGET_DB_RANGE
        targets = [min(max(low, decisions[name].target_db or _USUAL_DB), high) for decisions in decided]
        path = plan.decision.path
        found = estimates(matrix, lattice_of(coded), targets, path=path, base_path=path_of(coded))
        for at, bits in enumerate(found):
            if math.isfinite(bits[1]):
                fixed = (decided[at][name].target_db or 0.0) > high  # in fixed point there is no difference
                smaller[at] += matrix.numel() * (bits[1] if fixed else min(bits))
                direct[at] += matrix.numel() * bits[1]
    part = covered / max(1, whole)
    return [1 - part * (1 - least / most) if most else 1.0 for least, most in zip(smaller, direct, strict=True)]


def _spread(plans: Sequence[TensorPlan]) -> Iterator[TensorPlan]:
    """Yield some tensors of all sizes, including the largest."""
    ordered = sorted(plans, key=lambda plan: -math.prod(plan.tensor.shape))
    return islice(ordered, 0, None, max(1, -(-len(ordered) // SAMPLED)))
