"""The command `report`: lists runs, prints one, writes its page. Registered on the app of `cli`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birkhoff.pipeline.cli import JsonOption, StoreOption, app, notes, output
from birkhoff.pipeline.tables import VERSION_COLUMNS, Column, fixed, size

if TYPE_CHECKING:
    from birkhoff.pipeline.report import RunReport

RUN_COLUMNS = (
    Column(title="run", key="run"),
    Column(title="seconds", key="seconds", form=fixed(1), right=True),
    Column(title="published", key="published", right=True),
    Column(title="up to date", key="up_to_date", right=True),
    Column(title="failed", key="failed", right=True),
    Column(title="source", key="source_bytes", form=size, right=True),
    Column(title="stored", key="stored_bytes", form=size, right=True),
    Column(title="written", key="new_bytes", form=size, right=True),
    Column(title="error", key="error"),
)
MODEL_COLUMNS = (
    Column(title="model", key="name"),
    *(column for column in VERSION_COLUMNS if column.key not in ("model", "sqnr_db_median", "seconds", "digest")),
    Column(title="shards", key="shards", right=True),
    Column(title="shared", key="shards_reused", right=True),
    Column(title="lossless", key="lossless", right=True),
    Column(title="changes", key="changes"),
    Column(title="seconds", key="seconds", form=fixed(1), right=True),
)


@app.command("report")
def report_(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="A run's id, or its start; the newest where left out.")
    ] = ("latest"),
    every: Annotated[bool, typer.Option("--list", help="List the runs that have a report.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write its page to a file.")] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open its page in the browser.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of reports.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what became of a run: models, sizes, fidelity, changes; `--html` or `--open` for every tensor of it."""
    from birkhoff.pipeline import report as documents
    from birkhoff.pipeline import report_store
    from birkhoff.pipeline.report_rows import model_rows, run_rows, title
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import show

    if schema:
        typer.echo(documents.schema(), nl=False)
        return
    with open_default_store(store) as opened:
        if every:
            show(output(), RUN_COLUMNS, run_rows(opened), as_json=as_json)
            return
        report = report_store.read_report(opened, run)
    if html is not None or browse:
        _page(report, html, browse)
    elif as_json:
        typer.echo(json.dumps(report.model_dump(mode="json", exclude_none=True)))
    else:
        show(output(), MODEL_COLUMNS, model_rows(report), as_json=False, title=title(report))
        for model in report.models:
            if model.error:
                notes().print(f"{model.name}: {model.error}", highlight=False, markup=False, soft_wrap=True)


def _page(report: "RunReport", html: Path | None, browse: bool) -> None:
    """Write the page, drawn by this version of the code, and open it if asked to."""
    import webbrowser

    from birkhoff.pipeline.files import write_whole
    from birkhoff.pipeline.home import birkhoff_home
    from birkhoff.pipeline.report_html import render

    path = html or birkhoff_home() / "runs" / report.run / "report.html"
    if html is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(report).encode())
    typer.echo(str(path))
    if browse and not webbrowser.open(path.absolute().as_uri()):
        notes().print("no browser found; open that file in one", highlight=False, markup=False)
