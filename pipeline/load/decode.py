"""Decode the shards of an artifact as they arrive, with bounded memory.

On a CPU in threads: the entropy decoder, the digests and the operations of torch release the interpreter's lock; each
thread keeps torch to itself (one thread inside), as they would only wait for each other. What is at work at any time is
bounded by the size of the compressed model, or one shard where that is larger.

For a GPU threads read and check, and the caller's thread decodes much at once, as the GPU wants it. It does so when the
threads have nothing left to read, or while they wait for downloads: beside each other, all would wait for the
interpreter's lock at each small operation, five milliseconds a time. Host memory holds no more than the compressed
model.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.kernels.entropy.op import warm_up
from birkhoff.pipeline.artifact.readers import Artifact
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.registry.documents import ShardRecord

MAX_THREADS = 16

TOGETHER_BYTES = 1 << 30
"""Source bytes of shards that a GPU decodes together: planes and symbols take half of that there, for that time."""

T = TypeVar("T")


Take = Callable[[Sequence[list[CodedTensor]]], Sequence[T]]
"""Makes something of the tensors of each of some shards."""


def decode_shards(artifact: Artifact, take: Take[T], device: torch.device) -> Iterator[tuple[ShardRecord, T]]:
    """What `take` makes of the tensors of every shard, in the order in which they are done.

    `device` is where most of them go. For a CPU `take` runs in threads, on one shard at a time.

    Raises:
        IntegrityError: a shard is damaged; and whatever `take` raises.
    """
    return (_decode_together if device.type == "cuda" else _decode_in_threads)(artifact, take, device)


def _decode_in_threads(artifact: Artifact, take: Take[T], _: torch.device) -> Iterator[tuple[ShardRecord, T]]:
    def work(shard: ShardRecord) -> T:
        (made,) = _take(artifact, take, [shard], [artifact.coded_of(shard)])
        return made

    shards = artifact.manifest.shards
    budget = max(sum(shard.bytes for shard in shards), max(shard.source_bytes for shard in shards))
    with ThreadPoolExecutor(_threads(), "decode", initializer=_one_thread_inside) as pool:
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


def _decode_together(artifact: Artifact, take: Take[T], device: torch.device) -> Iterator[tuple[ShardRecord, T]]:
    with ThreadPoolExecutor(_threads(), "read") as pool:
        running: dict[Future[list[CodedTensor]], ShardRecord] = {}
        read: list[tuple[ShardRecord, list[CodedTensor]]] = []

        def taken() -> Iterator[tuple[ShardRecord, T]]:
            while read:
                shards, coded = zip(*read[: _most_together(read)], strict=True)
                del read[: len(shards)]
                yield from zip(shards, _take(artifact, take, shards, coded), strict=True)

        try:
            starting = pool.submit(warm_up, device)
            for shard in artifact.arriving():
                running[pool.submit(artifact.coded_of, shard)] = shard
                read += _ended(running, wait_for_one=False)
                if starting.done() and sum(shard.source_bytes for shard, _ in read) >= TOGETHER_BYTES:
                    yield from taken()
            while running:
                read += _ended(running)
            yield from taken()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _most_together(read: Sequence[tuple[ShardRecord, object]]) -> int:
    """How many of the first shards are decoded together: at least one."""
    sizes = accumulate(shard.source_bytes for shard, _ in read)
    return max(1, sum(size <= TOGETHER_BYTES for size in sizes))


def _take(
    artifact: Artifact, take: Take[T], shards: Sequence[ShardRecord], coded: Sequence[list[CodedTensor]]
) -> Sequence[T]:
    try:
        return take(coded)
    except FormatError as error:
        blobs = ", ".join(shard.blob for shard in shards)
        raise IntegrityError(f"{artifact.label}: blob {blobs}: {error}") from None


def _threads() -> int:
    return min(os.cpu_count() or 1, MAX_THREADS)


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
