"""The commands that read manifests: `compress` and `plan`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline import logs
from birkhoff.pipeline.cli.app import (
    JsonOption,
    SignOption,
    StoreOption,
    app,
    complain,
    is_quiet,
    notes,
    output,
    print_json,
    remark,
    remark_unproven,
    warn,
)
from birkhoff.pipeline.errors import EXIT_CODES, BusyError, SourceError, exit_code, failure
from birkhoff.pipeline.hints import hint, remember
from birkhoff.pipeline.logs import LogFormat
from birkhoff.pipeline.text import some

if TYPE_CHECKING:
    from birkhoff.pipeline.plan.estimate import Based, BaseOf
    from birkhoff.pipeline.plan.manifest import Manifest
    from birkhoff.pipeline.plan.models import Planned
    from birkhoff.pipeline.registry.versions import Version
    from birkhoff.pipeline.report.recorder import Recorder
    from birkhoff.pipeline.store.base import Store

_PROFILE_HELP = "Profile for every model, instead of the manifest's: " + "; ".join(
    f"{profile.name} ({profile.summary})" for profile in PROFILES.values()
)


class ExecutorName(StrEnum):
    """Runs shards in Ray workers, or in threads of this process."""

    RAY = "ray"
    INLINE = "inline"


ManifestArgument = Annotated[Path, typer.Argument(help="The manifest, a YAML file.", show_default=False)]


OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="Only this model. Repeatable.")]


ProfileOption = Annotated[str | None, typer.Option("--profile", metavar="P", help=_PROFILE_HELP)]


MirrorOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", envvar="BIRKHOFF_MIRROR", help="Folder to take sources from, by file name."),
]


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(envvar="BIRKHOFF_LOG_FORMAT", help="Format of standard error: text, or a JSON object per event."),
]


@app.command()
def compress(
    manifest: ManifestArgument,
    only: OnlyOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    executor: Annotated[
        ExecutorName | None,
        typer.Option(
            help="Run shards in Ray workers, or in threads of this process. Default: ray; inline for up to 4 GiB of "
            "weights, unless several GPUs are of use, or if Ray does not start on this machine.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of Ray workers (default: one per CPU, but for one CPU in 8), or of threads with --executor "
            "inline (default: one per CPU up to 8, or up to 6 if the run has work for a GPU).",
        ),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    mirror: MirrorOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Encode every shard, even those already in the store.")
    ] = False,
    revalidate: Annotated[
        bool, typer.Option("--revalidate", help="Validate shards in the store against their source again.")
    ] = False,
    sign: SignOption = None,
    scheduled: Annotated[
        bool,
        typer.Option(
            "--scheduled",
            help="If an earlier run of these models is still at work, say so and exit instead of waiting.",
        ),
    ] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    as_json: JsonOption = False,
) -> None:
    """Compress, validate and publish the models of a manifest; skip those that are up to date."""
    # What takes longer to import comes later, after Ray's start.
    from birkhoff.pipeline.cli.tables import VERSION_COLUMNS, filled, show
    from birkhoff.pipeline.plan.manifest import load_manifest
    from birkhoff.pipeline.plan.selection import select
    from birkhoff.pipeline.progress.progress import Progress
    from birkhoff.pipeline.registry.signing import load_signer
    from birkhoff.pipeline.run.choice import Choice
    from birkhoff.pipeline.run.demand import Demand, look_ahead
    from birkhoff.pipeline.run.schedule import in_turn
    from birkhoff.pipeline.store.conditions import probed
    from birkhoff.pipeline.store.default import open_default_store

    if log_format is not LogFormat.TEXT:
        logs.configure(log_format, debug="--debug" in sys.argv)
    if executor is ExecutorName.INLINE and address:
        raise typer.BadParameter("names a Ray cluster; leave out --executor inline", param_hint="--address")
    chosen = select(load_manifest(manifest), only or [], profile)
    remember(store=store or chosen.store)
    signer = load_signer(sign) if sign else None
    with open_default_store(store or chosen.store, allow_http=chosen.allow_http, create=True) as opened:
        single = probed(opened, warn)

        def in_threads(reason: str) -> None:
            warn(f"Ray did not start ({reason}); shards run in threads of this process")

        with (
            _gives_way(as_json=as_json),
            in_turn(opened, (model.name for model in chosen.models), wait=not scheduled, tell=warn),
            Choice(
                opened.address,
                ray=None if executor is None else executor is ExecutorName.RAY,
                address=address,
                workers=workers,
                # Only Ray's workers can be held to a limit of time.
                shard_seconds=chosen.shard_seconds if "shard_seconds" in chosen.model_fields_set else None,
                told=in_threads,
            ) as choice,
        ):
            outlook = look_ahead(chosen, opened, mirror)
            choice.ahead(outlook.new_bytes, workers=outlook.complete)
            from birkhoff.pipeline.report.recorder import Recorder
            from birkhoff.pipeline.run.compress import compress as run_all
            from birkhoff.pipeline.run.outcome import Executor
            from birkhoff.pipeline.shard.task import Reuse

            def start(demand: Demand) -> Executor:
                started = choice.start(demand)
                if choice.in_threads:
                    record.note_option("executor", ExecutorName.INLINE.value)
                return record.watch(started)

            reuse: Reuse = "never" if force else "revalidate" if revalidate else "trust"
            asked = executor or ExecutorName.RAY
            record = Recorder(chosen, opened, executor=asked.value, reuse=reuse, address=address)
            quiet = as_json or is_quiet() or log_format is LogFormat.JSON
            with (
                _announced(record, quiet=as_json),
                record,
                logs.trace(record.run),
                Progress(notes(), models=len(chosen.models), quiet=quiet) as progress,
            ):
                runs = run_all(
                    chosen,
                    opened,
                    start,
                    progress,
                    reuse=reuse,
                    mirror=mirror,
                    single_publisher=single,
                    signer=signer,
                    begun=record.follow,
                    ahead=choice.ahead,
                )
    if as_json or (any(run.version for run in runs) and not is_quiet()):
        rows = [run.row() for run in runs]
        show(output(), filled(VERSION_COLUMNS, rows, "agreement_mean"), rows, as_json=as_json)
    for run in runs:
        if run.version is not None and run.version.same_as is not None and not as_json:
            same = run.version.same_as
            remark(f"{run.name}: {run.version.name} has the content of {same}; `latest` goes forward only")
        for said in filter(None, (run.felt(), run.found(), run.differs())):
            if not as_json:
                remark(f"{run.name}: {said}")
        if run.newer_base is not None and run.version is not None and run.version.manifest.base is not None:
            _offer(manifest, run.name, run.version.manifest.base.label, run.newer_base.label, profile)
        for warning in run.warnings():
            warn(f"{run.name}: {warning}")
        if run.error is not None:
            complain(f"{run.name}: {run.error}")
    if not as_json:
        remark_unproven({run.name: run.subjects.unproven for run in runs if run.unproven and run.subjects.unproven})
    _announce(record, quiet=as_json)
    if all(run.status == "up to date" for run in runs) and not as_json:
        remark(f"nothing to do: {len(runs)} of {len(runs)} models are up to date")
    failed = failure([run.error for run in runs])
    if failed is not None:
        raise typer.Exit(exit_code(failed))


def _offer(manifest: Path, model: str, held: str, newer: str, profile: str | None) -> None:
    """Say that a model's base means another version by now, and what makes a difference to that."""
    options = () if profile is None else ("--profile", profile)
    command = hint("compress", str(manifest), "--only", model, "--force", *options)
    remark(f"{model}: its base is {newer} by now; it stays a difference to {held} until you make it again: {command}")


