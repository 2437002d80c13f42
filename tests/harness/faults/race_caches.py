"""Pullers in processes of their own on one cache, which is pruned and damaged meanwhile, and one of them killed.

Each writes down what it pulled, as its files were when the pull returned, with the times of call and answer. A pull
gives just the bytes of the version that was asked for, whatever the others do; only where a file of the cache was
damaged during the very pull may its folder hold the damage, which the digests in its manifest tell.
"""

import hashlib
import json
import multiprocessing
import random
import shutil
import time
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.artifact import blob
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import MANIFEST_FILE, pull
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.registry.trust import ANY
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.faults.history import Op, Stall
from tests.pipeline.publishing import publish_contents

MODEL = "net"
VERSIONS = 3
DERIVED = 1
RANGE_BYTES = 16 << 10
"""Of the pullers' requests: blobs take several."""

ALL = timedelta(0)
ENOUGH = "enough"
"""A file that tells the pullers to end."""


def publish_versions(store: Store) -> dict[str, list[str]]:
    """Versions that share a blob, one of them as differences to a large base; name -> digests of its blobs in order."""
    found = {}
    for number in range(VERSIONS):
        contents = [f"{part} " * 12_000 for part in ("shared", f"large {number}")] + [
            f"small {number} {n}" for n in range(4)
        ]
        base = "base " * 12_000 if number == DERIVED else None
        manifest = (version := publish_contents(store, MODEL, *contents, base=base)).manifest
        found[str(version.name)] = [record.blob for record in (*manifest.bases, *manifest.shards)]
    return found


def puller(url: str, folder: str, cache_folder: str, seed: int, turns: int) -> None:
    """What a process does until it is told to end: pulls versions, some into the folder of the one before, and notes
    what it got.
    """
    blob.RANGE_BYTES = RANGE_BYTES
    rng, cache = random.Random(seed), BlobCache(Path(cache_folder))
    home = Path(folder, str(seed))
    home.mkdir()
    with open_store(url) as store, (home / "log").open("a") as log:
        turn = 0
        while turn < turns or not (Path(folder) / ENOUGH).exists():
            version, target, called = f"v{rng.randint(1, VERSIONS)}", home / f"out{turn // 2}", time.monotonic()
            try:
                pull(find(store, f"{MODEL}@{version}", cache, ANY), store, target, cache)
                answer = digests(target)
            except BirkhoffError as error:
                answer = [f"{type(error).__name__}: {error}"]
            log.write(json.dumps([version, answer, called, time.monotonic()]) + "\n")
            log.flush()
            turn += 1
            shutil.rmtree(home / f"out{turn // 2 - 2}", ignore_errors=True)


def digests(folder: Path) -> list[str]:
    """Of the bases and the shards of a pulled folder, in order; of one without a manifest none."""
    if not (folder / MANIFEST_FILE).is_file():
        return ["no manifest"]
    paths = [path for kind in ("base-*", "shard-*") for path in sorted(folder.glob(kind))]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@dataclass
