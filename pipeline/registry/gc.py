"""Retention and garbage collection: retire old version names, and delete objects that nothing refers to.

`retire` retires names. `collect` buries names whose grace period is over, marks what is in use, and sweeps the rest. It
keeps

* versions that an alias or a name refers to, if the name is live or was retired within the grace period;
* manifests, shard records and blobs that were written or touched within the grace period;
* the shard records and blobs of every version it keeps (base containers and sidecar files included), and the blobs that
  kept shard records need;
* the statistics that a kept version was made with, those within the grace period, and the Hessians of both;
* the reports of the newest `keep_runs` runs, and reports written within the grace period.

Objects are deleted referrers first: names, manifests, shard records and statistics, blobs; then reports, which nothing
refers to. A kind is finished before the next begins, so a sweep that dies leaves no dangling reference, and the next
sweep continues.

The grace period counts by the store's clock and protects readers, who hold no lease: a version stays readable for that
long after its name was retired. Publishers hold leases, which keep a sweep from running beside them. A publisher may
lose its lease unnoticed; the order of steps in PROTOCOL.md then keeps versions whole: a sweep announces what it
condemns (`fencing`), reads names and aliases again, and deletes only what is still unreferenced and untouched, under a
permit that others can revoke.

If a version that a name or an alias refers to cannot be read, the collection stops before it deletes anything.
Unreadable statistics do not stop it: no reader needs them, and the next run takes them again.
"""

import contextlib
import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    IntegrityError,
    ManifestError,
    ObjectNotFoundError,
    StoreError,
)
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.registry import clock
from birkhoff.pipeline.registry.aliases import aliases, fence
from birkhoff.pipeline.registry.documents import (
    NOTHING,
    AliasRecord,
    NameRecord,
    ShardRecord,
    StatisticsRecord,
    VersionManifest,
    blob_key,
    fetch_document,
    name_key,
    shard_key,
    version_key,
)
from birkhoff.pipeline.registry.fencing import BATCH, Sweep, read_sweep
from birkhoff.pipeline.registry.leases import Lease, open_run, sweeping
from birkhoff.pipeline.registry.names import (
    VERSION_NAME,
    bury,
    live_name,
    names,
    number,
    read_name,
    read_tagged,
    remember_given,
    retire_name,
    revive_name,
)
from birkhoff.pipeline.registry.parallel import each
from birkhoff.pipeline.registry.versions import load_version, models
from birkhoff.pipeline.run_ids import run_of
from birkhoff.pipeline.store.base import ObjectInfo, Store

log: logging.Logger = logging.getLogger("birkhoff.gc")

Kind = Literal["name", "version", "shard", "statistics", "blob", "run"]
KINDS: tuple[Kind, ...] = ("name", "version", "shard", "statistics", "blob", "run")
"""In the order of deletion: referrers first."""

