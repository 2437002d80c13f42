"""The commands `key` and `sign`."""

from pathlib import Path
from typing import Annotated

import typer

from birkhoff.pipeline.cli.app import JsonOption, ReferenceArgument, StoreOption, app, report

key_app: typer.Typer = typer.Typer(no_args_is_help=True, help="Create and show signing keys (Ed25519).")
app.add_typer(key_app, name="key")


@key_app.command()
def new(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File of the private key; FILE.pub gets the public key.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Create a key pair: `--sign FILE` signs, `--require-signature FILE.pub` checks."""
    from birkhoff.pipeline.registry.signing import PUBLIC_SUFFIX, new_key

    public = new_key(file)
    report({"key": public.id, "private": str(file), "public": f"{file}{PUBLIC_SUFFIX}"}, as_json, "made")


@key_app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="PUBFILE", help="A public key.")], as_json: JsonOption = False
) -> None:
    """Print the id that signatures use for a public key."""
    from birkhoff.pipeline.registry.signing import load_public

    report({"key": load_public(file).id, "public": str(file)}, as_json, "key")


@app.command()
def sign(
    reference: ReferenceArgument,
    key: Annotated[Path, typer.Option("--key", metavar="KEYFILE", help="A private key (`birkhoff key new`).")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a published version and the alias that names it; change nothing else."""
    from birkhoff.pipeline.registry.signing import load_signer
    from birkhoff.pipeline.registry.versions import sign_published
    from birkhoff.pipeline.store.default import open_default_store

    signer = load_signer(key)
    with open_default_store(store) as opened:
        version = sign_published(opened, reference, signer)
    facts = {"model": version.model, "version": version.name, "digest": version.digest, "alias": version.alias}
    report({**facts, "key": signer.public.id}, as_json, "signed")
