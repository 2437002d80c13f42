"""Ed25519 signatures of versions and aliases: key files, what is signed, and where it lies.

    models/M/versions/<digest>/signatures/<key>.json    by one key: under which names this version was published
    models/M/aliases/<alias>.json                       an alias carries the signature of its present state

A signature covers a line that says what it is for and a JSON object in canonical form (sorted keys, no blanks, ASCII):
of a version its model, name, digest and time; of an alias also its own name and `gen`. So none holds for another model,
name, alias or generation. SIGNING.md has what this protects from and what it does not.
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

from birkhoff.pipeline.artifact import (
    AliasRecord,
    AliasSignature,
    NameSignature,
    VersionSignatures,
    fetch_document,
    parse_bounded,
    sha256,
    signatures_key,
    utc_now,
)
from birkhoff.pipeline.errors import ObjectNotFoundError, OutputError, PreconditionError, StoreError, TrustError
from birkhoff.pipeline.names import RACES
from birkhoff.pipeline.store import Store

if TYPE_CHECKING:  # imported by the functions that need it: readers that ask for no signature do without
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_SUFFIX = ".pub"
KEPT_NAMES = 64
"""Names under which one version can be signed by one key; the oldest go."""

_MAX_KEY_BYTES = 4096
_REMEDY = "make one with `birkhoff key new FILE`"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """A key that signatures are checked with. `id` is the sha256 of its 32 bytes in hex."""

    id: str
    key: "Ed25519PublicKey" = field(repr=False)

    def holds(self, signature: str, statement: bytes) -> bool:
        """Whether `signature` (base64) is of these bytes."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(base64.b64decode(signature, validate=True), statement)
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A private key, for the process that publishes; never sent to workers or written anywhere."""

    public: PublicKey
    key: "Ed25519PrivateKey" = field(repr=False)

    def sign(self, statement: bytes) -> str:
        """The signature in base64."""
        return base64.b64encode(self.key.sign(statement)).decode()


def new_key(path: Path) -> PublicKey:
    """Write a new key pair: `path`, which its owner alone can read, and `path`.pub.

    Raises:
        OutputError: one of the files exists, or cannot be written.
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
    """Read a private key file. Raises TrustError, also for a file that others can read."""
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
        raise TrustError(f"{path}: expected an unencrypted Ed25519 private key in PEM form; {_REMEDY}")
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


def version_statement(model: str, name: str, digest: str, signed: str) -> bytes:
    """What the signature of a version covers."""
    return _statement("version", {"model": model, "version": name, "digest": digest, "signed": signed})


def alias_statement(model: str, alias: str, record: AliasRecord) -> bytes:
    """What the signature of an alias covers: everything that it means, not its history."""
    facts = {"model": model, "alias": alias, "version": record.version, "digest": record.digest, "gen": record.gen}
    return _statement("alias", {**facts, "moved": record.moved, "back": bool(record.back)})


def sign_alias(signer: Signer, model: str, alias: str, record: AliasRecord) -> AliasRecord:
    """The record with a signature of this state."""
    signature = signer.sign(alias_statement(model, alias, record))
    return record.model_copy(update={"signature": AliasSignature(key=signer.public.id, signature=signature)})


def alias_signed_by(key: PublicKey, model: str, alias: str, record: AliasRecord) -> bool:
    """Whether the alias carries a signature of its state by this key."""
    found = record.signature
    if found is None or found.key != key.id:
        return False
    return key.holds(found.signature, alias_statement(model, alias, record))


def sign_version(
    store: Store, signer: Signer, model: str, name: str, digest: str, *, withdraw: str | None = None
) -> None:
    """Store the statement that `name` of `model` is this version; takes back the one about `withdraw`.

    Written before the name exists, so that no reader meets an unsigned one. Raises StoreError, IntegrityError.
    """
    key = signatures_key(model, digest, signer.public.id)
    for _ in range(RACES):
        try:
            body, tag = store.read(key)
            held = parse_bounded(VersionSignatures, key, body).names
        except ObjectNotFoundError:
            tag, held = "", ()
        names = tuple(entry for entry in held if entry.version != withdraw)
        if not any(_entry_holds(signer.public, model, digest, entry) for entry in names if entry.version == name):
            signed = utc_now()
            signature = signer.sign(version_statement(model, name, digest, signed))
            names = tuple(entry for entry in names if entry.version != name)
            names = (*names, NameSignature(version=name, signed=signed, signature=signature))[-KEPT_NAMES:]
        if names == held:
            return
        record = VersionSignatures(key=signer.public.id, names=names).to_bytes()
        try:
            store.replace(key, record, tag=tag) if tag else store.create(key, record)
        except PreconditionError:
            continue
        return
    raise StoreError(f"{store.url}: {key} changed under {RACES} tries to sign")


def read_signatures(store: Store, model: str, digest: str, key: PublicKey) -> VersionSignatures | None:
    """What a key has said of a version, its signatures unchecked. Raises StoreError, IntegrityError."""
    try:
        return fetch_document(store, VersionSignatures, signatures_key(model, digest, key.id))
    except ObjectNotFoundError:
        return None


def signed_names(key: PublicKey, model: str, digest: str, record: VersionSignatures | None) -> list[str]:
    """The names under which a key has signed this version of this model: signatures that do not hold are left out."""
    if record is None or record.key != key.id:
        return []
    return [entry.version for entry in record.names if _entry_holds(key, model, digest, entry)]


def _entry_holds(key: PublicKey, model: str, digest: str, entry: NameSignature) -> bool:
    return key.holds(entry.signature, version_statement(model, entry.version, digest, entry.signed))


def _statement(kind: str, facts: dict[str, object]) -> bytes:
    body = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"birkhoff {kind} signature 1\n{body}".encode()


def _public(key: "Ed25519PublicKey") -> PublicKey:
    return PublicKey(id=sha256(key.public_bytes_raw()), key=key)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            body = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror}; name a key file, or {_REMEDY}") from None
    if len(body) > _MAX_KEY_BYTES:
        raise TrustError(f"{path}: larger than {_MAX_KEY_BYTES} bytes: not a key; {_REMEDY}")
    return body


def _create(path: Path, body: bytes, mode: int) -> None:
    """Write a new file with this mode from its first moment on. Raises OutputError."""
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
