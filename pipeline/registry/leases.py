"""Leases: publishers and garbage collection announce themselves, so that they do not run at the same time.

A publisher relies on objects that nothing refers to yet: shards of an earlier run, a blob it found in the store.
Garbage collection deletes such objects. Leases keep the two apart, which saves work but is not the safeguard: a paused
holder may have lost its lease without knowing. `fencing` keeps versions whole even then; see PROTOCOL.md.

1. Each holder first writes an object of its own: `runs/open/<id>.json` or `runs/sweep/<id>.json`.
2. Then it looks for the others. A publisher that finds a sweep withdraws its lease, waits until the sweep is over, and
   starts again. A sweep that finds another lease gives up without deleting anything; or it keeps its lease, which holds
   off new runs, and waits for those that were there first. So overlapping runs cannot starve it.

A listing shows every object written before it began. Of two that start together, at least one therefore sees the other.
Publishers do not exclude each other, except runs of one schedule (`schedule_lock`), which also announce themselves
under `runs/turn/`.

A thread renews a lease while its holder lives. It counts for `LEASE_SECONDS` after its last renewal, by the store's
clock: the object's `modified` time is compared with that of the reader's own lease, so machines' clocks need not agree.
A lease dated after the store's present time (its clock was set back) counts until it was seen unchanged for that long.
The holder counts from before each renewal was sent, the others from its arrival plus `SLACK_SECONDS`: so the holder
learns that its lease expired before anyone else does. A holder that was stopped for longer, by a suspended machine or a
lost connection, has lost its lease for good, and `Lease.check` raises.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime, timedelta
from types import MappingProxyType

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.errors import BusyError, ObjectNotFoundError, StoreError
from birkhoff.pipeline.interrupt import Interrupted
from birkhoff.pipeline.registry import clock
from birkhoff.pipeline.registry.documents import utc_now
from birkhoff.pipeline.store.base import ObjectInfo, Store

log: logging.Logger = logging.getLogger("birkhoff.leases")

LEASE_SECONDS = 60.0
"""Seconds that a lease counts after its last renewal, and so the time that a killed process holds up others."""

RENEWALS = 4
"""Renewals within that time: three in a row may fail."""

SLACK_SECONDS = 2.0
"""Seconds of tolerance, because stores give times in whole seconds."""

POLL_SECONDS = 0.5
"""Seconds between two looks of a waiting process."""

_MAX_LEASE_BYTES = 4096
_OPEN, _SWEEP, _TURN = "runs/open/", "runs/sweep/", "runs/turn/"


class Lease:
    """The announcement that a process is at work in a store. `open_run` and `sweeping` create it."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.key: str = f"{prefix}{uuid.uuid4().hex}.json"
        self._store = store
        self._facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}
        self._renewals = 0
        self._renewed: float | None = None
        self._lost = False
        self._lock = threading.Lock()

    def renew(self) -> datetime:
        """Write the lease again and return the store's time. Raises StoreError."""
        with self._lock:
            sent = clock.seconds()
            self._renewals += 1  # each renewal must change the object's tag
            self._store.put(self.key, json.dumps({**self._facts, "renewals": self._renewals}).encode())
            self._lost = self._lost or self._over()
            self._renewed = sent
        return self._store.head(self.key).modified

    def check(self) -> None:
        """Raise StoreError if the lease has expired, because objects that the holder relied on may be gone."""
        if self._lost or self._over():
            raise StoreError(
                f"{self._store.url}: lease {self.key} ran out, as this process was stopped or cut off from the store "
                f"for more than {LEASE_SECONDS:g} s; run the same command again"
            )

    def _over(self) -> bool:
        return self._renewed is not None and clock.seconds() - self._renewed > LEASE_SECONDS


_mine: ContextVar[Mapping[str, Lease]] = ContextVar("birkhoff_open_runs", default=MappingProxyType({}))
"""Open runs of this thread, by the store's URL."""


