"""How long to wait before trying again."""

from datetime import UTC, datetime

import pytest

from birkhoff.pipeline import backoff
from birkhoff.pipeline.backoff import LONGEST_SECONDS, Backoff, retry_after


def test_waits_double_up_to_a_bound_and_vary(waits: list[float]) -> None:
    counted = Backoff(12, first=0.5)
    while counted.again():
        pass
    assert len(waits) == 11
    for number, wait in enumerate(waits):
        longest = min(0.5 * 2**number, LONGEST_SECONDS)
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) > 5


def test_progress_starts_anew(waits: list[float]) -> None:
    counted = Backoff(3, first=0.5)
    for _ in range(5):
        assert counted.again()
        assert counted.again()
        counted.reset()
    assert max(waits) <= 1.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7.0), (" 0 ", 0.0), ("", None), (None, None), ("soon", None), ("-3", None)]
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert retry_after(text) == seconds


def test_retry_after_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()
    monkeypatch.setattr(backoff.time, "time", lambda: now)
    assert retry_after("Thu, 01 Jan 2026 12:00:30 GMT") == 30.0
    assert retry_after("Thu, 01 Jan 2026 11:00:00 GMT") == 0.0
