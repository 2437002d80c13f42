"""Version names v1, v2, ...: taken once, retired at most once, never reused.

A name is claimed, checked, and only then made live. Each step is a compare-and-swap of its record, so of a publisher
that makes a claim live and a collection that buries it, one loses. A retired name stays as a tombstone, and a model's
highest name is never deleted, so the next number is higher than every number given before. `given.json` keeps the
numbers of resolved names whose tombstones were deleted: a copy that wants such a name is refused, and a publisher that
listed names before takes another one.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from birkhoff.pipeline.errors import ArtifactNotFoundError, ObjectNotFoundError, PreconditionError, StoreError
from birkhoff.pipeline.registry import clock, swaps
from birkhoff.pipeline.registry.documents import (
    NOTHING,
    GivenNames,
    NameRecord,
    fetch_document,
    given_key,
    name_key,
    utc_now,
)
from birkhoff.pipeline.registry.parallel import each
from birkhoff.pipeline.registry.swaps import RACES, change_document
from birkhoff.pipeline.store.base import Store

VERSION_NAME = re.compile(r"v[1-9][0-9]{0,8}")

_READ_AHEAD = 64
"""Records read ahead of demand."""


def number(name: str) -> int:
    """Return 3 for `v3`."""
    return int(name.removeprefix("v"))


def given(store: Store, model: str) -> list[str]:
    """Return every taken name of a model, retired ones too, oldest first."""
    prefix = f"models/{model}/names/"
    found = (info.key.removeprefix(prefix).removesuffix(".json") for info in store.list(prefix))
    return sorted((name for name in found if VERSION_NAME.fullmatch(name)), key=number)


def read_name(store: Store, model: str, name: str) -> NameRecord:
    """Return the record of a name, retired or not. Raises ObjectNotFoundError, IntegrityError."""
    key = name_key(model, name)
    return fetch_document(store, NameRecord, key)


def read_tagged(store: Store, model: str, name: str) -> tuple[NameRecord, str]:
    """Return the record of a name, and its tag. Raises what `read_name` raises."""
    return swaps.read_tagged(store, NameRecord, name_key(model, name))


def names(store: Store, model: str, *, newest_first: bool = False) -> Iterator[tuple[str, NameRecord]]:
    """Yield (name, record) of a model's live names, oldest first."""
    found = all_names(store, model, newest_first=newest_first)
    return ((name, record) for name, record in found if record.live)


def all_names(store: Store, model: str, *, newest_first: bool = False) -> Iterator[tuple[str, NameRecord]]:
    """Yield (name, record) of every recorded name, retired ones too, oldest first. Records are read in batches."""

    def read(name: str) -> NameRecord | None:
        try:
            return read_name(store, model, name)
        except ObjectNotFoundError:
            return None  # its tombstone was deleted since the listing

    known = given(store, model)
    if newest_first:
        known.reverse()
    start, count = 0, 1  # a caller that wants only the first pays for one read
    while start < len(known):
        some = known[start : start + count]
        yield from ((name, found) for name, found in zip(some, each(read, some), strict=True) if found is not None)
        start, count = start + count, _READ_AHEAD


def live_name(store: Store, model: str, name: str) -> NameRecord:
    """Return the record of a live name.

    Raises:
        ArtifactNotFoundError: There is no such name, or it is retired.
    """
    try:
        record = read_name(store, model, name)
    except ObjectNotFoundError:
        record = None
    if record is None or not record.live:
        what = f"version {name} was retired on {record.retired}" if record else f"has no version {name}"
        known = ", ".join(name for name, _ in names(store, model)) or "none"
        raise ArtifactNotFoundError(f"{store.url}: model {model!r}: {what}; it has: {known}")
    return record


def check_name(store: Store, model: str, name: str, digest: str) -> bool:
    """Return whether a name is this version's already; False if it can be claimed.

    Raises:
        PreconditionError: It is another version's, or was retired.
        StoreError, IntegrityError: The store failed.
    """
    try:
        held = _is_of(store, model, name, digest, read_name(store, model, name))
    except ObjectNotFoundError:
        held = False
    if not held:
        _check_new(store, model, name, digest)
    return held


def _is_of(store: Store, model: str, name: str, digest: str, record: NameRecord) -> bool:
    """Return whether a recorded name is this version's; False if it can be claimed. Raises PreconditionError
    otherwise."""
    if record.live and record.digest == digest:
        return True
    if record.never_live and (record.dead or record.digest == digest):
        return False  # a claim of a publisher of this version, or one whose publisher died
    what = f"was retired on {record.retired}" if record.retired else f"is version {record.digest[:12]}"
    raise _taken(store, model, name, digest, what)


def _check_new(store: Store, model: str, name: str, digest: str) -> None:
    """Raise PreconditionError if a name once resolved, although its record may be gone."""
    if read_given(store, model).holds(number(name)):
        raise _taken(store, model, name, digest, "was given up and collected")


def _taken(store: Store, model: str, name: str, digest: str, what: str) -> PreconditionError:
    return PreconditionError(
        f"{store.url}: {name} of {model} {what} there, and version {digest[:12]} was to have that name; give it the "
        "next free one with --rename"
    )


def read_given(store: Store, model: str) -> GivenNames:
    """Return the numbers of retired names. Raises StoreError, IntegrityError."""
    try:
        return fetch_document(store, GivenNames, given_key(model))
    except ObjectNotFoundError:
        return GivenNames()


