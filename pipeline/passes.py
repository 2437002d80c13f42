"""One model's way through the workers: every shard once, or for a budget once to foretell and then until it fits."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from birkhoff.codec.budget import Floats, Grid
from birkhoff.codec.profiles import Profile
from birkhoff.pipeline.artifact import (
    BudgetRecord,
    ShardRecord,
    VersionManifest,
)
from birkhoff.pipeline.budget import Search, Trial
from birkhoff.pipeline.errors import BudgetError
from birkhoff.pipeline.plan import ModelPlan
from birkhoff.pipeline.shard import Reuse, ShardResult, ShardSizes, ShardTask
from birkhoff.pipeline.tables import size

Describe = Callable[[Profile, Sequence[ShardRecord]], VersionManifest]
"""The manifest of the version that shards make, by the profile with the target that they were coded for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a budget has to go by: most bytes, and a target worth a try."""

    budget: BudgetRecord
    limit: int
    hint_db: float | None


class Passes:
    """Hands out the tasks of one model and takes their results, until `whole`.

    Then `records` are the shards, by index, of the version to publish, and `profile` has the target they were coded
    for.
    """

    def __init__(
        self,
        model: str,
        plan: ModelPlan,
        profile: Profile,
        describe: Describe,
        *,
        terms: Terms | None = None,
        reuse: Reuse = "trust",
    ) -> None:
        self.profile = profile
        self.records: dict[int, ShardRecord] = {}
        self.reused = 0
        self.whole = False
        self._model, self._plan, self._describe, self._terms, self._reuse = model, plan, describe, terms, reuse
        self._sizes: dict[int, Floats] = {}
        self._search: Search | None = None
        self._step = 0

    @property
    def first(self) -> bool:
        """Whether this is the first time that the shards are encoded."""
        return self._search is None or not self._search.passes

    @property
    def count(self) -> int:
        """Times that all shards were encoded, or found encoded."""
        return int(self.whole) if self._search is None else self._search.passes

    def start(self) -> list[ShardTask]:
        """The first tasks."""
        return self._tasks(foretell=self._terms is not None)

    def take(self, index: int, result: ShardResult | ShardSizes) -> list[ShardTask]:
        """Account for the result of a shard; returns the tasks that follow from it.

        Raises:
            BudgetError: no target fits.
        """
        if isinstance(result, ShardSizes):
            self._sizes[index] = np.array(result.bytes)
            return self._begin() if len(self._sizes) == len(self._plan.shards) else []
        self.records[index] = result.record
        self.reused += result.reused
        if len(self.records) < len(self._plan.shards):
            return []
        if self._search is None:
            self.whole = True
            return []
        self._search.note(Trial(step=self._step, bytes=self._count(), records=self.records, reused=self.reused))
        return self._next()

    def _tasks(self, *, foretell: bool = False) -> list[ShardTask]:
        tasks = []
        for index, tensors in enumerate(self._plan.shards):
            own = {t.name: self._plan.overrides[t.name] for t in tensors if t.name in self._plan.overrides}
            task = ShardTask(model=self._model, index=index, tensors=tensors, profile=self.profile, overrides=own)
            tasks.append(replace(task, reuse=self._reuse, foretell=foretell))
        return tasks

    def _begin(self) -> list[ShardTask]:
        assert self._terms is not None  # nothing is foretold without a budget
        coded = {plan.tensor.name for plan in self._plan.tensors if plan.action == "coded"}
        self.records = {index: _unknown(self._plan, index, coded) for index in range(len(self._plan.shards))}
        beside, sizes = self._count(), [self._sizes[index] for index in range(len(self._sizes))]
        grid, terms = Grid.of(self.profile), self._terms
        self._search = Search.begin(grid, terms.limit, sizes, beside, hint_db=terms.hint_db)
        return self._next()

    def _next(self) -> list[ShardTask]:
        """Tasks of the next pass; none where the search has ended."""
        assert self._search is not None
        step = self._search.next()
        if step is not None:
            self._step, self.records, self.reused = step, {}, 0
            self.profile = replace(self.profile, target_db=self._search.grid.target(step))
            return self._tasks()
        best = self._search.best
        if best is None:
            raise self._refusal(self._search)
        self.profile = replace(self.profile, target_db=self._search.grid.target(best.step))
        self.records, self.reused, self.whole = dict(best.records), best.reused, True
        return []

    def _count(self) -> int:
        """Every byte of the version that the present records make."""
        records = [self.records[index] for index in range(len(self._plan.shards))]
        return self._describe(self.profile, records).stored_bytes

    def _refusal(self, search: Search) -> BudgetError:
        assert self._terms is not None
        least, counted = search.least()
        return BudgetError(
            f"budget {self._terms.budget.label} leaves {size(search.limit)} ({search.limit} bytes); at the lowest "
            f"quality there is the version takes {'' if counted else 'about '}{size(least)} ({least} bytes): allow at "
            "least that much, or let fewer tensors be lossless"
        )


def _unknown(plan: ModelPlan, index: int, names: Container[str]) -> ShardRecord:
    """A record of the length that a shard's will have, with a container of no bytes; `names` are coded tensors'."""
    coded = [t.shape for t in plan.shards[index] if t.name in names]
    matrices = [shape for shape in coded if len(shape) == 2 and shape[1] > 1]
    return ShardRecord(
        key="0" * 64,
        blob="0" * 64,
        bytes=0,
        source_bytes=10**7,
        tensors=len(plan.shards[index]),
        sqnr_db=(30.01,) * len(coded),
        probe_db=(30.01,) * len(matrices),
        probe_error=1.2e-07,
    )
