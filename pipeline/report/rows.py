"""The rows printed by `birkhoff report`."""

from collections.abc import Mapping
from typing import Any

from birkhoff.pipeline.report.document import ModelRecord, RunReport
from birkhoff.pipeline.report.stored import read_report, runs
from birkhoff.pipeline.store.base import Store

Row = Mapping[str, Any]


def run_rows(store: Store) -> list[Row]:
    """Return one row per run with a report, oldest first. Raises IntegrityError, StoreError."""
    return [_run(read_report(store, run)) for run in runs(store)]


def _run(report: RunReport) -> Row:
    totals = report.totals.model_dump(mode="json")
    return {"run": report.run, "started": report.started, "seconds": report.seconds, **totals, "error": report.error}


def model_rows(report: RunReport) -> list[Row]:
    """Return one row per model of a run."""
    return [{**model.model_dump(exclude={"layers", "changes", "masks"}), **_more(model)} for model in report.models]


def _more(model: ModelRecord) -> Row:
    lossless = sum(layer.reason is not None for layer in model.layers) if model.layers else None
    change = model.changes
    if change is None:
        return {"lossless": lossless, "changes": None}
    tensors = {kind: count for kind, count in (change.tensors or {}).items() if kind != "same"}
    said = [f"{count} {kind}" for kind, count in tensors.items()] or [f"shards: {change.shards_new} new"]
    return {"lossless": lossless, "changes": "; ".join([*said, *change.recipe])}


def title(report: RunReport) -> str:
    """Return one line about the run."""
    totals = report.totals
    ratio = f", ratio {totals.source_bytes / totals.stored_bytes:.2f}" if totals.stored_bytes else ""
    ended = report.error or f"{totals.published} published, {totals.up_to_date} up to date, {totals.failed} failed"
    return f"run {report.run}: {ended}{ratio}, {report.seconds:.1f} s"
