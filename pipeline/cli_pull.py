"""Commands of whoever uses artifacts: pull and the cache. Registered on the app of `cli`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from birkhoff.pipeline.cli import (
    JsonOption,
    OlderOption,
    ReferenceArgument,
    SignatureOption,
    StoreOption,
    app,
    notes,
    report,
)
from birkhoff.pipeline.cli_versions import duration

cache_app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="The local cache of pulled blobs.")
app.add_typer(cache_app, name="cache")


class Format(StrEnum):
    """What a pulled folder is: the artifact as stored, or what `from_pretrained` of transformers reads."""

    BIRKHOFF = "birkhoff"
    TRANSFORMERS = "transformers"


OfflineOption = Annotated[bool, typer.Option("--offline", help="From the cache alone; ask no store.")]


@app.command()
def pull(
    reference: ReferenceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to fetch into.")],
    store: StoreOption = None,
    form: Annotated[
        Format, typer.Option("--format", help="As stored, or a folder for from_pretrained of transformers.")
    ] = Format.BIRKHOFF,
    offline: OfflineOption = False,
    require_signature: SignatureOption = None,
    accept_older: OlderOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a version into a folder, every digest checked; fetches only what neither folder nor cache holds."""
    from birkhoff.pipeline.blob_cache import BlobCache
    from birkhoff.pipeline.references import find, recall
    from birkhoff.pipeline.stores import open_default_store
    from birkhoff.pipeline.trust import Trust

    cache, trust = BlobCache(), Trust.of(require_signature, accept_older=accept_older)
    with ExitStack() as stack:
        opened = None if offline else stack.enter_context(open_default_store(store))
        found = recall(store, reference, cache, trust) if opened is None else find(opened, reference, cache, trust)
        total = sum(record.bytes for record in found.manifest.stored)
        advance = stack.enter_context(transferring(found.label, total, quiet=as_json))
        if form is Format.TRANSFORMERS:
            from birkhoff.pipeline.transformers_folder import pull_folder as fetch
        else:
            from birkhoff.pipeline.pull import pull as fetch
        fetched = fetch(found, opened, output, cache, report=advance)
    report({**found.pointer(), "fetched_bytes": fetched, "output": str(output)}, as_json, "pulled")


@contextmanager
def transferring(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar for bytes on a terminal's standard error; what it gives may be called from any thread."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=notes()) as bar:
        task = bar.add_task(label, total=total)

        def advance(nbytes: int) -> None:
            bar.update(task, advance=nbytes)

        yield advance


@cache_app.callback()
def usage(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show where the cache lies and what it holds."""
    from birkhoff.pipeline.blob_cache import BlobCache

    if context.invoked_subcommand is None:
        report(asdict(BlobCache().usage()), as_json, "cache")


@cache_app.command()
def prune(
    unused: Annotated[str, typer.Option(metavar="TIME", help="Blobs not used for so long: 30m, 12h, 7d, 0s.")] = "30d",
    keep: Annotated[int, typer.Option(metavar="MIB", min=0, help="Leave so many MiB of the last used ones.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove blobs not used for a while, and downloads that nobody goes on with; pulled folders stay whole."""
    from birkhoff.pipeline.blob_cache import BlobCache

    pruned = BlobCache().prune(unused=duration(unused), keep_bytes=keep << 20, dry_run=dry_run)
    report(asdict(pruned), as_json, "would remove" if dry_run else "removed")
