"""Artifacts of a few tensors, published without the pipeline in front."""

from collections.abc import Mapping

import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.artifact import ShardRecord, SourceRecord, VersionManifest, blob_key, sha256
from birkhoff.pipeline.publish import Version, publish
from birkhoff.pipeline.store import Store


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
            records.append(
                ShardRecord(
                    key=sha256(blob),
                    blob=sha256(blob),
                    bytes=len(blob),
                    source_bytes=sum(tensor.nbytes for tensor in group.values()),
                    tensors=len(group),
                    sqnr_db=(),
                    probe_db=(),
                    probe_error=0.0,
                )
            )
            group = {}
    source = SourceRecord(
        file=f"{model}.pth", sha256=sha256(model.encode()), bytes=1, format="torch-zip", nesting=nesting
    )
    manifest = VersionManifest(
        model=model, source=source, profile=profile, recipe=recipe.recipe(), code="0", shards=tuple(records)
    )
    return publish(store, manifest)
