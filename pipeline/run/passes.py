"""The passes of one model through the workers: its statistics, its shards, its proof.

Shards are encoded once. For a budget in bytes they are estimated once, then encoded until they fit. For a target of the
outputs they are encoded and proven until the lowest sufficient dB is found.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from birkhoff.pipeline.errors import BudgetError
from birkhoff.pipeline.plan.budget import DOUBT, DOUBT_OF_DIFFERENCES, Search, Trial, lowest_step
from birkhoff.pipeline.plan.grid import Floats, Grid
from birkhoff.pipeline.plan.output_search import OutputSearch, Wanted
from birkhoff.pipeline.plan.shards import ModelPlan
from birkhoff.pipeline.proof.task import Proof, ProofTask
from birkhoff.pipeline.registry.documents import (
    Agreement,
    BudgetRecord,
    Int8Record,
    ProofRecord,
    ShardRecord,
    VersionManifest,
)
from birkhoff.pipeline.run.outcome import Result
from birkhoff.pipeline.run.queue import Task
from birkhoff.pipeline.shard.task import Reuse, ShardSizes, TensorPlan
from birkhoff.pipeline.statistics.task import Statistics, StatisticsTask
from birkhoff.pipeline.text import size

Describe = Callable[[ModelPlan, Sequence[ShardRecord]], VersionManifest]
"""Returns the manifest, without a proof, of the version that the shards make under a plan."""

Prove = Callable[[VersionManifest], ProofTask]
"""Returns the task that proves the version of a manifest."""

Ask = Callable[[], StatisticsTask]
"""Returns the task that measures a model's statistics or finds them in the store."""


_MOST = Agreement(
    inputs=9999, prompts=99999, agreement_mean=0.999, agreement_p5=0.999, embedding_db=-99.9, output_db=-99.9
)
PROOF_BYTES = len(
    ProofRecord(adapter="efficient_tam", pictures_version=99, shapes_iou=0.999, measured=_MOST, own=_MOST).to_bytes()
)
"""The longest a proof's record can be in a manifest. A budget counts it before the proof is made."""

INT8_BYTES = len(Int8Record(layers=99999, least_db=-99.9, measured=_MOST, own=_MOST).to_bytes())
"""What one on int8 takes besides, without the names of the layers left in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of a budget: the most bytes, and a target to try first. A budget of the outputs uses neither."""

    budget: BudgetRecord
    limit: int
    hint_db: float | None


