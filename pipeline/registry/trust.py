"""What a reader demands of a version besides matching digests: signatures, and that aliases never go back unnoticed.

A reader remembers the highest `gen` of every alias it followed, by store, model and alias, in the cache folder. An
alias with a smaller `gen`, or with the same `gen` and another version, was not moved but replaced: a backup was
restored, a mirror is stale, or somebody replays an old state. Deleting the cache folder deletes this memory.
"""

import fcntl
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from birkhoff.pipeline.errors import TrustError
from birkhoff.pipeline.files import atomic_file
from birkhoff.pipeline.paths import cache_folder
from birkhoff.pipeline.registry.documents import AliasRecord, VersionSignatures, sha256
from birkhoff.pipeline.registry.signing import (
    PublicKey,
    alias_signed_by,
    audience_of,
    load_public,
    read_signatures,
    signed_names,
)
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.text import first_line, some

log: logging.Logger = logging.getLogger("birkhoff.trust")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """A reader's demands.

    keys: If given, version and alias must each be signed by one of them.
    audience: The store that they must be signed for, if the store that is read is its mirror.
    accept_older: Accept an alias's present state, and remember it from now on.
    """

    keys: tuple[PublicKey, ...] = ()
    audience: str | None = None
    accept_older: bool = False

    @classmethod
    def of(
        cls,
        key_files: Sequence[str | os.PathLike[str]] | None,
        *,
        audience: str | None = None,
        accept_older: bool = False,
    ) -> "Trust":
        """Return demands with the public keys of these files. Raises TrustError."""
        keys = tuple(load_public(Path(file)) for file in key_files or ())
        return cls(keys=keys, audience=audience, accept_older=accept_older)


ANY = Trust()
"""Requires no signatures. Aliases that go back are still noticed."""


def check_version(store: Store, version: Version, trust: Trust) -> tuple[VersionSignatures, ...]:
    """Check that a version found in a store meets a reader's demands; return the signatures that prove it.

    Raises:
        TrustError: A signature is missing, or is of another key, model, name or digest; or the alias went back.
        StoreError, IntegrityError: A signature cannot be read.
    """
    signatures = tuple(
        found for key in trust.keys if (found := read_signatures(store, version.model, version.digest, key)) is not None
    )
    trust = replace(trust, audience=trust.audience or audience_of(store))
    check_signatures(version.model, version.name, version.digest, signatures, trust, store.url)
    if version.alias is not None and version.pointer is not None:
        if trust.keys:
            _check_alias_signature(store, version.model, version.alias, version.pointer, trust)
        _check_generation(store, version.model, version.alias, version.pointer, trust)
    return signatures


def check_signatures(
    model: str, name: str | None, digest: str, signatures: Sequence[VersionSignatures], trust: Trust, where: str
) -> None:
    """Check that one of the keys has signed this version under this name; under any name if `name` is None.

    If `trust` names no store, signatures for any store are accepted, because `pull` has checked the store of what is in
    a folder or the cache.

    Raises:
        TrustError: None of the keys has. The message says what was signed instead.
    """
    if not trust.keys:
        return
    by_id = {record.key: record for record in signatures}
    signed = [
        found
        for key in trust.keys
        for found in signed_names(key, model, digest, by_id.get(key.id), audience=trust.audience)
    ]
    if signed and name in (None, *signed):
        return
    label = f"{where}: {model}@{name or digest[:12]}"
    if signed:
        raise TrustError(
            f"{label}: digest {digest} is signed as {', '.join(signed)}, not as {name}: a name moved or replayed; "
            "do not use it, and ask its publisher"
        )
    entries = [entry for key in trust.keys if key.id in by_id for entry in by_id[key.id].names]
    elsewhere = sorted({entry.audience for entry in entries if entry.audience} - {trust.audience or ""})
    if trust.audience is not None and elsewhere:
        raise TrustError(
            f"{label}: signed for {some(elsewhere, 3)}, not for {trust.audience}: copied from there; if this is its "
            "mirror, name the store it was signed for with --signed-for"
        )
    if entries and all(entry.audience is None for entry in entries):
        raise TrustError(
            f"{label}: signed before signatures named their store, so it may come from any; ask its publisher to sign "
            "it again with `birkhoff sign`"
        )
    if entries:
        raise TrustError(
            f"{label}: its signature by {_ids(trust)} does not hold for model {model} and digest {digest}; "
            "do not use it, and ask its publisher"
        )
    raise TrustError(
        f"{label}: not signed by {_ids(trust)}; ask its publisher to sign it with `birkhoff sign`, or name the key "
        "that signed it"
    )


