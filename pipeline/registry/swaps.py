"""Documents with several writers: read, decide, compare-and-swap, and retry if another writer was faster."""

from collections.abc import Callable

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, D, parse_bounded
from birkhoff.pipeline.errors import ObjectNotFoundError, PreconditionError, StoreError
from birkhoff.pipeline.store.base import Store

RACES = 100
"""Lost races before giving up. Every race has a winner, so more means that the store's swaps do not work."""


def read_tagged(store: Store, kind: type[D], key: str) -> tuple[D, str]:
    """Return a document and its tag. Raises ObjectNotFoundError, StoreError, IntegrityError."""
    body, tag = store.read(key, length=MAX_DOCUMENT_BYTES + 1)
    return parse_bounded(kind, key, body), tag


def change_document(
    store: Store, kind: type[D], key: str, change: Callable[[D | None], D | None], *, wish: str = "change it"
) -> None:
    """Replace a document by `change(document)`. `change` gets None if there is none, and returns None for no change.

    Raises:
        StoreError: The store failed, or the document changed during `RACES` attempts to do what `wish` says.
        IntegrityError: The stored object is not such a document.
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