class Passes:
    """Hands out the tasks of one model and takes their results, until `whole` is set.

    Then `records` are the shards, by index, of the version to publish, `plan` is what they were coded by, and `proof`
    what came of the proof, if `prove` was given; with `int8` that measures int8 too. With `ask` the plan is by the
    model's `statistics`.
    """

    def __init__(
        self,
        model: str,
        plan: ModelPlan,
        describe: Describe,
        *,
        terms: Terms | None = None,
        reuse: Reuse = "trust",
        prove: Prove | None = None,
        ask: Ask | None = None,
        int8: bool = False,
    ) -> None:
        self.plan: ModelPlan = plan
        self.records: dict[int, ShardRecord] = {}
        self.reused: int = 0
        self.whole: bool = False
        self.proof: Proof | None = None
        self.statistics: Statistics | None = None
        self._prove, self._ask, self._int8 = prove, ask, int8
        self._model, self._describe, self._terms, self._reuse = model, describe, terms, reuse
        self._sizes: dict[int, Floats] = {}
        self._search: Search | None = None
        self._outputs: OutputSearch | None = None
        self._probed: dict[int, tuple[dict[int, ShardRecord], int, Proof]] = {}
        self._step = 0

    @property
    def first(self) -> bool:
        """Whether the shards are encoded for the first time."""
        return not (self._search.passes if self._search else self._outputs.probes if self._outputs else 0)

    @property
    def count(self) -> int:
        """How often all shards were encoded or found encoded."""
        if self._outputs is not None:
            return self._outputs.probes
        return int(self.whole) if self._search is None else self._search.passes

    def start(self) -> list[Task]:
        """Return the first tasks: of statistics if they are needed, else of shards."""
        return self._encode() if self._ask is None else [self._ask()]

    def _encode(self) -> list[Task]:
        """Return the first tasks of shards: encodings, or for a budget in bytes estimates."""
        if self._terms is None:
            return [*self.plan.tasks(self._model, reuse=self._reuse)]
        if self._terms.budget.by_output:
            lowest = lowest_step(self.plan, self._terms.budget.least_db)
            self._outputs = OutputSearch(grid=Grid.of(self.plan.profile), lowest=lowest)
            return self._probe()
        return [*self.plan.estimates(self._model, Grid.of(self.plan.profile).knots, reuse=self._reuse)]

    def take(self, index: int, result: Result) -> list[Task]:
        """Record the result of a task. Returns the tasks that follow.

        Raises:
            BudgetError: No target fits the bytes, or none reaches the wanted agreement or dB of the outputs.
        """
        if isinstance(result, Statistics):
            self.statistics, self.plan = result, self.plan.with_statistics(result.record)
            return self._encode()
        if isinstance(result, Proof):
            self.proof, self.whole = result, self._outputs is None
            return [] if self.whole else self._probed_one(result)
        if isinstance(result, ShardSizes):
            self._sizes[index] = np.array(result.bytes)
            return self._begin() if len(self._sizes) == len(self.plan.shards) else []
        self.records[index] = result.record
        self.reused += result.reused
        if len(self.records) < len(self.plan.shards):
            return []
        if self._search is None:
            return self._end()
        self._search.note(Trial(step=self._step, bytes=self._count(), records=self.records, reused=self.reused))
        return self._next()

    def _end(self) -> list[Task]:
        """Return the task of the proof once all shards are encoded; none if no proof is due."""
        if self._prove is None:
            self.whole = True
            return []
        records = [self.records[index] for index in range(len(self.plan.shards))]
        return [self._prove(self._describe(self.plan, records))]

    def _probe(self) -> list[Task]:
        """Return the tasks of the next version to prove; none if the search has ended."""
        assert self._outputs is not None
        grid, step = self._outputs.grid, self._outputs.next()
        if step is not None:
            self._step, self.records, self.reused = step, {}, 0
            self.plan = self.plan.at(grid.target(step))
            return [*self.plan.tasks(self._model, reuse=self._reuse)]
        best = self._outputs.best
        if best is None:
            raise self._out_of_reach(grid)
        self.plan = self.plan.at(grid.target(best))
        (self.records, self.reused, self.proof), self.whole = self._probed[best], True
        return []

    def _probed_one(self, proof: Proof) -> list[Task]:
        """Record a proof of the search, and return the tasks that follow."""
        assert self._outputs is not None
        assert self._terms is not None
        assert proof.record is not None  # a search requires proofs, and a missing one is an error
        budget, found = self._terms.budget, proof.record.figures
        wanted = Wanted(agreement=budget.target_agreement, output_db=budget.target_output_db)
        self._probed[self._step] = self.records, self.reused, proof
        self._outputs.note(self._step, wanted.lacking_db(found["agreement_mean"], found["output_db"]))
        return self._probe()

    def _out_of_reach(self, grid: Grid) -> BudgetError:
        assert self._terms is not None
        highest = max(self._probed)
        proof = self._probed[highest][-1].record
        budget = self._terms.budget
        key = "agreement_mean" if budget.target_agreement is not None else "output_db"
        found = proof.figures[key] if proof else None
        return BudgetError(
            f"{budget.label} is out of reach: at {grid.target(highest):g} dB it is {found}; ask for less, or make more "
            "tensors lossless by overrides"
        )

    def _begin(self) -> list[Task]:
        assert self._terms is not None  # only budgets need estimates
        self.records = {index: _unknown(shard) for index, shard in enumerate(self.plan.shards)}
        beside, sizes = self._count(), [self._sizes[index] for index in range(len(self._sizes))]
        grid, terms = Grid.of(self.plan.profile), self._terms
        lowest = lowest_step(self.plan, terms.budget.least_db)
        doubt = DOUBT_OF_DIFFERENCES if self.plan.bases else DOUBT
        self._search = Search.begin(grid, terms.limit, sizes, beside, hint_db=terms.hint_db, lowest=lowest, doubt=doubt)
        return self._next()

    def _next(self) -> list[Task]:
        """Return the tasks of the next pass; none if the search has ended."""
        assert self._search is not None
        step = self._search.next()
        if step is not None:
            self._step, self.records, self.reused = step, {}, 0
            self.plan = self.plan.at(self._search.grid.target(step))
            return [*self.plan.tasks(self._model, reuse=self._reuse)]
        best = self._search.best
        if best is None:
            raise self._refusal(self._search)
        self.plan = self.plan.at(self._search.grid.target(best.step))
        self.records, self.reused = dict(best.records), best.reused
        return self._end()

    def _count(self) -> int:
        """Return the stored bytes of the version that the present records make, with its proof."""
        records = [self.records[index] for index in range(len(self.plan.shards))]
        beside = 0 if self._prove is None else PROOF_BYTES
        if self._prove is not None and self._int8:  # every layer may turn out to be left in float
            tensors = (plan.tensor for shard in self.plan.shards for plan in shard)
            beside += INT8_BYTES + sum(len(json.dumps(tensor.name)) + 8 for tensor in tensors if len(tensor.shape) == 2)
        return self._describe(self.plan, records).stored_bytes + beside

    def _refusal(self, search: Search) -> BudgetError:
        assert self._terms is not None
        least, counted = search.least()
        return BudgetError(
            f"budget {self._terms.budget.label} leaves {size(search.limit)} ({search.limit} bytes); at the lowest "
            f"quality the version takes {'' if counted else 'about '}{size(least)} ({least} bytes): allow at least "
            f"that much, make fewer tensors lossless, or lower floor_db, which is {self._terms.budget.least_db:g}"
        )


def _unknown(shard: Sequence[TensorPlan]) -> ShardRecord:
    """Return a record as long as the shard's will be, for a container of no bytes."""
    coded = [plan.tensor.shape for plan in shard if plan.decision.action == "coded"]
    matrices = [shape for shape in coded if len(shape) == 2 and shape[1] > 1]
    return ShardRecord(
        key="0" * 64,
        blob="0" * 64,
        bytes=0,
        source_bytes=10**7,
        tensors=len(shard),
        sqnr_db=(30.01,) * len(coded),
        probe_db=(30.01,) * len(matrices),
        probe_error=1.2e-07,
    )