def _check_alias_signature(store: Store, model: str, alias: str, record: AliasRecord, trust: Trust) -> None:
    if any(alias_signed_by(key, model, alias, record, audience=trust.audience) for key in trust.keys):
        return
    found = record.signature
    if found is None:
        what = "is not signed"
    elif found.audience is None:
        what = "was signed before signatures named their store"
    elif found.audience != trust.audience:
        what = f"is signed for {found.audience}, not for {trust.audience}"
    elif any(key.id == found.key for key in trust.keys):
        what = f"has a signature by {found.key[:16]} that does not hold"
    else:
        what = f"is signed by {found.key[:16]}"
    raise TrustError(
        f"{store.url}: alias {alias} of {model} at gen {record.gen} ({record.version}) {what}, expected {_ids(trust)}; "
        f"its publisher signs it with `birkhoff sign {model}@{alias}`, or pull {model}@{record.version} by its name"
    )


def _check_generation(store: Store, model: str, alias: str, record: AliasRecord, trust: Trust) -> None:
    """Compare an alias with the state remembered of it, and remember the present one.

    Raises:
        TrustError: It went back; or the memory cannot be read, or, if signatures are required, not be written.
    """
    name = json.dumps([store.url, store.address.settings.endpoint, model, alias])
    note = cache_folder() / "seen" / f"{sha256(name.encode())}.json"
    label = f"alias {alias} of {model}"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        # The lock is another file, because the note is replaced.
        with note.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            gen, digest = _seen(note, label, trust)
            _check_step(store, label, record, (gen, digest), note, trust)
            if (gen, digest) != (record.gen, record.digest):
                with atomic_file(note) as file:
                    file.write(json.dumps({"alias": name, "gen": record.gen, "digest": record.digest}).encode())
    except OSError as error:
        gen, digest = _seen(note, label, trust)  # a full or read-only disk can still be read
        _check_step(store, label, record, (gen, digest), note, trust)
        if trust.keys and not trust.accept_older and (gen, digest) != (record.gen, record.digest):
            raise TrustError(
                f"{note}: {error.strerror}, so a later step back of {label} would go unnoticed; point BIRKHOFF_HOME at "
                "a folder that can be written, or go on all the same with --accept-older"
            ) from None
        log.warning("%s: %s; a later step back of %s will go unnoticed", note, error.strerror, label)


def _check_step(store: Store, label: str, record: AliasRecord, seen: tuple[int, str], note: Path, trust: Trust) -> None:
    """Raise TrustError if an alias is behind the state remembered of it, unless that is accepted."""
    gen, digest = seen
    if trust.accept_older or record.gen > gen or (record.gen == gen and digest == record.digest):
        return
    raise TrustError(
        f"{store.url}: {label} is at gen {record.gen} ({record.version}, {record.digest[:12]}), and this machine has "
        f"seen gen {gen} ({digest[:12]}): an older state was put back; if that was meant, accept it with "
        f"--accept-older, or delete {note}"
    )


def _seen(note: Path, label: str, trust: Trust) -> tuple[int, str]:
    """Return (gen, digest) of a note; (0, "") if there is none. Raises TrustError if it cannot be read."""
    try:
        known = json.loads(note.read_bytes()[: 1 << 16])
        return int(known["gen"]), str(known["digest"])
    except (FileNotFoundError, NotADirectoryError):
        return 0, ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if trust.accept_older:
            return 0, ""
        raise TrustError(
            f"{note}: cannot be read ({first_line(error)}), so {label} may have gone back; accept what the store says "
            "with --accept-older, or delete that file"
        ) from None


def _ids(trust: Trust) -> str:
    return " or ".join(f"key {key.id[:16]}" for key in trust.keys)
