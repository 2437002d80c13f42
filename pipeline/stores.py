"""Which store a command means: `--store`, else `BIRKHOFF_STORE`, else the embedded server."""

import os

from birkhoff.pipeline.store import Store, open_store

DEFAULT_STORE = "embedded"
STORE_VARIABLE = "BIRKHOFF_STORE"


def default_store_url(url: str | None = None) -> str:
    """`url` where given, else the environment's, else the embedded server."""
    return url or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def open_default_store(url: str | None = None) -> Store:
    """Open the store that is meant. Raises StoreError."""
    return open_store(default_store_url(url))
