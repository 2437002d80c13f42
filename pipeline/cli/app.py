"""The typer app that commands register on, with shared options and output functions."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

import birkhoff
from birkhoff.pipeline import hints, logs
from birkhoff.pipeline.cli.completion import references
from birkhoff.pipeline.errors import failure_facts
from birkhoff.pipeline.text import printable, short, size, some

if TYPE_CHECKING:
    from rich.console import Console

log: logging.Logger = logging.getLogger("birkhoff.cli")


app: typer.Typer = typer.Typer(
    name="birkhoff",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compress fleets of vision models, prove every tensor, publish versioned artifacts, pull and run them.\n\n"
    "MODEL[@REF]: REF is a version name (v3), a digest or an alias. Default: `latest`.\n\n"
    "STORE: `s3://BUCKET/PREFIX` (standard AWS environment and profiles), `gs://BUCKET/PREFIX` (Google's application "
    "default credentials), `az://CONTAINER/PREFIX` (AZURE_STORAGE_* variables or `az login`), `file:///DIR`, or "
    "`embedded`, an S3 server on this machine. Default: BIRKHOFF_STORE, then `embedded`.\n\n"
    "Options of every command, before or after its name: `--quiet` prints results, warnings and errors only; `--debug` "
    "prints the traceback of an error; `--allow-http` permits plain http to other machines, which can be read and "
    "changed on its way.\n\n"
    "With `--json`, standard output is one JSON document, also if the command fails (`birkhoff schema`).",
)


SignOption = Annotated[
    Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign with this private key (`birkhoff key new`).")
]
SignatureOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--require-signature",
        metavar="PUBFILE",
        help="Require a signature by this public key. Repeatable: any one of the keys is enough.",
    ),
]
AudienceOption = Annotated[
    str | None,
    typer.Option(
        "--signed-for", metavar="STORE", help="The store that signatures must name, if this one is its mirror."
    ),
]
OlderOption = Annotated[
    bool, typer.Option("--accept-older", help="Accept an alias in an older state than this machine has seen.")
]


ReferenceArgument = Annotated[str, typer.Argument(metavar="MODEL[@REF]", show_default=False, autocompletion=references)]


def _named_store(url: str | None) -> str | None:
    hints.remember(store=url)
    return url


StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="The store: s3://, gs://, az://, file:// or embedded.", callback=_named_store
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def output() -> "Console":
    """Return the console for tables: standard output, 200 columns wide unless it is a terminal."""
    from rich.console import Console  # commands without tables start faster without it

    return Console(width=None if sys.stdout.isatty() else 200)


def notes() -> "Console":
    """Return the console for standard error; only `say`, `remark`, `warn` and `complain` print on it."""
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
            raise typer.BadParameter(f"`birkhoff {name}` takes no store", param_hint="--store")
        context.default_map = {name: {"store": store}}
    elif store is not None:
        raise typer.BadParameter(f"expected a command: {hints.hint('list')}", param_hint="--store")


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Set whether only results, warnings and errors are printed."""
    global _quiet  # one command per process
    _quiet = quiet


def is_quiet() -> bool:
    """Return whether to omit progress, remarks and facts."""
    return _quiet


def print_json(value: object, file: IO[str] | None = None) -> None:
    """Write the one document of `--json` to standard output; NaN and infinities become null."""
    typer.echo(json_text(value, indent=2), file=file)


def json_text(value: object, indent: int | None = None) -> str:
    """Serialise a value as `print_json` does."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failure_document(kind: str, code: int, message: str) -> dict[str, object]:
    """Return the document that `--json` writes if a command fails."""
    return {"error": failure_facts(kind, code, message)}


def report(facts: dict[str, Any], as_json: bool, verb: str) -> None:
    """Print the facts of a finished command, as one line or as JSON."""
    if as_json:
        print_json(facts)
        return
    if _quiet:
        return
    shown = [text for key, value in facts.items() if (text := _said(key, value))]
    typer.echo(printable(f"{verb}: {', '.join(shown)}"))


def _said(key: str, value: object) -> str:
    """Format a fact for people; an empty string if there is nothing to say."""
    name = key.replace("_", " ")
    if value is None or value is False or value == "" or (value == 0 and not name.endswith("bytes")):
        return ""
    if value is True:
        return name
    if name.endswith("bytes") and isinstance(value, int):
        return f"{name.removesuffix('bytes').strip()} {size(value)}".strip()
    return f"{name} {short(str(value)) if key == 'digest' else value}"


def say(text: str) -> None:
    """Print a line on standard error, without control characters from untrusted text."""
    notes().print(printable(text), highlight=False, markup=False, soft_wrap=True)


def remark(message: str) -> None:
    """Print a line of information; nothing with `--quiet`."""
    if _quiet:
        return
    if logs.as_json():
        log.info("%s", printable(message))
        return
    say(message)


def remark_unproven(reasons: Mapping[str, object]) -> None:
    """Print in one line per reason which models have no proof of their masks; `reasons` by model."""
    for reason in dict.fromkeys(reasons.values()):
        models = [model for model, why in reasons.items() if why == reason]
        remark(f"no proof of masks for {some(models)}: {reason}")


def warn(message: str) -> None:
    """Print a warning: the command works, but perhaps not as expected."""
    if logs.as_json():
        log.warning("%s", printable(message))
        return
    say(f"warning: {message}")


def complain(message: str) -> None:
    """Print the one line of an error."""
    if logs.as_json():
        log.error("%s", printable(message))
        return
    say(f"error: {message}")
