"""Standard streams that never fail: a command does its work whether or not its output can be written.

A daemon may have closed them, a pager may have quit, a disk may be full, a terminal may have hung up. The run must
still be published. So printing never raises, and the exit code reports lost output at the end.
"""

import errno
import io
import os
import sys
from typing import Any, TextIO

BROKEN_PIPE = 141
"""The shell's exit code for SIGPIPE, as other commands end if their reader goes away."""


class _Unfailing(io.FileIO):
    """A stream that discards what cannot be written, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """See io.FileIO; never raises."""
        try:
            return super().write(data) if self.error is None else memoryview(data).nbytes
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes


def guard() -> None:
    """Open closed standard streams, and make writes to the others never fail."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # else the next opened file takes this number, and output goes into it
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdin = sys.stdin or _reader()
    sys.stdout = _writer(1, sys.stdout)
    sys.stderr = _writer(2, sys.stderr)


def lost_output() -> OSError | None:
    """Return the error that lost some standard output; None if everything was written."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Unfailing) else None


def is_broken_pipe(error: OSError) -> bool:
    """Return whether the reader of a pipe went away."""
    return error.errno == errno.EPIPE


def _reader() -> TextIO:
    return open(0, encoding="utf-8", closefd=False)


def _writer(number: int, before: TextIO | None) -> TextIO:
    raw = _Unfailing(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors=(before.errors if before else None) or "backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )
