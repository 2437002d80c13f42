"""Compare a new version with the one before it, at a cost bounded by the change."""

from birkhoff.pipeline.artifact.diff import diff
from birkhoff.pipeline.registry.documents import VersionManifest, sqnr_summary
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.report.document import ChangeRecord, TensorChange
from birkhoff.pipeline.store.base import Store

LISTED = 40
"""Maximum number of changed tensors that a report names."""

_MOST_BYTES = 128 << 20
"""Stored bytes up to which tensors are compared one by one. Beyond it, only whole shards are counted."""


def changes(store: Store, before: Version, after: Version) -> ChangeRecord:
    """Compare two versions of a model. Raises IntegrityError, StoreError."""
    old, new = before.manifest, after.manifest
    blobs = {shard.blob for shard in old.shards}
    same = sum(shard.blob in blobs for shard in new.shards)
    least, median = sqnr_summary(old.shards)
    tensors, listed = _tensors(store, before, after) if _differing(old, new) <= _MOST_BYTES else (None, ())
    return ChangeRecord(
        version=before.name,
        digest=before.digest,
        stored_bytes=before.stored_bytes,
        ratio=old.ratio,
        sqnr_db_min=least,
        sqnr_db_median=median,
        recipe=_recipe(old, new),
        shards_same=same,
        shards_new=len(new.shards) - same,
        tensors=tensors,
        listed=listed,
    )


def _differing(old: VersionManifest, new: VersionManifest) -> int:
    """Return the stored bytes of shards that only one of the versions has."""
    sizes_old, sizes_new = ({shard.blob: shard.bytes for shard in manifest.shards} for manifest in (old, new))
    return sum((sizes_old | sizes_new)[blob] for blob in sizes_old.keys() ^ sizes_new.keys())


def _tensors(store: Store, before: Version, after: Version) -> tuple[dict[str, int], tuple[TensorChange, ...]]:
    found = diff(store, f"{before.model}@{before.digest}", f"{after.model}@{after.digest}")
    kinds = [str(row["change"]) for row in found.rows]
    fields = TensorChange.model_fields
    listed = [
        TensorChange.model_validate({key: value for key, value in row.items() if key in fields})
        for row in found.rows
        if row["change"] != "same"
    ]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, tuple(listed[:LISTED])


def _recipe(old: VersionManifest, new: VersionManifest) -> tuple[str, ...]:
    before, after = (
        {
            **manifest.recipe,
            "profile": manifest.profile,
            "code": manifest.code,
            **{f"files/{file.name}": file.blob[:12] for file in manifest.files or ()},
        }
        for manifest in (old, new)
    )
    keys = sorted({*before, *after})
    return tuple(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key))
