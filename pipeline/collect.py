"""Retention and garbage collection: which versions keep their names, and deleting what nothing refers to.

`retire` gives up names. `collect` marks and sweeps. It keeps

* every version that a live name or an alias refers to, or a name retired less than the grace period ago;
* every other version's manifest, shard record and blob written less than the grace period ago;
* all shard records and blobs (also of files) of the versions it keeps, and the blobs of the shard records it keeps;
* the reports of the newest `keep_runs` runs, and every report written less than the grace period ago.

The rest goes from the top down: tombstones of names, then manifests, then shard records, then blobs, each kind done
before the next begins; reports, to which nothing refers, come last. So an object is deleted only after everything that
referred to it, and a sweep that dies anywhere leaves no reference to what is gone; the next one takes up the rest.

The grace period counts by the store's clock. It is what readers live on: they hold no lease, and a version is there for
that long after its name was retired. Publishers rely on leases instead (`leases`): a sweep marks and deletes only while
no run is open, and none opens until it is over. So a shard of any age may be reused: it is either gone when the
publisher looks, or stays until its run has ended, and by then the new version refers to it. `publish` checks its blobs
under an open run of its own; a publisher that holds none while it encodes risks an error there, never a broken version.

A version that an alias or a name refers to but that cannot be read stops the collection before it deletes anything.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from birkhoff.pipeline.aliases import aliases
from birkhoff.pipeline.artifact import (
    NameRecord,
    ShardRecord,
    VersionManifest,
    blob_key,
    fetch_document,
    name_key,
    shard_key,
    version_key,
)
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.leases import Lease, sweeping
from birkhoff.pipeline.names import VERSION_NAME, names, number, read_name, retire_name, revive_name
from birkhoff.pipeline.publish import load_version, models
from birkhoff.pipeline.report import run_of
from birkhoff.pipeline.store import ObjectInfo, Store

Kind = Literal["name", "version", "shard", "blob", "run"]
KINDS: tuple[Kind, ...] = ("name", "version", "shard", "blob", "run")
"""In the order of deletion: referrers first."""

DEFAULT_GRACE = timedelta(days=7)
DEFAULT_KEEP_RUNS = 100
"""Runs whose reports stay, whatever their age."""

_THREADS = 8
"""Requests at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """An object that nothing refers to. `model` is None for shards, blobs and runs, which models share."""

    kind: Kind
    model: str | None
    info: ObjectInfo


@dataclass(slots=True, kw_only=True)
class Collection:
    """What a collection found: names it retired, objects it deleted, both only planned where `deleted` is off."""

    deleted: bool = False
    retired: list[tuple[str, str]] = field(default_factory=list)
    """(model, name)."""
    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[tuple[Kind, str | None], int] = field(default_factory=dict)
    """Objects that stay, by kind and model: every kind and model there is has its entry."""

    def rows(self) -> list[dict[str, object]]:
        """One row for each kind of object and model, in the order of deletion, under the keys of `--json`."""
        return [self._row(kind, model) for kind in KINDS for found, model in self.kept if found == kind]

    def _row(self, kind: Kind, model: str | None) -> dict[str, object]:
        sizes = [item.info.size for item in self.garbage if (item.kind, item.model) == (kind, model)]
        return {
            "kind": kind,
            "model": model,
            "retired": [name for owner, name in self.retired if kind == "name" and owner == model],
            "objects": len(sizes),
            "bytes": sum(sizes),
            "kept": self.kept[kind, model],
            "deleted": self.deleted,
        }


def retirable(store: Store, model: str, keep: int) -> list[str]:
    """Names beyond the newest `keep` that no alias points at, oldest first.

    Raises:
        ManifestError: `keep` is below 1.
        StoreError, IntegrityError: the store failed.
    """
    if keep < 1:
        raise ManifestError(f"keep: expected 1 version or more to keep of {model}, got {keep}")
    live = [name for name, _ in names(store, model)]
    held = {record.version for record in aliases(store, model).values()}
    return [name for name in live[:-keep] if name not in held]


def retire(store: Store, model: str, keep: int) -> list[str]:
    """Give up the names of the oldest versions beyond `keep`; returns them. The caller holds an open run or a sweep.

    Nothing is deleted: `collect` does that a grace period later. A name that an alias comes to point at meanwhile
    stays. Raises as `retirable`.
    """
    chosen = retirable(store, model, keep)
    for name in chosen:
        retire_name(store, model, name)
    held = {record.version for record in aliases(store, model).values()} if chosen else set()
    for name in held.intersection(chosen):
        revive_name(store, model, name)
    return [name for name in chosen if name not in held]


def collect(
    store: Store,
    *,
    grace: timedelta = DEFAULT_GRACE,
    keep: int | None = None,
    keep_runs: int = DEFAULT_KEEP_RUNS,
    delete: bool = False,
    wait: timedelta = timedelta(0),
) -> Collection:
    """Retire the versions of every model beyond `keep`, and delete what nothing refers to for longer than `grace`.

    Of reports, those beyond the newest `keep_runs` runs go, once they are older than `grace`.

    Runs that are open get the time `wait` to end, and new ones are held off meanwhile.

    Without `delete` the store is only read; meant for people: what others do meanwhile may fall between its readings.

    Raises:
        StoreError: a run is open (with `delete`), or the store failed.
        ArtifactNotFoundError, IntegrityError: a version that something refers to cannot be read.
        ManifestError: `keep` is below 1.
    """
    thinned = [] if keep is None else models(store)
    if not delete:
        chosen = {(model, name) for model in thinned for name in retirable(store, model, keep or 0)}
        return _Mark(store, datetime.now(UTC), grace, chosen, keep_runs).run(deleted=False)
    with sweeping(store, wait_seconds=wait.total_seconds()) as lease:
        chosen = {(model, name) for model in thinned for name in retire(store, model, keep or 0)}
        found = _Mark(store, lease.renew(), grace, chosen, keep_runs).run(deleted=True)
        _sweep(store, found.garbage, lease)
    return found