class CacheRace:
    """One run of it below `folder`, on `store`."""

    store: Store
    folder: Path
    seed: int = 0
    pullers: int = 3
    turns: int = 4
    kills: int = 2
    prunes: int = 5
    harm: int = 5
    """Blobs to damage."""
    pulls: list[Op] = field(default_factory=list)
    damages: list[Op] = field(default_factory=list)
    pruned: int = 0
    """Prunes that removed a blob."""

    def run(self) -> list[str]:
        """What is wrong, as lines; empty where all holds."""
        self._rng, self._cache = random.Random(self.seed), BlobCache(self.folder / "cache")
        self._versions = publish_versions(self.store)
        self._context, self._started = multiprocessing.get_context("spawn"), 0
        running = [self._start() for _ in range(self.pullers)]
        stall = Stall(self._moved)
        try:
            while any(process.is_alive() for process in running) and not stall.over():
                self._disturb(running)
                time.sleep(self._rng.uniform(0.05, 0.2))
            if hung := [process.pid for process in running if process.is_alive()]:
                return [f"pullers that do not end: {hung}"]
        finally:
            for process in running:
                process.kill()
                process.join()
        codes = [process.exitcode for process in running if process.exitcode]
        return [f"a puller ended with {code}" for code in codes] + self._read_logs() + self._judge() + self._leavings()

    def _due(self) -> tuple[int, ...]:
        """Kills, prunes and damages that are still to come."""
        done = self._started - self.pullers, self.pruned, len(self.damages)
        return tuple(
            max(0, wanted - got) for got, wanted in zip(done, (self.kills, self.prunes, self.harm), strict=True)
        )

    def _moved(self) -> tuple[object, int]:
        """What is to come, and once nothing is, the bytes that pullers have logged: until then they go on and on."""
        due = self._due()
        return due, 0 if any(due) else sum(log.stat().st_size for log in self.folder.glob("*/log"))

    def _start(self) -> BaseProcess:
        self._started += 1
        given = self.store.url, str(self.folder), str(self._cache.folder), 100 * self.seed + self._started, self.turns
        process = self._context.Process(target=puller, args=given, daemon=True)
        process.start()
        return process

    def _disturb(self, running: list[BaseProcess]) -> None:
        """One of: prune what is not in use now, damage a blob, kill a puller and let another one begin."""
        if (self.folder / ENOUGH).exists() or not any(self.folder.glob("*/log")):
            return  # nobody has begun
        match self._rng.choice(("prune", "damage", "damage", "kill")):
            case "prune":
                self.pruned += self._cache.prune(unused=ALL).blobs > 0
            case "damage":
                self._damage()
            case "kill" if self._started < self.pullers + self.kills:
                place = self._rng.randrange(len(running))
                running[place].kill()
                running[place].join()
                running[place] = self._start()
        if not any(self._due()):
            (self.folder / ENOUGH).touch()

    def _damage(self) -> None:
        """Put a file with a changed byte in the place of a blob; its other names, in folders, stay as they are."""
        blobs = [path for path in (self._cache.folder / "sha256").rglob("*") if path.is_file()]
        if not blobs:
            return
        path, called = self._rng.choice(blobs), time.monotonic()
        fresh = self.folder / "damaged"
        try:
            body = bytearray(path.read_bytes())
        except FileNotFoundError:
            return  # pruned
        body[self._rng.randrange(len(body))] ^= 1
        fresh.write_bytes(body)
        fresh.replace(path)
        self.damages.append(
            Op(name="damage", argument=path.name, answer=None, called=called, answered=time.monotonic())
        )

    def _read_logs(self) -> list[str]:
        """Take up what the pullers wrote down; of a killed one the last line may be cut off."""
        for log in sorted(self.folder.glob("*/log")):
            for line in log.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    version, answer, called, answered = json.loads(line)
                    self.pulls.append(
                        Op(name="pull", argument=version, answer=tuple(answer), called=called, answered=answered)
                    )
        return [] if len(self.pulls) >= self.pullers * self.turns else [f"only {len(self.pulls)} pulls"]

    def _judge(self) -> list[str]:
        return [
            f"pull of {op.argument}: {op.answer} instead of {self._versions[str(op.argument)]}"
            for op in self.pulls
            if not explained(op, self._versions[str(op.argument)], self.damages)
        ]

    def _leavings(self) -> list[str]:
        """A last pull of each version is right, and pruned of everything the cache is empty."""
        wrong = []
        for version, blobs in self._versions.items():
            target = self.folder / f"last-{version}"
            pull(find(self.store, f"{MODEL}@{version}", self._cache, ANY), self.store, target, self._cache)
            if digests(target) != blobs:
                wrong.append(f"the last pull of {version} gave {digests(target)}")
            shutil.rmtree(target)
        self._cache.prune(unused=ALL)
        left = [path for path in self._cache.folder.rglob("*") if path.is_file() and path.parent.name != "refs"]
        return [*wrong, *(f"left in the cache: {path.relative_to(self._cache.folder)}" for path in left)]


def explained(op: Op, blobs: list[str], damages: list[Op]) -> bool:
    """Whether a pull's answer is its version, but for blobs that were damaged between its call and its answer."""
    during = {damage.argument for damage in damages if damage.called < op.answered and op.called < damage.answered}
    found = op.answer if isinstance(op.answer, tuple) else ()
    same = len(found) == len(blobs)
    return same and all(mine == theirs or theirs in during for mine, theirs in zip(found, blobs, strict=True))
