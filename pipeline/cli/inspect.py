"""The commands that read artifacts, stored or pulled: inspect, verify, export."""

from pathlib import Path
from typing import Annotated

import typer

from birkhoff.pipeline.cli.app import (
    AudienceOption,
    JsonOption,
    OlderOption,
    ReferenceArgument,
    SignatureOption,
    StoreOption,
    app,
    output,
    report,
)
from birkhoff.pipeline.cli.several import Facts, ReferencesArgument, expand, is_glob, is_one, run_each
from birkhoff.pipeline.cli.tables import Column
from birkhoff.pipeline.text import pairs, short, size

VERIFY_COLUMNS = (
    Column(title="artifact", key="artifact"),
    Column(title="status", key="status"),
    Column(title="blobs", key="blobs", right=True, rank=2),
    Column(title="bytes", key="bytes", form=size, right=True, rank=1),
    Column(title="tensors", key="tensors", right=True, rank=3),
    Column(title="digest", key="digest", form=short, rank=4, whole=True),
)


@app.command()
def inspect(reference: ReferenceArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show every tensor of a version: shape, codec, bits per weight, SQNR, greatest error."""
    from birkhoff.pipeline.artifact.readers import inspect as rows_of
    from birkhoff.pipeline.artifact.readers import open_artifact, row_json
    from birkhoff.pipeline.cli.tables import TENSOR_COLUMNS, stream
    from birkhoff.pipeline.registry.proofs import proven

    with open_artifact(reference, store) as artifact:
        manifest = artifact.manifest
        sizes = f"{size(manifest.source.bytes)} to {size(manifest.stored_bytes)}, ratio {manifest.ratio:.2f}"
        count = sum(shard.tensors for shard in manifest.shards)
        labels = artifact.labels()
        said = f"; {pairs(labels)}" if labels else ""
        shared = ", allocation output" if manifest.allocation == "output" else ""
        if manifest.base is not None and manifest.bases:
            shared += f", differences to {manifest.base.label}"
        title = f"{artifact.label} ({manifest.profile}{shared}): {count} tensors, {sizes}{proven(manifest)}{said}"
        stream(output(), TENSOR_COLUMNS, map(row_json, rows_of(artifact)), as_json=as_json, title=title)


@app.command()
def verify(
    given: ReferencesArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Also measure against this checkpoint.")
    ] = None,
    store: StoreOption = None,
    require_signature: SignatureOption = None,
    signed_for: AudienceOption = None,
    accept_older: OlderOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check stored versions or pulled folders: every digest, and every tensor decoded."""
    from dataclasses import asdict

    from birkhoff.pipeline.artifact.readers import open_artifact
    from birkhoff.pipeline.artifact.verify import verify as check
    from birkhoff.pipeline.registry.trust import Trust
    from birkhoff.pipeline.store.default import open_default_store

    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)

    def verify_one(reference: str) -> Facts:
        with open_artifact(reference, store, trust=trust) as artifact:
            found = check(artifact, against)
            return {"artifact": artifact.label, "digest": artifact.manifest.digest, **asdict(found)}

    if is_one(given):
        report(verify_one(given[0]), as_json, "verified")
        return
    if against is not None:
        raise typer.BadParameter("one source is that of one artifact; name one", param_hint="--against")
    meant = given
    if any(map(is_glob, given)):
        with open_default_store(store) as opened:
            meant = expand(opened, given)
    run_each(meant, verify_one, VERIFY_COLUMNS, done="verified", as_json=as_json)


@app.command()
def export(
    reference: ReferenceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help=".safetensors, .pth or .pt")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a dense checkpoint with the original names, dtypes and nesting."""
    from birkhoff.pipeline.artifact.export import export as write
    from birkhoff.pipeline.artifact.readers import open_artifact

    with open_artifact(reference, store) as artifact:
        written = write(artifact, output)
        report({"artifact": artifact.label, "output": str(output), "bytes": written}, as_json, "exported")
