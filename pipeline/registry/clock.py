"""Time and waiting as the registry uses them. Callers name the module, so that a simulation can take its place."""

import time
from datetime import UTC, datetime


def seconds() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def pause(seconds: float) -> None:
    """Do nothing for so long."""
    time.sleep(seconds)


def utc() -> datetime:
    """The machine's time: for people to read, never to decide by."""
    return datetime.now(UTC)
