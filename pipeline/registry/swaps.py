"""Documents that several may change at once: read, decide, compare-and-swap, and again where somebody was faster."""

from collections.abc import Callable

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, D, parse_bounded
from birkhoff.pipeline.errors import ObjectNotFoundError, PreconditionError, StoreError
from birkhoff.pipeline.store.base import Store

RACES = 100
"""Lost races before giving up: with exactly one winner a race, more means the store does not do what it says."""


def read_tagged(store: Store, kind: type[D], key: str) -> tuple[D, str]:
    """A document and its tag. Raises ObjectNotFoundError, StoreError, IntegrityError."""
    body, tag = store.read(key, length=MAX_DOCUMENT_BYTES + 1)
    return parse_bounded(kind, key, body), tag


def change_document(
    store: Store, kind: type[D], key: str, change: Callable[[D | None], D | None], *, wish: str = "change it"
) -> None:
    """Swap a document for what `change` makes of it, which gets None where there is none; None for no change.

    Raises:
        StoreError: the store failed, or the document changed under `RACES` tries to do what `wish` says.
        IntegrityError: what stands there is no such document.
    """
    for _ in range(RACES):
        try:
            held, tag = read_tagged(store, kind, key)
        except ObjectNotFoundError:
            held, tag = None, ""
        after = change(held)
        if after is None:
            return
        try:
            store.replace(key, after.to_bytes(), tag=tag) if tag else store.create(key, after.to_bytes())
        except PreconditionError:
            continue
        return
    raise StoreError(f"{store.url}: {key} changed under {RACES} tries to {wish}")
