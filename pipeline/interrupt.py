"""Ctrl-C and SIGTERM: one request, acted on soon, never lost.

Python raises KeyboardInterrupt wherever it happens to be, also inside a finaliser, which swallows it, and the command
line library turns it into a silent exit; SIGTERM would end the process with nothing put in order. So both signals raise
an exception of ours, and leave a mark for loops to see. Compiled libraries can make nonsense of an exception that
arrives in the middle of a call; such calls are made inside `deferred`, where there is the mark alone.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_asked = threading.Event()
_number = signal.SIGINT
_deferred = 0


class Interrupted(BaseException):
    """The user asked to stop. Not an Exception: no handler of errors may keep it. `exit_code` is the shell's."""

    def __init__(self) -> None:
        super().__init__()
        self.exit_code: int = 128 + _number


def install() -> None:
    """Take over SIGINT and SIGTERM in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def check() -> None:
    """Raise Interrupted if the user has asked to stop; for loops that wait or publish."""
    if _asked.is_set():
        raise Interrupted


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a signal that comes inside the block wait for its end, in the main thread; for calls that end soon."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    check()


def asked() -> bool:
    """Return whether the user has asked to stop."""
    return _asked.is_set()


def _stop(number: int, _frame: FrameType | None) -> None:
    stop(number)


def stop(number: int) -> None:
    """Act as if the signal had come: raise Interrupted, or leave the mark where that is deferred."""
    global _number  # handlers get no state of their own
    _number = signal.Signals(number)
    _asked.set()
    if not _deferred:
        raise Interrupted
