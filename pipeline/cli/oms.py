"""Commands for statements that other tools read: oms sign, oms verify, provenance, bom."""

from pathlib import Path
from typing import Annotated, Any

import typer

from birkhoff.pipeline.cli.app import JsonOption, ReferenceArgument, StoreOption, app, print_json, report
from birkhoff.pipeline.cli.pull import OfflineOption

oms_app: typer.Typer = typer.Typer(no_args_is_help=True, help="Sign and verify with OpenSSF Model Signing (OMS).")
app.add_typer(oms_app, name="oms")

ChainOption = Annotated[
    list[Path] | None, typer.Option("--chain", metavar="PEM", help="Certificates up to a trusted root. Repeatable.")
]


@oms_app.command()
def sign(
    what: Annotated[str, typer.Argument(metavar="FOLDER|MODEL[@REF]", help="A pulled folder, or a version.")],
    key: Annotated[Path, typer.Option("--key", metavar="PEM", help="Private key of an elliptic curve.")],
    certificate: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate of that key.")] = None,
    chain: ChainOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign every file of a folder (model.sig), or a version; pulled folders of that version include the signature."""
    import tempfile

    from birkhoff.pipeline.artifact.cache import BlobCache
    from birkhoff.pipeline.artifact.oms import OmsKey, attach, sign_folder
    from birkhoff.pipeline.artifact.pull import pull
    from birkhoff.pipeline.artifact.readers import folder_meant
    from birkhoff.pipeline.artifact.references import find
    from birkhoff.pipeline.registry.trust import ANY
    from birkhoff.pipeline.store.default import open_default_store

    signer = OmsKey(key=key, certificate=certificate, chain=tuple(chain or ()))
    folder = folder_meant(what, store)
    if folder is not None and (folder.is_dir() or "/" in what.partition("@")[0]):
        report({"folder": what, "signature": str(sign_folder(folder, signer))}, as_json, "signed")
        return
    with open_default_store(store) as opened, tempfile.TemporaryDirectory(prefix="birkhoff-") as place:
        cache = BlobCache()
        found = find(opened, what, cache, ANY)
        pull(found, opened, Path(place) / "folder", cache)
        attach(opened, found.model, found.digest, sign_folder(Path(place) / "folder", signer).read_bytes())
    report({**found.pointer(), "store": opened.url}, as_json, "signed")


@oms_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of any model with an OMS signature.")],
    key: Annotated[Path | None, typer.Option("--key", metavar="PEM", help="The trusted public key.")] = None,
    chain: ChainOption = None,
    signature: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The signature. Default: FOLDER/model.sig.")
    ] = None,
    ignore: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="A path that may be unsigned. Repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a folder has exactly the files its signature names, and who signed it; exit with 20 if not."""
    from birkhoff.pipeline.artifact.oms import OmsKey, verify_folder

    if (key is None) == (not chain):
        raise typer.BadParameter("expected either a public key or certificates", param_hint="--key, --chain")
    trusted = OmsKey(key=key, chain=tuple(chain or ()))
    verify_folder(folder, trusted, signature=signature, ignored=ignore or ())
    report({"folder": str(folder), "trusted": str(key or ", ".join(map(str, chain or ())))}, as_json, "verified")


@app.command()
def provenance(reference: ReferenceArgument, store: StoreOption = None, offline: OfflineOption = False) -> None:
    """Print a version's provenance as JSON: an in-toto statement with SLSA's predicate."""
    from birkhoff.pipeline.artifact import statements

    print_json(_of(reference, store, statements.provenance, offline=offline))


@app.command()
def bom(reference: ReferenceArgument, store: StoreOption = None, offline: OfflineOption = False) -> None:
    """Print a version's bill of materials (CycloneDX) as JSON."""
    from birkhoff.pipeline.artifact import statements

    print_json(_of(reference, store, statements.bill_of_materials, offline=offline))


def _of(reference: str, store: str | None, statement: Any, *, offline: bool) -> dict[str, Any]:
    from birkhoff.pipeline.artifact.readers import open_artifact

    with open_artifact(reference, store, offline=offline) as artifact:
        found: dict[str, Any] = statement(artifact.manifest)
        return found
