"""Entry point: command modules register themselves, one command runs, and an error becomes one line."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline import hints, interrupt, logs, streams
from birkhoff.pipeline.cli.app import app, complain, failure_document, print_json, set_quiet
from birkhoff.pipeline.errors import OutputError, exit_code
from birkhoff.pipeline.files import FULL
from birkhoff.pipeline.logs import LogFormat
from birkhoff.pipeline.store.default import HTTP_VARIABLE

# --help lists commands in this order.
# isort: off
from birkhoff.pipeline.cli import compress  # noqa: F401
from birkhoff.pipeline.cli import versions  # noqa: F401
from birkhoff.pipeline.cli import inspect  # noqa: F401
from birkhoff.pipeline.cli import pull  # noqa: F401
from birkhoff.pipeline.cli import shipping  # noqa: F401
from birkhoff.pipeline.cli import models  # noqa: F401
from birkhoff.pipeline.cli import keys  # noqa: F401
from birkhoff.pipeline.cli import oms  # noqa: F401
from birkhoff.pipeline.cli import report  # noqa: F401
from birkhoff.pipeline.cli import doctor  # noqa: F401
from birkhoff.pipeline.cli import store  # noqa: F401
from birkhoff.pipeline.cli import schema  # noqa: F401
# isort: on


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What typer raises for a wrong command line; typer does not export it."""

_DISK = (*FULL, errno.EROFS)

_JSON = "--json"
GLOBAL_FLAGS = ("--debug", "--allow-http", "--quiet")
"""Flags of every command, before or after its name. `--json` and `--store` may also precede the commands that have
them."""


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. An error becomes one line, and with `--json` a document too."""
    words, flags = _split(arguments)
    hints.forget()
    hints.remember(program=hints.program(), allow_http="yes" if "--allow-http" in flags else None)
    if "--allow-http" in flags:
        os.environ[HTTP_VARIABLE] = "1"
    set_quiet("--quiet" in flags)
    return run(
        lambda: app(words, prog_name="birkhoff", standalone_mode=False),
        debug="--debug" in flags,
        as_json=_JSON in words,
    )


def run(command: Callable[[], object], *, debug: bool, as_json: bool = False) -> int:
    """Run a command; an error becomes one line and the exit code of its kind."""
    try:
        code = command()
    except (BirkhoffError, interrupt.Interrupted) as error:
        if debug:
            traceback.print_exc()
        return _end(error, as_json)
    except typer.Abort:  # Ctrl-C that typer caught
        return _end(interrupt.Interrupted(), as_json)
    except _UsageError as error:
        return _end_usage(error, as_json)
    except Exception as error:
        if interrupt.asked():  # a library turned Ctrl-C into another error
            return _end(interrupt.Interrupted(), as_json)
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f"{error.filename}: " if error.filename else ""
            remedy = "free some space" if error.errno in FULL else "make it writable"
            return _end(OutputError(f"{where}{error.strerror}; {remedy}, or point BIRKHOFF_HOME elsewhere"), as_json)
        message = f"{type(error).__name__}: {error}; this is a bug: run again with --debug and report it"
        complain(message)
        if as_json:
            print_json(failure_document(type(error).__name__, 70, message))
        return 70
    return code if isinstance(code, int) else 0


def _end(error: BirkhoffError | interrupt.Interrupted, as_json: bool) -> int:
    """Print the error that ended a command, and return its exit code."""
    if isinstance(error, interrupt.Interrupted):
        message, code = "interrupted; run the same command again to resume", error.exit_code
        with interrupt.held():  # another signal does not keep the line from the user
            complain(message)
            if interrupt.installed():
                interrupt.uninstall()
    else:
        message, code = str(error), exit_code(error)
        complain(message)
    if as_json:
        print_json(failure_document(type(error).__name__, code, message))
    return code


def _end_usage(error: Any, as_json: bool) -> int:
    """Print the error of a command line, and return the exit code."""
    error.show()
    if as_json:
        print_json(failure_document("UsageError", error.exit_code, error.format_message()))
    return int(error.exit_code)


def _split(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the command's words, with `--json` moved to the end, and the global flags."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head, tail = arguments[:end], arguments[end:]
    words = [word for word in head if word not in (*GLOBAL_FLAGS, _JSON)]
    if _JSON in head:
        words.append(_JSON)
    return [*words, *tail], {word for word in head if word in GLOBAL_FLAGS}


def main() -> None:
    """Entry point of the console command."""
    logs.configure(LogFormat.TEXT, debug="--debug" in sys.argv)
    interrupt.install()
    try:
        code: str | int | None = execute(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except interrupt.Interrupted as error:  # again, before the first was reported
        code = _end(error, as_json=False)
    interrupt.uninstall()
    sys.exit(_with_output(code))


def _with_output(code: str | int | None) -> str | int | None:
    """Return the final exit code. A command that succeeded must also have written its output."""
    lost = streams.lost_output()
    if code or lost is None:
        return code
    if streams.is_broken_pipe(lost):
        return streams.BROKEN_PIPE
    complain(f"standard output: {lost.strerror}; the command succeeded, but its output is lost")
    return exit_code(OutputError())