@contextmanager
def _gives_way(*, as_json: bool) -> Iterator[None]:
    """Exit with 0 if another run of the schedule is at work, because schedulers report every other code as a
    failure."""
    try:
        yield
    except BusyError as busy:
        if as_json:
            print_json([])
        remark(str(busy))
        raise typer.Exit(0) from busy


@contextmanager
def _announced(record: "Recorder", *, quiet: bool) -> Iterator[None]:
    """Print how to read a run's report, even if an error ends the run."""
    try:
        yield
    except BirkhoffError:
        _announce(record, quiet=quiet)
        raise


def _announce(record: "Recorder", *, quiet: bool) -> None:
    if record.written and not quiet and not logs.as_json():
        remark(f"report: {hint('report', record.run)}")


@app.command()
def plan(
    manifest: ManifestArgument,
    only: OnlyOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    mirror: MirrorOption = None,
    check_sources: Annotated[
        bool,
        typer.Option("--check-sources", help="Only ask the server of every address; exit with 4 if one fails."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what `compress` would do and cost. Reads headers and a sample of weights; downloads and writes nothing."""
    from birkhoff.pipeline.cli.tables import PLAN_COLUMNS, show
    from birkhoff.pipeline.plan.estimate import plan_rows
    from birkhoff.pipeline.plan.manifest import load_manifest
    from birkhoff.pipeline.plan.selection import select
    from birkhoff.pipeline.store.default import open_existing_store

    chosen = select(load_manifest(manifest), only or [], profile)
    if check_sources:
        _show_addresses(chosen, mirror, as_json=as_json)
        return
    remember(store=store or chosen.store)
    with open_existing_store(store or chosen.store, allow_http=chosen.allow_http) as opened:
        rows, errors = plan_rows(chosen, opened, mirror, _bases(chosen, opened), _unproven)
    columns = [column for column in PLAN_COLUMNS if any(row.get(column.key) is not None for row in rows)]
    if as_json or any(row["status"] != "failed" for row in rows):
        show(output(), columns, rows, as_json=as_json)
    for row in rows:
        if "note" in row:
            remark(f"{row['model']}: {row['note']}")
        if row.get("newer_base") is not None:
            _offer(manifest, str(row["model"]), str(row["base"]), str(row["newer_base"]), profile)
        skipped = row.get("skipped")
        if isinstance(skipped, list) and skipped:
            remark(f"{row['model']}: no weights, left out: {some(skipped)}")
        if "error" in row:
            complain(f"{row['model']}: {row['error']}")
    remark_unproven({str(row["model"]): row["unproven"] for row in rows if row.get("unproven")})
    failed = failure(errors)
    if failed is not None:
        raise typer.Exit(exit_code(failed))


def _unproven(planned: "Planned") -> str | None:
    """Return why a model cannot be proven. Raises what `compress` would raise about it."""
    from birkhoff.pipeline.proof.subject import subjects_of

    return subjects_of(planned).unproven


def _bases(chosen: "Manifest", opened: "Store | None") -> "BaseOf":
    """Return a function that finds the bases of models. The code that reads them is loaded only if a model names a
    base."""
    from birkhoff.pipeline.plan.estimate import Based

    def find(planned: "Planned", latest: "Version | None") -> "Based":
        if planned.entry.base is None:
            return Based(planned=planned)
        from birkhoff.pipeline.artifact.bases import forecast_base

        return forecast_base(chosen, opened, planned, latest)

    return find


def _show_addresses(chosen: "Manifest", mirror: Path | None, *, as_json: bool) -> None:
    """Print a row for each address of the manifest, with its server's answer."""
    from birkhoff.pipeline.cli.tables import ADDRESS_COLUMNS, show
    from birkhoff.pipeline.download.check import check_addresses

    found = check_addresses({model.name: model.source for model in chosen.models}, mirror=mirror)
    rows = [
        {"model": one.model, "address": one.url, "state": one.state, "bytes": one.nbytes, "problem": one.problem}
        for one in found
    ]
    show(output(), ADDRESS_COLUMNS, rows, as_json=as_json)
    bad = [one for one in found if not one.good]
    for one in bad:
        complain(f"{one.model}: {one.problem}")
    if bad:
        raise typer.Exit(EXIT_CODES[SourceError])
