"""OpenSSF Model Signing bundles (OMS 1.0) of folders, with the `model-signing` package.

A bundle is a Sigstore bundle around a DSSE envelope around an in-toto statement that names every file of the folder
with its SHA-256. `model_signing verify key` or `verify certificate` checks it without this package. In a pulled folder
the bundle is `model.sig`. `version.json`, which records how the folder was pulled, is not signed and has no weights.

A version has one bundle, of the folder that `pull` makes from it, as `oms.json` beside its manifest.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import MANIFEST_FILE, SIGNATURE_FILE, VERSION_FILE
from birkhoff.pipeline.artifact.references import Found
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, check_size
from birkhoff.pipeline.errors import ArtifactNotFoundError, ObjectNotFoundError, TrustError
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.registry.documents import version_key
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.text import first_line

log: logging.Logger = logging.getLogger("birkhoff.oms")

OMS_FILE = "oms.json"
"""A version's bundle, beside its manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OmsKey:
    """A signing key, or what is trusted: an elliptic-curve key (P-256, P-384 or P-521) in PEM form, or certificates.

    To sign: the private `key`, and for readers who trust certificates its `certificate` and the `chain` to the root. To
    verify: the public `key`, or the `chain` of trusted roots.
    """

    key: Path | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()


def sign_folder(folder: Path, signer: OmsKey) -> Path:
    """Sign every file of a folder except `version.json`; return the bundle's path, FOLDER/model.sig.

    Raises:
        TrustError: The key cannot be used, or model-signing is not installed.
        ArtifactNotFoundError: There is no such folder.
    """
    _check_folder(folder)
    signing, hashing = _package("signing"), _package("hashing")
    target = folder / SIGNATURE_FILE
    ignored = [target, folder / VERSION_FILE]
    try:
        config = signing.Config().set_hashing_config(
            hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
        )
        if signer.certificate is None:
            config = config.use_elliptic_key_signer(private_key=signer.key)
        else:
            config = config.use_certificate_signer(
                private_key=signer.key, signing_certificate=signer.certificate, certificate_chain=signer.chain
            )
        config.sign(folder, target)
    # Errors of many libraries: keys, certificates, files, JSON, base64.
    except Exception as error:
        log.debug("%s", error, exc_info=True)
        raise TrustError(
            f"{folder}: cannot be signed by {signer.key} ({first_line(error)}); expected an unencrypted private key on "
            "an elliptic curve in PEM form: openssl ecparam -name prime256v1 -genkey -noout"
        ) from None
    return target


def verify_folder(
    folder: Path, trusted: OmsKey, *, signature: Path | None = None, ignored: Sequence[Path] = ()
) -> None:
    """Check that a folder has exactly the files of its bundle, and that a trusted key or root signed them.

    Args:
        folder: A pulled folder, or any model's.
        trusted: See `OmsKey`.
        signature: The bundle. Default: FOLDER/model.sig.
        ignored: Paths that may be unsigned, in addition to those that the bundle leaves out.

    Raises:
        TrustError: A file differs, is missing or was added, or another signer signed.
        ArtifactNotFoundError: There is no such folder, or it has no bundle.
    """
    _check_folder(folder)
    path = signature or folder / SIGNATURE_FILE
    if not path.is_file():
        sign_it = hint("oms", "sign", str(folder), "--key", "PEM")
        raise ArtifactNotFoundError(f"{folder} has no signature {path.name}; sign it with `{sign_it}`")
    verifying, hashing = _package("verifying"), _package("hashing")
    try:
        config = verifying.Config()
        if trusted.key is not None:
            config = config.use_elliptic_key_verifier(public_key=trusted.key)
        else:
            config = config.use_certificate_verifier(certificate_chain=trusted.chain)
        config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[path, *ignored], ignore_git_paths=False))
        config.verify(folder, path)
    except Exception as error:  # as above
        log.debug("%s", error, exc_info=True)
        raise TrustError(f"{folder}: its signature does not hold: {first_line(error)}; do not use it") from None


def attach(store: Store, model: str, digest: str, bundle: bytes) -> None:
    """Store the bundle of a version, replacing an older one. Raises StoreError."""
    store.put(oms_key(model, digest), bundle)


def attached(store: Store, model: str, digest: str) -> bytes | None:
    """Return the bundle of a version; None if it has none. Raises StoreError, IntegrityError."""
    try:
        body = store.get(oms_key(model, digest), length=MAX_DOCUMENT_BYTES + 1)
    except ObjectNotFoundError:
        return None
    check_size(oms_key(model, digest), body)
    return body


def remembered(found: Found, store: Store | None, cache: BlobCache) -> bytes | None:
    """Return the bundle of a version to pull: the store's or, without a store, the one of its last pull here.

    Raises what `attached` raises.
    """
    note = f"oms {found.model}@{found.digest}"
    if store is None:
        return cache.recall(note) or None
    body = attached(store, found.model, found.digest)
    if body is not None or cache.recall(note):
        cache.remember(note, body or b"")
    return body


def oms_key(model: str, digest: str) -> str:
    """Return the key of a version's bundle."""
    return version_key(model, digest).removesuffix(MANIFEST_FILE) + OMS_FILE


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactNotFoundError(f"{folder}: no such folder; pull a version into it first")


def _package(name: str) -> Any:
    """Return a module of model-signing. Raises TrustError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise TrustError(
            f"OMS signatures need model-signing ({error.name} is missing): pip install 'birkhoff-compression[oms]'"
        ) from None
