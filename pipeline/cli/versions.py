"""Commands on versions: promote, rollback, remove, label, history, diff, gc, list."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from birkhoff.pipeline.cli.app import (
    JsonOption,
    ReferenceArgument,
    SignOption,
    StoreOption,
    app,
    output,
    remark,
    report,
)
from birkhoff.pipeline.cli.tables import LABELS_COLUMN, VERSION_COLUMNS, Column, filled
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.store.keys import ALIAS_STABLE, DIGEST, NAME_PATTERN
from birkhoff.pipeline.text import fixed, pairs, shape, significant, size

if TYPE_CHECKING:
    from birkhoff.pipeline.registry.gc import Collection

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"([0-9]{1,6})([smhdw])")


def duration(text: str) -> timedelta:
    """Parse `30m`, `12h`, `7d`, `2w` or `0s`. Raises typer.BadParameter."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"expected a whole number and one of s, m, h, d, w, such as 7d or 12h, got {text!r}")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", show_default=False)]
AliasArgument = Annotated[
    str | None,
    typer.Argument(metavar="ALIAS", help=f"The alias to move. Default: {ALIAS_STABLE}.", show_default=False),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Move the alias even if it is protected.")]


HISTORY_COLUMNS = (
    Column(title="time", key="time", whole=True),
    Column(title="event", key="event"),
    Column(title="alias", key="alias", rank=1),
    Column(title="from", key="from", rank=2),
    Column(title="version", key="version"),
    Column(title="profile", key="profile", rank=5),
    *(
        column
        for column in VERSION_COLUMNS
        if column.key in ("stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median", "agreement_mean", "digest")
    ),
    LABELS_COLUMN,
)
DIFF_COLUMNS = (
    Column(title="tensor", key="name", most=100, tail=True),
    Column(title="change", key="change"),
    Column(title="shape", key="shape", form=shape, right=True, rank=3),
    *(
        Column(title=f"{title} {side.upper()}", key=f"{key}_{side}", form=form, right=True, rank=rank)
        for title, key, form, rank in (
            ("bits/weight", "bits_per_weight", fixed(2), 2),
            ("SQNR dB", "sqnr_db", fixed(2), 1),
            ("max error", "max_abs_error", significant(3), 4),
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


_GC_DEFAULTS = {("--grace", "7d"), ("--keep", None), ("--wait", "0s"), ("--keep-runs", 100)}


@app.command()
def promote(
    reference: ReferenceArgument,
    alias: AliasArgument = None,
    protect: Annotated[
        bool | None,
        typer.Option(
            "--protect/--no-protect", help="Require --force for later moves of the alias, or allow them freely."
        ),
    ] = None,
    force: ForceOption = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version: `stable`, unless you name another."""
    from birkhoff.pipeline.errors import ArtifactNotFoundError
    from birkhoff.pipeline.registry.aliases import promote as move
    from birkhoff.pipeline.registry.signing import load_signer
    from birkhoff.pipeline.registry.versions import resolve
    from birkhoff.pipeline.store.default import open_default_store

    signer = load_signer(sign) if sign else None
    with open_default_store(store) as opened:
        version = resolve(opened, reference)
        if version.name is None:
            raise ArtifactNotFoundError(f"{reference} has no name any more; compress its source again to publish it")
        moved = move(
            opened, version.model, version.name, alias or ALIAS_STABLE, protect=protect, force=force, signer=signer
        )
    _show_move(moved.facts(), as_json, "promoted", defaulted=alias is None)


@app.command()
def rollback(
    model: ModelArgument,
    alias: AliasArgument = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="REF", help="Go to this version instead of the previous one.")
    ] = None,
    force: ForceOption = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take an alias (`stable`, unless you name another) back to its previous version; repeat to go further back."""
    from birkhoff.pipeline.registry.aliases import rollback as move
    from birkhoff.pipeline.registry.signing import load_signer
    from birkhoff.pipeline.registry.versions import resolve
    from birkhoff.pipeline.store.default import open_default_store

    signer = load_signer(sign) if sign else None
    with open_default_store(store) as opened:
        target = resolve(opened, f"{model}@{to}").name or to if to is not None else None
        moved = move(opened, model, alias or ALIAS_STABLE, to=target, force=force, signer=signer)
    _show_move(moved.facts(), as_json, "rolled back", defaulted=alias is None)


@app.command()
def remove(
    reference: ReferenceArgument,
    force: ForceOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a version's name (MODEL@v3) or an alias (MODEL@stable); `gc` frees the bytes later."""
    from birkhoff.pipeline.registry.aliases import remove as remove_alias
    from birkhoff.pipeline.registry.gc import remove_version
    from birkhoff.pipeline.registry.names import VERSION_NAME
    from birkhoff.pipeline.store.default import open_default_store

    model, _, ref = reference.partition("@")
    if not NAME_PATTERN.fullmatch(model) or not NAME_PATTERN.fullmatch(ref) or DIGEST.fullmatch(ref):
        raise typer.BadParameter(
            f"expected MODEL@v3 for a version or MODEL@ALIAS for an alias, got {reference[:200]!r}"
        )
    facts: dict[str, Any]
    with open_default_store(store) as opened:
        if VERSION_NAME.fullmatch(ref):
            record = remove_version(opened, model, ref)
            facts = {"model": model, "version": ref, "alias": None, "digest": record.digest}
        else:
            before = remove_alias(opened, model, ref, force=force).after
            facts = {"model": model, "version": before.version, "alias": ref, "digest": before.previous[-1].digest}
    report(facts, as_json, "removed")


@app.command()
def label(
    reference: ReferenceArgument,
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Labels to set.", show_default=False)
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="KEY", help="Label to remove. Repeatable.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set labels of a version, such as licence=Apache-2.0, or show them; its digest does not change."""
    from birkhoff.pipeline.registry.labels import label as change
    from birkhoff.pipeline.registry.labels import read_labels
    from birkhoff.pipeline.registry.versions import resolve
    from birkhoff.pipeline.store.default import open_default_store

    wanted = dict(_pair(text) for text in labels or [])
    with open_default_store(store) as opened:
        if wanted or drop:
            version, held = change(opened, reference, wanted, drop=drop or [])
        else:
            version = resolve(opened, reference)
            held = read_labels(opened, version.model, version.digest)
    facts = {"model": version.model, "version": version.name, "digest": version.digest}
    report(
        {**facts, "labels": held if as_json else pairs(held) or "none"},
        as_json,
        "labelled" if wanted or drop else "labels",
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected KEY=VALUE, got {text[:80]!r}; --drop KEY removes a label")
    return key, value


@app.command()
def history(model: ModelArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show a model's versions and every move of its aliases, oldest first, and their trend."""
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.registry.history import history_rows, trend
    from birkhoff.pipeline.store.default import open_default_store

    with open_default_store(store) as opened:
        rows = history_rows(opened, model)
    show(output(), filled(HISTORY_COLUMNS, rows, "labels", "agreement_mean"), rows, as_json=as_json, title=trend(rows))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="MODEL[@REF]", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="MODEL[@REF]", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Show equal tensors too.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which tensors differ between two versions, with both sides' metrics."""
    from birkhoff.pipeline.artifact.diff import diff as compare
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.store.default import open_default_store

    with open_default_store(store) as opened:
        found = compare(opened, a, b)
    rows = [row for row in found.rows if everything or row["change"] != "same"]
    show(output(), DIFF_COLUMNS, rows, as_json=as_json, title=found.title)


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Default: only show what would be deleted.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Keep objects written or retired within this time, for readers.")
    ] = "7d",
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Retire a model's versions except the newest N and those with an alias."),
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="Wait this long for open runs to end; new runs wait meanwhile.")
    ] = "0s",
    keep_runs: Annotated[int, typer.Option(min=0, metavar="N", help="Keep the reports of the newest N runs.")] = 100,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show objects that no version name, alias or open run refers to; delete them with --yes."""
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.registry.gc import collect
    from birkhoff.pipeline.store.default import open_default_store

    limit = duration(grace)
    with open_default_store(store) as opened:
        found = collect(opened, grace=limit, keep=keep, keep_runs=keep_runs, delete=yes, wait=duration(wait))
    rows = found.rows()
    if not as_json:
        rows = [row for row in rows if row["objects"] or row["retired"]]
    if rows or as_json:
        show(output(), GC_COLUMNS, rows, as_json=as_json)
    if not as_json:
        said = {"--grace": grace, "--keep": keep, "--wait": wait, "--keep-runs": keep_runs}
        own = [str(word) for pair in said.items() if pair not in _GC_DEFAULTS for word in pair]
        remark(_collected(found, hint("gc", "--yes", *own)))


def _collected(found: "Collection", deleting: str) -> str:
    """Summarise a collection in one line. `deleting` is the command that deletes what was only shown."""
    if not found.garbage and not found.retired:
        return f"nothing to delete: {sum(found.kept.values())} objects are in use or too young to go"
    freed = size(sum(item.info.size for item in found.garbage))
    if found.deleted:
        return f"deleted {len(found.garbage)} objects, {freed}"
    return f"--yes frees {freed}; nothing was deleted; delete it with `{deleting}`"


def _show_move(facts: dict[str, Any], as_json: bool, verb: str, *, defaulted: bool) -> None:
    """Print a move; say so if the command's default chose the alias."""
    if not as_json:
        if defaulted:
            facts = {**facts, "alias": f"{facts['alias']} (the default)"}
        unsaid = {"changed"} if facts["changed"] else {"changed", "from"}
        verb = verb if facts["changed"] else "nothing to do"
        facts = {key: value for key, value in facts.items() if key not in unsaid}
    report(facts, as_json, verb)


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(help="Show all versions of this model.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show each model's latest version and those that other aliases point at, or every version of one model."""
    from birkhoff.pipeline.cli.tables import LIST_COLUMNS, show
    from birkhoff.pipeline.registry.listing import current_versions, versions_of
    from birkhoff.pipeline.store.default import open_default_store

    with open_default_store(store) as opened:
        found = versions_of(opened, model) if model else current_versions(opened)
        rows = [version.row() for version in found]
    if not rows and not as_json:
        remark(f"{opened.url} holds no models yet")
        return
    show(output(), filled(LIST_COLUMNS, rows, "labels", "problem", "agreement_mean"), rows, as_json=as_json)
