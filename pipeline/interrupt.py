"""Ctrl-C: asked once, acted on soon, never lost.

Python raises KeyboardInterrupt wherever it happens to be, also inside a finaliser, which swallows it, and the command
line library turns it into a silent exit. So the signal raises an exception of ours, and leaves a mark for loops to see.
"""

import signal
import threading
from types import FrameType

_asked = threading.Event()


class Interrupted(BaseException):
    """The user asked to stop. Not an Exception: no handler of errors may keep it."""


def install() -> None:
    """Take over SIGINT in the main thread."""
    signal.signal(signal.SIGINT, _stop)


def check() -> None:
    """Raise Interrupted if the user has asked to stop; for loops that wait or publish."""
    if _asked.is_set():
        raise Interrupted


def _stop(_signal: int, _frame: FrameType | None) -> None:
    _asked.set()
    raise Interrupted
