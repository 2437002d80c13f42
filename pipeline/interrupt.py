"""Ctrl-C and SIGTERM: one request, acted on soon, never lost.

Python raises KeyboardInterrupt at any point, even inside a finalizer, which swallows it, and the command line library
turns it into a silent exit. SIGTERM would end the process without cleanup. So both signals raise `Interrupted` and set
a flag for loops to check. Compiled libraries can misbehave if an exception arrives in the middle of a call; such calls
are made inside `deferred`, where only the flag is set. An exception inside the logging module, or while a lock of
`threading` is taken, can leave the lock held, and other threads wait for it; while torch is imported, its compiled
parts end the process at an exception. A signal that arrives there is acted on once it is left.

Other threads get no exception, as it could leave any lock held: they end where they `check` or `pause`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_AGAIN_SECONDS = 0.01
"""How soon a signal that arrived where an exception does harm arrives again."""

_SLICE_SECONDS = 0.1
"""How long a pause lasts that is not looked up from."""

_asked = False  # an Event would take a lock, which a second signal would wait for
_number = signal.SIGINT
_deferred = 0
_arrives_again = False
_own = threading.local()


class Interrupted(BaseException):
    """The user asked to stop. Not an Exception, so that no error handler catches it. `exit_code` is the shell's."""

    def __init__(self) -> None:
        super().__init__()
        self.exit_code: int = 128 + _number


def install() -> None:
    """Take over SIGINT and SIGTERM in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    signal.signal(signal.SIGALRM, _stop_again)


def installed() -> bool:
    """Return whether this module has taken over the signals. A program that uses the library may have its own ways."""
    return signal.getsignal(signal.SIGTERM) is _stop


def uninstall() -> None:
    """Let either signal end the process at once: nothing is left to do, and nobody would catch `Interrupted`."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))


@contextlib.contextmanager
def ends_with(event: threading.Event) -> Iterator[None]:
    """Let `check` raise in this thread once `event` is set, too."""
    _own.event = event
    try:
        yield
    finally:
        del _own.event


def check() -> None:
    """Raise Interrupted if the user has asked to stop; for loops that wait or publish."""
    own: threading.Event | None = getattr(_own, "event", None)
    if _asked or (own is not None and own.is_set()):
        _raise()


def pause(seconds: float) -> None:
    """Do nothing for so long. Raises Interrupted as soon as the user asks to stop, in any thread."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _SLICE_SECONDS))
    check()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer a signal to the end of the block, in the main thread; for short calls."""
    with held():
        yield
    check()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Only note a signal inside the block, in the main thread; for what must be done once the user asked to stop."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def asked() -> bool:
    """Return whether the user has asked to stop."""
    return _asked


def _stop(number: int, frame: FrameType | None) -> None:
    global _arrives_again
    if _does_harm(frame):
        _ask(number)
        _arrives_again = True
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    else:
        stop(number)


def _stop_again(_: int, frame: FrameType | None) -> None:
    _stop(_number, frame)


def stop(number: int) -> None:
    """Act as on the signal: raise Interrupted, or set the flag while deferred."""
    _ask(number)
    if not _deferred:
        _raise()


def _raise() -> NoReturn:
    global _arrives_again
    if _arrives_again and threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)
        _arrives_again = False
    raise Interrupted


def _ask(number: int) -> None:
    global _number, _asked  # signal handlers take no state
    _number = signal.Signals(number)
    _asked = True


def _does_harm(frame: FrameType | None) -> bool:
    """Return whether an exception in this frame does harm: inside the logging module, where the standard library takes
    a lock, or while torch is imported."""
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == "logging" or (name == "__enter__" and module in _TAKE_LOCKS):
            return True
        if module == "torch" and name == "<module>":
            return True
        frame = frame.f_back
    return False


_TAKE_LOCKS = ("threading", "concurrent.futures._base")
"""Modules whose context managers take locks by a call in Python."""
