"""Processes that take turns in virtual time, over a store whose answers a seed may lose, delay or make stale.

Every process of a schedule is a greenlet, its lease keepers are more of them. Each store operation hands control to the
hub, which goes on with whoever is next in virtual time: what is drawn from the schedule's seed for an operation (its
latency, a pause, the end of the process, what becomes of request and answer) decides everything that follows, so a
seed replays exactly.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from birkhoff.pipeline.errors import StoreUnreachableError
from birkhoff.pipeline.store.base import ObjectInfo, Store
from birkhoff.pipeline.store.memory import MemoryStore

START = datetime(2030, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0

Like = Literal["directory", "s3", "plain"]
Result = TypeVar("Result")


class Violation(BaseException):
    """An invariant does not hold. No product code catches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How likely each disturbance is at an operation, and how far the clocks are off."""

    pause: float = 0.0
    kill: float = 0.0
    lost: float = 0.0
    """The answer, or the request before its effect."""
    ghost: float = 0.0
    """The request takes effect after its sender gave it up."""
    twice: float = 0.0
    """It takes effect, is answered, and takes effect again later."""
    stale: float = 0.0
    """A listing shows the store as it was a while ago."""
    stale_seconds: float = 0.0
    late_seconds: float = 0.0
    """The longest that a request may be under way; one under a permit may be for ever."""
    skewed: bool = False
    """The clocks of processes are wrong, run at another rate, and may stand still during a pause."""
    store_steps: bool = False
    """The store's own clock is set back and forth."""


PAUSES = (1.0, 20.0, 70.0, 130.0, 10 * MINUTE, HOUR, 5 * DAY, 20 * DAY)


class Process:
    """One operating system process: paused and killed as a whole."""

    def __init__(self, simulation: "Simulation", name: str) -> None:
        rng = simulation.rng
        self.simulation, self.name = simulation, name
        self.paused_until, self.killed = 0.0, False
        self.operations, self.pause_at = 0, -1
        """How many it has begun, and at which it is stopped for longer than any grace period."""
        skewed = simulation.weather.skewed
        self._rate = rng.choice((0.5, 0.9, 1.0, 1.1, 2.0)) if skewed else 1.0
        self._stands_still = skewed and rng.random() < 0.5
        self._lag = 0.0
        self.wall_offset = rng.uniform(-3, 3) * DAY if skewed else 0.0
        self.store = Wire(self)

    def seconds(self) -> float:
        """What it takes for the time since its start."""
        return (self.simulation.now - self._lag) * self._rate

    def pause(self, seconds: float) -> None:
        """Stop it from now on for so long."""
        self.paused_until = self.simulation.now + seconds
        if self._stands_still:
            self._lag += seconds

    def start(self, work: Callable[[], object], at: float = 0.0) -> None:
        """Let it do `work`, from so many seconds on."""
        self.simulation.start(self, work, at)


class Simulation:
    """One schedule."""

    def __init__(self, seed: int, like: Like, weather: Weather, *, trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.weather, self.like = weather, like
        self.now, self.store_offset = 0.0, 0.0
        self.operations = 0
        self.over = False
        self.trace: list[str] | None = [] if trace else None
        self.inner = MemoryStore(like=like, clock=self.store_time)
        self.shelf = self.inner._shelf
        self.violation: BaseException | None = None
        self.history: list[tuple[float, str, ObjectInfo | None]] = []
        """Of each change: when, the key, and what a listing would have shown of it before; for stale listings."""
        self.effect: Callable[[str], None] = lambda key: None
        """Called with a key after each change: the invariants."""
        self._events: list[tuple[float, int, Process | None, Any]] = []
        self._numbers = itertools.count()
        self._greenlets: list[Any] = []
        self._hub = getcurrent()

    def store_time(self) -> datetime:
        return START + timedelta(seconds=self.now + self.store_offset)

    def start(self, process: Process | None, work: Callable[[], object], at: float) -> None:
        def guarded() -> None:
            try:
                work()
            except GreenletExit:
                raise
            except BaseException as error:
                if self.violation is None:
                    self.violation = error

        started = greenlet(guarded, self._hub)
        self._greenlets.append(started)
        started.process = process
        self.push(self.now + at, process, started)

    def push(self, at: float, process: Process | None, act: Any) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), process, act))

    def sleep(self, seconds: float) -> None:
        """Let others go on for so long. For the running process."""
        current = getcurrent()
        if self.over:
            raise GreenletExit
        self.push(self.now + seconds, current.process, current)
        self._hub.switch()
        if self.over or self.violation is not None:
            raise GreenletExit

    def die(self) -> None:
        """End the running process on the spot: nothing of it runs any more."""
        getcurrent().process.killed = True
        self._hub.switch()
        raise GreenletExit

    def run(self) -> None:
        """Until nobody has anything left to do, or something is wrong."""
        while self._events and self.violation is None:
            at, _, process, act = heapq.heappop(self._events)
            if process is not None:
                if process.killed:
                    continue
                if process.paused_until > at:
                    self.push(process.paused_until, process, act)
                    continue
            if at > self.now:
                self.now = at
            if process is None:
                act()
            else:
                act.switch()

    def close(self) -> None:
        """End whoever is left."""
        self.over = True
        for left in self._greenlets:
            if not left.dead:
                left.throw()
        self._greenlets.clear()
        self._events.clear()

    def changed(self, key: str, before: ObjectInfo | None) -> None:
        """Note a change, and look at the invariants."""
        if self.weather.stale:
            self.history.append((self.now, key, before))
        try:
            self.effect(key)
        except Violation as error:
            if self.violation is None:
                self.violation = error
            raise

    def listing(self, prefix: str, age: float) -> list[ObjectInfo]:
        """What a listing shows that is so old."""
        found = {info.key: info for info in self.inner.list(prefix)}
        for at, key, before in reversed(self.history):
            if at <= self.now - age:
                break
            if key.startswith(prefix):
                if before is None:
                    found.pop(key, None)
                else:
                    found[key] = before
        return sorted(found.values(), key=lambda info: info.key)


