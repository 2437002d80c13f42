"""The stages of the pipeline that a fault is put into: what each does to a store, and which of its requests are harmed.

A cell is one store of its own: a published version `v1` of two shards, a third shard that nothing refers to yet, a lone
shard and lone statistics that are garbage. Every stage may be called again after it failed, and must then complete.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.output.packing import pack
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.artifact.verify import verify
from birkhoff.pipeline.registry.aliases import promote, rollback
from birkhoff.pipeline.registry.documents import (
    HessianRecord,
    ShardRecord,
    SourceRecord,
    StatisticsRecord,
    VersionManifest,
    blob_key,
    sha256,
    shard_key,
    statistics_key,
)
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.registry.versions import publish, resolve
from birkhoff.pipeline.shard.run import find_record, keep_shard
from birkhoff.pipeline.statistics.stored import find_statistics, keep_hessian, keep_statistics
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.probe import check_store
from tests.codec.by_profile import encode_tensor
from tests.pipeline.publishing import unmeasured

MODEL = "net"
PROFILE = "fast"


class WrongError(Exception):
    """A stage said that it was done, and it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A shard as a worker makes it."""

    blob: bytes
    record: ShardRecord


@cache
def shard(number: int) -> Shard:
    """One of the shards of the tests: 64 KiB of coded weights."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(number))
    blob = serialise([encode_tensor(f"layer{number}.weight", weight, PROFILES[PROFILE]).tensor])
    record = unmeasured(blob, source_bytes=weight.nbytes, tensors=1, key=sha256(b"key of " + blob))
    return Shard(blob=blob, record=record)


def version(*numbers: int) -> VersionManifest:
    """A version of these shards."""
    recipe = PROFILES[PROFILE].recipe()
    return VersionManifest(
        model=MODEL,
        source=SourceRecord(file="net.pth", sha256=sha256(bytes(numbers)), bytes=1, format="torch-zip"),
        profile=PROFILE,
        recipe=recipe,
        code="0",
        shards=tuple(shard(number).record for number in numbers),
    )


FIRST, SECOND = (0, 1), (1, 2)
LONE = 3


@cache
def hessian(number: int) -> bytes:
    """One of the Hessians of the tests: 65 KiB, packed."""
    inputs = torch.randn(300, 256, generator=torch.Generator().manual_seed(number))
    return pack(inputs.T @ inputs)


def statistics(number: int) -> StatisticsRecord:
    """Statistics of one Hessian."""
    packed = hessian(number)
    return StatisticsRecord(
        key=sha256(b"statistics of " + packed),
        pictures=1,
        probes=1,
        device="cpu",
        sensitivities={"w": 1.0},
        rms={"w": 1.0},
        hessians={"w": HessianRecord(blob=sha256(packed), bytes=len(packed), columns=256)},
    )


@dataclass(slots=True, kw_only=True)
class Cell:
    """What a stage works with: a store by way of the proxy, and folders of its own."""

    store: Store
    folder: Path
    digests: list[str] = field(default_factory=list)

    @property
    def cache(self) -> BlobCache:
        """The cache of its pulls."""
        return BlobCache(self.folder / "cache")


def prepare(store: Store) -> None:
    """Fill the store of a cell."""
    for number in (*FIRST, *SECOND[1:], LONE):
        keep_shard(store, shard(number).blob, shard(number).record)
    _keep(store, LONE)
    publish(store, version(*FIRST))


def _keep(store: Store, number: int) -> None:
    """Store statistics as a worker does."""
    keep_hessian(store, hessian(number), 256)
    keep_statistics(store, statistics(number))


def _probe(cell: Cell) -> None:
    if not check_store(cell.store).conditional_writes:
        raise WrongError("the probe found no conditional writes")


def _find(cell: Cell) -> None:
    found = find_record(cell.store, shard(0).record.key)
    if found not in (None, shard(0).record):  # None: it would be made anew
        raise WrongError("the record found is not the one stored")


def _find_statistics(cell: Cell) -> None:
    found = find_statistics(cell.store, statistics(LONE).key)
    if found not in (None, statistics(LONE)):  # None: they would be taken anew
        raise WrongError("the statistics found are not those stored")


def _upload_statistics(cell: Cell) -> None:
    _keep(cell.store, 4)


