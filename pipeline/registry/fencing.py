"""The sweep record: a collection announces what it will delete before it looks again, and others can end it.

A collection writes the keys that it condemns into one object, `runs/condemned.json`, then reads names and aliases once
more, then deletes under a permit. A publisher claims a name first and reads that object second. So one of the two sees
the other, in any order and with any clocks and pauses. A publisher that finds a key it needs there ends the permit
before it relies on the object. PROTOCOL.md has the rules and the argument.
"""

import contextlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime, timedelta
from typing import Literal

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, Document, parse_bounded
from birkhoff.pipeline.errors import (
    ObjectNotFoundError,
    PermitEndedError,
    PreconditionError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.registry import clock, leases
from birkhoff.pipeline.registry.documents import utc_now
from birkhoff.pipeline.registry.leases import Lease
from birkhoff.pipeline.store.base import UNENDING, Store, timed_end

log: logging.Logger = logging.getLogger("birkhoff.fencing")

SWEEP_KEY = "runs/condemned.json"
"""Key of a store's one sweep record, which exists while a collection deletes."""

BATCH = 5000
"""Keys condemned at a time: about half a megabyte."""

_TRIES = 4
"""How often one deletion is tried."""


class SweepRecord(Document):
    """The keys that a collection is about to delete."""

    sweep: str
    """A random id of the collection, so that no two write equal bodies."""
    holder: str
    """The collecting process, for people."""
    step: int
    """Number of changes of this record."""
    state: Literal["sweeping", "ended"]
    """Whether the collection may continue. Once ended, it stays ended."""
    permit: str
    """The permit it deletes under; the latest one, on a store that ends permits by its clock."""
    keys: tuple[str, ...]
    """Keys that deletions may be under way for."""


class Sweep:
    """The deleting side. A store has one at a time: a newer one ends what an older one left."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store, self._lease = store, lease
        self._sweep = uuid.uuid4().hex
        self._record: SweepRecord | None = None
        self._tag = ""
        self._keys: tuple[str, ...] = ()
        """The batch condemned last."""
        self._earlier: list[tuple[datetime, tuple[str, ...]]] = []
        """Earlier batches, of earlier collections too, with the time at which each batch's last permit ends. Until
        then a proxy may repeat a request, even after it was answered."""
        self._open = False
        """Whether a deletion was sent whose outcome is unknown."""
        self._lock = threading.Lock()

    def condemn(self, keys: Sequence[str]) -> None:
        """Announce the keys that may be deleted from now on, besides those that deletions may still be under way for.

        Raises:
            StoreError: Somebody has ended this collection, another one cannot be ended, or the store failed.
        """
        keys = tuple(keys)
        if self._record is None:
            self._take(keys)
        else:
            self._outlast()
            self._write(self._record.model_copy(update={"keys": (*self._under_way(), *keys)}))
        self._keys = keys

    def delete(self, key: str) -> None:
        """Delete a condemned object; a deletion without an answer is repeated. Raises what `condemn` raises."""
        for attempt in range(_TRIES):
            record = self._record
            assert record is not None  # condemned before
            try:
                self._store.delete(key, permit=record.permit)
            except PermitEndedError:
                self._renew(record.permit)
            except StoreUnreachableError:
                self._open = True
                if attempt == _TRIES - 1:
                    raise
                clock.pause(leases.POLL_SECONDS)
            except BaseException:
                self._open = True
                raise
            else:
                return
        raise StoreError(f"gc: {self._store.url}: {_TRIES} permits ended before {key} was deleted; run it again")

    def close(self, *, failed: bool = False) -> None:
        """Give up the right to delete, and remove from the record every key that no deletion is under way for. Raises
        StoreError.

        Over a network the record stays: a late deletion of it could remove another collection's. Without keys it has no
        effect.
        """
        if self._record is None:
            return
        if not failed:
            self._outlast()
        record = self._record
        if timed_end(record.permit) is not None:
            self._write(record.model_copy(update={"state": "ended", "keys": self._under_way()}))
        elif self._open:
            self._write(record.model_copy(update={"state": "ended"}))
            self._revoke(record.permit)
        else:
            permit = self._permit()
            self._write(record.model_copy(update={"state": "ended", "permit": permit, "keys": ()}))
            if permit != UNENDING:
                # Sent once. If it fails, the record has no effect, and the next collection takes it over.
                with contextlib.suppress(StoreError):
                    self._store.delete(SWEEP_KEY, permit=permit)
            self._revoke(permit)
            self._revoke(record.permit)

    def _outlast(self) -> None:
        """Wait until no unanswered deletion can take effect, then continue under another permit.

        If permits end by themselves there is no wait: the keys stay in the record until then.
        """
        record = self._record
        assert record is not None
        if self._open and timed_end(record.permit) is None:
            wait_for_end(self._store, self._lease, record)
            self._open = False
            self._write(record.model_copy(update={"permit": self._permit()}))

    def _under_way(self) -> tuple[str, ...]:
        """Return the keys condemned so far that a deletion may still reach."""
        over = None if self._record is None else timed_end(self._record.permit)
        if over is not None:
            self._earlier.append((over, self._keys))
        if self._earlier:
            now = self._lease.renew()
            self._earlier = [(over, keys) for over, keys in self._earlier if not _is_over(over, now)]
        return tuple(dict.fromkeys(key for _, keys in self._earlier for key in keys))

    def _take(self, keys: tuple[str, ...]) -> None:
        """Take over the sweep record, or create it."""
        while True:
            found = read_sweep(self._store)
            tag = ""
            if found is not None:
                tag = end(self._store, *found)
                if not tag:
                    continue
                over = timed_end(found[0].permit)
                if over is None:
                    wait_for_end(self._store, self._lease, found[0])
                self._earlier = [(over, found[0].keys)] if over is not None else []
            holder = f"process {os.getpid()} on {socket.gethostname()}, since {utc_now()}"
            record = SweepRecord(
                sweep=self._sweep,
                holder=holder,
                step=1,
                state="sweeping",
                permit=self._permit(),
                keys=(*self._under_way(), *keys),
            )
            try:
                if tag:
                    self._tag = self._store.replace(SWEEP_KEY, record.to_bytes(), tag=tag)
                else:
                    self._tag = self._store.create(SWEEP_KEY, record.to_bytes())
            except PreconditionError:
                self._revoke(record.permit)
                continue
            self._record = record
            return

    def _write(self, record: SweepRecord) -> None:
        record = record.model_copy(update={"step": record.step + 1})
        try:
            self._tag = self._store.replace(SWEEP_KEY, record.to_bytes(), tag=self._tag)
        except PreconditionError:
            self._revoke(record.permit)
            raise StoreError(
                f"gc: {self._store.url}: a publisher or a later collection has ended this one because it was stopped "
                "or slow; nothing is damaged: run it again"
            ) from None
        self._record = record

    def _renew(self, ended: str) -> None:
        """Get another permit, unless another thread has, or somebody has ended this collection."""
        with self._lock:
            record = self._record
            assert record is not None
            if record.permit == ended:
                self._write(record.model_copy(update={"permit": self._permit()}))

    def _permit(self) -> str:
        permit = self._store.permit(self._lease.renew(), witness=self._lease.key)
        if permit == UNENDING:
            self._lease.renew()  # the store has deleted that lease to show what kind of permit it has
        return permit

    def _revoke(self, permit: str) -> None:
        """Revoke a permit. One that ends by the store's clock, or never, needs nothing."""
        if permit != UNENDING:
            self._store.revoke(permit)


def settle(store: Store, run: Lease, keys: AbstractSet[str]) -> None:
    """Return once no deletion decided on before this call can take effect on any of `keys`.

    A collection that is about to delete one of them is ended. Later collections see what the caller wrote before this
    call.

    Raises:
        StoreError: The collection cannot be ended, because the store does not refuse late deletions; or the store
            failed.
    """
    while (found := read_sweep(store)) is not None:
        record, tag = found
        if keys.isdisjoint(record.keys):
            return
        if record.permit == UNENDING:
            _wait_for_answer(store, record)
        elif end(store, record, tag):
            wait_for_end(store, run, record)
            return


def read_sweep(store: Store) -> tuple[SweepRecord, str] | None:
    """Return the sweep record and its tag; None if there is none. Raises IntegrityError, StoreError."""
    try:
        body, tag = store.read(SWEEP_KEY, length=MAX_DOCUMENT_BYTES + 1)
    except ObjectNotFoundError:
        return None
    return parse_bounded(SweepRecord, SWEEP_KEY, body), tag


def end(store: Store, record: SweepRecord, tag: str) -> str:
    """End the collection of a record. Return the record's new tag, or "" if the record has changed.

    Deletions that were permitted before may take effect until `wait_for_end` returns.
    """
    if record.state == "ended":
        return tag
    if record.permit == UNENDING:
        _wait_for_answer(store, record)
        return ""
    log.warning("ending the collection of %s in %s", record.holder, store.url)
    ended = record.model_copy(update={"state": "ended", "step": record.step + 1})
    try:
        return store.replace(SWEEP_KEY, ended.to_bytes(), tag=tag)
    except PreconditionError:
        return ""


def wait_for_end(store: Store, lease: Lease, record: SweepRecord) -> None:
    """Return once no request of an ended collection can take effect."""
    if record.permit == UNENDING:
        if record.keys:
            raise _endless(store, record)
        return
    over = store.revoke(record.permit)
    while over is not None and not _is_over(over, lease.renew()):
        clock.pause(leases.POLL_SECONDS)


def _is_over(end: datetime, now: datetime) -> bool:
    """Return whether a permit that ends by the store's clock has certainly ended."""
    return now > end + timedelta(seconds=leases.SLACK_SECONDS)


def _wait_for_answer(store: Store, record: SweepRecord) -> None:
    """Wait for a collection that cannot be ended to change its record. Raises StoreError if it does not."""
    since = clock.seconds()
    while (found := read_sweep(store)) is not None and found[0] == record:
        if record.state == "ended" or clock.seconds() - since > leases.LEASE_SECONDS + leases.SLACK_SECONDS:
            raise _endless(store, record)
        clock.pause(leases.POLL_SECONDS)


def _endless(store: Store, record: SweepRecord) -> StoreError:
    return StoreError(
        f"{store.url}: a collection ({record.holder}) may still be deleting, and this store does not refuse late "
        f"deletions; if that process is gone for good, delete {SWEEP_KEY} and run again"
    )
