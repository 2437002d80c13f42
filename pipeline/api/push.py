"""Push versions to stores and registries: `birkhoff.push`, and the steps that `birkhoff copy` shares with it."""

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
    """Copy a version to another store, only what it lacks, with its name, signatures and labels.

    This is `birkhoff copy`. To a registry the version goes as one ModelPack image; that is `birkhoff push`.

    Args:
        reference: `MODEL[@VERSION|ALIAS|DIGEST]`. An alias that is named here is copied too.
        to: The target store or its URL; a folder is created. For `oci://HOST/REPOSITORY:TAG`, a registry, the tag
            moves, and `aliases`, `rename`, `force` and `sign` do not apply.
        store: The source, as in `pull`.
        aliases: Further aliases to point at the version in the target.
        rename: Take the next free name in the target instead of its own.
        force: Move aliases in the target even if they are protected.
        sign: File of the private key to sign with for the target.
        require_signature, signed_for, accept_older: Which signatures to require, as in `pull`.
        progress: Show a progress bar, in a terminal or a notebook.

    Warns:
        BirkhoffWarning: The target has no conditional writes, or the version's signatures name another store.

    Raises:
        ArtifactNotFoundError: There is no such version, or it has no name.
        PreconditionError: The target has another version under this name.
        AliasError: An alias in the target is protected.
        IntegrityError: A blob is missing or damaged; nothing was named.
        TrustError, StoreError: As in `pull`; StoreError also if both stores are the same.
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
            raise StoreError(f"{target.url} is the store it comes from; name another one")
        parcel = parcel_of(source, reference, trust)
        key = None if sign is None else Path(sign)
        delivery = delivery_to(target, aliases, rename=rename, force=force, sign=key, warn=_warn)
        with transferring(parcel.label, parcel.nbytes, quiet=not progress) as report:
            done = copy(source, parcel, target, delivery, report=report)
        tell_of_signatures(done, target, _warn)
    return done


def parcel_of(source: Store, reference: str, trust: Trust) -> Parcel:
    """Return a version without its blobs, if `trust` accepts it. Raises what `push` raises."""
    version = resolve(source, reference)
    check_version(source, version, trust)
    return pack(source, version)


def delivery_to(
    target: Store, aliases: Sequence[str], *, rename: bool, force: bool, sign: Path | None, warn: Warn
) -> Delivery:
    """Probe a store and return how versions are delivered to it. Raises TrustError, StoreError."""
    signer = None if sign is None else load_signer(sign)
    single = not check_store(target).conditional_writes
    if single:
        warn(f"{target.url} ignores conditional writes: make sure that nobody else publishes to it now")
    return Delivery(rename=rename, aliases=tuple(aliases), force=force, signer=signer, single_publisher=single)


def tell_of_signatures(done: Installed, target: Store, warn: Warn) -> None:
    """Warn if signatures name another store, with the option that readers then need."""
    if done.signed_for:
        warn(
            f"{done.parcel.label}: its signatures name {some(done.signed_for, 3)}, not {target.url}; readers there say "
            "that with --signed-for, unless it is signed there too with --sign"
        )


def _warn(message: str) -> None:
    warnings.warn(message, BirkhoffWarning, stacklevel=3)
