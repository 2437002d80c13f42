"""Decode the shards of an artifact as they arrive, with bounded memory.

On a CPU, threads decode: the entropy decoder, the digests and torch's operations release the interpreter's lock. Torch
uses one thread inside each, because more would only wait for each other. The work in progress is bounded by the size of
the compressed model, or by one shard if that is larger.

For a GPU, threads read, check and send the bytes. The caller's thread lets the GPU decode as many shards at once as
suit it, beside the copies. Meanwhile another thread uses the result of the batch before. A thread that holds
the interpreter's lock keeps all others waiting, five milliseconds at a time, so each takes few steps: a file, its
digest. What a process starts once for kernels starts beside that; only launches wait for it. Host memory holds no more
than the compressed model.
"""

import contextlib
import ctypes
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

import birkhoff.kernels.runtime.first_kernel  # noqa: F401
from birkhoff.codec.container import CodedTensor, Head
from birkhoff.codec.errors import FormatError
from birkhoff.codec.native.processors import processors
from birkhoff.kernels.entropy.op import warm_up
from birkhoff.kernels.entropy.plan import ALIGNED
from birkhoff.kernels.entropy.staging import Upload
from birkhoff.pipeline.artifact.readers import Artifact
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.registry.documents import ShardRecord
from birkhoff.pipeline.registry.parallel import pool

MAX_THREADS = 16

TOGETHER_BYTES = 1 << 29
"""Source bytes of shards that a GPU decodes together. Two batches are in progress, and planes and symbols of each take
half of that on the GPU."""

T = TypeVar("T")


Take = Callable[[Sequence[list[CodedTensor]], Upload | None], Callable[[], Sequence[T]]]
"""Begins to make a result of the tensors of each shard, whose bytes may be on the GPU already. The function that it
returns ends that."""


def decode_shards(
    artifact: Artifact, take: Take[T], device: torch.device, heads: Sequence[Head] = ()
) -> Iterator[tuple[ShardRecord, T]]:
    """Yield the result of `take` for the tensors of every shard, in the order of completion.

    `device` is where most of the tensors go. For a CPU, `take` runs in threads, on one shard at a time. `heads` are
    the shards' headers, if they were read.

    Raises:
        IntegrityError: A shard is damaged.
        Exception: `take` raised it.
    """
    known = dict(zip((shard.blob for shard in artifact.manifest.shards), heads, strict=False))
    return (_decode_together if device.type == "cuda" else _decode_in_threads)(artifact, take, device, known)


def _decode_in_threads(
    artifact: Artifact, take: Take[T], _: torch.device, heads: Mapping[str, Head]
) -> Iterator[tuple[ShardRecord, T]]:
    def work(shard: ShardRecord) -> T:
        coded = artifact.coded_in(shard, artifact.blob(shard), heads.get(shard.blob))
        with _told(artifact, [shard]):
            (made,) = take([coded], None)()
        return made

    shards = artifact.manifest.shards
    budget = max(sum(shard.bytes for shard in shards), max(shard.source_bytes for shard in shards))
    with pool(_threads(), "decode", initializer=_one_thread_inside) as threads:
        running: dict[Future[T], ShardRecord] = {}
        for shard in artifact.arriving():
            while running and sum(s.source_bytes for s in running.values()) + shard.source_bytes > budget:
                yield from _ended(running)
            running[threads.submit(work, shard)] = shard
            yield from _ended(running, wait_for_one=False)
        while running:
            yield from _ended(running)


