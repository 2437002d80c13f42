"""From an address to a store: the one place that knows every kind there is."""

from pathlib import Path
from urllib.parse import unquote

from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the store at `url` (`store.base` lists the kinds), starting the embedded server if that is the one.

    Opens no connection to a remote store: `probe.check_store` does. Raises StoreError, StoreDeniedError.
    """
    return open_address(StoreAddress.parse(url, settings), start=True)


def open_address(address: StoreAddress, *, start: bool = False) -> Store:
    """Open the store of an address. Workers leave `start` off: only the driver starts and stops the embedded server."""
    scheme, _, rest = address.url.partition("://")
    # Imported here: boto3 takes 0.2 s.
    if scheme == "file":
        from birkhoff.pipeline.store.directory import DirectoryStore

        return DirectoryStore(address, Path(unquote(rest)))
    if scheme == "embedded":
        from birkhoff.pipeline.store.seaweedfs import open_embedded

        return wrapped(open_embedded(address, Path(unquote(rest)), start=start))
    if scheme == "memory":
        from birkhoff.pipeline.store.memory import MemoryStore

        return MemoryStore(address)
    from birkhoff.pipeline.store.s3 import open_s3

    bucket, _, prefix = rest.partition("/")
    return wrapped(open_s3(address, bucket, prefix))


def wrapped(store: Store) -> Store:
    """A store behind a network as callers want it: what may pass is tried again, conditions go where they are honoured.

    A least speed is no wrapper: a call of a store is whole, and only its socket sees bytes come (`least_speed`).
    """
    from birkhoff.pipeline.store.conditions import ConditionalStore
    from birkhoff.pipeline.store.retry import RetryingStore

    return ConditionalStore(RetryingStore(store, store.address.settings.attempts))
