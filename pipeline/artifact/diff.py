"""Compare two versions tensor by tensor: the rows of `birkhoff diff` and of reports."""

import hashlib
from dataclasses import dataclass

from birkhoff.codec.container import CodedTensor
from birkhoff.pipeline.artifact.readers import StoredArtifact, TensorRow, inspect
from birkhoff.pipeline.registry.proofs import proven
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store

Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The comparison of two versions."""

    rows: list[Row]
    """One row per tensor: `change` is `added`, `removed`, `changed`, `recoded` or `same`; metrics are under `*_a`,
    `*_b`. Tensors are in B's order, removed ones last."""
    title: str
    """Both versions, and the number of tensors by kind of change."""


def diff(store: Store, reference_a: str, reference_b: str) -> Difference:
    """Compare the stored tensors of two versions, of one model or of two.

    A tensor is `same` if its streams and parameters are equal. Otherwise it is `changed`, or `recoded` if both versions
    were made from the same source file, so that only the recipe can differ. Shards are compared by digest; those that
    differ are fetched one at a time.

    Raises:
        ArtifactNotFoundError, IntegrityError, StoreError: As `resolve`.
    """
    a, b = (StoredArtifact(store, resolve(store, reference)) for reference in (reference_a, reference_b))
    contents_a, contents_b = _contents(a, b), _contents(b, a)
    tensors_a, tensors_b = ({row.name: row for row in inspect(artifact)} for artifact in (a, b))
    other = "recoded" if a.manifest.source.sha256 == b.manifest.source.sha256 else "changed"
    rows: list[Row] = []
    for name, tensor in tensors_b.items():
        equal = "same" if contents_a.get(name) == contents_b.get(name) else other
        rows.append(_row(tensor, equal if name in tensors_a else "added", tensors_a.get(name), tensor))
    rows += [_row(tensor, "removed", tensor, None) for name, tensor in tensors_a.items() if name not in tensors_b]
    kinds = [row["change"] for row in rows]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    sides = (f"{side.label} ({letter}{proven(side.manifest)})" for letter, side in (("A", a), ("B", b)))
    return Difference(rows=rows, title=f"{' and '.join(sides)}: {counts}")


def _contents(artifact: StoredArtifact, other: StoredArtifact) -> dict[str, str]:
    """Return the digest of every tensor in shards that `other` lacks."""
    shared = {shard.blob for shard in other.manifest.shards}
    found: dict[str, str] = {}
    for shard in artifact.manifest.shards:
        if shard.blob not in shared:
            found |= {coded.name: _digest(coded) for coded in artifact.coded_of(shard)}
    return found


def _digest(coded: CodedTensor) -> str:
    digest = hashlib.sha256(coded.entry().encode())
    for part in coded.parts:
        digest.update(part)
    return digest.hexdigest()


def _row(tensor: TensorRow, change: str, a: TensorRow | None, b: TensorRow | None) -> Row:
    row: Row = {"name": tensor.name, "change": change, "shape": tensor.shape, "dtype": tensor.dtype}
    for side, at in (("a", a), ("b", b)):
        row[f"action_{side}"] = at.action if at else None
        row[f"bits_per_weight_{side}"] = at.bits_per_weight if at else None
        row[f"sqnr_db_{side}"] = at.sqnr_db if at else None
        row[f"max_abs_error_{side}"] = at.max_abs_error if at else None
    return row
