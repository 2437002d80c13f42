"""Leases: how publishers and garbage collection keep out of each other's way, on stores without transactions.

A publisher relies on objects that nothing refers to yet: shards of an earlier run, a blob it has found in the store.
Garbage collection deletes just those, and no store deletes on a condition. So the two exclude each other:

1. Each announces itself first: an object of its own, `runs/open/<id>.json` or `runs/sweep/<id>.json`.
2. Only then it looks for the others. A publisher that finds a sweep takes its lease back, waits until the sweep is over
   and begins anew; a sweep that finds any other lease gives up and has deleted nothing, or keeps its lease and waits
   for those that were there before it. Its lease keeps new ones out, so runs that overlap for ever do not starve it.

Listings show every object written before they began, so of two that start together at least one sees the other:
a publisher at work and a sweep at work never overlap. Publishers do not exclude each other, except the ticks of one
schedule (`turn`), which announce themselves under `runs/turn/` too.

A lease is renewed by a thread while its holder lives and dies with it: it counts for `LEASE_SECONDS` after its last
renewal, by the store's own clock (the `modified` time of the object against that of the reader's own lease), so clocks
of machines need not agree. The holder counts from before each renewal was sent, the others from when it arrived, with
`_SLACK_SECONDS` on top: it knows first. A holder that was stopped longer than that (a suspended machine, a store out
of reach) has lost its lease for good, and `Lease.check`, called before every step that others must be able to rely on,
says so instead of going on. What is left is a single request that the network holds back for longer than the slack
after its check; the grace period of the sweep stands between that and an object anyone has used lately.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime, timedelta
from types import MappingProxyType

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.artifact import utc_now
from birkhoff.pipeline.errors import BusyError, ObjectNotFoundError, StoreError
from birkhoff.pipeline.store import ObjectInfo, Store

log = logging.getLogger("birkhoff.leases")

LEASE_SECONDS = 60.0
"""How long a lease counts after its last renewal: how long a killed process keeps the others waiting."""

_RENEWALS = 4
"""Renewals within that time: three in a row may fail."""

_SLACK_SECONDS = 2.0
"""Stores give times in whole seconds."""

_POLL_SECONDS = 0.5
_MAX_LEASE_BYTES = 4096
_OPEN, _SWEEP, _TURN = "runs/open/", "runs/sweep/", "runs/turn/"


class Lease:
    """The announcement that a process is at work in a store; `open_run` and `sweeping` hand it out."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.key = f"{prefix}{uuid.uuid4().hex}.json"
        self._store = store
        self._body = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": utc_now()}).encode()
        self._renewed: float | None = None
        self._lost = False
        self._lock = threading.Lock()

    def renew(self) -> datetime:
        """Write the lease once more; returns the store's time. Raises StoreError."""
        with self._lock:
            sent = _clock()
            self._store.put(self.key, self._body)
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
        return self._renewed is not None and _clock() - self._renewed > LEASE_SECONDS


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
            if not _live(store, _SWEEP, now, lease):
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
    deadline = _clock() + wait_seconds
    while True:
        with _held(store, _SWEEP) as (lease, now):
            others = _others(store, now, lease)
            while others and _clock() < deadline and not _yields(lease, others):
                time.sleep(_POLL_SECONDS)
                others = _others(store, lease.renew(), lease)
            if not others:
                _clear(store, lease.renew(), _OPEN, _SWEEP, _TURN)
                yield lease
                return
            holder = _holder(store, others[0])
        if _clock() >= deadline:
            raise StoreError(
                f"gc: {store.url} has open runs ({len(others)}, {holder}), so nothing was deleted; try again when they "
                f"have ended (that of a dead process ends after {LEASE_SECONDS:g} s), or give them time with --wait"
            )
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def turn(store: Store, models: Iterable[str]) -> Iterator[Lease]:
    """Be the only tick of a schedule of these models; the lease dies with its holder, as all do.

    Of two that begin in the same moment both may give way; the next tick then does the work.

    Raises:
        BusyError: another one is at work, or was within `LEASE_SECONDS`.
        StoreError: the store failed.
    """
    schedule = hashlib.sha256("\n".join(sorted(models)).encode()).hexdigest()[:16]
    prefix = f"{_TURN}{schedule}-"
    with _held(store, prefix) as (lease, now):
        others = _live(store, prefix, now, lease)
        if others:
            raise BusyError(
                f"{store.url}: an earlier tick of these models is still at work ({_holder(store, others[0])}), so this "
                f"one did nothing; the next does (that of a dead process ends after {LEASE_SECONDS:g} s)"
            )
        _clear(store, now, prefix)
        yield lease


def _others(store: Store, now: datetime, lease: Lease) -> list[ObjectInfo]:
    """Whom a sweep has to wait for."""
    return [*_live(store, _OPEN, now, lease), *_live(store, _SWEEP, now, lease)]


def _yields(lease: Lease, others: list[ObjectInfo]) -> bool:
    """Whether a waiting sweep withdraws: of two that wait for each other the one with the lesser key stays."""
    return any(info.key.startswith(_SWEEP) and info.key < lease.key for info in others)


def _wait_for_sweeps(store: Store, now: datetime) -> None:
    """Wait until no sweep counts any more; `now` is the store's time at the call."""
    since = _clock()
    while any(not _ended(info, now + timedelta(seconds=_clock() - since)) for info in store.list(_SWEEP)):
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _held(store: Store, prefix: str) -> Iterator[tuple[Lease, datetime]]:
    """A lease, renewed by a thread until the end; also the store's time."""
    lease, stop = Lease(store, prefix), threading.Event()
    thread = threading.Thread(target=_keep, args=(lease, stop), name="birkhoff-lease", daemon=True)
    try:
        now = lease.renew()
        thread.start()
        yield lease, now
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        with contextlib.suppress(StoreError):  # it ends by itself
            store.delete(lease.key)


def _keep(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(LEASE_SECONDS / _RENEWALS):
        try:
            lease.renew()
        except BirkhoffError as error:
            log.warning("lease %s could not be renewed: %s", lease.key, error)


def _live(store: Store, prefix: str, now: datetime, own: Lease) -> list[ObjectInfo]:
    """Leases of others that count at the store's time `now`."""
    return [info for info in store.list(prefix) if info.key != own.key and not _ended(info, now)]


def _ended(info: ObjectInfo, now: datetime) -> bool:
    return (now - info.modified).total_seconds() > LEASE_SECONDS + _SLACK_SECONDS


def _clear(store: Store, now: datetime, *prefixes: str) -> None:
    """Remove leases whose holders died. Leaves the others be: their own clocks told them first."""
    for info in store.list("runs/"):
        if info.key.startswith(prefixes) and _ended(info, now):
            store.delete(info.key)


def _holder(store: Store, info: ObjectInfo) -> str:
    """Who holds a lease, for people: the body is theirs alone, so anything may be in it."""
    try:
        held = json.loads(store.get(info.key, length=_MAX_LEASE_BYTES))
        return f"one of them process {held['pid']} on {held['host']}, since {held['started']}"
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return f"one of them {info.key}"


def _clock() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