class Wire(Store):
    """The way of one process to the store."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.simulation.inner.address)
        self._process, self._simulation = process, process.simulation
        self._inner = process.simulation.inner

    def _send(
        self, what: str, key: str, act: Callable[[], Result], *, writes: bool = False, ever: bool = False
    ) -> Result:
        simulation, process = self._simulation, self._process
        if simulation.over or process.killed:
            raise GreenletExit
        rng, weather = simulation.rng, simulation.weather
        simulation.operations += 1
        process.operations += 1
        draw = rng.random()
        if process.operations == process.pause_at:
            process.pause(20 * DAY)
        elif draw < weather.pause:
            process.pause(rng.choice(PAUSES) * rng.uniform(0.9, 1.1))
        elif draw < weather.pause + weather.kill:
            self._tell(what, key, "killed")
            simulation.die()
        if weather.store_steps and rng.random() < 0.01:
            simulation.store_offset += rng.choice((-10 * DAY, -HOUR, -70.0, 70.0, HOUR, 10 * DAY))
        simulation.sleep(rng.random() * 0.1 if rng.random() < 0.9 else rng.random() * 5)
        draw = rng.random()
        if draw < weather.lost:
            if rng.random() < 0.5:
                self._tell(what, key, "lost")
                act()
            raise StoreUnreachableError(f"{what} {key}: lost in simulation")
        # What nobody can end must not be sent twice (PROTOCOL.md, on stores that cannot promise all).
        twice = 0.0 if ever and simulation.like == "plain" else weather.twice
        if writes and draw < weather.lost + weather.ghost + twice:
            span = rng.choice((10.0, weather.late_seconds, 30 * DAY if ever else weather.late_seconds))
            simulation.push(simulation.now + rng.random() * span, None, lambda: self._late(what, key, act))
            if draw < weather.lost + weather.ghost:
                self._tell(what, key, "ghost")
                raise StoreUnreachableError(f"{what} {key}: still under way in simulation")
        try:
            result = act()
        except Exception as error:
            self._tell(what, key, type(error).__name__)
            raise
        self._tell(what, key, "")
        return result

    def _late(self, what: str, key: str, act: Callable[[], object]) -> None:
        try:
            act()
            self._tell(what, key, "came late")
        except Exception as error:
            self._tell(what, key, f"came late, {type(error).__name__}")
        except Violation:
            return  # noted

    def _tell(self, what: str, key: str, outcome: str) -> None:
        if self._simulation.trace is not None:
            line = f"{self._simulation.now:12.2f} {self._process.name:12} {what:8} {key[:90]} {outcome}"
            self._simulation.trace.append(line.rstrip())

    def _writing(self, what: str, key: str, act: Callable[[], Result], *, ever: bool = False) -> Result:
        simulation, objects = self._simulation, self._simulation.shelf.objects

        def change() -> Result:
            before = objects.get(key)
            result = act()
            after = objects.get(key)
            if after is not before:
                simulation.changed(key, before.info if before else None)
            return result

        return self._send(what, key, change, writes=True, ever=ever)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        return self._send("get", key, lambda: self._inner.get(key, start=start, length=length))

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        return self._send("read", key, lambda: self._inner.read(key, length=length))

    def head(self, key: str) -> ObjectInfo:
        return self._send("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        simulation = self._simulation

        def look() -> list[ObjectInfo]:
            weather, rng = simulation.weather, simulation.rng
            stale = weather.stale and rng.random() < weather.stale
            return simulation.listing(prefix, rng.random() * weather.stale_seconds if stale else 0.0)

        return iter(self._send("list", prefix, look))

    def put(self, key: str, body: bytes) -> str:
        return self._writing("put", key, lambda: self._inner.put(key, body))

    def create(self, key: str, body: bytes) -> str:
        return self._writing("create", key, lambda: self._inner.create(key, body))

    def replace(self, key: str, body: bytes, *, tag: str) -> str:
        return self._writing("replace", key, lambda: self._inner.replace(key, body, tag=tag))

    def touch(self, key: str) -> None:
        self._writing("touch", key, lambda: self._inner.touch(key))

    def delete(self, key: str, *, permit: str | None = None) -> None:
        # A delayed deletion under a permit is refused by the store, however late; the others are bounded.
        self._writing("delete", key, lambda: self._inner.delete(key, permit=permit), ever=permit is not None)

    def permit(self, now: datetime, *, witness: str) -> str:
        return self._send("permit", "", lambda: self._inner.permit(now, witness=witness))

    def revoke(self, permit: str) -> datetime | None:
        return self._send("revoke", "", lambda: self._inner.revoke(permit))

    def close(self) -> None:
        pass
