"""Rows of `birkhoff history`. Imports no torch; `diff` compares versions."""

from collections.abc import Iterator

from birkhoff.pipeline.registry.aliases import aliases
from birkhoff.pipeline.registry.documents import FIGURES, NOTHING, AliasRecord, AliasState, NameRecord
from birkhoff.pipeline.registry.labels import read_labels
from birkhoff.pipeline.registry.names import all_names
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.text import sparkline

Row = dict[str, object]


def history_rows(store: Store, model: str) -> list[Row]:
    """Return the events of a model, oldest first: versions published and retired, aliases moved.

    Events are `published`, `retired`, `moved`, `rolled back`, `removed`, `protected` and `unprotected`. A `published`
    row has sizes, SQNR and labels if the version still resolves. An alias remembers its last `aliases.KEPT_STATES`
    states.

    Raises:
        ArtifactNotFoundError: There is no such model.
        IntegrityError, StoreError: A stored object cannot be read.
    """
    rows = [row for name, record in all_names(store, model) for row in _name_rows(store, model, name, record)]
    if not rows:
        resolve(store, model)  # raises with the models that exist
    rows += [row for alias, record in aliases(store, model, removed=True).items() for row in _alias_rows(alias, record)]
    # Times have whole seconds: a stable sort keeps each alias's moves in order, after the versions they point at.
    return sorted(rows, key=lambda row: str(row["time"]))


def trend(rows: list[Row]) -> str:
    """Return ratio, SQNR and agreement of published versions as sparklines, oldest first; empty for fewer than two."""
    published = [row for row in rows if row["event"] == "published"]
    said = []
    for key, title, digits in (
        ("ratio", "ratio", 2),
        ("sqnr_db_min", "SQNR min dB", 2),
        ("sqnr_db_median", "median dB", 2),
        ("agreement_mean", "agreement", 3),
    ):
        values = [value for row in published if isinstance(value := row[key], float)]
        if len(values) > 1:
            said.append(f"{title} {sparkline(values)} {values[0]:.{digits}f} to {values[-1]:.{digits}f}")
    return ", ".join(said)


def _name_rows(store: Store, model: str, name: str, record: NameRecord) -> Iterator[Row]:
    metrics: Row = {}
    if record.claimed:
        return  # it was never a version
    if record.retired is None:
        manifest = resolve(store, f"{model}@{name}").manifest
        labels = read_labels(store, model, record.digest)
        metrics = {
            "profile": manifest.profile,
            "allocation": manifest.allocation,
            **manifest.figures(),
            "labels": labels,
        }
    yield _event(record.created, "published", name, record.digest, **metrics)
    if record.retired is not None:
        yield _event(record.retired, "retired", name, record.digest)


def _alias_rows(alias: str, record: AliasRecord) -> Iterator[Row]:
    before: AliasState | None = None
    for state in (*record.previous, record):
        if before is not None and before.digest == NOTHING:
            before = None
        if state.digest == NOTHING:
            event = "removed"
        elif before is not None and before.version == state.version:
            event = "protected" if state.protected else "unprotected"
        else:
            event = "rolled back" if state.back else "moved"
        origin = before.version if before else None
        digest = before.digest if before and state.digest == NOTHING else state.digest
        yield _event(state.moved, event, state.version, digest, **{"alias": alias, "from": origin, "gen": state.gen})
        before = state


def _event(time: str, event: str, version: str, digest: str, **more: object) -> Row:
    empty = dict.fromkeys(("alias", "from", "gen", "profile", "allocation", *FIGURES), None)
    return {"time": time, "event": event, "version": version, "digest": digest, **empty, "labels": {}, **more}
