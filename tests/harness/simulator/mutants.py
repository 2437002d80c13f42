"""The product with one rule of the protocol broken: each must be found out, or the simulator is blind to that rule.

`old_sweep` and `old_publish` are the two faults that were shown with real processes: a collection that checks its lease
and then deletes, and a publisher that checks its blobs and then takes a name.
"""

import contextlib
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from birkhoff.pipeline.errors import PreconditionError, StoreError
from birkhoff.pipeline.registry import aliases, gc, leases, names, versions
from birkhoff.pipeline.registry.documents import NameRecord, alias_key, blob_key, name_key, utc_now, version_key
from birkhoff.pipeline.registry.parallel import each
from tests.harness.simulator.scenario import Finding, Focus, run


def old_sweep(store: Any, mark: Any, found: Any, lease: Any) -> None:
    """Mark and delete, with a look at the lease before each deletion."""

    def delete(item: Any) -> None:
        lease.check()
        store.delete(item.info.key)

    for kind in gc.KINDS:
        each(delete, [item for item in found.garbage if item.kind == kind])


def old_publish(store: Any, manifest: Any, **_: Any) -> Any:
    """Check the blobs, then take a name that is live at once."""
    model, digest, publisher = manifest.model, manifest.digest, uuid.uuid4().hex
    with leases.open_run(store) as run:
        if not versions.is_whole(store, manifest):
            raise StoreError("a blob has gone since it was stored")
        store.create(version_key(model, digest), manifest.to_bytes())
        run.check()
        held = [(name, record.digest == digest) for name, record in names.names(store, model)]
        older = next((name for name, same in reversed(held) if same), None)
        if older is not None and held[-1][0] == older:
            name = older
        else:
            taken = max(map(names.number, names.given(store, model)), default=0)
            while True:
                taken += 1
                record = NameRecord(digest=digest, created=utc_now(), publisher=publisher)
                with contextlib.suppress(PreconditionError):
                    store.create(name_key(model, f"v{taken}"), record.to_bytes())
                    name = f"v{taken}"
                    break
        run.check()
        aliases.advance(store, model, name, publisher)
        return versions.Version(model=model, name=name, digest=digest, manifest=manifest)


def no_fence(store: Any, model: str) -> set[str]:
    """Look at the aliases, and rewrite none."""
    return {record.version for record in aliases.aliases(store, model).values()}


def one_step_alias(store: Any, model: str, alias: str, decide: Any, signer: Any) -> Any:
    """Make a new alias at once where it shall point."""
    for _ in range(names.RACES):
        before, tag = aliases._read(store, model, alias)
        after = decide(before)
        if after is None:
            return None
        with contextlib.suppress(PreconditionError):
            key = alias_key(model, alias)
            store.replace(key, after.to_bytes(), tag=tag) if tag else store.create(key, after.to_bytes())
            if not names.read_name(store, model, after.version).live:
                names.revive_name(store, model, after.version)
            return None
    return None


def put_live(store: Any, model: str, claim: Any) -> bool:
    """Make a claim live whatever became of it."""
    store.put(name_key(model, claim.name), claim.record.model_copy(update={"retired": None}).to_bytes())
    return True


def put_dead(store: Any, model: str, name: str, record: Any, tag: str) -> bool:
    """Bury a name whatever became of it."""
    dead = record.model_copy(update={"digest": "0" * 64, "retired": record.retired or utc_now()})
    store.put(name_key(model, name), dead.to_bytes())
    return True


def plain_delete(sweep: Any, key: str) -> None:
    """Delete without a permit."""
    sweep._store.delete(key)


def name_seen_before(real: Any = aliases.live_name) -> Any:
    """Look at the name before the alias is read, and go by that afterwards."""
    seen: dict[Any, Any] = {}

    def look(store: Any, model: str, name: str) -> Any:
        place = (store, model, name)
        if place in seen:
            return seen.pop(place)
        seen[place] = found = real(store, model, name)
        return found

    return look


def own_blobs(manifest: Any) -> set[str]:
    """What a version holds itself, and not what it is a difference to."""
    return {blob_key(record.blob) for record in manifest.own}


def _nothing(*_: Any) -> None:
    return None


def _empty(*_: Any) -> tuple[str, ...]:
    return ()


