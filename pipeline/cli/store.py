"""The commands of the embedded S3 server: store up, down, env."""

import typer

from birkhoff.pipeline.cli.app import JsonOption, app, print_json

store_app: typer.Typer = typer.Typer(no_args_is_help=True, help="Start, stop and reach the embedded S3 server.")
app.add_typer(store_app, name="store")


@store_app.command()
def up() -> None:
    """Start the embedded S3 server and leave it running."""
    from birkhoff.pipeline.store import seaweedfs

    typer.echo(f"embedded store at {seaweedfs.up().endpoint}")


@store_app.command()
def down() -> None:
    """Stop the server, unless a process uses it."""
    from birkhoff.pipeline.store import seaweedfs

    typer.echo(f"embedded store: {seaweedfs.down()}")


@store_app.command()
def env(as_json: JsonOption = False) -> None:
    """Print the variables that let S3 tools reach the server: `eval "$(birkhoff store env)"`.

    AWS_* are for the AWS command line and SDKs, S3_ENDPOINT_URL is for s5cmd, and RCLONE_CONFIG_* define rclone's
    remote birkhoff:.
    """
    import shlex

    from birkhoff.pipeline.store import seaweedfs

    variables = seaweedfs.tool_environment()
    if as_json:
        print_json(variables)
        return
    for key, value in variables.items():
        typer.echo(f"export {key}={shlex.quote(value)}")
