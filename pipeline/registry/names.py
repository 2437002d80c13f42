"""Human names of versions: v1, v2, ...: taken once, retired at most once, never given again.

A name is claimed first, checked, and only then made live; every step is a compare-and-swap of its record, so the
publisher who makes a claim live and the collection that buries it cannot both win. A retired name stays as a
tombstone, and a model's highest name is never removed: the next number lies above every number ever given. Of names
that resolved once, `given.json` keeps the numbers when their tombstones go: a copy that wants such a name is refused,
and a publisher who listed names before that takes another one.
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
"""Records read before anybody has asked for them."""


def number(name: str) -> int:
    """3 of `v3`."""
    return int(name.removeprefix("v"))


def given(store: Store, model: str) -> list[str]:
    """Every name of a model that is taken, retired ones too, oldest first."""
    prefix = f"models/{model}/names/"
    found = (info.key.removeprefix(prefix).removesuffix(".json") for info in store.list(prefix))
    return sorted((name for name in found if VERSION_NAME.fullmatch(name)), key=number)


def read_name(store: Store, model: str, name: str) -> NameRecord:
    """The record of a name, retired or not. Raises ObjectNotFoundError, IntegrityError."""
    key = name_key(model, name)
    return fetch_document(store, NameRecord, key)


def read_tagged(store: Store, model: str, name: str) -> tuple[NameRecord, str]:
    """The record of a name, and its tag. Raises as `read_name`."""
    return swaps.read_tagged(store, NameRecord, name_key(model, name))


def names(store: Store, model: str, *, newest_first: bool = False) -> Iterator[tuple[str, NameRecord]]:
    """(name, record) of the named versions of a model, oldest first; retired names are left out."""
    found = all_names(store, model, newest_first=newest_first)
    return ((name, record) for name, record in found if record.live)


def all_names(store: Store, model: str, *, newest_first: bool = False) -> Iterator[tuple[str, NameRecord]]:
    """(name, record) of every name ever given that is still on record, oldest first; read some at a time."""

    def read(name: str) -> NameRecord | None:
        try:
            return read_name(store, model, name)
        except ObjectNotFoundError:
            return None  # its tombstone was collected since the listing

    known = given(store, model)
    if newest_first:
        known.reverse()
    start, count = 0, 1  # who wants the first alone pays for no more
    while start < len(known):
        some = known[start : start + count]
        yield from ((name, found) for name, found in zip(some, each(read, some), strict=True) if found is not None)
        start, count = start + count, _READ_AHEAD


def live_name(store: Store, model: str, name: str) -> NameRecord:
    """The record of a name that resolves.

    Raises:
        ArtifactNotFoundError: no such name, or a retired one.
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
    """Whether a name is this version's already; False where it can be claimed for it.

    Raises:
        PreconditionError: it is another version's, or was given up.
        StoreError, IntegrityError: the store failed.
    """
    try:
        held = _is_of(store, model, name, digest, read_name(store, model, name))
    except ObjectNotFoundError:
        held = False
    if not held:
        _check_new(store, model, name, digest)
    return held


def _is_of(store: Store, model: str, name: str, digest: str, record: NameRecord) -> bool:
    """Whether a name that has a record is this version's, False where a claim can take it. Raises PreconditionError."""
    if record.live and record.digest == digest:
        return True
    if record.never_live and (record.dead or record.digest == digest):
        return False  # of a publisher of the same version, or of one that died
    what = f"was retired on {record.retired}" if record.retired else f"is version {record.digest[:12]}"
    raise _taken(store, model, name, digest, what)


def _check_new(store: Store, model: str, name: str, digest: str) -> None:
    """Raises PreconditionError if a name resolved once, whose record may be gone."""
    if read_given(store, model).holds(number(name)):
        raise _taken(store, model, name, digest, "was given up and collected")


