"""Fetch many blobs into the cache at once: ranges of all of them, on a few threads."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.blob import Blob, BlobDownload
from birkhoff.pipeline.artifact.cache import BlobCache, disk_errors
from birkhoff.pipeline.store.base import Store

THREADS = 8
"""Concurrent requests. More than cores, because threads mostly wait for the server."""

_POLL_SECONDS = 0.05


class _StoppedError(Exception):
    """The consumer has stopped."""


def fetch(
    store: Store,
    blobs: Iterable[Blob],
    cache: BlobCache,
    *,
    label: str,
    report: Callable[[int], None] = lambda _: None,
) -> Iterator[Blob]:
    """Fetch the blobs that the cache lacks; yield each when it is there, checked by its digest.

    Several processes may fetch the same blobs: each blob is fetched by one of them, and the others wait for it.

    Args:
        store: where they are.
        blobs: what is wanted; the bytes of what is in the cache already are not looked at.
        cache: where they go.
        label: name of the artifact, for messages.
        report: told of bytes as they arrive, from any thread; a negative number takes some back.

    Raises:
        IntegrityError: a stored blob is missing or damaged; it is named.
        OutputError: the cache cannot be written, or the disk is full.
        StoreError: the store failed.
    """
    here: list[Blob] = []
    missing: list[Blob] = []
    for blob in dict.fromkeys(blobs):
        (missing if cache.find(blob.digest, blob.size) is None else here).append(blob)
    if missing:
        cache.check_room(sum(blob.size for blob in missing))
    downloads = [BlobDownload(blob, store, cache, label=label) for blob in missing]
    yield from _Fetcher(downloads, cache, report).run(here)


class _Fetcher:
    def __init__(self, downloads: list[BlobDownload], cache: BlobCache, report: Callable[[int], None]) -> None:
        self._downloads, self._cache, self._report = downloads, cache, report
        self._ended: SimpleQueue[BlobDownload | BaseException] = SimpleQueue()
        self._stop = threading.Event()

    def run(self, here: list[Blob]) -> Iterator[Blob]:
        """Yield blobs that are there, then the others as they become ready."""
        pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="pull")
        try:
            for download in self._downloads:
                self._submit(download, pool)
            for blob in here:
                self._report(blob.size)
                yield blob
            left = set(self._downloads)
            waiting: list[BlobDownload] = []
            while left:
                item = self._next(waiting, pool)
                if item.ready and item in left:
                    left.discard(item)
                    yield item.blob
                elif item.busy and item not in waiting:
                    waiting.append(item)
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for download in self._downloads:
                download.close()

    def _submit(self, download: BlobDownload, pool: ThreadPoolExecutor) -> None:
        for index in range(download.blob.ranges):
            pool.submit(self._range, download, index)

    def _next(self, waiting: list[BlobDownload], pool: ThreadPoolExecutor) -> BlobDownload:
        """Return the next download that ended; meanwhile poll those of other processes."""
        while waiting and self._ended.empty():
            interrupt.check()
            self._look(waiting, pool)
            time.sleep(_POLL_SECONDS)
        item = self._ended.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _look(self, waiting: list[BlobDownload], pool: ThreadPoolExecutor) -> None:
        """Take over blobs that another process finished or gave up."""
        for download in list(waiting):
            with disk_errors(self._cache.folder):
                if download.busy and not download.retake():
                    continue
            waiting.remove(download)
            if download.ready:
                self._report(download.blob.size)
                self._ended.put(download)
            else:
                self._submit(download, pool)

    def _range(self, download: BlobDownload, index: int) -> None:
        """Fetch one range in a thread of the pool, and tell the consumer how it ended."""
        try:
            if self._stop.is_set():
                return
            with disk_errors(self._cache.folder):
                if download.open() and not download.ready:
                    download.run(index, self._take)
            if download.ready or not download.open():
                self._ended.put(download)
        except _StoppedError:
            pass
        except BaseException as error:
            self._ended.put(error)

    def _take(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._report(count)
