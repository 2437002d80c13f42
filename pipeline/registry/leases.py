"""Leases: how publishers and garbage collection keep out of each other's way, on stores without transactions.

A publisher relies on objects that nothing refers to yet: shards of an earlier run, a blob it has found in the store.
Garbage collection deletes just those. So the two exclude each other. This saves work and is no safeguard: a holder that
was stopped has lost its lease and may not know it. What keeps versions whole then is `fencing`; see PROTOCOL.md.

1. Each announces itself first: an object of its own, `runs/open/<id>.json` or `runs/sweep/<id>.json`.
2. Only then it looks for the others. A publisher that finds a sweep takes its lease back, waits until the sweep is over
   and begins anew; a sweep that finds any other lease gives up and has deleted nothing, or keeps its lease and waits
   for those that were there before it. Its lease keeps new ones out, so runs that overlap for ever do not starve it.

Listings show every object written before they began, so of two that start together at least one sees the other:
a publisher at work and a sweep at work never overlap. Publishers do not exclude each other, except the ticks of one
schedule (`schedule_lock`), which announce themselves under `runs/turn/` too.

A lease is renewed by a thread while its holder lives and dies with it: it counts for `LEASE_SECONDS` after its last
renewal, by the store's own clock (the `modified` time of the object against that of the reader's own lease), so clocks
of machines need not agree. One whose time lies ahead of the store's clock, set back since, counts until it was
seen unchanged for as long. The holder counts from before each renewal was sent, the others from when it arrived, with
`SLACK_SECONDS` on top: it knows first. A holder that was stopped longer than that (a suspended machine, a store out
of reach) has lost its lease for good, and `Lease.check` says so instead of going on.
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
from birkhoff.pipeline.registry import clock
from birkhoff.pipeline.registry.documents import utc_now
from birkhoff.pipeline.store.base import ObjectInfo, Store

log: logging.Logger = logging.getLogger("birkhoff.leases")

LEASE_SECONDS = 60.0
"""How long a lease counts after its last renewal: how long a killed process keeps the others waiting."""

RENEWALS = 4
"""Renewals within that time: three in a row may fail."""

SLACK_SECONDS = 2.0
"""Stores give times in whole seconds."""

POLL_SECONDS = 0.5
"""How often those who wait look again."""

_MAX_LEASE_BYTES = 4096
_OPEN, _SWEEP, _TURN = "runs/open/", "runs/sweep/", "runs/turn/"


class Lease:
    """The announcement that a process is at work in a store; `open_run` and `sweeping` hand it out."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.key: str = f"{prefix}{uuid.uuid4().hex}.json"
        self._store = store
        self._facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}
        self._renewals = 0
        self._renewed: float | None = None
        self._lost = False
        self._lock = threading.Lock()

    def renew(self) -> datetime:
        """Write the lease once more; returns the store's time. Raises StoreError."""
        with self._lock:
            sent = clock.seconds()
            self._renewals += 1  # so that each renewal changes the object's tag
            self._store.put(self.key, json.dumps({**self._facts, "renewals": self._renewals}).encode())
            self._lost = self._lost or self._over()
            self._renewed = sent
        return self._store.head(self.key).modified

    def check(self) -> None:
        """Make sure that the others still honour this lease.

        Raises:
            StoreError: it ran out in between: what was relied on may be gone.
        """
        if self._lost or self._over():
            raise StoreError(
                f"{self._store.url}: lease {self.key} ran out, as this process was stopped or cut off from the store "
                f"for more than {LEASE_SECONDS:g} s; run the same command again"
            )

    def _over(self) -> bool:
        return self._renewed is not None and clock.seconds() - self._renewed > LEASE_SECONDS


_mine: ContextVar[Mapping[str, Lease]] = ContextVar("birkhoff_open_runs", default=MappingProxyType({}))
"""Open runs of this thread by the store's URL."""


