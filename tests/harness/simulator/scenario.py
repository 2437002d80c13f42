"""What processes do in a schedule: the product's own functions, over a store and a clock that a seed disturbs."""

import contextlib
import itertools
import random
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Any, get_args

from greenlet import getcurrent

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    ObjectNotFoundError,
    StoreError,
)
from birkhoff.pipeline.registry import aliases, clock, fencing, gc, leases, names, parallel, shipping, versions
from birkhoff.pipeline.registry.documents import (
    BaseBlob,
    BlobRecord,
    ShardRecord,
    SourceRecord,
    VersionManifest,
    blob_key,
    sha256,
)
from birkhoff.pipeline.shard.run import find_record, keep_shard
from birkhoff.pipeline.store.base import Store
from tests.harness.simulator.engine import DAY, HOUR, MINUTE, START, Like, Process, Simulation, Violation, Weather
from tests.harness.simulator.reader import Reader
from tests.pipeline.publishing import record_of

MODELS = ("m", "n")
CONTENTS = ("a", "b", "c", "d")
DERIVED = ("x", "y")
"""What shards hold that are differences to others."""

REFUSALS = (StoreError, ArtifactNotFoundError, AliasError)
"""What a participant may be told: it then stops, as a command does."""


class Lock:
    """A lock among greenlets."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            getcurrent().process.simulation.sleep(0.05)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class Keeper:
    """Renews a lease as a greenlet of the process."""

    def __init__(self, lease: leases.Lease) -> None:
        self._lease, self._stopped, self._busy = lease, False, False

    def start(self) -> None:
        process: Process = getcurrent().process
        process.start(lambda: self._keep(process.simulation), leases.LEASE_SECONDS / leases.RENEWALS)

    def stop(self) -> None:
        self._stopped = True
        while self._busy:
            getcurrent().process.simulation.sleep(0.05)

    def _keep(self, simulation: Simulation) -> None:
        while not self._stopped:
            self._busy = True
            leases.keep_once(self._lease)
            self._busy = False
            simulation.sleep(leases.LEASE_SECONDS / leases.RENEWALS)


def _pause(seconds: float) -> None:
    getcurrent().process.simulation.sleep(seconds)


def _seconds() -> float:
    process = getattr(getcurrent(), "process", None)
    return process.seconds() if process else 0.0


def _utc() -> datetime:
    process = getattr(getcurrent(), "process", None)
    return START + timedelta(seconds=process.simulation.now + process.wall_offset) if process else START


def _uuid4() -> uuid.UUID:
    process = getattr(getcurrent(), "process", None)
    rng = process.simulation.rng if process else _SEEDED
    return uuid.UUID(int=rng.getrandbits(128), version=4)


_SEEDED = random.Random(0)


@contextlib.contextmanager
def simulated(**more: Any) -> Iterator[None]:
    """The product's clock, threads and random names taken over; `more` replaces functions, `module__name=function`."""
    if more:  # the histories are made by the product as it is
        for like, number in itertools.product(get_args(Like), range(BASES)):
            base(like, number)
    threading = types.SimpleNamespace(Lock=Lock)
    changes: list[tuple[Any, str, Any]] = [
        (clock, "pause", _pause),
        (clock, "seconds", _seconds),
        (clock, "utc", _utc),
        (uuid, "uuid4", _uuid4),
        (parallel, "THREADS", 1),
        (leases, "Keeper", Keeper),
        (leases, "threading", threading),
        (leases, "POLL_SECONDS", 7.0),
        (fencing, "threading", threading),
    ]
    modules = {module.__name__.rpartition(".")[2]: module for module in (aliases, fencing, gc, leases, names, versions)}
    for place, value in more.items():
        module, _, name = place.partition("__")
        owner, _, member = name.partition("__")
        target = getattr(modules[module], owner) if member else modules[module]
        changes.append((target, member or owner, value))
    before = [(target, name, getattr(target, name)) for target, name, _ in changes]
    disabled = [(logger, logger.disabled) for logger in (aliases.log, fencing.log, leases.log)]
    try:
        for target, name, value in changes:
            setattr(target, name, value)
        for logger, _ in disabled:
            logger.disabled = True
        yield
    finally:
        for target, name, value in reversed(before):
            setattr(target, name, value)
        for logger, state in disabled:
            logger.disabled = state


def derived_record(content: str, base: ShardRecord) -> ShardRecord:
    """The record of a shard that is a difference to another."""
    key, blob = sha256(f"{content} on {base.blob}".encode()), BaseBlob(blob=base.blob, bytes=base.bytes)
    return record_of(content).model_copy(update={"key": key, "bases": (blob,)})