def remember_given(store: Store, model: str, names: Iterable[str]) -> None:
    """Record the numbers of names that once resolved, before they are buried. Raises StoreError, IntegrityError."""
    numbers = [number(name) for name in names]

    def change(found: GivenNames | None) -> GivenNames | None:
        held = found or GivenNames()
        after = held.with_numbers(numbers)
        return None if after == held else after

    change_document(store, GivenNames, given_key(model), change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A name that one publisher has claimed and that does not resolve yet."""

    name: str
    record: NameRecord
    tag: str


def claim_name(
    store: Store,
    model: str,
    digest: str,
    publisher: str,
    *,
    wanted: str | None = None,
    single_publisher: bool = False,
    announce: Callable[[str, str | None], None] = lambda *_: None,
) -> Claim:
    """Claim `wanted`, or the next free `v<N>`. Of several publishers exactly one gets each name.

    From then on no collection deletes what a version of this digest needs, unless it had condemned it before.
    `announce` is called before each attempt, with the name and the one that was lost just before.

    If `wanted` is this version's already, live or claimed, that is the claim: publishers of one version share it.

    Raises:
        PreconditionError: `wanted` is another version's, or was retired.
        StoreError: The store failed.
    """
    lost: str | None = None
    taken = max(map(number, given(store, model)), default=0)
    for _ in range(RACES):
        taken += 1
        name, now = wanted or f"v{taken}", utc_now()
        record = NameRecord(
            digest=digest, created=now, publisher=publisher, single_publisher=single_publisher or None, retired=now
        )
        announce(name, lost)
        try:
            tag = store.create(name_key(model, name), record.to_bytes())
        except PreconditionError:
            found = None if wanted is None else _claim_again(store, model, name, record)
            if found is None:
                lost = None if wanted else name
                continue
        else:
            found = Claim(name=name, record=record, tag=tag)
        if wanted is None and read_given(store, model).holds(taken):
            # Given, retired and collected since the listing. The claim is left, and buried like any other.
            lost, taken = name, max(map(number, given(store, model)))
            continue
        if wanted is not None and not found.record.live:
            _check_new(store, model, name, digest)  # the old record may have been deleted since, and this one is new
        return found
    raise StoreError(f"{store.url}: no version name of {model} could be had in {RACES} tries")


def adopt_claim(store: Store, model: str, name: str, digest: str, publisher: str) -> Claim | None:
    """Take over a claim on the same version from a publisher that failed or is slower; None if it is not a claim any
    more.

    The other publisher finds its claim changed, as if a collection had buried it. Raises StoreError.
    """
    record, tag = read_tagged(store, model, name)
    if not record.claimed or record.digest != digest:
        return None
    now = utc_now()
    mine = record.model_copy(update={"created": now, "publisher": publisher, "retired": now})
    try:
        tag = store.replace(name_key(model, name), mine.to_bytes(), tag=tag)
    except PreconditionError:
        return None
    return Claim(name=name, record=mine, tag=tag)


def _claim_again(store: Store, model: str, name: str, claim: NameRecord) -> Claim | None:
    """Claim a name that has a record: return this version's claim, or a new one if the name was never live.

    None if the record changed meanwhile. Raises PreconditionError, as `check_name`.
    """
    try:
        found, tag = read_tagged(store, model, name)
    except ObjectNotFoundError:
        return None
    if _is_of(store, model, name, claim.digest, found) or not found.dead:
        return Claim(name=name, record=found, tag=tag)
    try:
        return Claim(name=name, record=claim, tag=store.replace(name_key(model, name), claim.to_bytes(), tag=tag))
    except PreconditionError:
        return None


def make_live(store: Store, model: str, claim: Claim) -> bool:
    """Make a claimed name resolve; return False if a collection has buried it. Raises StoreError."""
    record = claim.record.model_copy(update={"retired": None})
    try:
        store.replace(name_key(model, claim.name), record.to_bytes(), tag=claim.tag)
    except PreconditionError:
        return False
    return True


def bury(store: Store, model: str, name: str, record: NameRecord, tag: str) -> bool:
    """Make a name that does not resolve refer to nothing, for good; return False if it has changed since it was
    read."""
    dead = record.model_copy(update={"digest": NOTHING, "retired": record.retired or utc_now()})
    try:
        store.replace(name_key(model, name), dead.to_bytes(), tag=tag)
    except PreconditionError:
        return False
    return True


def retire_name(store: Store, model: str, name: str) -> None:
    """Replace a name by a tombstone. Raises StoreError."""

    def change(record: NameRecord) -> NameRecord | None:
        if not record.live:
            return None
        now = clock.utc()
        if now.isoformat(timespec="seconds") == record.created:  # which would make it look like a claim
            now += timedelta(seconds=1)
        return record.model_copy(update={"retired": now.isoformat(timespec="seconds")})

    _change(store, model, name, change)


def revive_name(store: Store, model: str, name: str) -> None:
    """Make a retired name live again, because an alias points at it now. Raises StoreError."""

    def change(record: NameRecord) -> NameRecord | None:
        if record.dead:
            raise StoreError(f"{store.url}: name {name} of {model} was collected, and refers to nothing any more")
        return None if record.live else record.model_copy(update={"retired": None})

    _change(store, model, name, change)


def _change(store: Store, model: str, name: str, change: Callable[[NameRecord], NameRecord | None]) -> None:
    """Replace the record of a name by `change(record)`; None means no change."""
    for _ in range(RACES):
        record, tag = read_tagged(store, model, name)
        after = change(record)
        if after is None:
            return
        try:
            store.replace(name_key(model, name), after.to_bytes(), tag=tag)
        except PreconditionError:
            continue
        return
    raise StoreError(f"{store.url}: name {name} of {model} changed under {RACES} tries to change it")
