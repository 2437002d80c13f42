"""Rounds of `kill -9` at random moments, what must hold after each, and the table of what was found.

A round: a run is killed at a random moment, checked, and started again, as often as there are targets; a run that comes
to its end all the same is followed by one on new weights; what is left is run to its end. All the while a reader walks
the store.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.harness.chaos.reader import BrokenError, Watch
from tests.harness.chaos.world import BASES, MODELS, SHARDS, TARGETS, Target, World, made, rows

DISTINCT = len(MODELS) * SHARDS - SHARDS // 2
"""Shards of a generation that differ."""

LIMIT_SECONDS = 400.0
"""A run that takes longer hangs; an undisturbed one takes some ten."""

STORE_CODES = (0, 7, 8, 14)
"""How a run may end whose store was killed: well, with a store error, or with some models failed for it."""
RAY_CODES = (0, 1)
"""How a run may end whose Ray was killed: well, or by Ray itself, which ends a driver that is just connecting to it."""


@dataclass(slots=True)
class Round:
    """What one round found."""

    number: int
    kills: Counter[str] = field(default_factory=Counter)
    moments: list[tuple[str, float]] = field(default_factory=list)
    """Target, and seconds from the start of a run to its kill."""
    missed: int = 0
    """Kills that came when the run had ended."""
    made_again: int = 0
    """Shards that were in the store when a run was killed and were encoded all the same."""
    rewritten: int = 0
    """Objects of shards that were there and were written once more."""
    leaks: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    polls: int = 0
    differences: int = 0
    """Shards of fine-tunes that were there at the end as differences to those of their base."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.leaks or self.broken or self.made_again or self.rewritten)


class Harness:
    """Runs rounds in one world."""

    def __init__(self, world: World, seed: int) -> None:
        self._world, self._rng = world, random.Random(seed)
        self._generation = -1
        self._older: set[str] = set()
        """Keys of shards that were there before the generation began."""
        self._full = 0.0

    def prepare(self) -> None:
        """Start the store and time a run that nobody disturbs."""
        self._world.start_store()
        self._next_generation()
        start = time.monotonic()
        process = self._world.start_run()
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode or made(rows(output)) != DISTINCT:
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}: {errors.strip()[-500:]}")
        self._full = time.monotonic() - start

    def round(self, number: int, targets: Iterable[Target]) -> Round:
        """One round, a kill for each of `targets`; new weights whenever a run was completed."""
        found, start, complete = Round(number), time.monotonic(), True
        watch = self._watch()
        for target in targets:
            if complete:
                self._next_generation()
            complete = self._run(found, target)
            if target == "store":  # a new server may have other ports
                self._ended(watch, found)
                watch = self._watch()
        if not complete and not self._run(found, None):
            found.broken.append("the next run did not complete")
        self._ended(watch, found)
        found.seconds = time.monotonic() - start
        return found

    def _next_generation(self) -> None:
        self._generation += 1
        self._world.write_checkpoints(self._generation)
        self._older = set(self._world.reader().shards())

    def _run(self, found: Round, target: Target | None) -> bool:
        """Start the run, kill the target if there is one, and check; returns whether the run was completed."""
        there = {key: state for key, state in self._world.reader().shards().items() if key not in self._older}
        process = self._world.start_run()
        killed = target is not None and self._kill(found, target, process)
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            errors = process.communicate()[1]
            found.broken.append(f"{target}: the run did not end within {LIMIT_SECONDS:g} s: {errors.strip()[-300:]}")
            return False
        expected: tuple[int, ...] = (0,)
        if killed:
            expected = {"driver": (-9,), "store": STORE_CODES, "worker": (0,), "ray": RAY_CODES}[str(target)]
        if process.returncode not in expected:
            found.broken.append(f"{target}: the run ended with {process.returncode}: {errors.strip()[-300:]}")
        found.leaks += self._world.leaks()
        self._check(found)
        if process.returncode == 0:
            try:
                self._check_work(found, there, made(rows(output)))
            except json.JSONDecodeError:
                found.broken.append(
                    f"{target}: standard output is no JSON: {output[:300]!r}; {errors.strip()[-300:]!r}"
                )
        return process.returncode == 0

    def _kill(self, found: Round, target: Target, process: subprocess.Popen[str]) -> bool:
        """Kill at a random moment; False if the run ended before it."""
        start, moment = time.monotonic(), self._rng.uniform(0, self._full)
        while time.monotonic() - start < moment and process.poll() is None:
            time.sleep(0.01)
        # A worker is waited for until there is one.
        killed = process.poll() is None and self._world.kill(target, process, self._rng)
        found.moments.append((target, time.monotonic() - start))
        found.kills[target] += killed
        found.missed += not killed
        if killed and target == "store":
            self._world.start_store()
        return killed

    def _check_work(self, found: Round, there: dict[str, tuple[str, str]], encoded: int) -> None:
        """A completed run made only what was not there, and every model has its version."""
        missing = DISTINCT - sum(key.startswith("shards/") for key in there)
        found.made_again += max(0, encoded - missing)
        after = self._world.reader().shards()
        found.rewritten += sum(after.get(key) != state for key, state in there.items())
        reader = self._world.reader()
        versions, generations = reader.check(), self._generation + 1
        found.differences = reader.differences
        if versions != generations * len(MODELS):
            found.broken.append(f"{versions} versions after generation {self._generation}")
        if found.differences != generations * len(BASES) * SHARDS:
            found.broken.append(f"{found.differences} shards are differences after generation {self._generation}")

    def _check(self, found: Round) -> None:
        try:
            self._world.reader().check()
        except BrokenError as error:
            found.broken.append(str(error))
        if uploads := self._world.reader().uploads():
            found.leaks.append(f"{uploads} multipart uploads")

    def _watch(self) -> Watch:
        watch = Watch(self._world.reader)
        watch.start()
        return watch

    def _ended(self, watch: Watch, found: Round) -> None:
        watch.stop()
        found.polls += watch.polls
        if watch.broken is not None:
            found.broken.append(f"seen by the reader: {watch.broken}")


def targets_of(target: str, kills: int, rng: random.Random) -> list[Target]:
    """The targets of a round."""
    return [rng.choice(TARGETS) if target == "random" else target for _ in range(kills)]  # type: ignore[misc]
