"""The JSON schema of every command's `--json` output: `birkhoff schema`, stored as `output.schema.json` here.

Standard output is always one JSON document: a list of objects if the command shows rows, one object if it reports what
it did, and `{"error": {...}}` if it failed. Keys are never removed; new ones may be added. A key that a table shows has
the table's heading as its `title`. Sizes are bytes, times seconds, fidelities dB.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from birkhoff.pipeline.cli.app import app
from birkhoff.pipeline.cli.tables import (
    ADDRESS_COLUMNS,
    LIST_COLUMNS,
    PLAN_COLUMNS,
    TENSOR_COLUMNS,
    VERSION_COLUMNS,
    Column,
)

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
NUMBERS: Schema = {"type": "array", "items": NUMBER}
COUNTS: Schema = {"type": "array", "items": COUNT}
MAP: Schema = {"type": "object"}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}


def maybe(schema: Schema) -> Schema:
    """Return a schema that also allows null."""
    return {"anyOf": [schema, {"type": "null"}]}


_NAME = maybe(TEXT)
_DB = _FIGURE = maybe(NUMBER)
_FIGURES = {
    "source_bytes": maybe(COUNT),
    "stored_bytes": maybe(COUNT),
    "ratio": maybe(NUMBER),
    "sqnr_db_min": _DB,
    "sqnr_db_median": _DB,
    "agreement_mean": maybe(NUMBER),
    "agreement_p5": maybe(NUMBER),
    "output_db": _DB,
}
_FAILURE = {"kind": TEXT, "code": COUNT, "message": TEXT, "remedy": maybe(TEXT)}
_MOVE = {
    "model": TEXT,
    "alias": TEXT,
    "version": TEXT,
    "from": _NAME,
    "digest": TEXT,
    "gen": COUNT,
    "protected": FLAG,
    "changed": FLAG,
}
_SCORES = {
    f"{name}_{which}": maybe(NUMBER)
    for name in ("agreement", "original_iou", "compressed_iou")
    for which in ("mean", "worst")
}


def an_object(keys: Mapping[str, Schema], columns: Sequence[Column] = (), optional: Sequence[str] = ()) -> Schema:
    """Return the schema of an object with these keys; those that a table shows get its headings as titles."""
    titles = {column.key: column.title for column in columns}
    properties = {key: {"title": titles[key], **form} if key in titles else form for key, form in keys.items()}
    return {"type": "object", "properties": properties, "required": [key for key in keys if key not in optional]}


def rows(keys: Mapping[str, Schema], columns: Sequence[Column] = (), optional: Sequence[str] = ()) -> Schema:
    """Return the schema of a list of such objects."""
    return {"type": "array", "items": an_object(keys, columns, optional)}


def several(keys: Mapping[str, Schema], columns: Sequence[Column], done: str) -> Schema:
    """Return the schema of a command on several models: a row each, with these keys and how it ended."""
    ended = {"model": TEXT, "status": {"enum": [done, "failed"]}, "error": _NAME}
    found = {key: maybe(form) for key, form in keys.items()}
    optional = [key for key in found if key not in {column.key for column in columns}]
    return rows({**found, **ended, "failure": maybe(an_object(_FAILURE))}, columns, optional)


ERROR = an_object({"error": an_object(_FAILURE)})
"""The document of any command that fails: class, exit code, line, remedy."""


def outputs() -> dict[str, Schema]:
    """Return the schema of each command's document on success, by the command's words."""
    from birkhoff.pipeline.cli.doctor import FINDING_COLUMNS
    from birkhoff.pipeline.cli.inspect import VERIFY_COLUMNS
    from birkhoff.pipeline.cli.models import OUTPUT_COLUMNS, SCORE_COLUMNS, SEGMENT_COLUMNS, SKIPPED_COLUMNS
    from birkhoff.pipeline.cli.pull import PULL_COLUMNS
    from birkhoff.pipeline.cli.report import RUN_COLUMNS
    from birkhoff.pipeline.cli.shipping import COPY_COLUMNS
    from birkhoff.pipeline.cli.versions import DIFF_COLUMNS, GC_COLUMNS, HISTORY_COLUMNS
    from birkhoff.pipeline.report.document import RunReport

    compress = {
        "model": TEXT,
        "profile": TEXT,
        "base": _NAME,
        "base_bytes": maybe(COUNT),
        "newer_base": _NAME,
        "allocation": _NAME,
        "version": _NAME,
        "digest": _NAME,
        "same_as": _NAME,
        "status": {"enum": ["published", "up to date", "failed", None]},
        **_FIGURES,
        "seconds": NUMBER,
        "shards": maybe(COUNT),
        "shards_reused": COUNT,
        "stages": MAP,
        "target_db": _DB,
        "passes": COUNT,
        "unproven": _NAME,
        "warnings": TEXTS,
        "error": maybe(TEXT),
        "failure": maybe(an_object(_FAILURE)),
    }
    plan = {
        "model": TEXT,
        "profile": TEXT,
        "base": _NAME,
        "base_share": maybe(NUMBER),
        "newer_base": _NAME,
        "allocation": TEXT,
        "status": {"enum": ["new", "changed", "to be read", "up to date", "to be downloaded", "failed"]},
        "budget_bytes": maybe(COUNT),
        "predicted_target_db": _DB,
        "predicted_tensor_db": maybe(NUMBERS),
        "source_bytes": COUNT,
        "predicted_stored_bytes": COUNT,
        "predicted_stored_bytes_range": COUNTS,
        "predicted_ratio": NUMBER,
        "predicted_ratio_range": NUMBERS,
        "shards": COUNT,
        "shared_shards": COUNT,
        "predicted_seconds": NUMBER,
        "predicted_memory_bytes": COUNT,
        "skipped": TEXTS,
        "unproven": _NAME,
        "overrides": MAP,
        "groups": rows({"action": TEXT, "reason": TEXT, "tensors": COUNT, "weights": COUNT, "bytes": COUNT}),
        "note": TEXT,
        "error": TEXT,
        "failure": an_object(_FAILURE),
    }
    tensor = {"name": TEXT, "shape": COUNTS, "dtype": TEXT}
    measured = {"action": TEXT, "bits_per_weight": NUMBER, "sqnr_db": _DB, "max_abs_error": NUMBER}
    aimed = {"target_db": _DB, "nominal": FLAG}
    sides = {f"{key}_{side}": maybe(form) for key, form in measured.items() for side in ("a", "b")}
    totals = dict.fromkeys(
        ("models", "published", "up_to_date", "failed", "source_bytes", "stored_bytes", "unique_bytes"), COUNT
    )
    totals |= {"new_bytes": COUNT, "shards": COUNT, "shards_reused": COUNT}
    run = {"run": TEXT, "started": TEXT, "seconds": NUMBER, **totals, "sqnr_db_min": _DB, "sqnr_db_median": _DB}
    version = {"model": TEXT, "version": _NAME, "digest": TEXT}
    missing = {"missing_blobs": maybe(COUNT), "missing_bytes": maybe(COUNT)}
    listed = {**version, "digest": _NAME, "aliases": TEXTS, "profile": _NAME, **_FIGURES, "created": _NAME}
    listed |= {"labels": LABELS, **missing, "problem": _NAME}
    verified = {"artifact": TEXT, "digest": TEXT, "blobs": COUNT, "bytes": COUNT, "tensors": COUNT, "compared": COUNT}
    verified |= {"sqnr_db": _DB}
    pulled = {**version, "fetched_bytes": COUNT, "output": TEXT, **missing}
    installed = {**version, "renamed_from": _NAME, "blobs": COUNT, "copied_blobs": COUNT, "copied_bytes": COUNT}
    installed |= {"aliases": TEXTS, "labels": LABELS, "signed_for": TEXTS, "store": TEXT}
    event = {"time": TEXT, "event": TEXT, "alias": _NAME, "from": _NAME, "version": _NAME, "digest": _NAME}
    states = {"enum": ["here", "mirror", "answers", "gone", "fails"]}
    address = {"model": TEXT, "address": TEXT, "state": states, "bytes": maybe(COUNT), "problem": TEXT}
    usage = {"blobs": COUNT, "bytes": COUNT, "partial": COUNT}
    scored = an_object({"prompts": COUNT, **_SCORES})
    return {
        "compress": rows(compress, VERSION_COLUMNS),
        "plan": rows(plan, PLAN_COLUMNS, [key for key in plan if key not in ("model", "profile", "status")]),
        "plan --check-sources": rows(address, ADDRESS_COLUMNS),
        "promote": an_object(_MOVE),
        "rollback": an_object(_MOVE),
        "remove": an_object({**version, "alias": _NAME}),
        "label": an_object({**version, "labels": LABELS}),
        "history": rows(
            {**event, "gen": maybe(COUNT), "profile": _NAME, "allocation": _NAME, **_FIGURES, "labels": LABELS},
            HISTORY_COLUMNS,
        ),
        "diff": rows({**tensor, "change": TEXT, **sides}, DIFF_COLUMNS, [*sides]),
        "gc": rows(
            {"kind": TEXT, "model": _NAME, "retired": TEXTS, "objects": COUNT, "bytes": COUNT, "kept": COUNT}
            | {"deleted": FLAG},
            GC_COLUMNS,
        ),
        "list": rows(listed, LIST_COLUMNS),
        "inspect": rows({**tensor, **measured, **aimed, "reason": _NAME, "why": TEXT}, TENSOR_COLUMNS),
        "verify": an_object(verified),
        "verify (several)": several(verified, VERIFY_COLUMNS, "verified"),
        "export": an_object({"artifact": TEXT, "output": TEXT, "bytes": COUNT}),
        "pull": an_object(pulled),
        "pull (several)": several(pulled, PULL_COLUMNS, "pulled"),
        "copy": an_object(installed),
        "copy (several)": several(installed, COPY_COLUMNS, "copied"),
        "push": an_object(
            {**version, "to": TEXT, "manifest": TEXT, "blobs": COUNT, "copied_blobs": COUNT, "copied_bytes": COUNT}
        ),
        "save": an_object({**version, "output": TEXT, "bytes": COUNT}),
        "load": an_object(installed),
        "recode": an_object(
            {**version, "from": _NAME, "format": COUNT, "shards": COUNT, "stored_bytes": COUNT}
            | {"saved_bytes": {"type": "integer"}}
        ),
        "cache": an_object({"folder": TEXT, **usage, "linked": COUNT, "partial_bytes": COUNT}),
        "cache prune": an_object(usage),
        "segment": rows(
            {"image": TEXT, "prompt": TEXT, "pixels": COUNT, "pixels_original": COUNT, "iou": NUMBER},
            SEGMENT_COLUMNS,
            ["image", "pixels_original", "iou"],
        ),
        "evaluate": an_object(
            {
                "model": TEXT,
                "digest": TEXT,
                "profile": TEXT,
                "compute": TEXT,
                "source": TEXT,
                "adapter": TEXT,
                "protocol": an_object(
                    {
                        "annotations": _NAME,
                        "boxes": _NAME,
                        "truth": TEXT,
                        "multimask": TEXT,
                        "metric": TEXT,
                        "random": maybe(COUNT),
                        "seed": COUNT,
                    }
                ),
                "scores": rows(
                    {"measure": TEXT, "original": _FIGURE, "compressed": _FIGURE, "difference": _FIGURE}, SCORE_COLUMNS
                ),
                "skipped": rows({"what": TEXT, "reason": TEXT, "count": COUNT, "first": TEXTS}, SKIPPED_COLUMNS),
                "images": COUNT,
                "prompts": {"type": "object", "additionalProperties": scored},
                "blocks": rows({"block": TEXT, "sqnr_db": _DB}),
                "per_image": {"type": "array", "items": {**an_object({"image": TEXT}), "additionalProperties": scored}},
            }
        ),
        "evaluate --inputs": an_object(
            {
                "model": TEXT,
                "digest": TEXT,
                "profile": TEXT,
                "compute": TEXT,
                "source": TEXT,
                "batches": COUNT,
                "outputs": rows({"output": TEXT, "sqnr_db": _DB, "cosine": NUMBER}, OUTPUT_COLUMNS),
                "metrics": {"type": "object", "additionalProperties": NUMBER},
            }
        ),
        "key new": an_object({"key": TEXT, "private": TEXT, "public": TEXT}),
        "key show": an_object({"key": TEXT, "public": TEXT}),
        "sign": an_object({**version, "alias": _NAME, "key": TEXT}),
        "oms sign": an_object({**version, "store": TEXT}),
        "oms sign (folder)": an_object({"folder": TEXT, "signature": TEXT}),
        "oms verify": an_object({"folder": TEXT, "trusted": TEXT}),
        "report": RunReport.model_json_schema(ref_template="#/$defs/report/$defs/{model}"),
        "report --list": rows({**run, "error": _NAME}, RUN_COLUMNS),
        "store env": {"type": "object", "additionalProperties": TEXT},
        "doctor": rows(
            {"check": TEXT, "state": {"enum": ["ok", "note", "fails"]}, "found": TEXT, "advice": TEXT, "code": COUNT},
            FINDING_COLUMNS,
        ),
    }


def document() -> dict[str, Any]:
    """Return the whole schema: a definition for each command, and `error`."""
    found = {**outputs(), "error": ERROR}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What birkhoff COMMAND --json writes to standard output: $defs has an entry for each COMMAND",
        "anyOf": [{"$ref": f"#/$defs/{name.replace(' ', '%20')}"} for name in found],
        "$defs": found,
    }


@app.command()
def schema(
    command: Annotated[
        str | None, typer.Argument(help="A command, such as 'cache prune', or 'error'. Default: all.")
    ] = None,
) -> None:
    """Print the JSON schema of the commands' --json output."""
    whole = document()
    if command is not None:
        if command not in whole["$defs"]:
            raise typer.BadParameter(
                f"{command!r} has none; there are {', '.join(whole['$defs'])}", param_hint="COMMAND"
            )
        whole = {**whole, "anyOf": [{"$ref": f"#/$defs/{command.replace(' ', '%20')}"}]}
    typer.echo(json.dumps(whole, indent=2))
