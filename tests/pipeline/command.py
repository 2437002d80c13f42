"""The command line, run in this process."""

import pytest

from birkhoff.pipeline.cli import main


def execute(*words: str) -> int:
    """Exit code of a command."""
    return main.execute(words)


def captured(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    capsys.readouterr()
    code = execute(*words)
    out, err = capsys.readouterr()
    return code, out, err