def shard_of(store: Store, content: str, base: ShardRecord | None = None) -> ShardRecord:
    """The record of a shard, found or made as a worker does; `base` is the shard that it is a difference to."""
    record = record_of(content) if base is None else derived_record(content, base)
    found = find_record(store, record.key)
    if found is None:
        keep_shard(store, content.encode(), record)
    return record


def manifest_of(model: str, contents: tuple[str, ...]) -> VersionManifest:
    """A version of shards of these bytes."""
    source = SourceRecord(file="f", sha256=sha256("".join(contents).encode()), bytes=9, format="test")
    shards = tuple(record_of(content) for content in contents)
    return VersionManifest(model=model, source=source, profile="p", recipe={}, code="0", shards=shards)


def publish(store: Store, model: str, contents: tuple[str, ...]) -> versions.Version:
    """Store the shards and publish the version."""
    for content in contents:
        shard_of(store, content)
    return versions.publish(store, manifest_of(model, contents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a store holds when a schedule begins."""

    objects: dict[str, Any]
    written: int


def _history(store: Store, number: int, at: Callable[[float], None]) -> None:
    """Some histories: nothing; a version that may go; shards that a dead run left; aliases; names of two models."""
    at(-40 * DAY)
    if number == 1:
        publish(store, "m", ("a", "b"))
        publish(store, "m", ("c",))
        gc.retire(store, "m", 1)
    elif number == 2:
        for content in CONTENTS[:3]:
            shard_of(store, content)
    elif number == 3:
        publish(store, "m", ("a", "b"))
        publish(store, "m", ("c",))
        aliases.promote(store, "m", "v1")
        at(-HOUR)
        publish(store, "m", ("d",))
    elif number == 5:
        at(-30 * MINUTE)
        for content in CONTENTS:
            publish(store, "m", (content,))
        gc.retire(store, "m", 3)
    elif number == 4:
        publish(store, "m", ("a",))
        publish(store, "n", ("a", "b"))
        publish(store, "m", ("c", "d"))
        gc.retire(store, "m", 1)
        at(-30 * MINUTE)
        publish(store, "n", ("d",))
        gc.retire(store, "n", 1)


BASES = 6


@cache
def base(like: Like, number: int) -> Base:
    """One of the histories, made without disturbance."""
    with simulated():
        simulation = Simulation(number, like, Weather())
        process = Process(simulation, "history")

        def at(seconds: float) -> None:
            simulation.store_offset = seconds - simulation.now

        process.start(lambda: _history(process.store, number, at))
        simulation.run()
        if simulation.violation is not None:
            raise simulation.violation
        simulation.close()
    return Base(objects=dict(simulation.shelf.objects), written=simulation.shelf.written)


@dataclass(frozen=True, slots=True, kw_only=True)
class Focus:
    """What is not left to the seed: for a fault that one knows."""

    like: Like
    roles: tuple[str, ...]
    base: int
    grace: timedelta = timedelta(0)
    duel: bool = True
    """The first of the roles is stopped once, and nothing else happens."""
    stale: bool = False
    repeats: bool = False
    """Many requests take effect twice."""


class Schedule:
    """Everything that a seed decides, run to its end."""

    def __init__(self, seed: int, *, focus: Focus | None = None, derived: bool = False, trace: bool = False) -> None:
        rng = random.Random(f"schedule {seed}")
        self.seed, self._focus, self._derived = seed, focus, derived
        self.like: Like = rng.choices(("directory", "s3", "plain"), (4, 5, 1))[0]
        if focus is not None:
            self.like = focus.like
        self.grace = timedelta(seconds=rng.choice((0.0, 0.0, 2 * HOUR, 7 * DAY)))
        if focus is not None:
            self.grace = focus.grace
        self._duel = rng.random() < 0.4 if focus is None else focus.duel
        """Whether one process is stopped once, for as long as the others need, and nothing else is."""
        self.weather = _weather(
            rng,
            self.like,
            self.grace,
            duel=self._duel,
            lags=focus is not None and focus.stale,
            repeats=focus is not None and focus.repeats,
        )
        self.simulation = Simulation(seed, self.like, self.weather, trace=trace)
        start = base(self.like, rng.randrange(BASES) if focus is None else focus.base)
        self.simulation.shelf.objects.update(start.objects)
        self.simulation.shelf.written = start.written
        self.reader = Reader(self.simulation)
        self._rng = rng
        self._patient = rng.random() < 0.5

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.like}, grace {self.grace}, {self.weather}"

    def run(self) -> None:
        """Raises what went wrong: Violation, or what the product should never raise."""
        rng, simulation = self._rng, self.simulation
        often, seldom = (1, 2), (0, 1)
        counts = {
            self._publish: (1, 3),
            self._collect: often,
            self._move: (0, 2),
            self._retire: seldom,
            self._read: seldom,
        }
        roles = [role for role, limits in counts.items() for _ in range(rng.randint(*limits))]
        if self._focus is None:
            roles += [self._install] * rng.randint(*seldom)
        if self._derived:
            roles += [self._derive] * rng.randint(1, 2)
        span = rng.choice((0.1, 3.0, 60.0))
        stopped = rng.randrange(len(roles)) if self._duel else -1
        if self._focus is not None:
            roles, stopped = [getattr(self, f"_{role}") for role in self._focus.roles], 0
        for number, role in enumerate(roles):
            process = Process(simulation, f"{role.__name__[1:]} {number}")
            if number == stopped and self._duel:
                process.pause_at = rng.randint(1, 60)
            process.start(partial(self._guard, role, process), rng.random() * span)
        try:
            simulation.run()
            self._check()
            if self.seed % 4 == 0 and self.like != "plain":
                self._finish()
        finally:
            simulation.close()

    def _check(self) -> None:
        if self.simulation.violation is not None:
            raise self.simulation.violation

    def _guard(self, role: Callable[[Process], None], process: Process) -> None:
        try:
            role(process)
        except REFUSALS as error:
            if self.simulation.trace is not None:
                self.simulation.trace.append(f"{self.simulation.now:12.2f} {process.name:12} ends: {error}")
            if isinstance(error, ArtifactNotFoundError) and role == self._collect:
                raise Violation(f"a collection found the store damaged: {error}") from error

    def _publish(self, process: Process) -> None:
        rng, store = self._rng, process.store
        for _ in range(rng.randint(1, 2)):
            model, contents = rng.choice(MODELS), tuple(rng.sample(CONTENTS, rng.randint(1, 2)))
            keep = rng.choice((0, 1, 2))
            with leases.open_run(store) if rng.random() < 0.8 else contextlib.nullcontext():
                publish(store, model, contents)
                if keep:
                    gc.retire(store, model, keep)

    def _derive(self, process: Process) -> None:
        """Versions whose shards are differences to those of the latest version of some model, which may be given up."""
        rng, store = self._rng, process.store
        for _ in range(rng.randint(1, 2)):
            with leases.open_run(store) if rng.random() < 0.8 else contextlib.nullcontext():
                base = versions.latest_version(store, rng.choice(MODELS))
                direct = [] if base is None else [shard for shard in base.manifest.shards if not shard.bases]
                if not direct:
                    return
                shard = shard_of(store, rng.choice(DERIVED), rng.choice(direct))
                manifest = manifest_of(rng.choice(MODELS), ("a",))
                versions.publish(store, manifest.model_copy(update={"shards": (shard,)}))
                if rng.random() < 0.5:
                    for model in MODELS:
                        gc.retire(store, model, 1)

    def _install(self, process: Process) -> None:
        """Versions come from another store, most of them under the names that they have there."""
        rng, store = self._rng, process.store
        for _ in range(rng.randint(1, 2)):
            contents = tuple(rng.sample(CONTENTS, rng.randint(1, 2)))
            manifest, bodies = manifest_of(rng.choice(MODELS), contents), [*contents]
            if self._derived and rng.random() < 0.5:  # a difference comes with what it is one to
                content = rng.choice(DERIVED)
                shard = derived_record(content, record_of(contents[0]))
                manifest, bodies = manifest.model_copy(update={"shards": (shard,)}), [content, contents[0]]
            parcel = shipping.Parcel(
                origin="elsewhere",
                name=f"v{rng.randint(1, 5)}",
                alias=rng.choice((None, "stable")),
                manifest=manifest,
                beside={},
            )
            held = {sha256(body.encode()): body.encode() for body in bodies}

            def bring(records: Sequence[BlobRecord], bodies: dict[str, bytes] = held) -> None:
                for record in records:
                    shipping.put_blob(store, record, bodies[record.blob])

            with contextlib.suppress(*REFUSALS):
                shipping.install(store, parcel, bring, shipping.Delivery(rename=rng.random() < 0.3))

    def _collect(self, process: Process) -> None:
        for _ in range(self._rng.randint(1, 2)):
            keep = self._rng.choice((None, 1, 2))
            wait = timedelta(seconds=self._rng.choice((0.0, 90.0)) if self._patient else 0.0)
            with contextlib.suppress(StoreError):  # the next one takes up what is left
                gc.collect(process.store, grace=self.grace, keep=keep, delete=True, wait=wait)

    def _move(self, process: Process) -> None:
        rng, store = self._rng, process.store
        for _ in range(rng.randint(1, 3)):
            model, alias = rng.choice(MODELS), rng.choice(("stable", "latest", "beta"))
            known = [name for name, _ in names.names(store, model)]
            with contextlib.suppress(*REFUSALS):
                if known and rng.random() < 0.7:
                    aliases.promote(store, model, rng.choice(known), alias)
                else:
                    aliases.rollback(store, model, alias)

    def _retire(self, process: Process) -> None:
        with leases.open_run(process.store):
            for model in MODELS:
                gc.retire(process.store, model, 1)

    def _read(self, process: Process) -> None:
        """Without a lease: a version that resolved is there for the grace period, and longer if not given up."""
        rng, store, simulation = self._rng, process.store, self.simulation
        for _ in range(3):
            model, reference = rng.choice(MODELS), rng.choice(("", "@stable", "@v1", "@v2"))
            began = simulation.now
            digest = versions._find(store, model, reference[1:] or "latest")[1]
            try:
                manifest = versions.load_version(store, model, digest)
                for record in manifest.stored:
                    store.get(blob_key(record.blob), length=MAX_DOCUMENT_BYTES)
            except (ArtifactNotFoundError, ObjectNotFoundError) as error:
                took = simulation.now - began
                if took < self.grace.total_seconds() - MINUTE and not self.weather.store_steps:
                    raise Violation(f"{model}{reference} went while it was read, in {took:.0f} s: {error}") from error
                return

    def _finish(self) -> None:
        """Undisturbed again, a version can be published, and collections leave just what something refers to."""
        simulation = self.simulation
        simulation.weather = Weather()
        # A store's clock may have gone back by more than that: nobody collects what seems to be of the future.
        newest = max(
            (entry.info.modified for entry in simulation.shelf.objects.values()), default=simulation.store_time()
        )
        simulation.now += 40 * DAY + max(0.0, (newest - simulation.store_time()).total_seconds())
        simulation.history.clear()
        process, done = Process(simulation, "at the end"), list[str]()
        found = fencing.read_sweep(simulation.inner)

        def work() -> None:
            name = publish(process.store, "m", ("a", "b")).name
            if f"models/m/names/{name}.json" not in self.reader.live():
                raise Violation(f"{name} was published and is not live")
            gc.collect(process.store, grace=timedelta(0), keep=1, delete=True)
            simulation.sleep(MINUTE)
            gc.collect(process.store, grace=timedelta(0), keep=1, delete=True)
            simulation.sleep(MINUTE)
            gc.collect(process.store, grace=timedelta(0), keep=1, delete=True)  # clears what is condemned
            done.append("all")

        process.start(work)
        simulation.run()
        self._check()
        if not done:
            raise Violation("nobody disturbed it, and it did not end")
        left = {key for key in simulation.shelf.objects if not key.startswith(("models/", "shards/"))}
        record = fencing.read_sweep(simulation.inner)
        # On S3 it stays. Elsewhere one whose collection was killed does, until another has something to condemn.
        if record is not None and not record[0].keys and (self.like == "s3" or record == found):
            left.remove(fencing.SWEEP_KEY)
        if wrong := left ^ {key for key in self.reader.needed if key.startswith("blobs/")}:
            raise Violation(f"a last collection left or took {', '.join(sorted(wrong))}")


def _weather(rng: random.Random, like: Like, grace: timedelta, *, duel: bool, lags: bool, repeats: bool) -> Weather:
    """What a store of this kind can do to who uses it, and what machines do."""
    rough = rng.choice((0.3, 1.0, 3.0))
    remote = like != "directory" and not duel
    steps = like == "directory" and rng.random() < 0.2
    stale = lags or (not steps and grace > timedelta(hours=1) and rng.random() < 0.3)
    return Weather(
        pause=0.0 if duel else 0.02 * rough,
        kill=0.0 if duel else 0.002 * rough,
        lost=0.004 * rough if remote else 0.0,
        ghost=0.004 * rough if remote else 0.0,
        # Requests of the same body twice, a quarter of an hour apart, need the grace period (PROTOCOL.md).
        twice=(0.1 if repeats else 0.004 * rough) if remote and grace else 0.0,
        late_seconds=15 * MINUTE,
        stale=0.2 + 0.3 * lags if stale else 0.0,
        stale_seconds=30 * MINUTE,
        skewed=rng.random() < 0.5,
        store_steps=steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was wrong in a schedule."""

    seed: int
    text: str


def run(
    seeds: Iterable[int], focus: Focus | None = None, *, derived: bool = False, **changes: Any
) -> tuple[int, Finding | None]:
    """Run schedules until one is wrong; how many store operations there were. `changes` as in `simulated`.

    `derived` adds publishers whose versions are differences to others.
    """
    operations = 0
    with simulated(**changes):
        for seed in seeds:
            schedule = Schedule(seed, focus=focus, derived=derived)
            try:
                schedule.run()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                return operations, Finding(seed=seed, text=f"{type(error).__name__}: {error}")
            operations += schedule.simulation.operations
    return operations, None
