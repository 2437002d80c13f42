"""Ctrl-C and SIGTERM: one request, acted on soon, never lost.

Python raises KeyboardInterrupt at any point, even inside a finalizer, which swallows it, and the command line library
turns it into a silent exit. SIGTERM would end the process without cleanup. So both signals raise `Interrupted` and set
a flag for loops to check. Compiled libraries can misbehave if an exception arrives in the middle of a call; such calls
are made inside `deferred`, where only the flag is set.
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
    """The user asked to stop. Not an Exception, so that no error handler catches it. `exit_code` is the shell's."""

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
    """Defer a signal to the end of the block, in the main thread; for short calls."""
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
    """Act as on the signal: raise Interrupted, or set the flag while deferred."""
    global _number  # signal handlers take no state
    _number = signal.Signals(number)
    _asked.set()
    if not _deferred:
        raise Interrupted
