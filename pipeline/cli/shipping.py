"""The commands that move versions: copy, push, save, load; and `recode`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from birkhoff.pipeline.cli.app import (
    AudienceOption,
    JsonOption,
    OlderOption,
    ReferenceArgument,
    SignatureOption,
    SignOption,
    StoreOption,
    app,
    is_quiet,
    report,
    warn,
)
from birkhoff.pipeline.cli.several import Facts, ReferencesArgument, expand, is_one, run_each
from birkhoff.pipeline.cli.tables import Column
from birkhoff.pipeline.text import pairs, short, size

AliasesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alias",
        metavar="ALIAS",
        help="Point this alias at the copy. Repeatable. The alias of MODEL@ALIAS travels by itself.",
    ),
]
RenameOption = Annotated[bool, typer.Option("--rename", help="Take the next free name there instead of its own.")]
MoveOption = Annotated[bool, typer.Option("--force", help="Move an alias there even if it is protected.")]

COPY_COLUMNS = (
    Column(title="model", key="model"),
    Column(title="version", key="version"),
    Column(title="status", key="status"),
    Column(title="blobs", key="blobs", right=True, rank=3),
    Column(title="copied", key="copied_blobs", right=True, rank=2),
    Column(title="bytes", key="copied_bytes", form=size, right=True, rank=1),
    Column(title="aliases", key="aliases", form=", ".join, rank=4),
    Column(title="digest", key="digest", form=short, rank=5, whole=True),
)


@app.command()
def copy(
    given: ReferencesArgument,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The target store; a new folder is created.")],
    alias: AliasesOption = None,
    rename: RenameOption = False,
    force: MoveOption = False,
    sign: SignOption = None,
    require_signature: SignatureOption = None,
    signed_for: AudienceOption = None,
    accept_older: OlderOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy versions to another store, only what it lacks, with name, signatures and labels."""
    from birkhoff.pipeline.api.push import delivery_to, parcel_of, tell_of_signatures
    from birkhoff.pipeline.api.transfer import transferring
    from birkhoff.pipeline.registry.shipping import copy as copy_version
    from birkhoff.pipeline.registry.trust import Trust
    from birkhoff.pipeline.store.default import open_default_store

    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)
    with ExitStack() as stack:
        source = stack.enter_context(open_default_store(store))
        target = stack.enter_context(open_default_store(to, create=True))
        if target.url == source.url:
            raise typer.BadParameter(f"{target.url} is the store it comes from", param_hint="--to")
        parcels = expand(source, given)
        delivery = delivery_to(target, alias or (), rename=rename, force=force, sign=sign, warn=warn)

        def copy_one(reference: str) -> Facts:
            parcel = parcel_of(source, reference, trust)
            with transferring(parcel.label, parcel.nbytes, quiet=as_json or is_quiet()) as advance:
                done = copy_version(source, parcel, target, delivery, report=advance)
            tell_of_signatures(done, target, warn)
            return {**done.facts(), "store": target.url}

        if is_one(given):
            report(_said(copy_one(given[0]), as_json), as_json, "copied")
            return
        run_each(parcels, copy_one, COPY_COLUMNS, done="copied", as_json=as_json)


@app.command()
def push(
    reference: ReferenceArgument,
    to: Annotated[str, typer.Argument(metavar="oci://HOST/REPO:TAG", help="Image in a registry.")],
    require_signature: SignatureOption = None,
    signed_for: AudienceOption = None,
    accept_older: OlderOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Push a version to an OCI registry as a ModelPack image; `pull oci://...` fetches it."""
    from birkhoff.pipeline.api.push import parcel_of
    from birkhoff.pipeline.api.transfer import transferring
    from birkhoff.pipeline.artifact.oci import push_oci
    from birkhoff.pipeline.artifact.oci_client import OciReference
    from birkhoff.pipeline.registry.trust import Trust
    from birkhoff.pipeline.store.default import http_allowed, open_default_store

    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)
    reached = OciReference.parse(to)
    with open_default_store(store) as source:
        parcel = parcel_of(source, reference, trust)
        with transferring(parcel.label, parcel.nbytes, quiet=as_json or is_quiet()) as advance:
            done = push_oci(source, parcel, reached, allow_http=http_allowed(), report=advance)
    report(done.facts(), as_json, "pushed")


@app.command()
def save(
    reference: ReferenceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The tar file to write.")],
    require_signature: SignatureOption = None,
    signed_for: AudienceOption = None,
    accept_older: OlderOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version to one file, for a machine without a network; `load` publishes it there."""
    from birkhoff.pipeline.api.push import parcel_of
    from birkhoff.pipeline.api.transfer import transferring
    from birkhoff.pipeline.registry.archive import save as save_version
    from birkhoff.pipeline.registry.trust import Trust
    from birkhoff.pipeline.store.default import open_default_store

    trust = Trust.of(require_signature, audience=signed_for, accept_older=accept_older)
    with open_default_store(store) as source:
        parcel = parcel_of(source, reference, trust)
        with transferring(parcel.label, parcel.nbytes, quiet=as_json or is_quiet()) as advance:
            written = save_version(source, parcel, output, report=advance)
    facts = {"model": parcel.manifest.model, "version": parcel.name, "digest": parcel.manifest.digest}
    report({**facts, "output": str(output), "bytes": written}, as_json, "saved")


@app.command()
def load(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that `birkhoff save` wrote.", show_default=False)
    ],
    alias: AliasesOption = None,
    rename: RenameOption = False,
    force: MoveOption = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a version from a file of `save`, with name, signatures and labels; check every digest."""
    from birkhoff.pipeline.api.push import delivery_to, tell_of_signatures
    from birkhoff.pipeline.api.transfer import transferring
    from birkhoff.pipeline.registry.archive import load as load_version
    from birkhoff.pipeline.store.default import open_default_store

    with ExitStack() as stack:
        target = stack.enter_context(open_default_store(store, create=True))
        delivery = delivery_to(target, alias or (), rename=rename, force=force, sign=sign, warn=warn)
        done = load_version(
            file,
            target,
            delivery,
            report=lambda label, total: stack.enter_context(transferring(label, total, quiet=as_json or is_quiet())),
        )
        tell_of_signatures(done, target, warn)
        facts = {**done.facts(), "store": target.url}
    report(_said(facts, as_json), as_json, "loaded")


@app.command()
def recode(
    reference: ReferenceArgument,
    make_latest: Annotated[
        bool, typer.Option("--make-latest", help="Also recode an older version, and point `latest` at it.")
    ] = False,
    sign: SignOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a version in the current container format, without loss and without its source."""
    from birkhoff.pipeline.api.push import delivery_to
    from birkhoff.pipeline.artifact.recode import recode_version
    from birkhoff.pipeline.store.default import open_default_store

    with open_default_store(store) as opened:
        delivery = delivery_to(opened, (), rename=True, force=False, sign=sign, warn=warn)
        done = recode_version(
            opened,
            reference,
            make_latest=make_latest,
            single_publisher=delivery.single_publisher,
            signer=delivery.signer,
        )
    report(done.facts(), as_json, "recoded" if done.shards else "already in the current format")


def _said(facts: Facts, as_json: bool) -> Facts:
    """Return the facts for one line; signatures get a warning of their own."""
    if as_json:
        return facts
    return {**facts, "aliases": ", ".join(facts["aliases"]), "labels": pairs(facts["labels"]), "signed_for": ""}
