"""Commands on several models: references and globs, a row per model, one rule for the exit code.

A model that fails does not stop the others. The exit code is 0 if none failed, the error's if all failed with the same
kind, else 14, as for `compress`.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.cli.app import complain, is_quiet, output
from birkhoff.pipeline.cli.completion import references
from birkhoff.pipeline.cli.tables import Column, filled
from birkhoff.pipeline.errors import ArtifactNotFoundError, exit_code, failure, failure_of
from birkhoff.pipeline.text import some

if TYPE_CHECKING:
    from birkhoff.pipeline.store.base import Store

Facts = dict[str, Any]
_MAGIC = frozenset("*?[")

ReferencesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL[@REF]...",
        help="One or more models; a glob such as 'sam-*@stable' takes every model that matches.",
        show_default=False,
        autocompletion=references,
    ),
]


def is_glob(reference: str) -> bool:
    """Return whether a reference may match several models."""
    return not _MAGIC.isdisjoint(reference.partition("@")[0])


def is_one(given: Sequence[str]) -> bool:
    """Return whether a command is about one artifact, so that it prints a line instead of a table."""
    return len(given) == 1 and not is_glob(given[0])


def expand(store: "Store", given: Sequence[str]) -> list[str]:
    """Return the references that globs and names stand for, each once; those of a glob are sorted.

    Raises:
        ArtifactNotFoundError: A glob matches no model.
        StoreError: The store failed.
    """
    from birkhoff.pipeline.registry.versions import models

    known = models(store) if any(map(is_glob, given)) else []
    found: list[str] = []
    for reference in given:
        pattern, at, ref = reference.partition("@")
        if not is_glob(reference):
            found.append(reference)
            continue
        matched = [f"{model}{at}{ref}" for model in known if fnmatchcase(model, pattern)]
        if not matched:
            raise ArtifactNotFoundError(f"{store.url} has no model {pattern[:80]!r}; it has: {some(known)}")
        found += matched
    return list(dict.fromkeys(found))


def model_of(reference: str) -> str:
    """Return the model of a reference."""
    return reference.partition("@")[0]


def check_models_differ(given: Sequence[str]) -> None:
    """Refuse two references to one model, which would share the folder of that model's name. Raises
    typer.BadParameter."""
    models = [model_of(reference) for reference in given]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise typer.BadParameter(f"{twice} is named twice but has one folder; pull its versions one by one, with -o")


def run_each(
    given: Sequence[str], work: Callable[[str], Facts], columns: Sequence[Column], *, done: str, as_json: bool
) -> None:
    """Call `work` for each reference, show a row for each, and exit with the code of the failures.

    `work` returns the facts of one reference; `done` is its `status` on success. Raises typer.Exit.
    """
    from birkhoff.pipeline.cli.tables import show

    rows: list[Facts] = []
    errors: list[BirkhoffError | None] = []
    for reference in given:
        row: Facts = dict.fromkeys(column.key for column in columns)
        row |= {"model": model_of(reference), "status": done, "error": None, "failure": None}
        try:
            row |= work(reference)
            errors.append(None)
        except BirkhoffError as error:
            row |= {"status": "failed", "error": str(error), "failure": failure_of(error)}
            errors.append(error)
        rows.append(row)
    if as_json or not is_quiet():
        show(output(), filled(columns, rows, "problem"), rows, as_json=as_json)
    for row in rows:
        if row["error"] is not None:
            complain(f"{row['model']}: {row['error']}")
    failed = failure(errors)
    if failed is not None:
        raise typer.Exit(exit_code(failed))
