"""Artifacts of a few tensors or bytes, published without the pipeline in front."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.errors import ObjectNotFoundError
from birkhoff.pipeline.registry.documents import (
    BaseBlob,
    HessianRecord,
    ShardRecord,
    SourceRecord,
    StatisticsRecord,
    VersionManifest,
    blob_key,
    keep_object,
    sha256,
    shard_key,
    statistics_key,
)
from birkhoff.pipeline.registry.versions import Version, publish
from birkhoff.pipeline.store.base import Store
from tests.codec.by_profile import encode_tensor

if TYPE_CHECKING:
    from birkhoff.pipeline.registry.signing import Signer


def unmeasured(blob: bytes, *, source_bytes: int, tensors: int, key: str | None = None) -> ShardRecord:
    """Record of a shard that nobody validated; its key is the blob's digest where none is given."""
    return ShardRecord(
        key=key or sha256(blob),
        blob=sha256(blob),
        bytes=len(blob),
        source_bytes=source_bytes,
        tensors=tensors,
        sqnr_db=(),
        probe_db=(),
        probe_error=0.0,
    )


def record_of(content: str) -> ShardRecord:
    """Record of a shard of these bytes, which are no container."""
    body = content.encode()
    return unmeasured(body, source_bytes=9, tensors=1, key=sha256(b"key of " + body))


def keep(store: Store, content: str, base: str | None = None) -> ShardRecord:
    """Store a shard as a worker does: looked up, or made; as a difference to the shard of `base`, if given."""
    record = record_of(content)
    if base is not None:
        held = keep(store, base)
        key = sha256(f"{content} on {base}".encode())
        record = record.model_copy(update={"key": key, "bases": (BaseBlob(blob=held.blob, bytes=held.bytes),)})
    try:
        store.head(shard_key(record.key))
        store.head(blob_key(record.blob))
    except ObjectNotFoundError:
        store.create(blob_key(record.blob), content.encode())
        store.create(shard_key(record.key), record.to_bytes())
    return record


def keep_felt(store: Store, content: str) -> StatisticsRecord:
    """Store statistics of one Hessian of these bytes, which are none."""
    body = content.encode()
    hessian = HessianRecord(blob=sha256(body), bytes=max(2, len(body)), columns=1)
    record = StatisticsRecord(
        key=sha256(b"statistics of " + body),
        pictures=1,
        probes=1,
        device="cpu",
        sensitivities={"w": 1.0},
        rms={"w": 1.0},
        hessians={"w": hessian},
    )
    keep_object(store, blob_key(hessian.blob), body)
    keep_object(store, statistics_key(record.key), record.to_bytes())
    return record


def publish_contents(
    store: Store,
    model: str,
    *contents: str,
    signer: "Signer | None" = None,
    felt: StatisticsRecord | None = None,
    base: str | None = None,
) -> Version:
    """Publish a version of shards of these bytes, made by these statistics, as differences to the shard of `base`."""
    shards = tuple(keep(store, content, base) for content in contents)
    source = SourceRecord(file="f", sha256=sha256("".join(contents).encode()), bytes=9, format="test")
    recipe: dict[str, str | float | int | None] = {} if felt is None else {"statistics": felt.key}
    manifest = VersionManifest(model=model, source=source, profile="p", recipe=recipe, code="0", shards=shards)
    return publish(store, manifest, signer=signer)


def publish_tensors(
    store: Store,
    model: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    profile: str = "fast",
    shard_weights: int = 1 << 22,
    nesting: tuple[str, ...] = (),
) -> Version:
    """Code tensors into shards of about so many weights, and publish them; measures nothing."""
    recipe, records, group = PROFILES[profile], [], dict[str, torch.Tensor]()
    names = list(tensors)
    for name in names:
        group[name] = tensors[name]
        if sum(tensor.numel() for tensor in group.values()) >= shard_weights or name == names[-1]:
            blob = serialise([encode_tensor(key, tensor, recipe).tensor for key, tensor in group.items()])
            store.put(blob_key(sha256(blob)), blob)
            size = sum(tensor.nbytes for tensor in group.values())
            records.append(unmeasured(blob, source_bytes=size, tensors=len(group)))
            group = {}
    source = SourceRecord(
        file=f"{model}.pth", sha256=sha256(model.encode()), bytes=1, format="torch-zip", nesting=nesting
    )
    manifest = VersionManifest(
        model=model, source=source, profile=profile, recipe=recipe.recipe(), code="0", shards=tuple(records)
    )
    return publish(store, manifest)
