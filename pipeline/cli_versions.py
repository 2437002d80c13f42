"""Commands about versions: promote, rollback, history, diff, gc. Registered on the app of `cli`."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from birkhoff.pipeline.cli import JsonOption, ReferenceArgument, SignOption, StoreOption, app, notes, output, report
from birkhoff.pipeline.store_keys import ALIAS_STABLE
from birkhoff.pipeline.tables import VERSION_COLUMNS, Column, fixed, shape, significant, size

if TYPE_CHECKING:
    from birkhoff.pipeline.collect import Collection

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"([0-9]{1,6})([smhdw])")


def duration(text: str) -> timedelta:
    """`30m`, `12h`, `7d`, `2w` or `0s`. Raises typer.BadParameter."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"expected a whole number and one of s, m, h, d, w, such as 7d or 12h, got {text!r}")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", show_default=False)]
AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS")]
ForceOption = Annotated[bool, typer.Option("--force", help="Move the alias although it is protected.")]


HISTORY_COLUMNS = (
    Column(title="time", key="time"),
    Column(title="event", key="event"),
    Column(title="alias", key="alias"),
    Column(title="from", key="from"),
    Column(title="version", key="version"),
    Column(title="profile", key="profile"),
    *(
        column
        for column in VERSION_COLUMNS
        if column.key in ("stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median", "digest")
    ),
)
DIFF_COLUMNS = (
    Column(title="tensor", key="name"),
    Column(title="change", key="change"),
    Column(title="shape", key="shape", form=shape, right=True),
    *(
        Column(title=f"{title} {side.upper()}", key=f"{key}_{side}", form=form, right=True)
        for title, key, form in (
            ("bits/weight", "bits_per_weight", fixed(2)),
            ("SQNR dB", "sqnr_db", fixed(2)),
            ("max error", "max_abs_error", significant(3)),
        )
        for side in ("a", "b")
    ),
)
GC_COLUMNS = (
    Column(title="kind", key="kind"),
    Column(title="model", key="model"),
    Column(title="retired", key="retired", form=", ".join),
    Column(title="to delete", key="objects", right=True),
    Column(title="bytes", key="bytes", form=size, right=True),
    Column(title="kept", key="kept", right=True),
)


@app.command()
def promote(
    reference: ReferenceArgument,
    alias: AliasArgument = ALIAS_STABLE,
    protect: Annotated[
        bool | None,
        typer.Option("--protect/--no-protect", help="From now on the alias moves with --force only, or freely again."),
    ] = None,
    force: ForceOption = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    from birkhoff.pipeline.aliases import promote as move
    from birkhoff.pipeline.errors import ArtifactNotFoundError
    from birkhoff.pipeline.publish import resolve
    from birkhoff.pipeline.signing import load_signer
    from birkhoff.pipeline.stores import open_default_store

    signer = load_signer(sign) if sign else None
    with open_default_store(store) as opened:
        version = resolve(opened, reference)
        if version.name is None:
            raise ArtifactNotFoundError(f"{reference} has no name (any more); compress its source again to publish it")
        moved = move(opened, version.model, version.name, alias, protect=protect, force=force, signer=signer)
    _show_move(moved.facts(), as_json, "promoted")


@app.command()
def rollback(
    model: ModelArgument,
    alias: AliasArgument = ALIAS_STABLE,
    to: Annotated[
        str | None, typer.Option("--to", metavar="REF", help="This version instead of the one the alias came from.")
    ] = None,
    force: ForceOption = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an alias back to the version it pointed at before; once more, and it goes back one more."""
    from birkhoff.pipeline.aliases import rollback as move
    from birkhoff.pipeline.publish import resolve
    from birkhoff.pipeline.signing import load_signer
    from birkhoff.pipeline.stores import open_default_store

    signer = load_signer(sign) if sign else None
    with open_default_store(store) as opened:
        target = resolve(opened, f"{model}@{to}").name or to if to is not None else None
        moved = move(opened, model, alias, to=target, force=force, signer=signer)
    _show_move(moved.facts(), as_json, "rolled back")


@app.command()
def history(model: ModelArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show the versions of a model and every move of its aliases, oldest first, and the trend of its versions."""
    from birkhoff.pipeline.history import history_rows, trend
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import show

    with open_default_store(store) as opened:
        rows = history_rows(opened, model)
    show(output(), HISTORY_COLUMNS, rows, as_json=as_json, title=trend(rows))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="MODEL[@REF]", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="MODEL[@REF]", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Show equal tensors too.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which tensors differ between two versions, and what each stores of them."""
    from birkhoff.pipeline.diff import diff as compare
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import show

    with open_default_store(store) as opened:
        found = compare(opened, a, b)
    rows = [row for row in found.rows if everything or row["change"] != "same"]
    show(output(), DIFF_COLUMNS, rows, as_json=as_json, title=found.title)


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would be deleted.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Keep what was written or retired less long ago; readers live on it.")
    ] = "7d",
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Retire versions beyond a model's newest N that no alias points at."),
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="Give open runs so long to end; new ones are held off meanwhile.")
    ] = "0s",
    keep_runs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Keep the reports of the newest N runs, whatever their age.")
    ] = 100,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what no version name, alias or open run refers to; shows what that is unless told --yes."""
    from birkhoff.pipeline.collect import collect
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import show

    limit = duration(grace)
    with open_default_store(store) as opened:
        found = collect(opened, grace=limit, keep=keep, keep_runs=keep_runs, delete=yes, wait=duration(wait))
    rows = found.rows()
    if not as_json:
        rows = [row for row in rows if row["objects"] or row["retired"]]
    if rows or as_json:
        show(output(), GC_COLUMNS, rows, as_json=as_json)
    if not as_json:
        notes().print(_collected(found), highlight=False, markup=False)


def _collected(found: "Collection") -> str:
    """What a collection came to, in one line."""
    if not found.garbage and not found.retired:
        return f"nothing to delete: {sum(found.kept.values())} objects are in use or too young to go"
    freed = size(sum(item.info.size for item in found.garbage))
    if found.deleted:
        return f"deleted {len(found.garbage)} objects, {freed}"
    return f"--yes frees {freed}; nothing was deleted"


def _show_move(facts: dict[str, Any], as_json: bool, verb: str) -> None:
    if not as_json:
        unsaid = {"changed"} if facts["changed"] else {"changed", "from"}
        verb = verb if facts["changed"] else "nothing to do"
        facts = {key: value for key, value in facts.items() if key not in unsaid}
    report(facts, as_json, verb)