class _Mark:
    """Tells garbage from what stays, reading only."""

    def __init__(
        self, store: Store, now: datetime, grace: timedelta, retired: set[tuple[str, str]], keep_runs: int
    ) -> None:
        self._store, self._keep_runs = store, keep_runs
        self._now, self._young = now, now - grace
        self._retired = retired
        self._found = Collection()

    def run(self, *, deleted: bool) -> Collection:
        found = self._found
        found.deleted, found.retired = deleted, sorted(self._retired)
        by_model: dict[str, list[ObjectInfo]] = {}
        for info in self._store.list("models/"):
            by_model.setdefault(info.key.split("/")[1], []).append(info)
        kept = [manifest for model, objects in by_model.items() for manifest in self._versions(model, objects)]
        shards = {shard_key(shard.key) for manifest in kept for shard in manifest.shards}
        blobs = {blob_key(record.blob) for manifest in kept for record in manifest.stored}
        stay = self._judge("shard", None, self._store.list("shards/"), shards)
        # Records that no version refers to, too young to go, hold their blobs by themselves.
        records = _fetch(lambda key: fetch_document(self._store, ShardRecord, key), sorted(stay - shards))
        blobs |= {blob_key(record.blob) for record in records}
        self._judge("blob", None, self._store.list("blobs/"), blobs)
        self._reports()
        return found

    def _reports(self) -> None:
        """Judge the reports of runs, all files of a run alike; leases have no part in it."""
        reports = [(run, info) for info in self._store.list("runs/") if (run := run_of(info.key))]
        known = sorted({run for run, _ in reports})
        newest = set(known[max(0, len(known) - self._keep_runs) :])
        stay = {info.key for run, info in reports if run in newest}
        if reports:
            self._judge("run", None, (info for _, info in reports), stay)

    def _versions(self, model: str, objects: list[ObjectInfo]) -> list[VersionManifest]:
        """Judge a model's names and versions; returns the manifests that stay."""
        prefix = f"models/{model}/versions/"
        reached = {version_key(model, digest) for digest in self._reached(model, objects)}
        found = [info for info in objects if info.key.startswith(prefix)]
        manifests = [info for info in found if info.key.count("/") == prefix.count("/") + 1]
        held = reached | {info.key for info in manifests if info.modified > self._young}
        # Signatures stay and go with their manifest.
        beside = {info.key for info in found if version_key(model, info.key.removeprefix(prefix).split("/")[0]) in held}
        self._judge("version", model, found, beside, young=False)
        # One that is reached and not there stops everything here.
        digests = sorted(key.removeprefix(prefix).split("/")[0] for key in held)
        return _fetch(lambda digest: load_version(self._store, model, digest), digests)

    def _reached(self, model: str, objects: list[ObjectInfo]) -> set[str]:
        """Digests that aliases and names of a model refer to, the names judged."""
        pointers = aliases(self._store, model).values()
        digests, pointed = {state.digest for state in pointers}, {state.version for state in pointers}
        taken = {name: info for info in objects if (name := _name(model, info.key))}
        records = _fetch(lambda name: read_name(self._store, model, name), list(taken))
        highest = max(taken, key=number, default=None)
        stay = {name_key(model, highest)} if highest else set()
        for name, record in zip(taken, records, strict=True):
            if name in pointed or not self._expired(model, name, record, taken[name]):
                digests.add(record.digest)
                stay.add(taken[name].key)
        self._judge("name", model, taken.values(), stay, young=False)
        return digests

    def _expired(self, model: str, name: str, record: NameRecord, info: ObjectInfo) -> bool:
        """Whether a name was retired longer than the grace period ago; in a dry run some would be retired now."""
        if record.retired is None:
            return (model, name) in self._retired and self._now <= self._young
        return info.modified <= self._young

    def _judge(
        self, kind: Kind, model: str | None, objects: Iterable[ObjectInfo], reached: set[str], *, young: bool = True
    ) -> set[str]:
        """Sort objects into garbage and kept, those within the grace period kept if `young`; returns the kept keys."""
        stay: set[str] = set()
        for info in objects:
            if info.key in reached or (young and info.modified > self._young):
                stay.add(info.key)
            else:
                self._found.garbage.append(Garbage(kind=kind, model=model, info=info))
        self._found.kept[kind, model] = len(stay)
        return stay


def _name(model: str, key: str) -> str | None:
    """`v3` of a name's key, None for another key."""
    prefix = f"models/{model}/names/"
    name = key.removeprefix(prefix).removesuffix(".json")
    return name if key.startswith(prefix) and VERSION_NAME.fullmatch(name) else None


def _sweep(store: Store, garbage: list[Garbage], lease: Lease) -> None:
    """Delete, one kind after the other. Raises StoreError, also where the lease was lost on the way."""

    def delete(item: Garbage) -> None:
        lease.check()
        store.delete(item.info.key)

    for kind in KINDS:
        _fetch(delete, [item for item in garbage if item.kind == kind])


def _fetch(read: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Results of `read` for every item, in their order, a few at a time. All have ended when it returns or raises."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, items))