DEFAULT_GRACE = timedelta(days=7)
DEFAULT_KEEP_RUNS = 100
"""Number of newest runs whose reports are kept, whatever their age."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """An object that nothing refers to. `model` is None for objects that models share: shards, statistics, blobs,
    runs."""

    kind: Kind
    model: str | None
    info: ObjectInfo


@dataclass(slots=True, kw_only=True)
class Collection:
    """The result of a collection: retired names and deleted objects. Without `deleted` both are only planned."""

    deleted: bool = False
    retired: list[tuple[str, str]] = field(default_factory=list)
    """(model, name)."""
    garbage: list[Garbage] = field(default_factory=list)
    kept: dict[tuple[Kind, str | None], int] = field(default_factory=dict)
    """Number of kept objects by kind and model. Every kind and model in the store has an entry."""

    def rows(self) -> list[dict[str, object]]:
        """Return one row per kind of object and model, in the order of deletion, under the keys of `--json`."""
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
    """Return the names beyond the newest `keep` that no alias points at, oldest first.

    Raises:
        ManifestError: `keep` is below 1.
        StoreError, IntegrityError: The store failed.
    """
    if keep < 1:
        raise ManifestError(f"keep: expected 1 version or more to keep of {model}, got {keep}")
    live = [name for name, _ in names(store, model)]
    held = {record.version for record in aliases(store, model).values()}
    return [name for name in live[:-keep] if name not in held]


def retire(store: Store, model: str, keep: int) -> list[str]:
    """Retire the names of the oldest versions beyond `keep`, and return them. The caller holds an open run or a sweep.

    Nothing is deleted: `collect` does that once the grace period is over. A name stays if an alias is moved to it
    meanwhile. Raises what `retirable` raises.
    """
    chosen = retirable(store, model, keep)
    for name in chosen:
        retire_name(store, model, name)
    held = {record.version for record in aliases(store, model).values()} if chosen else set()
    for name in sorted(held.intersection(chosen)):
        revive_name(store, model, name)
    return [name for name in chosen if name not in held]


def remove_version(store: Store, model: str, name: str) -> NameRecord:
    """Retire one name and return its record. The first collection after the grace period deletes the version.

    Raises:
        ArtifactNotFoundError: There is no such version, or it is retired.
        AliasError: An alias points at it.
        StoreError, IntegrityError: The store failed.
    """

    def check() -> None:
        held = [alias for alias, state in aliases(store, model).items() if state.version == name]
        if held:
            raise AliasError(
                f"{store.url}: {name} of {model} is what {', '.join(held)} points at; move the alias first with "
                f"`promote` or `rollback`, or take it away with `{hint('remove', f'{model}@{held[0]}')}`"
            )

    with open_run(store):
        record = live_name(store, model, name)
        check()
        retire_name(store, model, name)
        try:
            check()
        except AliasError:  # an alias was moved there meanwhile
            revive_name(store, model, name)
            raise
        return record


def collect(
    store: Store,
    *,
    grace: timedelta = DEFAULT_GRACE,
    keep: int | None = None,
    keep_runs: int = DEFAULT_KEEP_RUNS,
    delete: bool = False,
    wait: timedelta = timedelta(0),
) -> Collection:
    """Retire each model's versions beyond `keep`, and delete what nothing has referred to for longer than `grace`.

    Without `delete` the store is only read. The result is then an estimate for people, because others may write
    meanwhile.

    Args:
        store: The store.
        grace: Objects written or retired within this time stay.
        keep: Versions to keep per model; None retires none.
        keep_runs: Reports to keep; older ones are deleted once they are older than `grace`.
        delete: Retire and delete.
        wait: Time for open runs to end; new runs are held off meanwhile.

    Raises:
        StoreError: With `delete`, a run is open; or the store failed.
        ArtifactNotFoundError, IntegrityError: A version that something refers to cannot be read.
        ManifestError: `keep` is below 1.
    """
    thinned = [] if keep is None else models(store)
    pointers = _Pointers(store)
    if not delete:
        chosen = {(model, name) for model in thinned for name in retirable(store, model, keep or 0)}
        return _Mark(store, pointers, clock.utc(), grace, chosen, keep_runs, deletes=False).run()
    with sweeping(store, wait_seconds=wait.total_seconds()) as lease:
        chosen = {(model, name) for model in thinned for name in retire(store, model, keep or 0)}
        now = lease.renew()
        _bury_expired(store, pointers, now - grace)
        mark = _Mark(store, pointers, now, grace, chosen, keep_runs, deletes=True)
        found = mark.run()
        _sweep(store, mark, found, lease)
    return found


@dataclass(slots=True)
class _Model:
    """Everything that points at the versions of one model."""

    names: dict[str, tuple[ObjectInfo, NameRecord]] = field(default_factory=dict)
    aliases: dict[str, AliasRecord] = field(default_factory=dict)
    others: list[ObjectInfo] = field(default_factory=list)
    """Manifests and signatures."""

    @property
    def pointed(self) -> set[str]:
        """Names that an alias points at."""
        return {record.version for record in self.aliases.values()}

    def digests(self, *, without: Container[str] = ()) -> set[str]:
        """Return the digests that aliases and names refer to, except the names in `without`."""
        held = {record.digest for name, (_, record) in self.names.items() if name not in without and not record.dead}
        return held | {record.digest for record in self.aliases.values()}


class _Pointers:
    """Names and aliases of every model. Each is read again only if it has changed since the last look."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[str, NameRecord | AliasRecord]] = {}
        """Tag in the listing and record, by key."""

    def look(self) -> dict[str, _Model]:
        """Return everything below `models/`, by model."""
        objects = list(self._store.list("models/"))
        pointers = [info for info in objects if info.key.split("/")[2] in ("names", "aliases")]
        stale = [info for info in pointers if self._known.get(info.key, ("", None))[0] != info.tag]
        for info, record in zip(stale, each(self._read, stale), strict=True):
            if record is not None:
                self._known[info.key] = (info.tag, record)
        found: dict[str, _Model] = {}
        for info in objects:
            _, model, kind, *rest = info.key.split("/")
            entry, name = found.setdefault(model, _Model()), rest[-1].removesuffix(".json") if rest else ""
            record = self._known.get(info.key, ("", None))[1]
            if isinstance(record, NameRecord):
                entry.names[name] = (info, record)
            elif isinstance(record, AliasRecord) and record.digest != NOTHING:
                entry.aliases[name] = record
            elif kind == "versions":
                entry.others.append(info)
        return found

    def _read(self, info: ObjectInfo) -> NameRecord | AliasRecord | None:
        _, model, kind, *rest = info.key.split("/")
        name = "/".join(rest).removesuffix(".json")
        try:
            if kind == "names" and VERSION_NAME.fullmatch(name):
                return read_name(self._store, model, name)
            if kind == "aliases" and info.key.endswith(".json"):
                return fetch_document(self._store, AliasRecord, info.key)
        except ObjectNotFoundError:
            self._known.pop(info.key, None)
        return None


