"""The store of a command: `--store`, else `BIRKHOFF_STORE`, else the embedded server."""

import contextlib
import os
from collections.abc import Iterator

from birkhoff.pipeline.errors import StoreError
from birkhoff.pipeline.paths import birkhoff_home
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings, store_folder
from birkhoff.pipeline.store.open import open_store

DEFAULT_STORE = "embedded"
STORE_VARIABLE = "BIRKHOFF_STORE"
HTTP_VARIABLE = "BIRKHOFF_ALLOW_HTTP"


def default_store_url(url: str | None = None) -> str:
    """Return `url` if given, else the environment's, else the embedded server."""
    return url or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def http_allowed() -> bool:
    """Return whether BIRKHOFF_ALLOW_HTTP=1 permits plain http to other machines."""
    return os.environ.get(HTTP_VARIABLE) == "1"


def open_default_store(url: str | None = None, *, allow_http: bool = False, create: bool = False) -> Store:
    """Open the store of a command; `allow_http` as in `StoreSettings`, or by the environment.

    Raises:
        StoreError: It cannot be opened, or its folder does not exist and `create` is off.
    """
    store = open_store(default_store_url(url), StoreSettings(allow_http=allow_http or http_allowed()))
    folder = store_folder(store.url)
    if folder is not None and not create and not folder.exists():
        raise StoreError(
            f"{store.url}: there is no folder {folder}; check --store and BIRKHOFF_STORE, or publish there with "
            "`compress`, which makes it"
        )
    return store


@contextlib.contextmanager
def borrowed_store(store: str | Store | None = None, *, create: bool = False) -> Iterator[Store]:
    """Yield the given store, which its owner closes, or open that of `open_default_store` and close it afterwards."""
    if isinstance(store, Store):
        yield store
        return
    with open_default_store(store, create=create) as opened:
        yield opened


@contextlib.contextmanager
def open_existing_store(url: str | None = None, *, allow_http: bool = False) -> Iterator[Store | None]:
    """Open the store of a command for reading; None for one on this machine that was never used, so that none is
    created."""
    meant = StoreAddress.parse(default_store_url(url)).url
    folder = birkhoff_home() / "embedded" if meant == StoreAddress.parse(DEFAULT_STORE).url else store_folder(meant)
    if folder is not None and not folder.exists():
        yield None
        return
    with open_default_store(meant, allow_http=allow_http) as store:
        yield store