@contextlib.contextmanager
def open_run(store: Store) -> Iterator[Lease]:
    """Hold off garbage collection while publishing. Waits for a collection that is running or about to start.

    Hold it from the first look for reusable shards until the version that refers to them is published. A nested call in
    the same thread yields the outer run, because it must not wait for a collection that waits for the outer run. Runs
    of other threads and processes may overlap.

    Raises:
        StoreError: The store failed.
    """
    outer = _mine.get().get(store.url)
    if outer is not None:
        yield outer
        return
    waited = False
    while True:
        with _held(store, _OPEN) as (lease, now):
            if not _live(store, _SWEEP, now, lease, _Watch()):
                token = _mine.set({**_mine.get(), store.url: lease})
                try:
                    yield lease
                finally:
                    _mine.reset(token)
                return
        # Not held while waiting: the sweep may be waiting for the runs that it found.
        if not waited:
            log.warning("waiting for the garbage collection of %s to end", store.url)
        waited = True
        _wait_for_sweeps(store, now)


@contextlib.contextmanager
def sweeping(store: Store, *, wait_seconds: float = 0.0) -> Iterator[Lease]:
    """Keep publishers out while deleting.

    Open runs get `wait_seconds` to end. No new run starts meanwhile, so overlapping runs cannot hold off the sweep for
    ever.

    Raises:
        StoreError: Another process still publishes or sweeps there, or the store failed.
    """
    deadline, watch = clock.seconds() + wait_seconds, _Watch()
    while True:
        with _held(store, _SWEEP) as (lease, now):
            others = _others(store, now, lease, watch)
            while others and (clock.seconds() < deadline or watch.doubts(others)) and not _yields(lease, others):
                clock.pause(POLL_SECONDS)
                others = _others(store, lease.renew(), lease, watch)
            if not others:
                _clear(store, lease.renew(), watch, _OPEN, _SWEEP, _TURN)
                yield lease
                return
            holder = _holder(store, others[0])
        if clock.seconds() >= deadline:
            raise StoreError(
                f"gc: {store.url} has open runs ({len(others)}, {holder}), so nothing was deleted; try again when they "
                f"have ended (that of a dead process ends after {LEASE_SECONDS:g} s), or give them time with --wait"
            )
        clock.pause(POLL_SECONDS)


@contextlib.contextmanager
def schedule_lock(store: Store, models: Iterable[str]) -> Iterator[Lease]:
    """Hold the one slot of a schedule of these models.

    If two start in the same moment both may give way, and the next run of the schedule does the work.

    Raises:
        BusyError: Another run is at work, or was within `LEASE_SECONDS`.
        StoreError: The store failed.
    """
    schedule = hashlib.sha256("\n".join(sorted(models)).encode()).hexdigest()[:16]
    prefix = f"{_TURN}{schedule}-"
    watch = _Watch()
    with _held(store, prefix) as (lease, now):
        others = _live(store, prefix, now, lease, watch)
        if others:
            holder, (host, pid) = _holder(store, others[0]), _process(store, others[0])
            raise BusyError(
                f"{store.url}: an earlier run of these models is still at work ({holder}), so this one did nothing; "
                f"the next does (that of a dead process ends after {LEASE_SECONDS:g} s)",
                holder=holder,
                host=host,
                pid=pid,
            )
        _clear(store, now, watch, prefix)
        yield lease