def _bury_expired(store: Store, pointers: _Pointers, young: datetime) -> None:
    """Bury names that were retired before `young`, unless an alias points at them."""
    for model, state in pointers.look().items():
        expired = {
            name: (info, record)
            for name, (info, record) in state.names.items()
            if not record.live and not record.dead and info.modified <= young
        }
        if not expired:
            continue
        pointed = fence(store, model)
        resolved = [name for name, (_, record) in expired.items() if not record.never_live and name not in pointed]
        if resolved:  # before any of their records can be deleted
            remember_given(store, model, resolved)
        for name, (info, record) in expired.items():
            if name in pointed:
                revive_name(store, model, name)
            else:
                bury(store, model, name, record, info.tag)


def _needed(manifest: VersionManifest) -> set[str]:
    """Return the keys of the blobs that reading a version takes.

    They include containers of its base. The base may lose its names and its manifest while differences to it remain.
    """
    return {blob_key(record.blob) for record in manifest.stored}


class _Mark:
    """Separates garbage from what stays."""

    def __init__(
        self,
        store: Store,
        pointers: _Pointers,
        now: datetime,
        grace: timedelta,
        retired: set[tuple[str, str]],
        keep_runs: int,
        *,
        deletes: bool,
    ) -> None:
        self._store, self._pointers, self._keep_runs = store, pointers, keep_runs
        self._now, self._young = now, now - grace
        self._retired, self._deletes = retired, deletes
        self._found = Collection()
        self._held: set[tuple[str, str]] = set()
        """(model, digest) that something refers to."""
        self._late: set[str] = set()
        """Keys, and folders of versions, that versions named since the mark need."""

    def run(self) -> Collection:
        """Judge every object."""
        found = self._found
        found.deleted, found.retired = self._deletes, sorted(self._retired)
        kept = [manifest for model, state in self._pointers.look().items() for manifest in self._versions(model, state)]
        shards = {shard_key(shard.key) for manifest in kept for shard in manifest.shards}
        blobs = {key for manifest in kept for key in _needed(manifest)}
        stay = self._judge("shard", None, self._store.list("shards/"), shards)
        # Young records that no version refers to keep their blobs, too.
        records = each(lambda key: fetch_document(self._store, ShardRecord, key), sorted(stay - shards))
        blobs |= {blob_key(blob) for record in records for blob in record.needs}
        blobs |= self._statistics({key for manifest in kept for key in manifest.statistics_keys})
        self._judge("blob", None, self._store.list("blobs/"), blobs)
        self._reports()
        return found

    def look_again(self) -> None:
        """Find versions that were named since the last look, so that `reached` knows what they need."""
        for model, state in self._pointers.look().items():
            for digest in sorted(state.digests()):
                if (model, digest) in self._held:
                    continue
                manifest = self._manifest(model, digest)
                if manifest is None:
                    continue
                self._held.add((model, digest))
                self._late.add(version_key(model, digest).rpartition("/")[0])
                self._late.update(shard_key(shard.key) for shard in manifest.shards)
                self._late.update(_needed(manifest))
                for key in manifest.statistics_keys:
                    self._late.update((key, *self._hessians(key)))

    def reached(self, key: str) -> bool:
        """Return whether an object that was garbage at the mark is needed now."""
        return key in self._late or "/".join(key.split("/")[:4]) in self._late

    def _statistics(self, reached: set[str]) -> set[str]:
        """Judge the statistics of models; return the keys of the blobs that the kept ones need."""
        objects = list(self._store.list("statistics/"))
        stay = self._judge("statistics", None, objects, reached) if objects else set()
        return {blob for blobs in each(self._hessians, sorted(stay)) for blob in blobs}

    def _hessians(self, key: str) -> list[str]:
        """Return the keys of the blobs that statistics refer to; none if they are gone or unreadable."""
        try:
            record = fetch_document(self._store, StatisticsRecord, key)
        except ObjectNotFoundError:
            return []
        except IntegrityError as error:
            log.warning("%s; a run measures them again", error)
            return []
        return [blob_key(hessian.blob) for hessian in record.hessians.values()]

    def _reports(self) -> None:
        """Judge the reports of runs; all files of a run share one fate. Leases are not considered."""
        reports = [(run, info) for info in self._store.list("runs/") if (run := run_of(info.key))]
        known = sorted({run for run, _ in reports})
        newest = set(known[max(0, len(known) - self._keep_runs) :])
        stay = {info.key for run, info in reports if run in newest}
        if reports:
            self._judge("run", None, (info for _, info in reports), stay)

    def _versions(self, model: str, state: _Model) -> list[VersionManifest]:
        """Judge a model's names and versions; return the manifests that stay."""
        digests = self._reached(model, state)
        manifests = {digest: found for digest in sorted(digests) if (found := self._manifest(model, digest))}
        self._held.update((model, digest) for digest in manifests)
        prefix = f"models/{model}/versions/"
        of_version = {info.key: info.key.removeprefix(prefix).split("/")[0] for info in state.others}
        young = {of_version[info.key] for info in state.others if self._is_young_manifest(info)}
        held = young | manifests.keys()
        # Signatures stay and go with their manifest.
        stay = {key for key, digest in of_version.items() if digest in held}
        self._judge("version", model, state.others, stay, young=False)
        others = each(lambda digest: self._young_manifest(model, digest), sorted(young - manifests.keys()))
        return [*manifests.values(), *(found for found in others if found is not None)]

    def _is_young_manifest(self, info: ObjectInfo) -> bool:
        return info.key.endswith("/manifest.json") and info.key.count("/") == 4 and info.modified > self._young

    def _manifest(self, model: str, digest: str) -> VersionManifest | None:
        """Return the manifest of a version that is referred to; None if only claims refer to it, or nothing does any
        more.

        A claim without a manifest is buried; its publisher, if it is alive, notices and claims again.

        Raises:
            ArtifactNotFoundError, IntegrityError: It cannot be read, which stops the collection.
        """
        try:
            return load_version(self._store, model, digest)
        except ArtifactNotFoundError:
            claims = self._claims(model, digest)  # another collection may have been faster
            if claims is None:
                raise
        if not self._deletes or all(bury(self._store, model, *claim) for claim in claims):
            return None
        return load_version(self._store, model, digest)  # its publisher has made a claim live, so the version is whole

    def _claims(self, model: str, digest: str) -> list[tuple[str, NameRecord, str]] | None:
        """Return (name, record, tag) of each claim on a version, read again; None if anything but claims refers to
        it."""
        state, found = self._pointers.look().get(model, _Model()), []
        for name, (_, record) in state.names.items():
            if record.digest == digest:
                with contextlib.suppress(ObjectNotFoundError):
                    now, tag = read_tagged(self._store, model, name)
                    if now.digest == digest:
                        found.append((name, now, tag))
        pointed = any(record.digest == digest for record in aliases(self._store, model).values())
        return None if pointed or not all(record.claimed for _, record, _ in found) else found

    def _young_manifest(self, model: str, digest: str) -> VersionManifest | None:
        """Return the manifest of an unreferenced version, if it is still there."""
        try:
            return load_version(self._store, model, digest)
        except ArtifactNotFoundError:
            return None

    def _reached(self, model: str, state: _Model) -> set[str]:
        """Judge a model's names; return the digests that its aliases and remaining names refer to."""
        highest = max(state.names, key=number, default=None)
        gone = {
            name
            for name, (info, record) in state.names.items()
            if record.dead
            or (not self._deletes and name not in state.pointed and self._expired(model, name, info, record))
        }
        infos = [info for info, _ in state.names.values()]
        stay = {name_key(model, name) for name in state.names if name not in gone or name == highest}
        self._judge("name", model, infos, stay, young=False)
        return state.digests(without=gone)

    def _expired(self, model: str, name: str, info: ObjectInfo, record: NameRecord) -> bool:
        """Return whether a deleting collection would bury a name now, or retire it first."""
        if record.live:
            return (model, name) in self._retired and self._now <= self._young
        return info.modified <= self._young

    def _judge(
        self, kind: Kind, model: str | None, objects: Iterable[ObjectInfo], reached: set[str], *, young: bool = True
    ) -> set[str]:
        """Sort objects into garbage and kept ones, and return the kept keys. With `young` the grace period protects
        objects."""
        stay: set[str] = set()
        for info in objects:
            if info.key in reached or (young and info.modified > self._young):
                stay.add(info.key)
            else:
                self._found.garbage.append(Garbage(kind=kind, model=model, info=info))
        self._found.kept[kind, model] = len(stay)
        return stay


