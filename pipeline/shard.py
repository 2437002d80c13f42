"""One shard, start to finish, in one process: read, key, encode, validate, upload, record.

What a worker does for each task; nothing here knows about Ray.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import birkhoff.kernels.trellis  # noqa: F401  registers the GPU's search
from birkhoff.codec.budget import Grid, sizes
from birkhoff.codec.container import FORMAT_VERSION, CodedTensor, serialise
from birkhoff.codec.dtypes import dtype_name
from birkhoff.codec.profiles import Override, Profile
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline import logs
from birkhoff.pipeline.artifact import ShardRecord, blob_key, fetch_document, sha256, shard_key
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError, PreconditionError
from birkhoff.pipeline.plan import dense_bytes
from birkhoff.pipeline.source import StoredTensor, read_tensor
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.validate import ShardChecks, validate_shard

log = logging.getLogger("birkhoff.shard")

TENSOR_BYTES = 1 << 19
"""Source bytes that take as long as a tensor's own overhead does: a decoder's 120 small tensors take longer than a
block of an encoder of five times their bytes. On a CPU it is some 0.3 MB, on a GPU that others use too it is more."""

NONE: Mapping[str, Override] = MappingProxyType({})
"""No overrides."""

Reuse = Literal["trust", "revalidate", "never"]
"""What to do with a shard that the store has: take it, prove it once more against its source first, or make it anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """What the driver hands out: descriptors, never tensors."""

    model: str
    index: int
    tensors: tuple[StoredTensor, ...]
    profile: Profile
    reuse: Reuse = "trust"
    overrides: Mapping[str, Override] = field(default_factory=dict)
    """Of its tensors, by name."""
    foretell: bool = False
    """Only foretell its sizes, for a budget."""

    @property
    def signature(self) -> object:
        """Equal for shards that may turn out to be the same: names, dtypes, shapes and recipe."""
        names = tuple((t.name, t.dtype, t.shape) for t in self.tensors)
        return names, self.profile, tuple(self.overrides.items()), self.foretell

    @property
    def label(self) -> str:
        """For messages: model, number and the first tensor."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.model} shard {self.index} ({self.tensors[0].name}{more})"

    @property
    def nbytes(self) -> int:
        """Bytes of its source tensors."""
        return sum(map(dense_bytes, self.tensors))

    @property
    def effort(self) -> int:
        """How long it will take, in bytes: those it has, and what each tensor costs besides."""
        return self.nbytes + len(self.tensors) * TENSOR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What comes back: the record, whether the store had it already, and the seconds of each stage."""

    record: ShardRecord
    reused: bool
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """What comes back of a shard whose sizes were to be foretold: bytes at the knots of its profile's grid, [T]."""

    bytes: tuple[float, ...]
    stages: dict[str, float]


class Stages:
    """Seconds by stage, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """A stage has ended now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def run_shard(task: ShardTask, store: Store, device: torch.device) -> ShardResult | ShardSizes:
    """Do what a task asks for. Raises as `compress_shard`."""
    return foretell_shard(task) if task.foretell else compress_shard(task, store, device)


def foretell_shard(task: ShardTask) -> ShardSizes:
    """Foretell what a shard will take at every target, a tensor at a time. Raises SourceError, CodecError."""
    stages = Stages()
    total = np.zeros(len(Grid.of(task.profile).knots))
    for tensor in task.tensors:
        source = _read(tensor)
        stages.end("read")
        logs.step("foretell", source.nbytes, tensor.name)
        total += sizes(tensor.name, source, task.profile, task.overrides.get(tensor.name))
        stages.end("foretell")
    return ShardSizes(bytes=tuple(total.tolist()), stages=stages.seconds)


