"""The state of a run's progress: counts, speed and time left. Draws nothing."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from birkhoff.pipeline.text import size

_WINDOW_SECONDS = 30.0
"""Length in seconds of the window in which speed is measured."""

_TELLING_SHARE = 0.01
"""Share of the work before which no speed is given: one small shard after a slow start would mislead."""


@dataclass(slots=True, kw_only=True)
class ModelProgress:
    """One model: its source bytes and shards, how many have ended, and its status once the model has ended."""

    name: str
    nbytes: int
    shards: int
    done_bytes: int = 0
    done_shards: int = 0
    reused: int = 0
    status: str | None = None


@dataclass(slots=True, kw_only=True)
class FleetProgress:
    """All models of a run. `models` is their expected number, `clock` returns seconds."""

    models: int
    clock: Callable[[], float] = time.monotonic
    planned: dict[str, ModelProgress] = field(default_factory=dict)
    _since: float = 0.0
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._since = self.clock()

    @property
    def nbytes(self) -> int:
        """Source bytes of the models planned so far."""
        return sum(model.nbytes for model in self.planned.values())

    @property
    def done_bytes(self) -> int:
        """Source bytes that have ended. A failed model counts whole, since nothing remains to do for it."""
        return sum(m.nbytes if m.status else m.done_bytes for m in self.planned.values())

    @property
    def done(self) -> int:
        """Models that have ended."""
        return sum(model.status is not None for model in self.planned.values())

    @property
    def shards(self) -> tuple[int, int]:
        """Return (ended shards, all shards)."""
        states = self.planned.values()
        return sum(m.shards if m.status else m.done_shards for m in states), sum(m.shards for m in states)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._since

    def plan(self, name: str, nbytes: int, shards: int, status: str | None) -> None:
        """Add a model. `status` is set if there is nothing to do for it."""
        self.planned[name] = ModelProgress(name=name, nbytes=nbytes, shards=shards, status=status)

    def advance(self, name: str, nbytes: int, status: str | None, *, reused: bool) -> None:
        """Record that `nbytes` source bytes of a model ended (0: a step without bytes). `status` is set with the
        last."""
        model = self.planned[name]
        model.done_bytes = min(model.nbytes, model.done_bytes + nbytes)
        model.done_shards = min(model.shards, model.done_shards + bool(nbytes))
        model.reused += bool(nbytes) and reused
        model.status = status or model.status
        self._recent.append((self.clock(), nbytes))

    def speed(self) -> float | None:
        """Source bytes per second in the recent window; None before `_TELLING_SHARE` of the work has ended."""
        worked = sum(model.done_bytes for model in self.planned.values())
        if worked < _TELLING_SHARE * (worked + self.nbytes - self.done_bytes):
            return None
        now = self.clock()
        while self._recent and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()
        spent = min(_WINDOW_SECONDS, self.seconds)
        return sum(nbytes for _, nbytes in self._recent) / spent if self._recent and spent > 0 else None

    def left(self) -> float | None:
        """Seconds left at this speed; None without a speed."""
        speed = self.speed()
        return (self.nbytes - self.done_bytes) / speed if speed else None

    def summary(self) -> str:
        """Return one line: `5/19 models, 312/607 shards, 4.1 GiB of 12.3 GiB, 41.2 MiB/s, 3:20 left`."""
        ended, shards = self.shards
        speed, left = self.speed(), self.left()
        parts = [f"{self.done}/{self.models} models", f"{ended}/{shards} shards"]
        parts.append(f"{size(self.done_bytes)} of {size(self.nbytes)}")
        if speed:
            parts.append(f"{size(round(speed))}/s")
        if left is not None and self.done < self.models:
            parts.append(f"{clock_time(left)} left")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """Format a duration: `3:20`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
