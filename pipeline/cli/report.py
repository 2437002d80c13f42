"""The command `report`: list runs, print one, write its page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birkhoff.pipeline.cli.app import JsonOption, StoreOption, app, output, print_json, remark, remark_unproven
from birkhoff.pipeline.cli.tables import VERSION_COLUMNS, Column, filled
from birkhoff.pipeline.text import fixed, printable, size

if TYPE_CHECKING:
    from birkhoff.pipeline.report.document import RunReport

RUN_COLUMNS = (
    Column(title="run", key="run", whole=True),
    Column(title="seconds", key="seconds", form=fixed(1), right=True, rank=3),
    Column(title="published", key="published", right=True, rank=1),
    Column(title="up to date", key="up_to_date", right=True, rank=2),
    Column(title="failed", key="failed", right=True),
    Column(title="source", key="source_bytes", form=size, right=True, rank=6),
    Column(title="stored", key="stored_bytes", form=size, right=True, rank=5),
    Column(title="written", key="new_bytes", form=size, right=True, rank=7),
    Column(title="error", key="error", rank=4),
)
MODEL_COLUMNS = (
    Column(title="model", key="name"),
    *(column for column in VERSION_COLUMNS if column.key not in ("model", "sqnr_db_median", "seconds", "digest")),
    Column(title="shards", key="shards", right=True, rank=7),
    Column(title="shared", key="shards_reused", right=True, rank=8),
    Column(title="lossless", key="lossless", right=True, rank=6),
    Column(title="changes", key="changes", rank=5),
    Column(title="seconds", key="seconds", form=fixed(1), right=True, rank=9),
)


@app.command("report")
def report_(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="A run's id, or its first characters.")] = ("latest"),
    every: Annotated[bool, typer.Option("--list", help="List the runs that have a report.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the page to this file.")] = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of reports.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run's results: models, sizes, fidelity, changes. `--html` and `--open` show every tensor."""
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.report import document as documents
    from birkhoff.pipeline.report import stored
    from birkhoff.pipeline.report.rows import model_rows, run_rows, title
    from birkhoff.pipeline.store.default import open_default_store

    if schema:
        typer.echo(documents.schema(), nl=False)
        return
    with open_default_store(store) as opened:
        if every:
            show(output(), RUN_COLUMNS, run_rows(opened), as_json=as_json)
            return
        report = stored.read_report(opened, run)
    if html is not None or browse:
        _page(report, html, browse)
    elif as_json:
        print_json(report.model_dump(mode="json", exclude_none=True))
    else:
        rows = model_rows(report)
        show(output(), filled(MODEL_COLUMNS, rows, "agreement_mean"), rows, as_json=False, title=title(report))
        for model in report.models:
            if model.error:
                remark(f"{model.name}: {model.error}")
        remark_unproven({model.name: model.unproven for model in report.models if model.unproven})


def _page(report: "RunReport", html: Path | None, browse: bool) -> None:
    """Write the page, drawn by this version of the code, and open it if asked to."""
    import webbrowser

    from birkhoff.pipeline.files import atomic_write
    from birkhoff.pipeline.paths import birkhoff_home
    from birkhoff.pipeline.report.html import render

    path = html or birkhoff_home() / "runs" / report.run / "report.html"
    if html is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render(report).encode())
    typer.echo(printable(str(path)))
    if browse and not webbrowser.open(path.absolute().as_uri()):
        remark("no browser found; open that file in one")