def _taken(store: Store, model: str, name: str, digest: str, what: str) -> PreconditionError:
    return PreconditionError(
        f"{store.url}: {name} of {model} {what} there, and version {digest[:12]} was to have that name; give it the "
        "next free one with --rename"
    )


def read_given(store: Store, model: str) -> GivenNames:
    """Numbers of names that were given up. Raises StoreError, IntegrityError."""
    try:
        return fetch_document(store, GivenNames, given_key(model))
    except ObjectNotFoundError:
        return GivenNames()


def remember_given(store: Store, model: str, names: Iterable[str]) -> None:
    """Note names that resolved once, before they are buried. Raises StoreError, IntegrityError."""
    numbers = [number(name) for name in names]

    def change(found: GivenNames | None) -> GivenNames | None:
        held = found or GivenNames()
        after = held.with_numbers(numbers)
        return None if after == held else after

    change_document(store, GivenNames, given_key(model), change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A name that is its publisher's alone, and does not resolve yet."""

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
    """Claim `wanted`, or the next free `v<N>`: of several publishers exactly one gets each.

    From here on no collection deletes what a version of this digest needs, unless it has condemned that before.
    `announce` is called before each try, with the name and the one that was lost just before.

    A name that is wanted and this version's already is the claim, live or not: publishers of one version share it.

    Raises:
        PreconditionError: `wanted` is another version's, or was given up.
        StoreError: the store failed.
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
            # Given, given up and collected since the listing; the claim is left, and buried like any other.
            lost, taken = name, max(map(number, given(store, model)))
            continue
        if wanted is not None and not found.record.live:
            _check_new(store, model, name, digest)  # its record may have gone, and be a new one now
        return found
    raise StoreError(f"{store.url}: no version name of {model} could be had in {RACES} tries")


def adopt_claim(store: Store, model: str, name: str, digest: str, publisher: str) -> Claim | None:
    """Take over the claim of a publisher of the same version who failed or is slower; None if it is none any more.

    The other one then finds its claim changed, as if a collection had buried it. Raises StoreError.
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
    """The claim of a name that has a record: what is this version's, or a new one where it was never live.

    None where it changed meanwhile. Raises PreconditionError, as `check_name`.
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
    """Let a claimed name resolve; False if a collection has buried it meanwhile. Raises StoreError."""
    record = claim.record.model_copy(update={"retired": None})
    try:
        store.replace(name_key(model, claim.name), record.to_bytes(), tag=claim.tag)
    except PreconditionError:
        return False
    return True


def bury(store: Store, model: str, name: str, record: NameRecord, tag: str) -> bool:
    """Let a name that does not resolve refer to nothing, for good; False if it has changed since it was read."""
    dead = record.model_copy(update={"digest": NOTHING, "retired": record.retired or utc_now()})
    try:
        store.replace(name_key(model, name), dead.to_bytes(), tag=tag)
    except PreconditionError:
        return False
    return True


def retire_name(store: Store, model: str, name: str) -> None:
    """Put a tombstone in place of a name. Raises StoreError."""

    def change(record: NameRecord) -> NameRecord | None:
        if not record.live:
            return None
        now = clock.utc()
        if now.isoformat(timespec="seconds") == record.created:  # which would make it a claim
            now += timedelta(seconds=1)
        return record.model_copy(update={"retired": now.isoformat(timespec="seconds")})

    _change(store, model, name, change)


def revive_name(store: Store, model: str, name: str) -> None:
    """Take a tombstone away again, for a version that an alias has come to point at. Raises StoreError."""

    def change(record: NameRecord) -> NameRecord | None:
        if record.dead:
            raise StoreError(f"{store.url}: name {name} of {model} was collected, and refers to nothing any more")
        return None if record.live else record.model_copy(update={"retired": None})

    _change(store, model, name, change)


def _change(store: Store, model: str, name: str, change: Callable[[NameRecord], NameRecord | None]) -> None:
    """Swap the record of a name for what `change` makes of it, None for no change."""
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
