"""The stages of the pipeline that a fault is put into: what each does to a store, and which of its requests are harmed.

A cell is one store of its own: a published version `v1` of two shards, a third shard that nothing refers to yet, and a
lone shard that is garbage. Every stage may be called again after it failed, and must then complete.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.aliases import promote, rollback
from birkhoff.pipeline.artifact import ShardRecord, SourceRecord, VersionManifest, blob_key, sha256, shard_key
from birkhoff.pipeline.artifacts import StoredArtifact
from birkhoff.pipeline.blob_cache import BlobCache
from birkhoff.pipeline.collect import collect
from birkhoff.pipeline.publish import publish, resolve
from birkhoff.pipeline.pull import pull
from birkhoff.pipeline.references import find
from birkhoff.pipeline.shard import find_record, keep_shard
from birkhoff.pipeline.store import Store, check_store
from birkhoff.pipeline.trust import ANY
from birkhoff.pipeline.verify import verify
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
    publish(store, version(*FIRST))


def _probe(cell: Cell) -> None:
    if not check_store(cell.store).conditional_writes:
        raise WrongError("the probe found no conditional writes")


def _find(cell: Cell) -> None:
    found = find_record(cell.store, shard(0).record.key)
    if found not in (None, shard(0).record):  # None: it would be made anew
        raise WrongError("the record found is not the one stored")


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
_ANY_READ = ("GET", "LIST", "HEAD")
_GARBAGE = tuple(
    key for number in (2, LONE) for key in (blob_key(shard(number).record.blob), shard_key(shard(number).record.key))
)

STAGES: tuple[Stage, ...] = (
    Stage(name="probe", act=_probe, methods=("PUT", "GET", "DELETE"), key="probe/"),
    Stage(name="find", act=_find, methods=("GET",), key="shards/|blobs/"),
    Stage(name="upload blob", act=_upload, methods=("PUT",), key="blobs/", there=_NEW),
    Stage(name="upload record", act=_upload, methods=("PUT",), key="shards/", there=_NEW),
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
    Stage(name="gc: mark", act=_collect, methods=("GET", "LIST"), key="models/|shards/|blobs/", gone=_GARBAGE),
    Stage(name="gc: sweep", act=_collect, methods=("DELETE",), key="shards/|blobs/|models/", gone=_GARBAGE),
)
