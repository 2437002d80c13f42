"""The stages of the pipeline that a fault is put into: what each does to a store, and which of its requests are harmed.

A cell is one store of its own: a published version `v1` of two shards, a third shard that nothing refers to yet, a lone
shard and lone statistics that are garbage. In cells of stages with a base there is besides a version of another model
whose shard is a difference to a fourth one, which no other version holds. Every stage may be called again after it
failed, and must then complete.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from birkhoff.codec.container import is_difference, parse, serialise
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.packing import pack
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.artifact.verify import verify
from birkhoff.pipeline.checkpoint.open import open_checkpoint
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
from birkhoff.pipeline.shard.run import compress_shard, find_record, keep_shard
from birkhoff.pipeline.shard.sources import SourceBuffer
from birkhoff.pipeline.shard.task import BaseShard, ShardTask, TensorPlan
from birkhoff.pipeline.statistics.stored import find_statistics, keep_hessian, keep_statistics
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.memory import MemoryStore
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
    weight = _weight(number)
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
HELD, TUNED = 5, "tuned"
"""The shard that is a base, and the model whose version is a difference to it."""


def _weight(number: int) -> torch.Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(number))


def _moved(seed: int) -> torch.Tensor:
    """The weights of the base's shard, moved by a fiftieth of their size."""
    return _weight(HELD) + 0.02 * _weight(seed)


def _base() -> BaseShard:
    held = shard(HELD).record
    return BaseShard(key=held.key, blob=held.blob, bytes=held.bytes, tensors=(f"layer{HELD}.weight",))


@cache
def difference(seed: int) -> Shard:
    """A shard as a worker makes it of weights with a base."""
    store, name = MemoryStore(), f"layer{HELD}.weight"
    keep_shard(store, shard(HELD).blob, shard(HELD).record)
    with tempfile.TemporaryDirectory() as folder:
        record = compress_shard(_task(Path(folder), seed), store, torch.device("cpu"), SourceBuffer()).record
    blob = store.get(blob_key(record.blob))
    if not all(is_difference(coded) for coded in parse(blob)) or record.bases is None:
        raise WrongError(f"{name} is no difference")
    return Shard(blob=blob, record=record)


def _task(folder: Path, seed: int) -> ShardTask:
    """What makes such a shard of a checkpoint in a folder."""
    path, name = folder / f"tuned-{seed}.safetensors", f"layer{HELD}.weight"
    if not path.exists():
        save_file({name: _moved(seed)}, path)
    (tensor,) = open_checkpoint(path).tensors
    profile = PROFILES[PROFILE]
    plan = TensorPlan(tensor=tensor, decision=profile.decide(tensor.shape, tensor.dtype, None, name))
    return ShardTask(model=TUNED, index=0, tensors=(plan,), recipe=profile.recipe(), bases=(_base(),))


def derived(seed: int) -> VersionManifest:
    """A version of one shard that is a difference."""
    return version(*FIRST).model_copy(update={"model": TUNED, "shards": (difference(seed).record,)})


@cache
def hessian(number: int) -> Hessian:
    """One of the Hessians of the tests: 65 KiB when packed."""
    inputs = torch.randn(300, 256, generator=torch.Generator().manual_seed(number))
    return Hessian(columns=inputs.T @ inputs)


def statistics(number: int) -> StatisticsRecord:
    """Statistics of one Hessian."""
    packed = pack(hessian(number))
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


def prepare_with_base(store: Store) -> None:
    """Fill the store of a cell with a base: the version that holds that for itself has gone."""
    for one in (shard(HELD), difference(6)):
        keep_shard(store, one.blob, one.record)
    publish(store, derived(6))
    prepare(store)


def _keep(store: Store, number: int) -> None:
    """Store statistics as a worker does."""
    keep_hessian(store, hessian(number))
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


def _upload_difference(cell: Cell) -> None:
    found = compress_shard(_task(cell.folder, 7), cell.store, torch.device("cpu"), SourceBuffer())
    if found.record != difference(7).record:
        raise WrongError("the shard made is not that of its weights and its base")


def _publish_difference(cell: Cell) -> None:
    keep_shard(cell.store, difference(7).blob, difference(7).record)
    if (name := publish(cell.store, derived(7)).name) != "v2":
        raise WrongError(f"published as {name}, expected v2")


def _pull_difference(cell: Cell) -> None:
    found = find(cell.store, TUNED, cell.cache, ANY)
    folder = cell.folder / "out"
    pull(found, cell.store, folder, cell.cache)
    pulled = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    if pulled != {difference(6).record.blob, shard(HELD).record.blob}:
        raise WrongError("the pulled files are not those of the version and its base")


def _verify_difference(cell: Cell) -> None:
    if verify(StoredArtifact(cell.store, resolve(cell.store, TUNED))).blobs != 2:
        raise WrongError("verified another number of blobs")


def _load_difference(cell: Cell) -> None:
    loaded = dict(StoredArtifact(cell.store, resolve(cell.store, TUNED)).tensors())
    if not fidelity(_moved(6), loaded[f"layer{HELD}.weight"]).sqnr_db > 25:
        raise WrongError("loaded other weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: what is done, the requests that a fault meets (method, beginning of the key), versions there are after.

    there: keys that must be there after it was completed. gone: keys that must not. base: its cell has one.
    """

    name: str
    act: Callable[[Cell], None]
    methods: tuple[str, ...]
    key: str
    versions: int = 1
    there: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    base: bool = False

    @property
    def prepare(self) -> Callable[[Store], None]:
        """What fills its cell."""
        return prepare_with_base if self.base else prepare

    @property
    def published(self) -> str | None:
        """The model of which it publishes a second version; None for one that publishes none."""
        if self.versions != (3 if self.base else 2):
            return None
        return TUNED if self.base else MODEL


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
    blob_key(sha256(pack(hessian(LONE)))),
)


def _keys(record: ShardRecord) -> tuple[str, str]:
    return blob_key(record.blob), shard_key(record.key)


_FELT = (statistics_key(statistics(4).key), blob_key(sha256(pack(hessian(4)))))

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
    Stage(
        name="read a base, upload a difference",
        act=_upload_difference,
        methods=("GET", "PUT"),
        key="shards/|blobs/",
        versions=2,
        there=_keys(difference(7).record),
        base=True,
    ),
    Stage(
        name="publish a difference",
        act=_publish_difference,
        methods=("GET", "LIST", "HEAD", "PUT"),
        key="models/|blobs/",
        versions=3,
        there=(blob_key(shard(HELD).record.blob),),
        base=True,
    ),
    Stage(
        name="pull a difference",
        act=_pull_difference,
        methods=_ANY_READ,
        key="models/|blobs/",
        versions=2,
        base=True,
    ),
    Stage(
        name="verify a difference",
        act=_verify_difference,
        methods=("GET",),
        key="models/|blobs/",
        versions=2,
        base=True,
    ),
    Stage(name="load a difference", act=_load_difference, methods=("GET",), key="blobs/", versions=2, base=True),
    Stage(
        name="gc: keep a base",
        act=_collect,
        methods=("GET", "LIST", "DELETE"),
        key="models/|shards/|blobs/",
        versions=2,
        there=(blob_key(shard(HELD).record.blob), blob_key(difference(6).record.blob)),
        gone=_GARBAGE,
        base=True,
    ),
)
