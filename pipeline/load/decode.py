"""Decoding the shards of an artifact in threads, as they arrive, with bounded memory.

The entropy decoder, the digests and the operations of torch release the interpreter's lock, so threads do; each keeps
torch to itself (one thread inside), as they would only wait for each other. What is at work at any time is bounded by
the size of the compressed model, or one shard where that is larger.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.pipeline.artifact.readers import Artifact
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.registry.documents import ShardRecord

MAX_THREADS = 16

T = TypeVar("T")


def decode_shards(artifact: Artifact, take: Callable[[list[CodedTensor]], T]) -> Iterator[tuple[ShardRecord, T]]:
    """What `take` makes of the tensors of every shard, in the order in which they are done.

    `take` runs in threads.

    Raises:
        IntegrityError: a shard is damaged; and whatever `take` raises.
    """

    def work(shard: ShardRecord) -> T:
        try:
            return take(artifact.coded_of(shard))
        except FormatError as error:
            raise IntegrityError(f"{artifact.label}: blob {shard.blob}: {error}") from None

    shards = artifact.manifest.shards
    budget = max(sum(shard.bytes for shard in shards), max(shard.source_bytes for shard in shards))
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    with ThreadPoolExecutor(threads, "decode", initializer=_one_thread_inside) as pool:
        running: dict[Future[T], ShardRecord] = {}
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


def _ended(running: dict[Future[T], ShardRecord], *, wait_for_one: bool = True) -> Iterator[tuple[ShardRecord, T]]:
    done, _ = wait(running, timeout=None if wait_for_one else 0, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _one_thread_inside() -> None:
    """Keep torch's own loops in the calling thread, and in no other: `torch.set_num_threads` is for the whole process.

    OpenMP, which runs those loops on CPUs, has a number for each thread. Where torch is built without it, its loops
    share one pool, and threads do not multiply.
    """
    torch.get_num_threads()  # a thread takes over the process's number when it first asks
    if (set_threads := _openmp_threads()) is not None:
        set_threads(1)


@cache
def _openmp_threads() -> Callable[[int], object] | None:
    """`omp_set_num_threads` of the very library that torch is linked with."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            # A library's handle leads to the symbols of those that it is linked with.
            found: Callable[[int], object] | None = getattr(
                ctypes.CDLL(str(folder / name)), "omp_set_num_threads", None
            )
            return found
    return None
