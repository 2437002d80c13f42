"""The races of the fault suite, round after round with other seeds, as rows of its table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.harness.faults.race_caches import CacheRace
from tests.harness.faults.race_collections import CollectionRace

GRACE = timedelta(seconds=3)


@dataclass
class Row:
    """What came of all rounds of a race."""

    race: str
    rounds: int = 0
    operations: int = 0
    disturbances: int = 0
    """Collections that deleted something; prunes, damaged files and kills."""
    wrong: list[str] = field(default_factory=list)


def rows(folder: Path, bucket: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Run each race so many times, below `folder` and in a bucket's URL; a row as each is over."""
    races: dict[str, Callable[[Row, int], None]] = {
        "publishers against a collector without grace, S3": lambda row, seed: _collections(
            row, f"{bucket}/gc-{seed}", timedelta(0), seed
        ),
        "publishers against a collector without grace, directory": lambda row, seed: _collections(
            row, (folder / f"gc-{seed}").as_uri(), timedelta(0), seed
        ),
        f"publishers against a collector, {GRACE.seconds} s of grace, directory": lambda row, seed: _collections(
            row, (folder / f"grace-{seed}").as_uri(), GRACE, seed
        ),
        "pullers on a cache that is pruned and damaged, one killed": lambda row, seed: _caches(row, folder, seed),
    }
    for name, race in races.items():
        row = Row(race=name)
        for seed in range(rounds):
            race(row, seed)
            row.rounds += 1
        yield {**vars(row), "leaked": []}


def _collections(row: Row, url: str, grace: timedelta, seed: int) -> None:
    with open_store(url) as store:
        race = CollectionRace(store=store, grace=grace, seed=seed, turns=8)
        row.wrong += race.run()
    row.operations += len(race.log.ops)
    row.disturbances += race.swept


def _caches(row: Row, folder: Path, seed: int) -> None:
    home = folder / f"cache-{seed}"
    home.mkdir()
    store: Store
    with open_store((home / "store").as_uri()) as store:
        race = CacheRace(store=store, folder=home, seed=seed, prunes=10, harm=10)
        row.wrong += race.run()
    row.operations += len(race.pulls)
    row.disturbances += race.pruned + len(race.damages) + race.kills
