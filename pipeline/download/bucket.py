"""Downloads from s3://, gs:// and az://, through the stores' clients: their credentials, retries and errors."""

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.download.cache import Partial, Remote, check_space
from birkhoff.pipeline.download.http import FetchSettings, Report
from birkhoff.pipeline.download.spec import bucket_place
from birkhoff.pipeline.errors import ObjectNotFoundError, SourceError, SourceGoneError
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings
from birkhoff.pipeline.store.default import http_allowed
from birkhoff.pipeline.store.open import open_address

_RANGE_BYTES = 16 << 20


class BucketTransport:
    """Reads objects in buckets, with one client per bucket."""

    def __init__(self, settings: FetchSettings, *, allow_http: bool = False) -> None:
        self._settings = StoreSettings(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            attempts=settings.attempts,
            allow_http=allow_http or http_allowed(),
        )
        self._stores: dict[str, Store] = {}

    def close(self) -> None:
        """Release connections."""
        for store in self._stores.values():
            store.close()

    def look(self, url: str) -> Remote:
        """Return size and tag of the object. Raises SourceError."""
        try:
            store, key = self._place(url)
            info = store.head(key)
        except ObjectNotFoundError as error:
            raise SourceGoneError(str(error)) from error
        except BirkhoffError as error:
            raise SourceError(str(error)) from error
        return Remote(size=info.size, etag=info.tag)

    def download(self, url: str, partial: Partial, report: Report | None) -> Remote:
        """Complete `partial`, range by range; return the object's description. Raises SourceError, OSError."""
        remote = self.look(url)
        assert remote.size is not None  # a store always states it
        if partial.remote() != remote or partial.done > remote.size:
            partial.begin(remote)
        check_space(partial.path.parent, remote.size - partial.done, url)
        store, key = self._place(url)
        with partial.path.open("ab") as file:
            while (done := file.tell()) < remote.size:
                try:
                    body = store.get(key, start=done, length=min(_RANGE_BYTES, remote.size - done))
                except BirkhoffError as error:
                    raise SourceError(str(error)) from error
                if not body:
                    break
                file.write(body)
                file.flush()
                if report is not None:
                    report(key.rpartition("/")[2], file.tell(), remote.size)
        # The ranges belong together only if the object is still the same.
        if partial.done != remote.size or self.look(url) != remote:
            partial.discard()
            raise SourceError(f"{url}: has changed while it was being downloaded; run the same command again")
        return remote

    def _place(self, url: str) -> tuple[Store, str]:
        bucket, key = bucket_place(url)
        if bucket not in self._stores:
            self._stores[bucket] = open_address(StoreAddress.parse(bucket, self._settings))
        return self._stores[bucket], key
