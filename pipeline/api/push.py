"""Versions into other stores and registries: `birkhoff.push`, and what `birkhoff copy` does for each."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from birkhoff.codec.errors import BirkhoffWarning
from birkhoff.pipeline.api.transfer import transferring
from birkhoff.pipeline.artifact.oci import OciPushed, push_oci
from birkhoff.pipeline.artifact.oci_client import OciReference
from birkhoff.pipeline.errors import StoreError
from birkhoff.pipeline.registry.shipping import Delivery, Installed, Parcel, copy, pack
from birkhoff.pipeline.registry.signing import load_signer
from birkhoff.pipeline.registry.trust import Trust, check_version
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.default import borrowed_store, http_allowed
from birkhoff.pipeline.store.probe import check_store
from birkhoff.pipeline.text import some

Warn = Callable[[str], object]


def push(
    reference: str,
    to: str | Store,
    *,
    store: str | Store | None = None,
    aliases: Sequence[str] = (),
    rename: bool = False,
    force: bool = False,
    sign: str | os.PathLike[str] | None = None,
    require_signature: Sequence[str | os.PathLike[str]] | None = None,
    signed_for: str | None = None,
    accept_older: bool = False,
    progress: bool = True,
) -> Installed | OciPushed:
    """Bring a version into another store, only what it lacks, with its name, signatures and labels: `birkhoff copy`.

    Into a registry it goes as one image by the ModelPack specification: `birkhoff push`.

    Args:
        reference: `MODEL[@VERSION|ALIAS|DIGEST]`; an alias that is named travels along.
        to: the store that gets it, or its URL; a folder is made. `oci://HOST/REPOSITORY:TAG` is a registry, whose
            tag is moved, and for which aliases, rename, force and sign mean nothing.
        store: where it is, as in `pull`.
        aliases: point these at it there, besides.
        rename: take the next free name there instead of the one it has.
        force: move aliases there although they are protected.
        sign: file of the private key that signs it there.
        require_signature, signed_for, accept_older: what it must be signed by, as in `pull`.
        progress: show a bar, in a terminal or a notebook.

    Warns:
        BirkhoffWarning: the target has no conditional writes, or the version's signatures name another store.

    Raises:
        ArtifactNotFoundError: no such version, or it has no name.
        PreconditionError: its name is another version's there.
        AliasError: an alias there is protected.
        IntegrityError: a blob is missing or damaged; nothing was named.
        TrustError, StoreError: as in `pull`; both stores are the same one.
    """
    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)
    with ExitStack() as stack:
        source = stack.enter_context(borrowed_store(store))
        if isinstance(to, str) and to.startswith("oci://"):
            if aliases or rename or force or sign is not None:
                raise StoreError(f"{to}: a registry has neither aliases nor our signatures; leave those options out")
            reached = OciReference.parse(to)
            parcel = parcel_of(source, reference, trust)
            with transferring(parcel.label, parcel.nbytes, quiet=not progress) as report:
                return push_oci(source, parcel, reached, allow_http=http_allowed(), report=report)
        target = stack.enter_context(borrowed_store(to, create=True))
        if target.url == source.url:
            raise StoreError(f"{target.url} is the store it is in; name another one")
        parcel = parcel_of(source, reference, trust)
        key = None if sign is None else Path(sign)
        delivery = delivery_to(target, aliases, rename=rename, force=force, sign=key, warn=_warn)
        with transferring(parcel.label, parcel.nbytes, quiet=not progress) as report:
            done = copy(source, parcel, target, delivery, report=report)
        tell_of_signatures(done, target, _warn)
    return done


def parcel_of(source: Store, reference: str, trust: Trust) -> Parcel:
    """All of a version but its blobs, if it is what `trust` demands. Raises as `push`."""
    version = resolve(source, reference)
    check_version(source, version, trust)
    return pack(source, version)


def delivery_to(
    target: Store, aliases: Sequence[str], *, rename: bool, force: bool, sign: Path | None, warn: Warn
) -> Delivery:
    """What is to become of versions in a store, once it was asked what it can. Raises TrustError, StoreError."""
    signer = None if sign is None else load_signer(sign)
    single = not check_store(target).conditional_writes
    if single:
        warn(f"{target.url} ignores conditional writes: make sure that nobody else publishes to it now")
    return Delivery(rename=rename, aliases=tuple(aliases), force=force, signer=signer, single_publisher=single)


def tell_of_signatures(done: Installed, target: Store, warn: Warn) -> None:
    """Say what readers of the target have to say, where signatures name another store."""
    if done.signed_for:
        warn(
            f"{done.parcel.label}: its signatures name {some(done.signed_for, 3)}, not {target.url}; readers there say "
            "that with --signed-for, unless it is signed there too with --sign"
        )


def _warn(message: str) -> None:
    warnings.warn(message, BirkhoffWarning, stacklevel=3)