@contextlib.contextmanager
def open_run(store: Store) -> Iterator[Lease]:
    """Hold off garbage collection while publishing; waits for one that is under way or asked for.

    Whoever looks for stored shards in order to reuse them holds an open run from the first look until the version that
    refers to them is published. A run opened inside another one of the same thread is that one: it must not wait for
    a collection that waits for the outer one. Runs of others may overlap.

    Raises:
        StoreError: the store failed.
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
        # Withdrawn while it waits: the sweep may be waiting itself, for the runs it has found.
        if not waited:
            log.warning("waiting for the garbage collection of %s to end", store.url)
        waited = True
        _wait_for_sweeps(store, now)


@contextlib.contextmanager
def sweeping(store: Store, *, wait_seconds: float = 0.0) -> Iterator[Lease]:
    """Keep publishers out while deleting.

    Runs that are open get `wait_seconds` to end; none begins meanwhile, so that runs which overlap without a pause do
    not hold it off for ever.

    Raises:
        StoreError: someone still publishes or sweeps there, or the store failed.
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
    """Be the only tick of a schedule of these models; the lease dies with its holder, as all do.

    Of two that begin in the same moment both may give way; the next tick then does the work.

    Raises:
        BusyError: another one is at work, or was within `LEASE_SECONDS`.
        StoreError: the store failed.
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
    """Tells whether leases have ended, also where the store's clock was set back since they were written."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}
        """Tag and the time here at which it was first seen, of leases from ahead of the store's clock."""
        self._held: set[str] = set()
        """Those that have changed since: somebody renews them."""

    def ended(self, info: ObjectInfo, now: datetime) -> bool:
        """Whether a lease counts no more at the store's time `now`."""
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
        """Whether of each of these only time will tell."""
        return all(info.key in self._seen and info.key not in self._held for info in others)


def _others(store: Store, now: datetime, lease: Lease, watch: _Watch) -> list[ObjectInfo]:
    """Whom a sweep has to wait for."""
    return [*_live(store, _OPEN, now, lease, watch), *_live(store, _SWEEP, now, lease, watch)]


def _yields(lease: Lease, others: list[ObjectInfo]) -> bool:
    """Whether a waiting sweep withdraws: of two that wait for each other the one with the lesser key stays."""
    return any(info.key.startswith(_SWEEP) and info.key < lease.key for info in others)


def _wait_for_sweeps(store: Store, now: datetime) -> None:
    """Wait until no sweep counts any more; `now` is the store's time at the call."""
    since, watch = clock.seconds(), _Watch()
    while any(not watch.ended(info, now + timedelta(seconds=clock.seconds() - since)) for info in store.list(_SWEEP)):
        clock.pause(POLL_SECONDS)


@contextlib.contextmanager
def _held(store: Store, prefix: str) -> Iterator[tuple[Lease, datetime]]:
    """A lease, renewed by a thread until the end; also the store's time."""
    lease = Lease(store, prefix)
    keeper = Keeper(lease)
    try:
        now = lease.renew()
        keeper.start()
        yield lease, now
    finally:
        keeper.stop()
        with contextlib.suppress(StoreError):  # it ends by itself
            store.delete(lease.key)


class Keeper:
    """Renews a lease from a thread."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._stop = lease, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="birkhoff-lease", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and return once no renewal is under way."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / RENEWALS):
            keep_once(self._lease)


def keep_once(lease: Lease) -> None:
    """Renew a lease; a failure is logged, as the next renewal may come through."""
    try:
        lease.renew()
    except BirkhoffError as error:
        log.warning("lease %s could not be renewed: %s", lease.key, error)


def _live(store: Store, prefix: str, now: datetime, own: Lease, watch: _Watch) -> list[ObjectInfo]:
    """Leases of others that count at the store's time `now`."""
    return [info for info in store.list(prefix) if info.key != own.key and not watch.ended(info, now)]


def _clear(store: Store, now: datetime, watch: _Watch, *prefixes: str) -> None:
    """Remove leases whose holders died. Leaves the others be: their own clocks told them first."""
    for info in store.list("runs/"):
        if info.key.startswith(prefixes) and watch.ended(info, now):
            store.delete(info.key)


def _holder(store: Store, info: ObjectInfo) -> str:
    """Who holds a lease, for people: the body is theirs alone, so anything may be in it."""
    try:
        held = json.loads(store.get(info.key, length=_MAX_LEASE_BYTES))
        return f"one of them process {held['pid']} on {held['host']}, since {held['started']}"
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return f"one of them {info.key}"


def _process(store: Store, info: ObjectInfo) -> tuple[str | None, int | None]:
    """(host, process id) of who holds a lease, as far as it says them."""
    try:
        held = json.loads(store.get(info.key, length=_MAX_LEASE_BYTES))
        host, pid = held["host"], held["pid"]
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None, None
    return host if isinstance(host, str) else None, pid if isinstance(pid, int) and pid > 0 else None
