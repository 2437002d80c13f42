"""One shard, start to finish, in one process: read, key, encode, validate, upload, record.

What a worker does for each task; nothing here knows about Ray.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from birkhoff.codec.container import FORMAT_VERSION, serialise
from birkhoff.codec.profiles import Profile
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.artifact import ShardRecord, blob_key, read_document, sha256, shard_key
from birkhoff.pipeline.errors import ObjectNotFoundError, PreconditionError
from birkhoff.pipeline.plan import dense_bytes
from birkhoff.pipeline.source import StoredTensor, read_tensor
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.validate import validate_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """What the driver hands out: descriptors, never tensors."""

    model: str
    index: int
    tensors: tuple[StoredTensor, ...]
    profile: Profile

    @property
    def label(self) -> str:
        """For messages: model, number and the first tensor."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.model} shard {self.index} ({self.tensors[0].name}{more})"

    @property
    def nbytes(self) -> int:
        """Bytes of its source tensors."""
        return sum(map(dense_bytes, self.tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What comes back: the record, whether the store had it already, and the seconds it took."""

    record: ShardRecord
    reused: bool
    seconds: float


def compress_shard(task: ShardTask, store: Store, device: torch.device) -> ShardResult:
    """Bring one shard into the store, unless it is there.

    Raises:
        SourceError, CodecError, ValidationError, StoreError: with the tensor's or object's name.
    """
    start = time.perf_counter()
    sources = {tensor.name: read_tensor(tensor) for tensor in task.tensors}
    key = input_key(sources, task.profile)
    record = find_record(store, key)
    reused = record is not None
    if record is None:
        blob, record = encode_shard(key, sources, task.profile, device)
        record = keep_shard(store, blob, record)
    return ShardResult(record=record, reused=reused, seconds=time.perf_counter() - start)


def encode_shard(
    key: str, sources: Mapping[str, Tensor], profile: Profile, device: torch.device
) -> tuple[bytes, ShardRecord]:
    """Encode and validate; returns the container and its record. Raises as `compress_shard`."""
    encoded = [encode_tensor(name, tensor.to(device), profile) for name, tensor in sources.items()]
    blob = serialise([item.tensor for item in encoded])
    checks = validate_shard(blob, sources, profile, device)
    return blob, ShardRecord(
        key=key,
        blob=sha256(blob),
        bytes=len(blob),
        source_bytes=sum(tensor.nbytes for tensor in sources.values()),
        tensors=len(sources),
        sqnr_db=checks.sqnr_db,
        probe_db=checks.probe_db,
        probe_error=checks.probe_error,
    )


def keep_shard(store: Store, blob: bytes, record: ShardRecord) -> ShardRecord:
    """Upload a shard, blob first; returns the record that stands, another worker's if that one was first."""
    store.create(blob_key(record.blob), blob)
    try:
        store.create(shard_key(record.key), record.to_bytes())
    except PreconditionError:
        # Probes may differ in their last digit between devices; a record without its blob is worth nothing.
        other = find_record(store, record.key)
        if other is not None:
            return other
        store.put(shard_key(record.key), record.to_bytes())
    return record


def find_record(store: Store, key: str) -> ShardRecord | None:
    """The record of a shard key whose blob is in the store."""
    try:
        record = read_document(ShardRecord, shard_key(key), store.get(shard_key(key)))
        return record if store.head(blob_key(record.blob)).size == record.bytes else None
    except ObjectNotFoundError:
        return None


def input_key(sources: Mapping[str, Tensor], profile: Profile) -> str:
    """Key of a shard: everything that decides its bytes, and nothing else."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, profile.recipe()], sort_keys=True).encode())
    for name, tensor in sources.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
