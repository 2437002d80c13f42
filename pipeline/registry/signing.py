"""Ed25519 signatures of versions and aliases: key files, signed statements, storage.

    models/M/versions/<digest>/signatures/<key>.json    by one key: the names this version was published under
    models/M/aliases/<alias>.json                       an alias carries the signature of its present state

A signature covers one line with its purpose, and a JSON object in canonical form (sorted keys, no blanks, ASCII). For a
version the object has store, model, name, digest and time; for an alias also the alias and `gen`. So a signature is
valid for one store, model, name, alias and generation only. SIGNING.md says what this protects from and what it does
not.
"""

import base64
import binascii
import contextlib
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from birkhoff.pipeline.errors import ObjectNotFoundError, OutputError, TrustError
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.registry.documents import (
    AliasRecord,
    AliasSignature,
    NameSignature,
    VersionSignatures,
    fetch_document,
    sha256,
    signatures_key,
    utc_now,
)
from birkhoff.pipeline.registry.swaps import change_document
from birkhoff.pipeline.store.base import Store

if TYPE_CHECKING:  # the functions that need it import it, so readers that check no signature do without
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_SUFFIX = ".pub"
KEPT_NAMES = 64
"""Names that one key can sign one version under; the oldest are dropped."""

_MAX_KEY_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A key to check signatures with. `id` is the sha256 of its 32 bytes in hex."""

    id: str
    key: "Ed25519PublicKey" = field(repr=False)

    def holds(self, signature: str, statement: bytes) -> bool:
        """Return whether `signature` (base64) is valid for these bytes."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(base64.b64decode(signature, validate=True), statement)
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A private key, for the publishing process. It is never sent to workers or written anywhere."""

    public: PublicKey
    key: "Ed25519PrivateKey" = field(repr=False)

    def sign(self, statement: bytes) -> str:
        """Return the signature in base64."""
        return base64.b64encode(self.key.sign(statement)).decode()


def new_key(path: Path) -> PublicKey:
    """Write a new key pair: `path`, readable only by its owner, and `path`.pub.

    Raises:
        OutputError: One of the files exists, or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    other = path.with_name(path.name + PUBLIC_SUFFIX)
    _create(path, private, 0o600)
    try:
        _create(other, public, 0o644)
    except OutputError:
        path.unlink()
        raise
    return _public(key.public_key())


def load_signer(path: Path) -> Signer:
    """Read a private key file. Raises TrustError, also if others can read the file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    body = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise TrustError(f"{path}: others can read this signing key (mode {mode:o}); chmod 600 it, or make a new one")
    try:
        key = load_pem_private_key(body, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path}: expected an unencrypted Ed25519 private key in PEM form; {_remedy()}")
    return Signer(public=_public(key.public_key()), key=key)


def load_public(path: Path) -> PublicKey:
    """Read a public key file. Raises TrustError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    body = _read(path)
    try:
        key = load_pem_public_key(body)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        hint = f"; that of a private key lies beside it as {path.name}{PUBLIC_SUFFIX}" if b"PRIVATE" in body else ""
        raise TrustError(f"{path}: expected an Ed25519 public key in PEM form{hint}")
    return _public(key)


def audience_of(store: Store) -> str:
    """Return how signatures name a store: its URL, with its endpoint unless that is AWS's own.

    Buckets of one name in two services are two stores. An embedded store is named by its folder, whatever port serves
    it.
    """
    endpoint = store.address.settings.endpoint
    return store.url if endpoint is None or store.url.startswith("embedded:") else f"{store.url} at {endpoint}"


def version_statement(audience: str, model: str, name: str, digest: str, signed: str) -> bytes:
    """Return the bytes that a version's signature covers."""
    named = {"audience": audience, "model": model, "version": name}
    return _statement("version", {**named, "digest": digest, "signed": signed})


def alias_statement(audience: str, model: str, alias: str, record: AliasRecord) -> bytes:
    """Return the bytes that an alias's signature covers: everything but its history."""
    facts = {"model": model, "alias": alias, "version": record.version, "digest": record.digest, "gen": record.gen}
    return _statement("alias", {"audience": audience, **facts, "moved": record.moved, "back": bool(record.back)})


def sign_alias(signer: Signer, audience: str, model: str, alias: str, record: AliasRecord) -> AliasRecord:
    """Return the record with a signature of its state for the store `audience`."""
    signature = signer.sign(alias_statement(audience, model, alias, record))
    signed = AliasSignature(key=signer.public.id, audience=audience, signature=signature)
    return record.model_copy(update={"signature": signed})