def compress_shard(task: ShardTask, store: Store, device: torch.device) -> ShardResult:
    """Bring one shard into the store, unless it is there.

    Raises:
        SourceError, CodecError, ValidationError, StoreError: with the tensor's or object's name.
    """
    stages = Stages()
    sources = {tensor.name: _read(tensor) for tensor in task.tensors}
    stages.end("read")
    key = input_key(sources, task.profile, task.overrides)
    stages.end("key")
    record = None if task.reuse == "never" else find_record(store, key)
    stages.end("find")
    if record is not None and task.reuse == "revalidate":
        validate_shard(store.get(blob_key(record.blob)), sources, task.profile, device, task.overrides)
        stages.end("validate")
    if record is not None:
        return ShardResult(record=record, reused=True, stages=stages.seconds)
    blob = encode_shard(sources, task.profile, device, task.overrides)
    stages.end("encode")
    checks = validate_shard(blob, sources, task.profile, device, task.overrides)
    stages.end("validate")
    record = make_record(key, sources, blob, checks)
    logs.step("upload", len(blob))
    keep_shard(store, blob, record)
    stages.end("upload")
    return ShardResult(record=record, reused=False, stages=stages.seconds)


def encode_shard(
    sources: Mapping[str, Tensor], profile: Profile, device: torch.device, overrides: Mapping[str, Override] = NONE
) -> bytes:
    """The container of a shard's tensors. Raises as `compress_shard`."""
    profiles = {name: profile.of_tensor(tuple(t.shape), overrides.get(name)) for name, t in sources.items()}
    return serialise([_encode(name, tensor, profiles[name], device) for name, tensor in sources.items()])


def _encode(name: str, tensor: Tensor, profile: Profile, device: torch.device) -> CodedTensor:
    logs.step("encode", tensor.nbytes, name)
    # A lossless one is only packed, by the CPU: on a GPU it would be fetched back.
    coded = profile.action(tuple(tensor.shape), dtype_name(tensor.dtype))[0] == "coded"
    return encode_tensor(name, tensor.to(device) if coded else tensor, profile).tensor


def _read(tensor: StoredTensor) -> Tensor:
    logs.step("read", dense_bytes(tensor), tensor.name)
    return read_tensor(tensor)


def make_record(key: str, sources: Mapping[str, Tensor], blob: bytes, checks: ShardChecks) -> ShardRecord:
    """What is kept about a validated shard."""
    return ShardRecord(
        key=key,
        blob=sha256(blob),
        bytes=len(blob),
        source_bytes=sum(tensor.nbytes for tensor in sources.values()),
        tensors=len(sources),
        sqnr_db=checks.sqnr_db,
        probe_db=checks.probe_db,
        probe_error=checks.probe_error,
        fallbacks=checks.fallbacks or None,
    )


def keep_shard(store: Store, blob: bytes, record: ShardRecord) -> None:
    """Upload a shard, blob first. What stands there otherwise is damaged, or another worker's equal claim: replaced."""
    for key, body in ((blob_key(record.blob), blob), (shard_key(record.key), record.to_bytes())):
        try:
            store.create(key, body)
        except PreconditionError:
            store.put(key, body)


def find_record(store: Store, key: str) -> ShardRecord | None:
    """The record of a shard key whose blob is in the store, whole: its bytes are read and match their digest."""
    try:
        record = fetch_document(store, ShardRecord, shard_key(key))
        if record.key == key and sha256(store.get(blob_key(record.blob))) == record.blob:
            return record
        log.warning("blob %s is damaged in %s; it is made anew", record.blob, store.url)
    except ObjectNotFoundError:
        pass
    except IntegrityError as error:
        log.warning("%s; it is made anew", error)
    return None


def input_key(sources: Mapping[str, Tensor], profile: Profile, overrides: Mapping[str, Override] = NONE) -> str:
    """Key of a shard: everything that decides its bytes, and nothing else."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, profile.recipe()], sort_keys=True).encode())
    for name, tensor in sources.items():
        override = [overrides[name]] if name in overrides else []
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), *override]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