class _Watch:
    """Decides whether leases have expired, even if the store's clock was set back since they were written."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}
        """For leases dated after the store's time: the tag, and the local time at which it was first seen."""
        self._held: set[str] = set()
        """Such leases that changed since: somebody renews them."""

    def ended(self, info: ObjectInfo, now: datetime) -> bool:
        """Return whether a lease has expired at the store's time `now`."""
        age = (now - info.modified).total_seconds()
        if age >= -SLACK_SECONDS:
            self._seen.pop(info.key, None)
            return age > LEASE_SECONDS + SLACK_SECONDS
        tag, since = self._seen.get(info.key, ("", 0.0))
        if tag != info.tag:
            self._seen[info.key] = (info.tag, clock.seconds())
            if tag:
                self._held.add(info.key)
            return False
        return clock.seconds() - since > LEASE_SECONDS + SLACK_SECONDS

    def doubts(self, others: Iterable[ObjectInfo]) -> bool:
        """Return whether waiting is the only way to tell if these leases have expired."""
        return all(info.key in self._seen and info.key not in self._held for info in others)


def _others(store: Store, now: datetime, lease: Lease, watch: _Watch) -> list[ObjectInfo]:
    """Return the leases that a sweep has to wait for."""
    return [*_live(store, _OPEN, now, lease, watch), *_live(store, _SWEEP, now, lease, watch)]


def _yields(lease: Lease, others: list[ObjectInfo]) -> bool:
    """Return whether a waiting sweep withdraws: of two that wait for each other, the one with the smaller key stays."""
    return any(info.key.startswith(_SWEEP) and info.key < lease.key for info in others)


def _wait_for_sweeps(store: Store, now: datetime) -> None:
    """Wait until no sweep is left; `now` is the store's time at the call."""
    since, watch = clock.seconds(), _Watch()
    while any(not watch.ended(info, now + timedelta(seconds=clock.seconds() - since)) for info in store.list(_SWEEP)):
        clock.pause(POLL_SECONDS)


@contextlib.contextmanager
def _held(store: Store, prefix: str) -> Iterator[tuple[Lease, datetime]]:
    """Yield a lease that a thread renews, and the store's time."""
    lease = Lease(store, prefix)
    keeper = Keeper(lease)
    try:
        now = lease.renew()
        keeper.start()
        yield lease, now
    finally:
        keeper.stop()
        with contextlib.suppress(StoreError):  # it expires by itself
            store.delete(lease.key)


class Keeper:
    """Renews a lease in a thread."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._stop = lease, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="birkhoff-lease", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and return once no renewal is under way."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        with contextlib.suppress(Interrupted):  # while it waited to ask again
            while not self._stop.wait(LEASE_SECONDS / RENEWALS):
                keep_once(self._lease)


def keep_once(lease: Lease) -> None:
    """Renew a lease. A failure is logged, because the next renewal may succeed."""
    try:
        lease.renew()
    except BirkhoffError as error:
        log.warning("lease %s could not be renewed: %s", lease.key, error)


def _live(store: Store, prefix: str, now: datetime, own: Lease, watch: _Watch) -> list[ObjectInfo]:
    """Return the leases of others that have not expired at the store's time `now`."""
    return [info for info in store.list(prefix) if info.key != own.key and not watch.ended(info, now)]


def _clear(store: Store, now: datetime, watch: _Watch, *prefixes: str) -> None:
    """Remove the leases of dead holders. Their own clocks told them first that the leases had expired."""
    for info in store.list("runs/"):
        if info.key.startswith(prefixes) and watch.ended(info, now):
            store.delete(info.key)


def _holder(store: Store, info: ObjectInfo) -> str:
    """Describe a lease's holder for people. Only the holder writes the body, so it is not trusted."""
    try:
        held = json.loads(store.get(info.key, length=_MAX_LEASE_BYTES))
        return f"one of them process {held['pid']} on {held['host']}, since {held['started']}"
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return f"one of them {info.key}"


def _process(store: Store, info: ObjectInfo) -> tuple[str | None, int | None]:
    """Return (host, process id) of a lease's holder; None for what its body does not say."""
    try:
        held = json.loads(store.get(info.key, length=_MAX_LEASE_BYTES))
        host, pid = held["host"], held["pid"]
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None, None
    return host if isinstance(host, str) else None, pid if isinstance(pid, int) and pid > 0 else None