def alias_signed_by(
    key: PublicKey, model: str, alias: str, record: AliasRecord, *, audience: str | None = None
) -> bool:
    """Return whether an alias carries this key's signature of its state for the store `audience` (None: any store)."""
    found = record.signature
    if found is None or found.key != key.id or not _is_for(found.audience, audience):
        return False
    return key.holds(found.signature, alias_statement(found.audience or "", model, alias, record))


def sign_version(
    store: Store, signer: Signer, model: str, name: str, digest: str, *, withdraw: str | None = None
) -> None:
    """Store the statement that `name` of `model` is this version, and withdraw the one about the name `withdraw`.

    It is written before the name exists, so that no reader meets an unsigned name. Raises StoreError, IntegrityError.
    """
    audience = audience_of(store)

    def change(found: VersionSignatures | None) -> VersionSignatures | None:
        held = () if found is None else found.names
        names = tuple(entry for entry in held if entry.version != withdraw or entry.audience != audience)
        if not any(
            _entry_holds(signer.public, model, digest, entry, audience) for entry in names if entry.version == name
        ):
            signed = utc_now()
            signature = signer.sign(version_statement(audience, model, name, digest, signed))
            # one without an audience is not accepted by any reader
            names = tuple(e for e in names if e.version != name or e.audience not in (None, audience))
            added = NameSignature(version=name, audience=audience, signed=signed, signature=signature)
            names = (*names, added)[-KEPT_NAMES:]
        return None if names == held else VersionSignatures(key=signer.public.id, names=names)

    change_document(store, VersionSignatures, signatures_key(model, digest, signer.public.id), change, wish="sign")


def add_signatures(store: Store, model: str, digest: str, record: VersionSignatures) -> None:
    """Store a key's statements from another store beside those made here. Raises StoreError, IntegrityError."""

    def change(found: VersionSignatures | None) -> VersionSignatures | None:
        held = () if found is None else found.names
        known = {(entry.version, entry.audience) for entry in held}
        # Statements made here come last, so that they are kept.
        names = (*(e for e in record.names if (e.version, e.audience) not in known), *held)[-KEPT_NAMES:]
        return None if names == held else VersionSignatures(key=record.key, names=names)

    change_document(store, VersionSignatures, signatures_key(model, digest, record.key), change, wish="sign")


def read_signatures(store: Store, model: str, digest: str, key: PublicKey) -> VersionSignatures | None:
    """Return a key's statements about a version, not checked. Raises StoreError, IntegrityError."""
    try:
        return fetch_document(store, VersionSignatures, signatures_key(model, digest, key.id))
    except ObjectNotFoundError:
        return None


def signed_names(
    key: PublicKey, model: str, digest: str, record: VersionSignatures | None, *, audience: str | None = None
) -> list[str]:
    """Return the names under which a key has validly signed this version for the store `audience` (None: any store)."""
    if record is None or record.key != key.id:
        return []
    return [entry.version for entry in record.names if _entry_holds(key, model, digest, entry, audience)]


def _entry_holds(key: PublicKey, model: str, digest: str, entry: NameSignature, audience: str | None) -> bool:
    if not _is_for(entry.audience, audience):
        return False
    return key.holds(
        entry.signature, version_statement(entry.audience or "", model, entry.version, digest, entry.signed)
    )


def _is_for(named: str | None, wanted: str | None) -> bool:
    """Return whether a signature for the store `named` is for `wanted`. Old signatures name no store."""
    return named is not None and wanted in (None, named)


def _statement(kind: str, facts: dict[str, object]) -> bytes:
    body = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"birkhoff {kind} signature 2\n{body}".encode()


def _public(key: "Ed25519PublicKey") -> PublicKey:
    return PublicKey(id=sha256(key.public_bytes_raw()), key=key)


def _remedy() -> str:
    return f"make one with `{hint('key', 'new', 'birkhoff.key')}`"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            body = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}; name a key file, or {_remedy()}") from None
    if len(body) > _MAX_KEY_BYTES:
        raise TrustError(f"{path}: larger than {_MAX_KEY_BYTES} bytes: not a key; {_remedy()}")
    return body


def _create(path: Path, body: bytes, mode: int) -> None:
    """Create a file with this mode from the start. Raises OutputError."""
    made = False
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        made = True
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise OutputError(f"{path}: {error.strerror}; name a new file in a folder that can be written") from None
