"""The command line, run in this process."""

import pytest

from birkhoff.pipeline import cli


def execute(*words: str) -> int:
    """Exit code of a command."""
    return cli.run(lambda: cli.app(list(words), standalone_mode=False), debug=False)


def captured(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    capsys.readouterr()
    code = execute(*words)
    out, err = capsys.readouterr()
    return code, out, err