def _true(*_: Any) -> bool:
    return True


def _false(*_: Any) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A rule that is broken, and where that shows."""

    changes: dict[str, Any]
    """What replaces what, as for `scenario.simulated`."""
    focus: Focus
    seed: int
    """A schedule that shows it."""


_WEEK = timedelta(days=7)
_GC_STOPS = Focus(like="directory", roles=("collect", "publish"), base=1)
_PUBLISHER_STOPS = Focus(like="directory", roles=("publish", "collect"), base=1)
_MOVER_STOPS = Focus(like="directory", roles=("move", "retire", "collect"), base=5)
_ON_S3 = Focus(like="s3", roles=("collect", "publish", "publish"), base=2, duel=False)
_SENT_TWICE = Focus(like="s3", roles=("collect", "publish", "publish"), base=2, grace=_WEEK, duel=False, repeats=True)
_BASE_GOES = Focus(like="directory", roles=("derive", "publish", "retire", "collect"), base=1, duel=False)
_ALL_MOVE = Focus(like="directory", roles=("move", "move", "retire", "collect"), base=5, duel=False)
_COPY_COMES = Focus(like="directory", roles=("install", "retire", "collect", "collect"), base=5, duel=False)
_LISTINGS_LAG = Focus(
    like="s3", roles=("publish", "collect", "publish", "collect"), base=1, grace=_WEEK, duel=False, stale=True
)

MUTANTS = {
    "old sweep": Mutant(changes={"gc___sweep": old_sweep}, focus=_GC_STOPS, seed=56),
    "old publish": Mutant(changes={"versions__publish": old_publish}, focus=_PUBLISHER_STOPS, seed=80),
    "no look again": Mutant(changes={"gc___Mark__look_again": _nothing}, focus=_GC_STOPS, seed=131),
    "no look at what is condemned": Mutant(changes={"versions__settle": _nothing}, focus=_GC_STOPS, seed=5),
    "no permit": Mutant(changes={"fencing__Sweep__delete": plain_delete}, focus=_GC_STOPS, seed=5),
    "nothing comes twice": Mutant(changes={"fencing__Sweep___under_way": _empty}, focus=_SENT_TWICE, seed=1791),
    "no wait for the end of a permit": Mutant(changes={"fencing__wait_for_end": _nothing}, focus=_ON_S3, seed=696),
    "a claim made live by force": Mutant(changes={"versions__make_live": put_live}, focus=_PUBLISHER_STOPS, seed=1059),
    "no look at the blobs after the claim": Mutant(
        changes={"versions__is_whole": _true}, focus=_PUBLISHER_STOPS, seed=20
    ),
    "a name buried by force": Mutant(
        changes={"gc__bury": put_dead},
        focus=Focus(like="directory", roles=("collect", "publish", "publish", "collect"), base=1, duel=False),
        seed=98,
    ),
    "aliases not rewritten before a burial": Mutant(changes={"gc__fence": no_fence}, focus=_ALL_MOVE, seed=1440),
    "a new alias in one step": Mutant(changes={"aliases___swap": one_step_alias}, focus=_MOVER_STOPS, seed=330),
    "a name looked at before its alias": Mutant(
        changes={"aliases__live_name": name_seen_before()}, focus=_ALL_MOVE, seed=17
    ),
    "no record of the numbers that were given": Mutant(
        changes={"gc__remember_given": _nothing}, focus=_COPY_COMES, seed=9
    ),
    "bases not reached": Mutant(changes={"gc___needed": own_blobs}, focus=_BASE_GOES, seed=49),
    "no look at what was touched": Mutant(changes={"gc___touched": _false}, focus=_LISTINGS_LAG, seed=137),
    "no touch of what is reused": Mutant(
        changes={"versions__FRESH": timedelta(days=10000)}, focus=_LISTINGS_LAG, seed=3968
    ),
}
"""By name."""


def work(chunk: tuple[range, str | None, bool]) -> tuple[int, Finding | None]:
    """Run schedules, of a mutant if one is named, with derived versions if so asked; as `scenario.run`."""
    seeds, name, derived = chunk
    if name is None:
        return run(seeds, derived=derived)
    return run(seeds, focus=MUTANTS[name].focus, derived=derived, **MUTANTS[name].changes)