def _sweep(store: Store, mark: _Mark, found: Collection, lease: Lease) -> None:
    """Delete what is still unreferenced and untouched, kind by kind; what survives is removed from `found.garbage`.

    Raises:
        StoreError: The store failed, the lease was lost, or somebody has ended this collection.
    """
    sweep = Sweep(store, lease)

    def delete(item: Garbage) -> bool:
        lease.check()
        if mark.reached(item.info.key) or _touched(store, item.info):
            return False
        sweep.delete(item.info.key)
        return True

    order = sorted(found.garbage, key=lambda item: KINDS.index(item.kind))
    found.garbage = []
    try:
        left = None if order else read_sweep(store)
        if left is not None and (left[0].state == "sweeping" or left[0].keys):
            sweep.condemn([])  # ends what an older collection has left
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            sweep.condemn([item.info.key for item in batch])
            mark.look_again()
            for kind in KINDS:
                items = [item for item in batch if item.kind == kind]
                for item, gone in zip(items, each(delete, items), strict=True):
                    if gone:
                        found.garbage.append(item)
                    else:
                        found.kept[kind, item.model] += 1
    except BaseException:
        with contextlib.suppress(StoreError):  # the first error is the one to report
            sweep.close(failed=True)
        raise
    sweep.close()


def _touched(store: Store, info: ObjectInfo) -> bool:
    """Return whether an object has changed since it was listed, so that somebody uses it again."""
    try:
        now = store.head(info.key)
    except ObjectNotFoundError:
        return False
    return (now.tag, now.modified) != (info.tag, info.modified)
