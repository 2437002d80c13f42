"""Aliases: movable pointers at named versions, each with its history inside, moved by compare-and-swap.

`promote` points an alias at a version, `rollback` takes it back along the versions it came by, `advance` is what
publishing does to `latest`. Every change raises `gen` by one and keeps the state before it, so history is never
rewritten: a rollback is one more state.

An alias points at live names only. Retiring a name and moving an alias there may meet; each side writes first and
looks second (the mover at the name, `collect.retire` at the aliases), so at least one of them sees the other, and
whoever does makes the name live again. Movers hold an open run (`leases`), so no version is collected under them.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from birkhoff.pipeline.artifact import (
    AliasRecord,
    AliasState,
    alias_key,
    fetch_document,
    parse_bounded,
    utc_now,
)
from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
)
from birkhoff.pipeline.leases import open_run
from birkhoff.pipeline.names import RACES, VERSION_NAME, live_name, number, read_name, revive_name
from birkhoff.pipeline.signing import Signer, alias_signed_by, sign_alias
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.store_keys import ALIAS_LATEST, ALIAS_STABLE, DIGEST, NAME_PATTERN

log = logging.getLogger("birkhoff.aliases")

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


def aliases(store: Store, model: str) -> dict[str, AliasRecord]:
    """Aliases of a model. Raises IntegrityError, StoreError."""
    prefix = f"models/{model}/aliases/"
    keys = [info.key for info in store.list(prefix) if info.key.endswith(".json")]
    return {key.removeprefix(prefix).removesuffix(".json"): fetch_document(store, AliasRecord, key) for key in keys}


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
        if there and _is_signed(before, model, alias, signer):
            return None
        _check_protection(before, model, alias, force)
        return _next(before, name, digest, publisher, protected=protected)

    with open_run(store):
        digest = live_name(store, model, name).digest  # only now it cannot be collected any more
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
    if first is None:
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
                f"`birkhoff history {model}` and decide again"
            )
        _check_protection(before, model, alias, force)
        return _next(before, target, digest, publisher, protected=bool(before.protected), back=True)

    with open_run(store):
        digest = live_name(store, model, target).digest  # as above
        return _swap(store, model, alias, decide, signer)


def advance(store: Store, model: str, name: str, digest: str, publisher: str, *, signer: Signer | None = None) -> None:
    """Move `latest` to a version just published. The caller holds an open run.

    It stays where it is if it has been at this version or a later one before: a slow publisher must not take it back,
    and what was rolled back comes again only with a new version. A protected one stays too, with a warning. With
    `signer` it is signed, also where it is at this version already.
    """

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is not None:
            here = before.version == name and not _is_signed(before, model, ALIAS_LATEST, signer)
            if not here and max(number(state.version) for state in (*before.previous, before)) >= number(name):
                return None
            if before.protected:
                log.warning("%s of %s is protected and stays at %s", ALIAS_LATEST, model, before.version)
                return None
        return _next(before, name, digest, publisher)

    _swap(store, model, ALIAS_LATEST, decide, signer)


def sign(store: Store, model: str, alias: str, name: str, signer: Signer) -> Move:
    """Sign the state that an alias is in; `gen`, time and history stay what they are.

    Raises:
        ArtifactNotFoundError: no such alias.
        PreconditionError: it has left the version `name` meanwhile.
        StoreError: the store failed.
    """

    def decide(before: AliasRecord | None) -> AliasRecord | None:
        if before is None or _is_signed(before, model, alias, signer):
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
    previous: tuple[AliasState, ...] = ()
    if before is not None:
        left = AliasState.model_validate(before.model_dump(exclude={"publisher", "signature", "previous"}))
        previous = (*before.previous, left)[-KEPT_STATES:]
    return AliasRecord(
        version=name,
        digest=digest,
        gen=before.gen + 1 if before else 1,
        moved=utc_now(),
        back=back or None,
        protected=protected or None,
        publisher=publisher,
        previous=previous,
    )


def _is_signed(record: AliasRecord | None, model: str, alias: str, signer: Signer | None) -> bool:
    """Whether nothing is left to sign."""
    return signer is None or (record is not None and alias_signed_by(signer.public, model, alias, record))


def _swap(
    store: Store,
    model: str,
    alias: str,
    decide: Callable[[AliasRecord | None], AliasRecord | None],
    signer: Signer | None,
) -> Move:
    """Change an alias to what `decide` makes of its present state, None for no change. Raises StoreError."""
    key = alias_key(model, alias)
    for _ in range(RACES):
        before, tag = _read(store, model, alias)
        after = decide(before)
        if after is None:
            if before is None:
                raise ArtifactNotFoundError(f"{store.url}: alias {alias!r} of {model!r} is gone; promote a version")
            return Move(model=model, alias=alias, before=before, after=before)
        if signer is not None:
            after = sign_alias(signer, model, alias, after)
        try:
            store.replace(key, after.to_bytes(), tag=tag) if tag else store.create(key, after.to_bytes())
        except PreconditionError:
            continue
        if read_name(store, model, after.version).retired is not None:
            revive_name(store, model, after.version)
        return Move(model=model, alias=alias, before=before, after=after)
    raise StoreError(f"{store.url}: alias {alias} of {model} changed under {RACES} tries to move it")


def _read(store: Store, model: str, alias: str) -> tuple[AliasRecord | None, str]:
    """State and tag of an alias; None and nothing where there is none."""
    key = alias_key(model, alias)
    try:
        body, tag = store.read(key)
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
    if before is not None and before.protected and not force:
        raise AliasError(f"alias {alias} of {model} is protected at {before.version}; --force moves it all the same")
