"""A shard's task, as the driver sends it to a worker, and its result: descriptors and decisions, never tensors."""

from dataclasses import dataclass
from typing import Literal

from birkhoff.codec.native.library import native
from birkhoff.codec.profiles import Decision, Recipe
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.registry.documents import ShardRecord

TENSOR_BYTES = 1 << 19
"""Source bytes that take as long as the fixed cost of one tensor. A decoder's 120 small tensors take longer than an
encoder's block of five times their bytes. Measured: about 0.3 MB on a CPU, more on a shared GPU."""

PROBE_LIMIT = 1e-5
"""Greatest ||y - y'|| / ||y'||, with y from HyperLinear in float32 and y' from `F.linear` with the decoded weight."""

Reuse = Literal["trust", "revalidate", "prove", "never"]
"""What to do with a shard that the store has: take it (`trust`); validate it against its source first, and fail
(`revalidate`) or encode it again (`prove`, for signatures) if that fails; or always encode it again (`never`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor's location, and its decision."""

    tensor: StoredTensor
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShard:
    """A shard of a base version: key, container with its size, and the tensors in it that can be bases."""

    key: str
    blob: str
    bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What became of a task: the record, whether the store already had the shard, and the seconds of each stage."""

    record: ShardRecord
    reused: bool
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        """The sum over all stages."""
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """Estimated sizes of a shard, in bytes, at each of the requested targets, [T]."""

    bytes: tuple[float, ...]
    stages: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to encode, or to estimate the sizes of."""

    model: str
    index: int
    tensors: tuple[TensorPlan, ...]
    recipe: Recipe
    """The recipe of the profile, part of the shard's key."""
    reuse: Reuse = "trust"
    bases: tuple[BaseShard, ...] = ()
    """Shards of a base version with tensors of the same names, which may serve as bases."""
    known: tuple[ShardRecord, ...] = ()
    """Records of shards of this run that may be the same. They were stored or found in the store a moment ago."""
    targets_db: tuple[tuple[float, ...], ...] = ()
    """Candidate targets of each tensor under a budget in dB, [T] each. If given, sizes are estimated and nothing is
    encoded."""

    @property
    def estimate_only(self) -> bool:
        """Whether only sizes are estimated."""
        return bool(self.targets_db)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is of use. Launches and waits for a tensor take longer than the native library takes for all
        of it, unless its encoder searches: SAM-B's shards take 2.4 s of a processor with an H200, 3.1 s without, and
        eight processes that share it take three times as long as eight processors."""
        return not self.estimate_only and (native() is None or any(plan.decision.searches for plan in self.tensors))

    @property
    def decisions(self) -> dict[str, Decision]:
        """The decisions for its tensors, by name."""
        return {plan.tensor.name: plan.decision for plan in self.tensors}

    @property
    def signature(self) -> object:
        """Equal for shards that may be duplicates: names, dtypes, shapes, recipe and decisions."""
        tensors = tuple(
            (plan.tensor.name, plan.tensor.dtype, plan.tensor.shape, plan.decision) for plan in self.tensors
        )
        return tensors, tuple(self.recipe.items()), self.bases, self.estimate_only

    @property
    def label(self) -> str:
        """The task's name in messages: model, number and first tensor."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.model} shard {self.index} ({self.tensors[0].tensor.name}{more})"

    @property
    def patience(self) -> int:
        """The time limit, as a multiple of a shard's."""
        return 1

    @property
    def memory_remedy(self) -> str:
        """What to do if memory runs out."""
        return "lower shard_mib, or run fewer workers on a machine with more memory"

    @property
    def nbytes(self) -> int:
        """Bytes of its source tensors."""
        return sum(plan.tensor.dense_bytes for plan in self.tensors)

    @property
    def effort(self) -> int:
        """Expected duration in units of bytes: the source bytes, and a fixed cost per tensor."""
        return self.nbytes + len(self.tensors) * TENSOR_BYTES
