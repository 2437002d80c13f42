"""The commands `pull` and `cache`."""

from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from birkhoff.pipeline.cli.app import (
    AudienceOption,
    JsonOption,
    OlderOption,
    SignatureOption,
    StoreOption,
    app,
    is_quiet,
    report,
    warn,
)
from birkhoff.pipeline.cli.several import (
    Facts,
    ReferencesArgument,
    check_models_differ,
    expand,
    is_glob,
    is_one,
    model_of,
    run_each,
)
from birkhoff.pipeline.cli.tables import Column
from birkhoff.pipeline.cli.versions import duration
from birkhoff.pipeline.text import short, size

cache_app: typer.Typer = typer.Typer(
    no_args_is_help=False, invoke_without_command=True, help="Show or prune the cache of pulled blobs."
)
app.add_typer(cache_app, name="cache")


class Format(StrEnum):
    """The form of a pulled folder: the artifact as stored, or a folder for transformers' `from_pretrained`."""

    BIRKHOFF = "birkhoff"
    TRANSFORMERS = "transformers"


PULL_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="version", key="version"),
    Column(title="status", key="status"),
    Column(title="fetched", key="fetched_bytes", form=size, right=True, rank=1),
    Column(title="missing", key="missing_blobs", right=True, rank=2),
    Column(title="folder", key="output", rank=3),
    Column(title="digest", key="digest", form=short, rank=4, whole=True),
)

PULLED = Path("pulled")
"""Default folder of pulls, each in a folder of its model's name."""

OfflineOption = Annotated[bool, typer.Option("--offline", help="Use the cache only; ask no store.")]


@app.command()
def pull(
    given: ReferencesArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to fetch into; DIR/MODEL if there are several models. Default: pulled/MODEL.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    form: Annotated[
        Format, typer.Option("--format", help="The artifact as stored, or a folder for transformers' from_pretrained.")
    ] = Format.BIRKHOFF,
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of the model card, with --format transformers."),
    ] = None,
    offline: OfflineOption = False,
    require_signature: SignatureOption = None,
    signed_for: AudienceOption = None,
    accept_older: OlderOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch versions into folders and check every digest; fetch only what folder and cache lack."""
    from birkhoff.pipeline.api.pull import check_not_remote, origin_of, pull_found
    from birkhoff.pipeline.api.transfer import transferring
    from birkhoff.pipeline.artifact.cache import BlobCache, usable_cache
    from birkhoff.pipeline.artifact.references import find, recall
    from birkhoff.pipeline.registry.trust import Trust
    from birkhoff.pipeline.store.default import open_default_store

    if card is not None and form is not Format.TRANSFORMERS:
        raise typer.BadParameter("applies to --format transformers", param_hint="--card")
    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)
    with ExitStack() as stack:
        cache = BlobCache() if offline else stack.enter_context(usable_cache(output or PULLED, warn))
        image = is_one(given) and given[0].startswith("oci://")
        if offline:
            check_not_remote(given[0])
            opened = None
        elif image:
            opened, named = stack.enter_context(origin_of(given[0], store))
            given = [named]
        else:
            opened = stack.enter_context(open_default_store(store))

        def pull_one(reference: str, folder: Path) -> Facts:
            found = recall(store, reference, cache, trust) if opened is None else find(opened, reference, cache, trust)
            total = sum(record.bytes for record in found.manifest.stored)
            with transferring(found.label, total, quiet=as_json or is_quiet()) as advance:
                done = pull_found(found, opened, folder, cache, form.value, card=card, report=advance)
            if done.problem:
                warn(done.problem)
            return done.facts()

        if is_one(given):
            facts = pull_one(given[0], output or PULLED / model_of(given[0]))
            report(facts if as_json or facts["missing_blobs"] else _less(facts, "missing_"), as_json, "pulled")
            return
        if opened is None and any(map(is_glob, given)):
            raise typer.BadParameter("a glob needs the store; name the models, or leave out --offline")
        meant = list(given) if opened is None else expand(opened, given)
        check_models_differ(meant)
        run_each(
            meant,
            lambda reference: pull_one(reference, (output or PULLED) / model_of(reference)),
            PULL_COLUMNS,
            done="pulled",
            as_json=as_json,
        )


def _less(facts: Facts, prefix: str) -> Facts:
    return {key: value for key, value in facts.items() if not key.startswith(prefix)}


@cache_app.callback()
def usage(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the cache's folder and size."""
    from birkhoff.pipeline.artifact.cache import BlobCache

    if context.invoked_subcommand is None:
        report(asdict(BlobCache().usage()), as_json, "cache")


@cache_app.command()
def prune(
    unused: Annotated[
        str, typer.Option(metavar="TIME", help="Remove blobs unused for this long: 30m, 12h, 7d, 0s.")
    ] = "30d",
    keep: Annotated[int, typer.Option(metavar="MIB", min=0, help="Keep this many MiB of the most recently used.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove unused blobs and abandoned downloads. Pulled folders stay complete."""
    from birkhoff.pipeline.artifact.cache import BlobCache

    pruned = BlobCache().prune(unused=duration(unused), keep_bytes=keep << 20, dry_run=dry_run)
    report(asdict(pruned), as_json, "would remove" if dry_run else "removed")
