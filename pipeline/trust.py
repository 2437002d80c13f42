"""What a reader demands of a version beyond its digests: signatures, and that an alias never goes back unnoticed.

A reader remembers the highest `gen` of every alias it has followed, by store, model and alias, under the cache folder.
An alias that comes with a smaller one, or with the same one and another version, was not moved but replaced: a backup
was restored, a mirror is stale, or somebody replays an old state. Deleting the cache folder forgets it.
"""

import fcntl
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from birkhoff.pipeline.artifact import AliasRecord, VersionSignatures, sha256
from birkhoff.pipeline.errors import TrustError
from birkhoff.pipeline.home import cache_folder
from birkhoff.pipeline.publish import Version
from birkhoff.pipeline.signing import PublicKey, alias_signed_by, load_public, read_signatures, signed_names
from birkhoff.pipeline.store import Store

log = logging.getLogger("birkhoff.trust")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """A reader's demands.

    keys: where there are any, version and alias must be signed, each by one of them.
    accept_older: take what an alias says now, and remember that from here on.
    """

    keys: tuple[PublicKey, ...] = ()
    accept_older: bool = False

    @classmethod
    def of(cls, key_files: Sequence[str | os.PathLike[str]] | None, *, accept_older: bool = False) -> "Trust":
        """Demands with the public keys of these files. Raises TrustError."""
        keys = tuple(load_public(Path(file)) for file in key_files or ())
        return cls(keys=keys, accept_older=accept_older)


ANY = Trust()
"""No signatures asked for; aliases that go back are noticed."""


def check_version(store: Store, version: Version, trust: Trust) -> tuple[VersionSignatures, ...]:
    """Make sure that a version found in a store is what the reader demands; returns the signatures that say so.

    Raises:
        TrustError: a signature is missing, or of another key, model, name or digest; or the alias went back.
        StoreError, IntegrityError: a signature cannot be read.
    """
    signatures = tuple(
        found for key in trust.keys if (found := read_signatures(store, version.model, version.digest, key)) is not None
    )
    check_signatures(version.model, version.name, version.digest, signatures, trust, store.url)
    if version.alias is not None and version.pointer is not None:
        if trust.keys:
            _check_alias_signature(store, version.model, version.alias, version.pointer, trust)
        _check_generation(store, version.model, version.alias, version.pointer, accept=trust.accept_older)
    return signatures


def check_signatures(
    model: str, name: str | None, digest: str, signatures: Sequence[VersionSignatures], trust: Trust, where: str
) -> None:
    """Make sure that one of the keys has signed this version under this name; under any where `name` is None.

    Raises:
        TrustError: none has; what was signed instead stands in it.
    """
    if not trust.keys:
        return
    by_id = {record.key: record for record in signatures}
    signed = [found for key in trust.keys for found in signed_names(key, model, digest, by_id.get(key.id))]
    if signed and name in (None, *signed):
        return
    label = f"{where}: {model}@{name or digest[:12]}"
    if signed:
        raise TrustError(
            f"{label}: digest {digest} is signed as {', '.join(signed)}, not as {name}: a name moved or replayed; "
            "do not use it, and ask its publisher"
        )
    if any(key.id in by_id for key in trust.keys):
        raise TrustError(
            f"{label}: its signature by {_ids(trust)} does not hold for model {model} and digest {digest}; "
            "do not use it, and ask its publisher"
        )
    raise TrustError(
        f"{label}: not signed by {_ids(trust)}; its publisher signs it with `birkhoff sign`, or name the key it is "
        "signed with"
    )


def _check_alias_signature(store: Store, model: str, alias: str, record: AliasRecord, trust: Trust) -> None:
    if any(alias_signed_by(key, model, alias, record) for key in trust.keys):
        return
    found = record.signature
    if found is None:
        what = "is not signed"
    elif any(key.id == found.key for key in trust.keys):
        what = f"has a signature by {found.key[:16]} that does not hold"
    else:
        what = f"is signed by {found.key[:16]}"
    raise TrustError(
        f"{store.url}: alias {alias} of {model} at gen {record.gen} ({record.version}) {what}, expected {_ids(trust)}; "
        f"its publisher signs it with `birkhoff sign {model}@{alias}`, or pull {model}@{record.version} by its name"
    )


def _check_generation(store: Store, model: str, alias: str, record: AliasRecord, *, accept: bool) -> None:
    """Compare an alias with what was seen of it, and remember it. Raises TrustError."""
    name = json.dumps([store.url, store.address.settings.endpoint, model, alias])
    note = cache_folder() / "seen" / f"{sha256(name.encode())}.json"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with note.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            gen, digest = _seen(file.read(1 << 16))
            if not accept and (record.gen < gen or (record.gen == gen and digest != record.digest)):
                raise TrustError(
                    f"{store.url}: alias {alias} of {model} is at gen {record.gen} ({record.version}, "
                    f"{record.digest[:12]}), and this machine has seen gen {gen} ({digest[:12]}): an older state was "
                    f"put back; if that was meant, accept it with --accept-older, or delete {note}"
                )
            if (gen, digest) != (record.gen, record.digest):
                file.seek(0)
                file.truncate()
                file.write(json.dumps({"alias": name, "gen": record.gen, "digest": record.digest}))
    except OSError as error:
        log.warning("%s: %s; a later step back of alias %s of %s will go unnoticed", note, error.strerror, alias, model)


def _seen(text: str) -> tuple[int, str]:
    """(gen, digest) of a note; nothing seen where it is new, or was cut short."""
    try:
        known = json.loads(text)
        return int(known["gen"]), str(known["digest"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _ids(trust: Trust) -> str:
    return " or ".join(f"key {key.id[:16]}" for key in trust.keys)
