"""Rows of `birkhoff history` and `birkhoff diff`: what became of a model, and what differs between two versions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from birkhoff.codec.container import CodedTensor, parse
from birkhoff.codec.errors import FormatError
from birkhoff.pipeline.aliases import aliases
from birkhoff.pipeline.artifact import AliasRecord, AliasState, NameRecord
from birkhoff.pipeline.artifacts import StoredArtifact, TensorRow, inspect
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.names import all_names
from birkhoff.pipeline.publish import resolve
from birkhoff.pipeline.report_charts import sparkline
from birkhoff.pipeline.store import Store
from birkhoff.pipeline.validate import summary

Row = dict[str, object]


def history_rows(store: Store, model: str) -> list[Row]:
    """What happened to a model, oldest first: versions published and retired, aliases moved.

    Events are `published`, `retired`, `moved`, `rolled back`, `protected` and `unprotected`. Sizes and SQNR stand with
    the publication of versions that are there; an alias remembers its last `aliases.KEPT_STATES` states.

    Raises:
        ArtifactNotFoundError: no such model.
        IntegrityError, StoreError: something stored cannot be read.
    """
    rows = [row for name, record in all_names(store, model) for row in _name_rows(store, model, name, record)]
    if not rows:
        resolve(store, model)  # says which models there are
    rows += [row for alias, record in aliases(store, model).items() for row in _alias_rows(alias, record)]
    # Times are whole seconds: a stable sort keeps each alias's moves in order, after the versions they point at.
    return sorted(rows, key=lambda row: str(row["time"]))


def trend(rows: list[Row]) -> str:
    """Ratio and SQNR of the published versions as sparklines, oldest first; nothing for less than two."""
    published = [row for row in rows if row["event"] == "published"]
    said = []
    for key, title in (("ratio", "ratio"), ("sqnr_db_min", "SQNR min dB"), ("sqnr_db_median", "median dB")):
        values = [value for row in published if isinstance(value := row[key], float)]
        if len(values) > 1:
            said.append(f"{title} {sparkline(values)} {values[0]:.2f} to {values[-1]:.2f}")
    return ", ".join(said)


def _name_rows(store: Store, model: str, name: str, record: NameRecord) -> Iterator[Row]:
    metrics: Row = {}
    if record.retired is None:
        version = resolve(store, f"{model}@{name}")
        least, median = summary([db for shard in version.manifest.shards for db in shard.sqnr_db])
        metrics = {
            "profile": version.manifest.profile,
            "stored_bytes": version.stored_bytes,
            "ratio": round(version.manifest.source.bytes / version.stored_bytes, 3),
            "sqnr_db_min": least,
            "sqnr_db_median": median,
        }
    yield _event(record.created, "published", name, record.digest, **metrics)
    if record.retired is not None:
        yield _event(record.retired, "retired", name, record.digest)


def _alias_rows(alias: str, record: AliasRecord) -> Iterator[Row]:
    before: AliasState | None = None
    for state in (*record.previous, record):
        if before is not None and before.version == state.version:
            event = "protected" if state.protected else "unprotected"
        else:
            event = "rolled back" if state.back else "moved"
        origin = before.version if before else None
        yield _event(
            state.moved, event, state.version, state.digest, **{"alias": alias, "from": origin, "gen": state.gen}
        )
        before = state


def _event(time: str, event: str, version: str, digest: str, **more: object) -> Row:
    empty = dict.fromkeys(
        ("alias", "from", "gen", "profile", "stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median"), None
    )
    return {"time": time, "event": event, "version": version, "digest": digest, **empty, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two versions side by side."""

    rows: list[Row]
    """One for each tensor: `change` is `added`, `removed`, `changed`, `recoded` or `same`; metrics under `*_a`, `*_b`.
    Tensors are in B's order, removed ones last."""
    title: str
    """Both versions, and how many tensors are what."""


def diff(store: Store, reference_a: str, reference_b: str) -> Difference:
    """Compare the tensors of two versions, of one model or of two, by what is stored of them.

    A tensor is `same` if its streams and parameters are, and otherwise `changed`, or `recoded` where both versions were
    made from the same source file, so that only the recipe can differ. Shards that the versions share are compared by
    their digests; of the others one at a time is fetched.

    Raises:
        ArtifactNotFoundError, IntegrityError, StoreError: as `resolve`.
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
    return Difference(rows=rows, title=f"{a.label} (A) and {b.label} (B): {counts}")


def _contents(artifact: StoredArtifact, other: StoredArtifact) -> dict[str, str]:
    """Digest of every tensor that lies in a shard which `other` does not have."""
    shared = {shard.blob for shard in other.manifest.shards}
    found: dict[str, str] = {}
    for shard in artifact.manifest.shards:
        if shard.blob not in shared:
            try:
                found |= {coded.name: _digest(coded) for coded in parse(artifact.blob(shard))}
            except FormatError as error:
                raise IntegrityError(f"{artifact.label}: blob {shard.blob}: {error}") from None
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
