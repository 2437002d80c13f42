"""Decoding the shards of an artifact in threads, as they arrive, with bounded memory.

The entropy decoder, the digests and the operations of torch release the interpreter's lock, so threads do; each keeps
torch to itself (one thread inside), as they would only wait for each other. What is at work at any time is bounded by
the size of the compressed model, or one shard where that is larger.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.pipeline.artifact import ShardRecord
from birkhoff.pipeline.artifacts import Artifact
from birkhoff.pipeline.errors import IntegrityError

MAX_THREADS = 16

T = TypeVar("T")


def decode_shards(artifact: Artifact, take: Callable[[CodedTensor], T]) -> Iterator[tuple[ShardRecord, list[T]]]:
    """What `take` makes of every tensor, shard by shard in the order in which they are done.

    `take` runs in threads.

    Raises:
        IntegrityError: a shard is damaged; and whatever `take` raises.
    """

    def work(shard: ShardRecord) -> list[T]:
        _one_thread_inside()
        try:
            return [take(coded) for coded in artifact.coded_of(shard)]
        except FormatError as error:
            raise IntegrityError(f"{artifact.label}: blob {shard.blob}: {error}") from None

    shards = artifact.manifest.shards
    budget = max(sum(shard.bytes for shard in shards), max(shard.source_bytes for shard in shards))
    with _threads_restored(), ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS), "decode") as pool:
        running: dict[Future[list[T]], ShardRecord] = {}
        try:
            for shard in artifact.arriving():
                while running and sum(s.source_bytes for s in running.values()) + shard.source_bytes > budget:
                    yield from _ended(running)
                running[pool.submit(work, shard)] = shard
                yield from _ended(running, wait_for_one=False)
            while running:
                yield from _ended(running)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ended(
    running: dict[Future[list[T]], ShardRecord], *, wait_for_one: bool = True
) -> Iterator[tuple[ShardRecord, list[T]]]:
    done, _ = wait(running, timeout=None if wait_for_one else 0, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _one_thread_inside() -> None:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@contextmanager
def _threads_restored() -> Iterator[None]:
    """What a thread says about its number of threads also holds for threads made later."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
