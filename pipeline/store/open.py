"""Open a store from its address: the one place that knows every kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from birkhoff.pipeline.errors import StoreError
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings


def open_store(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the store at `url` (`store.base` lists the kinds), starting the embedded server if that is meant.

    Opens no connection to a remote store; `probe.check_store` does. Raises StoreError, StoreDeniedError.
    """
    return open_address(StoreAddress.parse(url, settings), start=True)


def open_address(address: StoreAddress, *, start: bool = False) -> Store:
    """Open the store of an address. Workers leave `start` off: only the driver starts and stops the embedded server."""
    scheme, _, rest = address.url.partition("://")
    # Imported here: boto3 takes 0.2 s, and so do the clouds' own libraries.
    if scheme == "file":
        from birkhoff.pipeline.store.directory import DirectoryStore

        return DirectoryStore(address, Path(unquote(rest)))
    if scheme == "embedded":
        from birkhoff.pipeline.store.seaweedfs import open_embedded

        return wrapped(open_embedded(address, Path(unquote(rest)), start=start))
    if scheme == "memory":
        from birkhoff.pipeline.store.memory import MemoryStore

        return MemoryStore(address)
    bucket, _, prefix = rest.partition("/")
    if scheme == "gs":
        with _needs("google-cloud-storage", "gcs"):
            from birkhoff.pipeline.store.gcs import open_gcs
        return wrapped(open_gcs(address, bucket, prefix))
    if scheme == "az":
        with _needs("azure-storage-blob", "azure"):
            from birkhoff.pipeline.store.azure import open_azure
        return wrapped(open_azure(address, bucket, prefix))
    from birkhoff.pipeline.store.s3 import open_s3

    return wrapped(open_s3(address, bucket, prefix))


@contextmanager
def _needs(library: str, extra: str) -> Iterator[None]:
    """Name the extra to install if a library is missing. Raises StoreError."""
    try:
        yield
    except ImportError as error:
        raise StoreError(
            f"this store needs {library} ({error.name} is missing): pip install 'birkhoff-compression[{extra}]'"
        ) from error


def wrapped(store: Store) -> Store:
    """Wrap a networked store: transient failures are retried, conditions are sent if the store honours them.

    The minimum throughput is not a wrapper, because only the socket sees bytes arrive (`least_speed`).
    """
    from birkhoff.pipeline.store.conditions import ConditionalStore
    from birkhoff.pipeline.store.retry import RetryingStore

    return ConditionalStore(RetryingStore(store, store.address.settings.attempts))
