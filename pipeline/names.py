"""Human names of versions: v1, v2, ...: taken once, retired at most once, never given again.

A retired name stays as a tombstone, and a model's highest name is never removed: the next number lies above every
number ever given.
"""

import re
from collections.abc import Callable, Iterator

from birkhoff.pipeline.artifact import NameRecord, fetch_document, name_key, parse_bounded, utc_now
from birkhoff.pipeline.errors import ArtifactNotFoundError, ObjectNotFoundError, PreconditionError, StoreError
from birkhoff.pipeline.store import Store

VERSION_NAME = re.compile(r"v[1-9][0-9]{0,8}")
RACES = 100
"""Lost races before giving up: with exactly one winner a race, more means the store does not do what it says."""


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


def names(store: Store, model: str) -> Iterator[tuple[str, NameRecord]]:
    """(name, record) of the named versions of a model, oldest first; retired names are left out."""
    return ((name, record) for name, record in all_names(store, model) if record.retired is None)


def all_names(store: Store, model: str) -> Iterator[tuple[str, NameRecord]]:
    """(name, record) of every name ever given that is still on record, oldest first."""
    for name in given(store, model):
        try:
            yield name, read_name(store, model, name)
        except ObjectNotFoundError:
            continue  # its tombstone was collected since the listing


def live_name(store: Store, model: str, name: str) -> NameRecord:
    """The record of a name that resolves.

    Raises:
        ArtifactNotFoundError: no such name, or a retired one.
    """
    try:
        record = read_name(store, model, name)
    except ObjectNotFoundError:
        record = None
    if record is None or record.retired is not None:
        what = f"version {name} was retired on {record.retired}" if record else f"has no version {name}"
        known = ", ".join(name for name, _ in names(store, model)) or "none"
        raise ArtifactNotFoundError(f"{store.url}: model {model!r}: {what}; it has: {known}")
    return record


def take_name(
    store: Store,
    model: str,
    digest: str,
    publisher: str,
    *,
    single_publisher: bool = False,
    announce: Callable[[str, str | None], None] = lambda *_: None,
) -> str:
    """Create the next free `v<N>`: of several publishers exactly one gets each. Raises StoreError.

    `announce` is called before each try, with the name and the one that was lost just before.
    """
    lost: str | None = None
    taken = max(map(number, given(store, model)), default=0)
    for _ in range(RACES):
        taken += 1
        record = NameRecord(
            digest=digest, created=utc_now(), publisher=publisher, single_publisher=single_publisher or None
        )
        announce(f"v{taken}", lost)
        try:
            store.create(name_key(model, f"v{taken}"), record.to_bytes())
        except PreconditionError:
            lost = f"v{taken}"
            continue
        return f"v{taken}"
    raise StoreError(f"{store.url}: no version name of {model} could be had in {RACES} tries")


def retire_name(store: Store, model: str, name: str) -> None:
    """Put a tombstone in place of a name. Raises StoreError."""
    _set_retired(store, model, name, utc_now())


def revive_name(store: Store, model: str, name: str) -> None:
    """Take a tombstone away again, for a version that an alias has come to point at. Raises StoreError."""
    _set_retired(store, model, name, None)


def _set_retired(store: Store, model: str, name: str, time: str | None) -> None:
    key = name_key(model, name)
    for _ in range(RACES):
        body, tag = store.read(key)
        record = parse_bounded(NameRecord, key, body)
        if (record.retired is None) == (time is None):
            return
        try:
            store.replace(key, record.model_copy(update={"retired": time}).to_bytes(), tag=tag)
        except PreconditionError:
            continue
        return
    raise StoreError(f"{store.url}: name {name} of {model} changed under {RACES} tries to change it")
