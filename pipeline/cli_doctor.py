"""The command `doctor`. Registered on the app of `cli`."""

from dataclasses import asdict

import typer

from birkhoff.pipeline.cli import JsonOption, StoreOption, app, output
from birkhoff.pipeline.tables import Column

FINDING_COLUMNS = (
    Column(title="check", key="check"),
    Column(title="state", key="state"),
    Column(title="found", key="found"),
    Column(title="advice", key="advice"),
)


@app.command()
def doctor(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check what a run here would use, and advise; exit code 0 only if it would work."""
    from birkhoff.pipeline.doctor import examine
    from birkhoff.pipeline.tables import show

    found = list(examine(store))
    show(output(), FINDING_COLUMNS, [asdict(finding) for finding in found], as_json=as_json)
    failing = [finding.code for finding in found if finding.state == "fails"]
    if failing:
        raise typer.Exit(failing[0])