def _decode_together(
    artifact: Artifact, take: Take[T], device: torch.device, heads: Mapping[str, Head]
) -> Iterator[tuple[ShardRecord, T]]:
    batches = deque(_batches(artifact.manifest.shards))
    places: dict[str, deque[tuple[_Batch, int]]] = defaultdict(deque)
    for batch in batches:
        for number, shard in enumerate(batch.shards):
            places[shard.blob].append((batch, number))
    begun: deque[tuple[list[ShardRecord], Future[Sequence[T]]]] = deque()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # each thread has its own

    def read(batch: _Batch, number: int) -> memoryview:
        part = batch.part(number)
        artifact.read_into(batch.shards[number], part)
        if batch.arrived():
            batch.upload.send()
        return part

    def begin() -> None:
        batch = batches.popleft()
        blobs = [(shard, batch.read[number].result()) for number, shard in enumerate(batch.shards)]
        coded = [artifact.coded_in(shard, blob, heads.get(shard.blob)) for shard, blob in blobs]
        with _told(artifact, batch.shards):
            result = take(coded, batch.upload)
        begun.append((batch.shards, last.submit(finish, result, batch.upload)))

    def finish(result: Callable[[], Sequence[T]], upload: Upload) -> Sequence[T]:
        with torch.cuda.stream(stream):
            made = result()
        unpinning.submit(upload.end)
        return made

    def end(most: int = 0) -> Iterator[tuple[ShardRecord, T]]:
        """End all but so many batches."""
        while len(begun) > most:
            shards, future = begun.popleft()
            with _told(artifact, shards):
                made = future.result()
            yield from zip(shards, made, strict=True)

    with (
        pool(_threads(), "read", initializer=_one_thread_inside) as threads,
        pool(1, "unpin") as unpinning,
        pool(1, "finish") as last,
    ):
        starting = threads.submit(warm_up, device)
        for shard in artifact.arriving():
            batch, number = places[shard.blob].popleft()
            with _told(artifact, batch.shards):
                batch.make_room(device, starting.result)
            batch.read[number] = threads.submit(read, batch, number)
            while batches and batches[0].is_read() and starting.done():
                begin()
                yield from end(1)
        while batches:
            begin()
            yield from end(1)
        starting.result()
        yield from end()


@dataclass(slots=True, kw_only=True)
class _Batch:
    """Shards that are decoded together, and the places of their containers in one piece of memory."""

    shards: list[ShardRecord]
    places: list[int]
    size: int
    read: dict[int, Future[memoryview]] = field(default_factory=dict)
    """By number of the shard in the batch."""
    _upload: Upload | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _arrived: int = 0

    def make_room(self, device: torch.device, ready: Callable[[], object]) -> None:
        """Set memory aside, unless that was done. `ready` is called before kernels are queued.

        Raises:
            FormatError: There is not so much memory.
        """
        try:
            self._upload = self._upload or Upload(self.size, device, ready)
        except MemoryError:
            raise FormatError(f"no memory for the {self.size} bytes that their manifest declares") from None

    @property
    def upload(self) -> Upload:
        """The memory of the containers."""
        assert self._upload is not None
        return self._upload

    def part(self, number: int) -> memoryview:
        """Return the memory of a container."""
        to = self.places[number]
        return self.upload.host[to : to + self.shards[number].bytes].data

    def arrived(self) -> bool:
        """Count one more container that is in its memory. Return whether it is the last."""
        with self._lock:
            self._arrived += 1
            return self._arrived == len(self.shards)

    def is_read(self) -> bool:
        return len(self.read) == len(self.shards) and all(future.done() for future in self.read.values())


def _batches(shards: Sequence[ShardRecord]) -> Iterator[_Batch]:
    """Yield all shards in order, at least one in each batch."""
    left = deque(shards)
    while left:
        batch = _Batch(shards=[], places=[], size=0)
        together = 0
        while left and (not together or together + left[0].source_bytes <= TOGETHER_BYTES):
            shard = left.popleft()
            together += shard.source_bytes
            batch.shards.append(shard)
            batch.places.append(batch.size)
            batch.size += -(-shard.bytes // ALIGNED) * ALIGNED
        yield batch


@contextlib.contextmanager
def _told(artifact: Artifact, shards: Sequence[ShardRecord]) -> Iterator[None]:
    """Name the shards in a FormatError, which becomes an IntegrityError."""
    try:
        yield
    except FormatError as error:
        blobs = ", ".join(shard.blob for shard in shards)
        raise IntegrityError(f"{artifact.label}: blob {blobs}: {error}") from None


def _threads() -> int:
    return min(processors(), MAX_THREADS)


def _ended(running: dict[Future[T], ShardRecord], *, wait_for_one: bool = True) -> Iterator[tuple[ShardRecord, T]]:
    done, _ = wait(running, timeout=None if wait_for_one else 0, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _one_thread_inside() -> None:
    """Keep torch's own loops in the calling thread, and only there: `torch.set_num_threads` is for the whole process.

    OpenMP, which runs those loops on CPUs, has a number for each thread. If torch is built without it, its loops share
    one pool, and threads do not multiply.
    """
    torch.get_num_threads()  # a thread takes over the process's number when it first asks
    if (set_threads := _openmp_threads()) is not None:
        set_threads(1)


@cache
def _openmp_threads() -> Callable[[int], object] | None:
    """Return `omp_set_num_threads` of the library that torch is linked with."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            # A library's handle also finds the symbols of the libraries that it is linked with.
            found: Callable[[int], object] | None = getattr(
                ctypes.CDLL(str(folder / name)), "omp_set_num_threads", None
            )
            return found
    return None