def _upload(cell: Cell) -> None:
    new = shard(4)
    keep_shard(cell.store, new.blob, new.record)


def _publish(cell: Cell) -> None:
    name = publish(cell.store, version(*SECOND)).name
    if name != "v2":
        raise WrongError(f"published as {name}, expected v2")


def _move(cell: Cell) -> None:
    promote(cell.store, MODEL, "v1", "stable")


def _back(cell: Cell) -> None:
    """`latest` is taken back to where it is: the states of an alias are read, none is written."""
    rollback(cell.store, MODEL, "latest", to="v1")


def _pull(cell: Cell) -> None:
    found = find(cell.store, MODEL, cell.cache, ANY)
    folder = cell.folder / "out"
    pull(found, cell.store, folder, cell.cache)
    pulled = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    if pulled != {entry.blob for entry in found.manifest.shards}:
        raise WrongError("the pulled files are not those of the version")


def _verify(cell: Cell) -> None:
    if verify(StoredArtifact(cell.store, resolve(cell.store, MODEL))).blobs != len(FIRST):
        raise WrongError("verified another number of blobs")


def _collect(cell: Cell) -> None:
    collect(cell.store, grace=timedelta(0), delete=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: what is done, the requests that a fault meets (method, beginning of the key), versions there are after.

    gone: keys that must not be there after it was completed.
    """

    name: str
    act: Callable[[Cell], None]
    methods: tuple[str, ...]
    key: str
    versions: int = 1
    there: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


_NEW = (blob_key(shard(4).record.blob), shard_key(shard(4).record.key))
_SHARED = "shards/|statistics/|blobs/"
_ANY_READ = ("GET", "LIST", "HEAD")
_GARBAGE = (
    *(
        key
        for number in (2, LONE)
        for key in (blob_key(shard(number).record.blob), shard_key(shard(number).record.key))
    ),
    statistics_key(statistics(LONE).key),
    blob_key(sha256(hessian(LONE))),
)
_FELT = (statistics_key(statistics(4).key), blob_key(sha256(hessian(4))))

STAGES: tuple[Stage, ...] = (
    Stage(name="probe", act=_probe, methods=("PUT", "GET", "DELETE"), key="probe/"),
    Stage(name="find", act=_find, methods=("GET",), key="shards/|blobs/"),
    Stage(name="upload blob", act=_upload, methods=("PUT",), key="blobs/", there=_NEW),
    Stage(name="upload record", act=_upload, methods=("PUT",), key="shards/", there=_NEW),
    Stage(name="find statistics", act=_find_statistics, methods=("GET",), key="statistics/|blobs/"),
    Stage(name="upload Hessian", act=_upload_statistics, methods=("PUT",), key="blobs/", there=_FELT),
    Stage(name="upload statistics", act=_upload_statistics, methods=("PUT",), key="statistics/", there=_FELT),
    Stage(name="announce the run", act=_publish, methods=("PUT", "HEAD", "LIST"), key="runs/", versions=2),
    Stage(name="look before publishing", act=_publish, methods=_ANY_READ, key="blobs/|models/", versions=2),
    Stage(name="publish manifest", act=_publish, methods=("PUT",), key="models/[^/]+/versions/", versions=2),
    Stage(name="name", act=_publish, methods=("PUT",), key="models/[^/]+/names/", versions=2),
    Stage(name="alias: read", act=_publish, methods=("GET",), key="models/[^/]+/aliases/", versions=2),
    Stage(name="alias: swap", act=_publish, methods=("PUT",), key="models/[^/]+/aliases/", versions=2),
    Stage(name="promote", act=_move, methods=("GET", "PUT"), key="models/"),
    Stage(name="roll back", act=_back, methods=("GET",), key="models/"),
    Stage(name="read for pull: documents", act=_pull, methods=_ANY_READ, key="models/"),
    Stage(name="read for pull: blobs", act=_pull, methods=("GET",), key="blobs/"),
    Stage(name="verify", act=_verify, methods=("GET",), key="models/|blobs/"),
    Stage(
        name="gc: mark", act=_collect, methods=("GET", "LIST"), key="models/|shards/|statistics/|blobs/", gone=_GARBAGE
    ),
    Stage(name="gc: sweep", act=_collect, methods=("DELETE",), key="shards/|statistics/|blobs/|models/", gone=_GARBAGE),
)
