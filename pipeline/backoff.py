"""The wait before a retry: one policy for stores and downloads.

The wait doubles with each consecutive failure, and jitter shortens it to as little as half, so that clients that failed
together do not retry together. The server's `Retry-After` takes precedence, up to a bound.
"""

import random
import time
from email.utils import parsedate_to_datetime

from birkhoff.pipeline import interrupt

FIRST_SECONDS = 0.5
"""The longest wait before the second try, in seconds. Four tries wait 1.7 to 3.5 s in total."""

LONGEST_SECONDS = 60.0
"""The longest wait, also at a server's request."""


class Backoff:
    """The consecutive failures of work that may be tried `attempts` times.

    `first` is the longest wait before the second try, in seconds.
    """

    def __init__(self, attempts: int, *, first: float = FIRST_SECONDS) -> None:
        self.failures: int = 0
        self._attempts = attempts
        self._first = first

    def again(self, asked: float | None = None) -> bool:
        """Count a failure, then wait and return True; False at once if that was the last try.

        `asked` is the wait that the server requests, in seconds. Raises Interrupted once the user asks to stop.
        """
        self.failures += 1
        if self.failures >= self._attempts:
            return False
        interrupt.pause(self._pause() if asked is None else min(asked, LONGEST_SECONDS))
        return True

    def reset(self) -> None:
        """Forget the failures so far, because the work has advanced."""
        self.failures = 0

    def _pause(self) -> float:
        return float(min(self._first * 2 ** (self.failures - 1), LONGEST_SECONDS) * random.uniform(0.5, 1))


def retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3), a number or a date; None for neither."""
    text = (text or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
