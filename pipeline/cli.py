"""The `birkhoff` command."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.completion import references
from birkhoff.pipeline.errors import exit_code, printable
from birkhoff.pipeline.logs import LogFormat
from birkhoff.pipeline.stores import HTTP_VARIABLE
from birkhoff.pipeline.tables import short, size

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("birkhoff.cli")

_PROFILE_HELP = "Profile for every model, over the manifest's: " + "; ".join(
    f"{profile.name} ({profile.summary})" for profile in PROFILES.values()
)

app = typer.Typer(
    name="birkhoff",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compress fleets of vision models, prove every layer, publish versioned artifacts, pull and run them.\n\n"
    "MODEL[@REF]: REF is a version name (v3), a digest or an alias; `latest` where left out.\n\n"
    "STORE: s3://BUCKET/PREFIX (standard AWS environment and profiles), file:///DIR, or embedded, an S3 server on "
    "this machine; BIRKHOFF_STORE, then embedded, where left out.\n\n"
    "With every command: --debug shows where an error came from; --allow-http lets other machines be reached by "
    "http://, which can be read and changed on its way.",
)
store_app = typer.Typer(no_args_is_help=True, help="The embedded S3 server.")
app.add_typer(store_app, name="store")


SignOption = Annotated[
    Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign with this private key of `birkhoff key new`.")
]
SignatureOption = Annotated[
    list[Path] | None,
    typer.Option("--require-signature", metavar="PUBFILE", help="Only if signed by this public key; several: by any."),
]
OlderOption = Annotated[
    bool, typer.Option("--accept-older", help="Accept an alias that was put back to an older state than seen before.")
]


class ExecutorName(StrEnum):
    """Where shards run."""

    RAY = "ray"
    INLINE = "inline"


ManifestArgument = Annotated[Path, typer.Argument(help="The manifest, a YAML file.", show_default=False)]
ReferenceArgument = Annotated[str, typer.Argument(metavar="MODEL[@REF]", show_default=False, autocompletion=references)]
StoreOption = Annotated[str | None, typer.Option("--store", metavar="URL", help="The store; see above.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="This model only; repeatable.")]
ProfileOption = Annotated[str | None, typer.Option("--profile", metavar="P", help=_PROFILE_HELP)]
MirrorOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", envvar="BIRKHOFF_MIRROR", help="Take sources by their file names from this folder."),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(envvar="BIRKHOFF_LOG_FORMAT", help="Standard error: text, or a JSON object for each event."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def output() -> "Console":
    """Where tables go: standard output, wide when it is no terminal."""
    from rich.console import Console  # in functions: a command that prints no table does not wait for it

    return Console(width=None if sys.stdout.isatty() else 200)


def notes() -> "Console":
    """Where everything else goes: standard error."""
    from rich.console import Console

    return Console(stderr=True)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    store: StoreOption = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"birkhoff {birkhoff.__version__}")
        raise typer.Exit
    name = context.invoked_subcommand
    if store is not None and name is not None:
        command = getattr(context.command, "commands", {}).get(name)
        if command is not None and all(parameter.name != "store" for parameter in command.params):
            raise typer.BadParameter(f"`birkhoff {name}` takes none", param_hint="--store")
        context.default_map = {name: {"store": store}}
    elif store is not None:
        raise typer.BadParameter("expected a command: birkhoff list --store URL", param_hint="--store")


@app.command()
def compress(
    manifest: ManifestArgument,
    only: OnlyOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    executor: Annotated[ExecutorName, typer.Option(help="Where shards run.")] = ExecutorName.RAY,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    mirror: MirrorOption = None,
    force: Annotated[bool, typer.Option("--force", help="Make every shard anew, also those in the store.")] = False,
    revalidate: Annotated[
        bool, typer.Option("--revalidate", help="Prove shards that are in the store against their source once more.")
    ] = False,
    sign: SignOption = None,
    scheduled: Annotated[
        bool, typer.Option("--scheduled", help="Leave it to an earlier such run that is still at work: exit code 22.")
    ] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    as_json: JsonOption = False,
) -> None:
    """Compress, validate and publish the models of a manifest; what is up to date is left alone."""
    from birkhoff.pipeline.compress import compress as run_all
    from birkhoff.pipeline.execute import Executor, InlineExecutor, RayExecutor
    from birkhoff.pipeline.leases import turn
    from birkhoff.pipeline.manifest import load_manifest
    from birkhoff.pipeline.model_run import failure
    from birkhoff.pipeline.planned import select
    from birkhoff.pipeline.progress import Progress
    from birkhoff.pipeline.report_build import Recorder
    from birkhoff.pipeline.shard import Reuse
    from birkhoff.pipeline.signing import load_signer
    from birkhoff.pipeline.store import check_store
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import VERSION_COLUMNS, show

    if log_format is not LogFormat.TEXT:
        logs.configure(log_format, debug="--debug" in sys.argv)
    chosen = select(load_manifest(manifest), only or [], profile)
    signer = load_signer(sign) if sign else None
    with open_default_store(store or chosen.store, allow_http=chosen.allow_http, create=True) as opened:
        single = not check_store(opened).conditional_writes
        if single:
            warn(f"{opened.url} ignores conditional writes: make sure that nobody else publishes to it now")

        def start() -> Executor:
            if executor is ExecutorName.INLINE:
                return InlineExecutor(opened.address)
            return RayExecutor(opened.address, address=address, shard_seconds=chosen.shard_seconds)

        reuse: Reuse = "never" if force else "revalidate" if revalidate else "trust"
        with (
            turn(opened, (model.name for model in chosen.models)) if scheduled else nullcontext(),
            Recorder(chosen, opened, executor=executor.value, reuse=reuse, address=address) as record,
            logs.trace(record.run),
            Progress(notes(), models=len(chosen.models), quiet=as_json or log_format is LogFormat.JSON) as progress,
        ):
            runs = record.runs = run_all(
                chosen,
                opened,
                lambda: record.watch(start()),
                progress,
                reuse=reuse,
                mirror=mirror,
                single_publisher=single,
                signer=signer,
            )
    if as_json or any(run.version for run in runs):
        show(output(), VERSION_COLUMNS, [run.row() for run in runs], as_json=as_json)
    for run in runs:
        if run.version is not None and run.version.same_as is not None and not as_json:
            same = run.version.same_as
            remark(f"{run.name}: {run.version.name} has the content of {same}; `latest` goes forward only")
        for warning in run.warnings():
            warn(f"{run.name}: {warning}")
        if run.error is not None:
            complain(f"{run.name}: {run.error}")
    if record.written and not as_json and not logs.as_json():
        notes().print(f"report: birkhoff report {record.run}", highlight=False, markup=False)
    if all(run.status == "up to date" for run in runs) and not as_json:
        remark(f"nothing to do: {len(runs)} of {len(runs)} models are up to date")
    failed = failure([run.error for run in runs])
    if failed is not None:
        raise typer.Exit(exit_code(failed))


@app.command()
def plan(
    manifest: ManifestArgument,
    only: OnlyOption = None,
    store: StoreOption = None,
    profile: ProfileOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what `compress` would do and cost; reads headers only, downloads and writes nothing."""
    from birkhoff.pipeline.forecast import plan_rows
    from birkhoff.pipeline.manifest import load_manifest
    from birkhoff.pipeline.model_run import failure
    from birkhoff.pipeline.planned import select
    from birkhoff.pipeline.stores import open_existing_store
    from birkhoff.pipeline.tables import PLAN_COLUMNS, show

    chosen = select(load_manifest(manifest), only or [], profile)
    with open_existing_store(store or chosen.store, allow_http=chosen.allow_http) as opened:
        rows, errors = plan_rows(chosen, opened, mirror)
    columns = [column for column in PLAN_COLUMNS if any(row.get(column.key) is not None for row in rows)]
    if as_json or any(row["status"] != "failed" for row in rows):
        show(output(), columns, rows, as_json=as_json)
    for row in rows:
        if "note" in row:
            remark(f"{row['model']}: {row['note']}")
        if "error" in row:
            complain(f"{row['model']}: {row['error']}")
    failed = failure(errors)
    if failed is not None:
        raise typer.Exit(exit_code(failed))


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(help="All versions of this model.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the models of a store, or the versions of one: aliases, sizes, ratios."""
    from birkhoff.pipeline.listing import model_rows, version_rows
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.tables import LIST_COLUMNS, show

    with open_default_store(store) as opened:
        rows = version_rows(opened, model) if model else model_rows(opened)
    if not rows and not as_json:
        notes().print(f"{opened.url} holds no models yet", highlight=False, markup=False)
        return
    show(output(), LIST_COLUMNS, rows, as_json=as_json)


@app.command()
def inspect(reference: ReferenceArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show every tensor of a version: shape, codec, bits a weight, SQNR, greatest error."""
    from birkhoff.pipeline.artifacts import inspect as rows_of
    from birkhoff.pipeline.artifacts import open_artifact, row_json
    from birkhoff.pipeline.tables import TENSOR_COLUMNS, show

    with open_artifact(reference, store) as artifact:
        rows, manifest = [row_json(row) for row in rows_of(artifact)], artifact.manifest
    sizes = f"{size(manifest.source.bytes)} to {size(manifest.stored_bytes)}, ratio {manifest.ratio:.2f}"
    title = f"{artifact.label} ({manifest.profile}): {len(rows)} tensors, {sizes}"
    show(output(), TENSOR_COLUMNS, rows, as_json=as_json, title=title)


@app.command()
def verify(
    reference: ReferenceArgument,
    against: Annotated[Path | None, typer.Option(metavar="SOURCE", help="Measure against this checkpoint too.")] = None,
    store: StoreOption = None,
    require_signature: SignatureOption = None,
    accept_older: OlderOption = False,
    as_json: JsonOption = False,
) -> None:
    """Re-check a stored version, or a pulled folder: every digest, every tensor decoded."""
    from dataclasses import asdict

    from birkhoff.pipeline.artifacts import open_artifact
    from birkhoff.pipeline.trust import Trust
    from birkhoff.pipeline.verify import verify as check

    trust = Trust.of(require_signature, accept_older=accept_older)
    with open_artifact(reference, store, trust=trust) as artifact:
        found = check(artifact, against)
        report({"artifact": artifact.label, "digest": artifact.manifest.digest, **asdict(found)}, as_json, "verified")


@app.command()
def export(
    reference: ReferenceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help=".safetensors, .pth or .pt")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a dense checkpoint with the original names, dtypes and nesting."""
    from birkhoff.pipeline.artifacts import open_artifact
    from birkhoff.pipeline.export import export as write

    with open_artifact(reference, store) as artifact:
        written = write(artifact, output)
        report({"artifact": artifact.label, "output": str(output), "bytes": written}, as_json, "exported")


@store_app.command()
def up() -> None:
    """Start the embedded S3 server and leave it running."""
    from birkhoff.pipeline import embedded

    typer.echo(f"embedded store at {embedded.up().endpoint}")


@store_app.command()
def down() -> None:
    """Stop it, unless someone uses it."""
    from birkhoff.pipeline import embedded

    typer.echo(f"embedded store: {embedded.down()}")


@store_app.command()
def env() -> None:
    """Print the variables with which any S3 tool reaches it: `eval "$(birkhoff store env)"`."""
    import shlex

    from birkhoff.pipeline import embedded

    for key, value in embedded.environment().items():
        typer.echo(f"export {key}={shlex.quote(value)}")


def report(facts: dict[str, Any], as_json: bool, verb: str) -> None:
    """The facts of a finished command as one line or as JSON."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    shown = [text for key, value in facts.items() if (text := _said(key, value))]
    typer.echo(f"{verb}: {', '.join(shown)}")


def _said(key: str, value: object) -> str:
    """A fact for people; nothing for what there is none of."""
    name = key.replace("_", " ")
    if value is None or value is False or (value == 0 and not name.endswith("bytes")):
        return ""
    if value is True:
        return name
    if name.endswith("bytes") and isinstance(value, int):
        return f"{name.removesuffix('bytes').strip()} {size(value)}".strip()
    return f"{name} {short(str(value)) if key == 'digest' else value}"


def remark(message: str) -> None:
    """A line for what is worth knowing."""
    if logs.as_json():
        log.info("%s", printable(message))
        return
    notes().print(printable(message), highlight=False, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """A line for what works, but not as one may think."""
    if logs.as_json():
        log.warning("%s", printable(message))
        return
    notes().print(f"warning: {printable(message)}", highlight=False, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """The one line of an error."""
    if logs.as_json():
        log.error("%s", printable(message))
        return
    notes().print(f"error: {printable(message)}", highlight=False, markup=False, soft_wrap=True)


def run(command: Callable[[], object], *, debug: bool) -> int:
    """Run a command; its error becomes one line and the exit code of its kind."""
    try:
        code = command()
    except BirkhoffError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        return exit_code(error)
    except interrupt.Interrupted as stop:
        complain("interrupted; run the same command again to go on from here")
        return stop.exit_code
    except BrokenPipeError:
        return 141
    except Exception as error:
        if interrupt.asked():  # a library made something else of it
            complain("interrupted; run the same command again to go on from here")
            return interrupt.Interrupted().exit_code
        if debug:
            raise
        complain(f"{type(error).__name__}: {error}; this is a bug: run again with --debug and report it")
        return 70
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console command."""
    debug = "--debug" in sys.argv
    if "--allow-http" in sys.argv:
        os.environ[HTTP_VARIABLE] = "1"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--debug", "--allow-http")]
    logs.configure(LogFormat.TEXT, debug=debug)
    interrupt.install()
    sys.exit(run(lambda: app(arguments, prog_name="birkhoff"), debug=debug))


# Its commands join the app made above.
from birkhoff.pipeline import cli_doctor, cli_keys, cli_pull, cli_report, cli_use, cli_versions  # noqa: E402, F401
