"""Aliases: movable pointers at named versions, each with its history inside, moved by compare-and-swap.

`promote` points an alias at a version, `rollback` takes it back along the versions it came by, `advance` is what
publishing does to `latest`. Every change raises `gen` by one and keeps the state before it, so history is never
rewritten: a rollback is one more state.

An alias points at live names only. Retiring a name and moving an alias there may meet; each side writes first and
looks second (the mover at the name, `gc.retire` at the aliases), so at least one of them sees the other, and whoever
does makes the name live again. Before a name is buried for good, `fence` rewrites every alias of its model, so a mover
who looked at the name before, and was stopped since, loses its swap and looks again. A new alias is made in two steps
for that: first one that refers to nothing, which can be rewritten.
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
"""States an alias remembers: about 200 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What became of an alias: `before` is None where it is new, and equals `after` where nothing was to do."""

    model: str
    alias: str
    before: AliasRecord | None
    after: AliasRecord

    def facts(self) -> dict[str, object]:
        """The move under the keys of `--json`."""
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
    """Aliases of a model, with `removed` also those that refer to nothing now. Raises IntegrityError, StoreError."""
    known = _known(store, model)
    records = [fetch_document(store, AliasRecord, alias_key(model, alias)) for alias in known]
    return {
        alias: record
        for alias, record in zip(known, records, strict=True)
        if record.digest != NOTHING or (removed and record.previous)
    }


def fence(store: Store, model: str) -> set[str]:
    """Make every move of an alias fail that was decided on before; returns the versions that aliases point at.

    Rewrites each with another `publisher`: its state, generation, history and signature stay what they are.
    Raises IntegrityError, StoreError.
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
    """Point an alias at a named version, making the alias where there is none.

    Args:
        protect: protect the alias from now on, or no longer; None leaves that as it is.
        force: move it although it is protected.
        signer: signs the alias, also one that points there already.

    Raises:
        ArtifactNotFoundError: no such version, or a retired one.
        AliasError: a protected alias without `force`, or no name for an alias.
        StoreError: the store failed.
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
    """Point an alias at the version it came from, or at `to`; again, and it goes back one more.

    Refers to the state it finds first: of two rollbacks that meet, one moves the alias and the other finds it done.

    Raises:
        ArtifactNotFoundError: no such alias, or the version to go back to was retired.
        AliasError: nothing to go back to, or a protected alias without `force`.
        PreconditionError: somebody else moved the alias elsewhere meanwhile.
        StoreError: the store failed.
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
    """Let an alias refer to nothing. Its history stays, and it goes on from there where it is made again.

    Raises:
        ArtifactNotFoundError: no such alias.
        AliasError: a protected alias without `force`.
        StoreError: the store failed.
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
    """Raises AliasError where `promote` to a version `to` would: for what is no alias, or a protected one elsewhere."""
    _check_alias(alias)
    found = _read(store, model, alias)[0]
    if found is None or found.version != to:
        _check_protection(found, model, alias, force)


def advance(store: Store, model: str, name: str, publisher: str, *, signer: Signer | None = None) -> None:
    """Move `latest` to a version just published. The caller holds an open run.

    It stays where it is if it has been at this version or a later one before: a slow publisher must not take it back,
    and what was rolled back comes again only with a new version. A protected one stays too, with a warning. With
    `signer` it is signed, also where it is at this version already.
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
    """Sign the state that an alias is in; `gen`, time and history stay what they are.

    Raises:
        ArtifactNotFoundError: no such alias.
        PreconditionError: it has left the version `name` meanwhile.
        StoreError: the store failed.
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
    """The versions by which an alias came to where it is, with what was rolled back cut off; the present one last."""
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
    """The state that follows `before`, which moves into the history."""
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
    """A state as the one after `before`."""
    left = AliasState.model_validate(before.model_dump(exclude={"publisher", "signature", "previous"}))
    return after.model_copy(update={"gen": before.gen + 1, "previous": (*before.previous, left)[-KEPT_STATES:]})


def _is_signed(store: Store, record: AliasRecord | None, model: str, alias: str, signer: Signer | None) -> bool:
    """Whether nothing is left to sign."""
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
    """Change an alias to what `decide` makes of its present state, None for no change. Raises StoreError.

    `decide` looks at the name that it points the alias at, after the alias was read: see `fence`.
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
    """State and tag of an alias, also of one that refers to nothing; None and no tag where there is none."""
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
