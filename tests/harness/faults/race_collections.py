"""Publishers, a collector and readers of one model at once; the history checker judges what each of them was told.

Shards come from a small pool, so that what one version gives up the next one wants again: as a shard of its own, or as
what its own shard is a difference to. Some publishers hold an open
run while they make shards; a careless one does not, and may be refused, but never publishes a version that lacks a
blob. Some readers hold an open run; the others hold nothing: they may see a version go while they read it, but only one
whose name was given up, and within the grace period not even that.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

from birkhoff.pipeline.errors import ArtifactNotFoundError, ObjectNotFoundError, StoreError
from birkhoff.pipeline.registry.aliases import aliases
from birkhoff.pipeline.registry.documents import blob_key, sha256
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.names import names as named
from birkhoff.pipeline.registry.names import read_name
from birkhoff.pipeline.registry.versions import load_version
from birkhoff.pipeline.store.base import Store
from tests.harness.faults.history import PATIENCE_SECONDS, Log, Op, highest, joined, lifetime, linearizable, names
from tests.pipeline.publishing import publish_contents

MODEL = "net"
KEEP = 2
PUBLISHERS = 3

ROUNDING_SECONDS = 1.5
"""Stores give times in whole seconds, so a grace period may be that much shorter."""


@dataclass
class CollectionRace:
    """One run of it against `store`: at least `turns` versions of each publisher, and `sweeps` that deleted blobs."""

    store: Store
    grace: timedelta
    seed: int = 0
    turns: int = 4
    sweeps: int = 2
    log: Log = field(default_factory=Log)
    swept: int = 0
    refused: int = 0
    within_grace: int = 0
    """Readings without a lease that ended within the grace period: of those no excuse is taken."""

    def run(self) -> list[str]:
        """What is wrong, as lines; empty where all holds."""
        self._over, errors = threading.Event(), list[BaseException]()
        readers = [lambda: self._reader(leased=True), lambda: self._reader(leased=False), self._reader_of_latest]
        publishers = [self._thread(lambda seed=seed: self._publisher(seed), errors) for seed in range(PUBLISHERS)]
        others = [self._thread(act, errors) for act in (self._collector, *readers)]
        ended = joined(publishers, self._moved)
        self._over.set()
        if not joined((*publishers, *others), self._moved) or not ended:
            return [f"nothing moves after {PATIENCE_SECONDS:g} s"]
        if errors:
            return [f"{type(error).__name__}: {error}" for error in errors]
        self._last_look()
        return self._judge()

    def _thread(self, act: Callable[[], None], errors: list[BaseException]) -> threading.Thread:
        def run() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)
                self._over.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _moved(self) -> tuple[int, int]:
        """Versions published and blobs swept so far: readers go on whatever these do."""
        return sum(op.name == "publish" for op in self.log.ops), self.swept

    @property
    def _enough(self) -> bool:
        return self.swept >= self.sweeps or self._over.is_set()

    def _publisher(self, seed: int) -> None:
        rng, turn = random.Random(f"{self.seed} {seed}"), 0
        while turn < self.turns or not self._enough:
            pooled, own = f"s{rng.randint(0, 3)}", f"own {self.seed} {seed} {turn}"
            derived = rng.random() < 0.5
            contents, base = ((own,), pooled) if derived else ((pooled, own), None)
            with open_run(self.store) if seed else contextlib.nullcontext():
                try:
                    self.log.call("publish", MODEL, partial(self._publish, contents, base))
                except StoreError as error:
                    if seed or "has gone since it was stored" not in str(error):
                        raise
                    self.refused += 1
            turn += 1
            time.sleep(rng.uniform(0, 0.1))

    def _publish(self, contents: tuple[str, ...], base: str | None) -> int:
        return int((publish_contents(self.store, MODEL, *contents, base=base).name or "")[1:])

    def _collector(self) -> None:
        while not self._over.wait(0.05):
            called = time.monotonic()
            found = collect(self.store, grace=self.grace, keep=KEEP, delete=True, wait=timedelta(minutes=2))
            self.swept += any(item.kind == "blob" for item in found.garbage)
            for _, name in found.retired:
                self._note("retire", int(name[1:]), True, called)

    def _note(self, name: str, argument: int, answer: object, called: float) -> None:
        op = Op(name=name, argument=argument, answer=answer, called=called, answered=time.monotonic())  # type: ignore[arg-type]
        with self.log.lock:
            self.log.ops.append(op)

    def _reader(self, *, leased: bool) -> None:
        rng = random.Random(f"{self.seed} {leased}")
        while not self._over.wait(0.02):
            known = [int(name[1:]) for name, _ in named(self.store, MODEL)]
            if not known:
                continue
            number, called = rng.choice(known), time.monotonic()
            with open_run(self.store) if leased else contextlib.nullcontext():
                self._note("read", number, self._look(number, leased=leased), called)

    def _look(self, number: int, *, leased: bool) -> str:
        """What a reader finds under a name."""
        began = time.monotonic()
        digest = self._digest(number)
        if digest is None:
            return "no"
        whole = self._whole(digest)
        within = time.monotonic() - began < self.grace.total_seconds() - ROUNDING_SECONDS
        self.within_grace += within and not leased
        if whole:
            return "whole"
        # Something went while it was read: the name must have been given up, and, with a grace period, long ago.
        return "broken" if leased or within or self._digest(number) is not None else "no"

    def _digest(self, number: int) -> str | None:
        """What a live name stands for."""
        try:
            record = read_name(self.store, MODEL, f"v{number}")
        except (ObjectNotFoundError, ArtifactNotFoundError):
            return None
        return None if record.retired is not None else record.digest

    def _whole(self, digest: str) -> bool:
        try:
            found = load_version(self.store, MODEL, digest).stored
            return all(sha256(self.store.get(blob_key(record.blob))) == record.blob for record in found)
        except (ObjectNotFoundError, ArtifactNotFoundError):
            return False

    def _reader_of_latest(self) -> None:
        """`latest` never leads to what is not there, lease or none: it moves on before its version may go."""
        while not self._over.wait(0.02):
            called, pointer = time.monotonic(), aliases(self.store, MODEL).get("latest")
            if pointer is None:
                continue
            self._note("latest", 0, int(pointer.version[1:]), called)
            if not self._whole(pointer.digest) and aliases(self.store, MODEL)["latest"] == pointer:
                self._note("read", int(pointer.version[1:]), "broken", called)

    def _last_look(self) -> None:
        """Every version there ever was, after a last collection without grace: those that live are whole."""
        called = time.monotonic()
        for _, name in collect(self.store, grace=timedelta(0), keep=KEEP, delete=True).retired:
            self._note("retire", int(name[1:]), True, called)
        self.grace = timedelta(0)
        for number in [op.answer for op in self.log.ops if op.name == "publish"]:
            called = time.monotonic()
            self._note("read", int(str(number)), self._look(int(str(number)), leased=True), called)

    def _judge(self) -> list[str]:
        published = [op for op in self.log.ops if op.name == "publish"]
        latest = [op for op in self.log.ops if op.name == "latest"]
        wrong = [] if linearizable(published, 0, names) else ["the names given are no sequence"]
        if not linearizable([*published, *latest], 0, highest):
            wrong.append("latest was not at the highest version, or went back")
        for number in sorted({int(str(op.answer)) for op in published}):
            ops = [op for op in self.log.ops if op.name in ("read", "retire") and op.argument == number]
            ops += [replace(op, argument=number) for op in published if op.answer == number]
            if not linearizable(ops, "absent", lifetime):
                wrong.append(f"v{number}: lost, broken or seen at another time than it was there: {_shown(ops)}")
        return wrong


def _shown(ops: list[Op]) -> str:
    first = min(op.called for op in ops)
    told = sorted((round(op.called - first, 3), round(op.answered - first, 3), op.name, op.answer) for op in ops)
    return ", ".join(f"{name} -> {answer} [{called}, {answered}]" for called, answered, name, answer in told)
