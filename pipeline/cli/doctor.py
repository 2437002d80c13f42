"""The command `doctor`."""

from dataclasses import asdict

import typer

from birkhoff.pipeline.cli.app import JsonOption, StoreOption, app, complain, output, remark
from birkhoff.pipeline.cli.tables import Column

FINDING_COLUMNS = (
    Column(title="check", key="check"),
    Column(title="state", key="state"),
    Column(title="found", key="found", most=100),
    Column(title="advice", key="advice", most=200, rank=1),
)


@app.command()
def doctor(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check what a run would use, and say what to fix; exit with 0 only if a run would work."""
    from birkhoff.pipeline.cli.doctor_checks import examine
    from birkhoff.pipeline.cli.tables import show

    found = list(examine(store))
    show(output(), FINDING_COLUMNS, [asdict(finding) for finding in found], as_json=as_json)
    console = output()
    for finding in found if not as_json else ():
        line = f"{finding.check}: {finding.found}; {finding.advice}"
        if finding.state == "fails":
            complain(line)
        elif finding.advice and console.is_terminal:  # in full; the table may have cut it
            remark(line)
    failing = [finding.code for finding in found if finding.state == "fails"]
    if failing:
        raise typer.Exit(failing[0])
