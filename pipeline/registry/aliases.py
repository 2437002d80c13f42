"""Aliases: movable pointers at named versions. Each stores its history and is moved by compare-and-swap.

`promote` points an alias at a version, `rollback` moves it back along its history, and `advance` moves `latest` when a
version is published. Every change raises `gen` by one and keeps the previous state: a rollback adds a state and
rewrites none.

An alias may point at live names only. If a name is retired while an alias moves to it, both sides write first and look
second (the mover at the name, `gc.retire` at the aliases). So at least one of them sees the other and makes the name
live again. Before a name is buried for good, `fence` rewrites every alias of its model: a mover that looked at the name
earlier and was paused since then loses its swap and looks again. For this, a new alias is made in two steps: first as a
record that refers to nothing, which `fence` can rewrite.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, parse_bounded
from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
)
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.registry.documents import (
    NOTHING,
    AliasRecord,
    AliasState,
    alias_key,
    fetch_document,
    utc_now,
)
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.names import VERSION_NAME, live_name, number, read_name, revive_name
from birkhoff.pipeline.registry.signing import Signer, alias_signed_by, audience_of, sign_alias
from birkhoff.pipeline.registry.swaps import RACES
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import ALIAS_LATEST, ALIAS_STABLE, DIGEST, NAME_PATTERN

log: logging.Logger = logging.getLogger("birkhoff.aliases")

KEPT_STATES = 50
"""Number of states that an alias remembers, of about 200 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The result of moving an alias: `before` is None for a new alias, and equals `after` if there was nothing to
    do."""

    model: str
    alias: str
    before: AliasRecord | None
    after: AliasRecord

    def facts(self) -> dict[str, object]:
        """Return the move under the keys of `--json`."""
        return {
            "model": self.model,
            "alias": self.alias,
            "version": self.after.version,
            "from": self.before.version if self.before else None,
            "digest": self.after.digest,
            "gen": self.after.gen,
            "protected": bool(self.after.protected),
            "changed": self.before != self.after,
        }


def aliases(store: Store, model: str, *, removed: bool = False) -> dict[str, AliasRecord]:
    """Return the aliases of a model by name; with `removed`, removed ones too. Raises IntegrityError, StoreError."""
    known = _known(store, model)
    records = [fetch_document(store, AliasRecord, alias_key(model, alias)) for alias in known]
    return {
        alias: record
        for alias, record in zip(known, records, strict=True)
        if record.digest != NOTHING or (removed and record.previous)
    }


def fence(store: Store, model: str) -> set[str]:
    """Make pending moves of a model's aliases fail; return the versions that its aliases point at.

    Each alias gets another `publisher` and stays the same otherwise, its signature included. A mover that read it
    before loses its swap. Raises IntegrityError, StoreError.
    """
    pointed = set()
    for alias in _known(store, model):
        key = alias_key(model, alias)
        for _ in range(RACES):
            body, tag = store.read(key, length=MAX_DOCUMENT_BYTES + 1)
            record = parse_bounded(AliasRecord, key, body)
            try:
                store.replace(key, record.model_copy(update={"publisher": uuid.uuid4().hex}).to_bytes(), tag=tag)
            except PreconditionError:
                continue
            break
        else:
            raise _restless(store, model, alias)
        if record.digest != NOTHING:
            pointed.add(record.version)
    return pointed


def _known(store: Store, model: str) -> list[str]:
    prefix = f"models/{model}/aliases/"
    keys = (info.key for info in store.list(prefix) if info.key.endswith(".json"))
    return [key.removeprefix(prefix).removesuffix(".json") for key in keys]


def promote(
    store: Store,
    model: str,
    name: str,
    alias: str = ALIAS_STABLE,
    *,
    protect: bool | None = None,
    force: bool = False,
    signer: Signer | None = None,
) -> Move:
    """Point an alias at a named version. A new alias is created.

    Args:
        store: The store.
        model: The model.
        name: Name of the version, such as `v3`.
        alias: The alias.
        protect: Protect the alias, or stop protecting it; None changes nothing.
        force: Move a protected alias.
        signer: Signs the alias, even if it points there already.

    Raises:
        ArtifactNotFoundError: There is no such version, or it is retired.
        AliasError: The alias is protected and `force` is off, or its name is not allowed.
        StoreError: The store failed.
    """
    _check_alias(alias)
    publisher = uuid.uuid4().hex

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        protected = (before is not None and bool(before.protected)) if protect is None else protect
        there = before is not None and (before.version, bool(before.protected)) == (name, protected)
        if there and _is_signed(store, before, model, alias, signer):
            return None
        _check_protection(before, model, alias, force)
        return _next(before, name, live_name(store, model, name).digest, publisher, protected=protected)

    with open_run(store):
        live_name(store, model, name)
        return _swap(store, model, alias, decide, signer)


def rollback(
    store: Store,
    model: str,
    alias: str = ALIAS_STABLE,
    *,
    to: str | None = None,
    force: bool = False,
    signer: Signer | None = None,
) -> Move:
    """Point an alias at its previous version, or at `to`. Each further call goes back one more.

    The call is about the state that it finds first: of two concurrent rollbacks, one moves the alias and the other
    finds that done.

    Raises:
        ArtifactNotFoundError: There is no such alias, or the version to go back to is retired.
        AliasError: The alias has no previous version, or it is protected and `force` is off.
        PreconditionError: Somebody else moved the alias elsewhere meanwhile.
        StoreError: The store failed.
    """
    _check_alias(alias)
    first = _read(store, model, alias)[0]
    if first is None or first.digest == NOTHING:
        known = ", ".join(aliases(store, model)) or "none"
        raise ArtifactNotFoundError(f"{store.url}: model {model!r} has no alias {alias!r}; it has: {known}")
    target = to or _version_before(model, alias, first)
    publisher = uuid.uuid4().hex

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is None or before.version == target:
            return None
        if before.gen != first.gen:
            raise PreconditionError(
                f"{store.url}: alias {alias} of {model} moved to {before.version} meanwhile; look at "
                f"`{hint('history', model)}` and decide again"
            )
        _check_protection(before, model, alias, force)
        digest = live_name(store, model, target).digest
        return _next(before, target, digest, publisher, protected=bool(before.protected), back=True)

    with open_run(store):
        live_name(store, model, target)
        return _swap(store, model, alias, decide, signer)


def remove(store: Store, model: str, alias: str, *, force: bool = False) -> Move:
    """Remove an alias. Its history stays, and continues if the alias is made again.

    Raises:
        ArtifactNotFoundError: There is no such alias.
        AliasError: The alias is protected and `force` is off.
        StoreError: The store failed.
    """
    _check_alias(alias)
    publisher = uuid.uuid4().hex

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is None:
            known = ", ".join(aliases(store, model)) or "none"
            raise ArtifactNotFoundError(f"{store.url}: model {model!r} has no alias {alias!r}; it has: {known}")
        _check_protection(before, model, alias, force)
        return _next(before, before.version, NOTHING, publisher)

    with open_run(store):
        return _swap(store, model, alias, decide, None)


def check_movable(store: Store, model: str, alias: str, *, to: str, force: bool = False) -> None:
    """Raise AliasError if `promote` to version `to` would: the name is not allowed, or the alias is protected
    elsewhere."""
    _check_alias(alias)
    found = _read(store, model, alias)[0]
    if found is None or found.version != to:
        _check_protection(found, model, alias, force)


def advance(store: Store, model: str, name: str, publisher: str, *, signer: Signer | None = None) -> None:
    """Move `latest` to a version that was just published. The caller holds an open run.

    `latest` stays if it has ever been at this version or a later one: a slow publisher must not move it back, and a
    version that was rolled back does not return. A protected alias stays too, with a warning. With `signer` the alias
    is signed, even if it is at this version already.
    """

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is not None:
            here = before.version == name and not _is_signed(store, before, model, ALIAS_LATEST, signer)
            if not here and max(number(state.version) for state in (*before.previous, before)) >= number(name):
                return None
            if before.protected:
                log.warning("%s of %s is protected and stays at %s", ALIAS_LATEST, model, before.version)
                return None
        return _next(before, name, live_name(store, model, name).digest, publisher)

    try:
        _swap(store, model, ALIAS_LATEST, decide, signer)
    except ArtifactNotFoundError:
        log.warning("%s of %s was retired before %s could move to it", name, model, ALIAS_LATEST)


def sign(store: Store, model: str, alias: str, name: str, signer: Signer) -> Move:
    """Sign the present state of an alias; its `gen`, time and history stay the same.

    Raises:
        ArtifactNotFoundError: There is no such alias.
        PreconditionError: The alias has left the version `name` meanwhile.
        StoreError: The store failed.
    """

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is None or _is_signed(store, before, model, alias, signer):
            return None
        if before.version != name:
            raise PreconditionError(
                f"{store.url}: alias {alias} of {model} moved to {before.version} meanwhile; look at it and sign again"
            )
        return before.model_copy(update={"signature": None})

    return _swap(store, model, alias, decide, signer)


def trail(record: AliasRecord) -> list[str]:
    """Return the versions that led to an alias's present state, which comes last; versions rolled back from are left
    out."""
    found: list[str] = []
    for state in (*record.previous, record):
        if state.back and state.version in found:
            while found[-1] != state.version:
                found.pop()
        elif found[-1:] != [state.version]:
            found.append(state.version)
    return found


def _version_before(model: str, alias: str, record: AliasRecord) -> str:
    way = trail(record)
    if len(way) < 2:
        raise AliasError(
            f"alias {alias} of {model} points at {way[-1]} and came from nowhere else; name a version: --to v1, say"
        )
    return way[-2]


def _next(
    before: AliasRecord | None, name: str, digest: str, publisher: str, *, protected: bool = False, back: bool = False
) -> AliasRecord:
    """Return the state that follows `before`, with `before` in its history."""
    after = AliasRecord(
        version=name,
        digest=digest,
        gen=1,
        moved=utc_now(),
        back=back or None,
        protected=protected or None,
        publisher=publisher,
    )
    return after if before is None else _follow(before, after)


def _follow(before: AliasRecord, after: AliasRecord) -> AliasRecord:
    """Return `after` as the successor of `before`."""
    left = AliasState.model_validate(before.model_dump(exclude={"publisher", "signature", "previous"}))
    return after.model_copy(update={"gen": before.gen + 1, "previous": (*before.previous, left)[-KEPT_STATES:]})


def _is_signed(store: Store, record: AliasRecord | None, model: str, alias: str, signer: Signer | None) -> bool:
    """Return whether there is nothing left to sign."""
    if signer is None:
        return True
    return record is not None and alias_signed_by(signer.public, model, alias, record, audience=audience_of(store))


def _swap(
    store: Store,
    model: str,
    alias: str,
    decide: Callable[[AliasRecord | None], AliasRecord | None],
    signer: Signer | None,
) -> Move:
    """Replace an alias by what `decide` returns for its present state; None means no change. Raises StoreError.

    `decide` must look at the name it points to only after the alias was read: see `fence`.
    """
    key = alias_key(model, alias)
    for _ in range(RACES):
        found, tag = _read(store, model, alias)
        before = None if found is None or found.digest == NOTHING else found
        after = decide(before)
        if after is None:
            if before is None:
                raise ArtifactNotFoundError(f"{store.url}: alias {alias!r} of {model!r} is gone; promote a version")
            return Move(model=model, alias=alias, before=before, after=before)
        if before is None and found is not None and found.previous:
            after = _follow(found, after)
        if signer is not None:
            after = sign_alias(signer, audience_of(store), model, alias, after)
        try:
            if not tag:
                unmade = after.model_copy(update={"digest": NOTHING, "signature": None})
                store.create(key, unmade.to_bytes())
                continue
            store.replace(key, after.to_bytes(), tag=tag)
        except PreconditionError:
            continue
        if after.digest != NOTHING and not read_name(store, model, after.version).live:
            revive_name(store, model, after.version)
        return Move(model=model, alias=alias, before=before, after=after)
    raise _restless(store, model, alias)


def _restless(store: Store, model: str, alias: str) -> StoreError:
    return StoreError(f"{store.url}: alias {alias} of {model} changed under {RACES} tries to move it")


def _read(store: Store, model: str, alias: str) -> tuple[AliasRecord | None, str]:
    """Return the record and tag of an alias, even if it refers to nothing; (None, "") if there is no record."""
    key = alias_key(model, alias)
    try:
        body, tag = store.read(key, length=MAX_DOCUMENT_BYTES + 1)
    except ObjectNotFoundError:
        return None, ""
    return parse_bounded(AliasRecord, key, body), tag


def _check_alias(alias: str) -> None:
    if not NAME_PATTERN.fullmatch(alias) or VERSION_NAME.fullmatch(alias) or DIGEST.fullmatch(alias):
        raise AliasError(
            f"alias {alias[:80]!r}: expected 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or "
            "digit, and neither a version such as v3 nor a digest"
        )


def _check_protection(before: AliasRecord | None, model: str, alias: str, force: bool) -> None:
    if before is not None and before.digest != NOTHING and before.protected and not force:
        raise AliasError(f"alias {alias} of {model} is protected at {before.version}; --force moves it all the same")
