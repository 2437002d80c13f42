"""The unit of work as the driver hands it out: descriptors and decisions, never tensors."""

from dataclasses import dataclass
from typing import Literal

from birkhoff.codec.profiles import Decision, Recipe
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor

TENSOR_BYTES = 1 << 19
"""Source bytes that take as long as a tensor's own overhead does: a decoder's 120 small tensors take longer than a
block of an encoder of five times their bytes. On a CPU it is some 0.3 MB, on a GPU that others use too it is more."""

Reuse = Literal["trust", "revalidate", "prove", "never"]
"""What to do with a shard that the store has: take it; prove it once more against its source first, and fail where that
fails (`revalidate`) or make it anew (`prove`, what a signature asks for); or make it anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """The place of a tensor, and the decision for it."""

    tensor: StoredTensor
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShard:
    """A shard of a base version: key, container and its size, and the tensors in it that can be a base."""

    key: str
    blob: str
    bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to be made, or only its sizes to be estimated."""

    model: str
    index: int
    tensors: tuple[TensorPlan, ...]
    recipe: Recipe
    """Of the profile that decided; part of the shard's key."""
    reuse: Reuse = "trust"
    bases: tuple[BaseShard, ...] = ()
    """Shards of a base version that hold tensors of these names, which they may be coded as differences to."""
    targets_db: tuple[tuple[float, ...], ...] = ()
    """What a budget might make of the target of each tensor, dB, [T] each: sizes are estimated, and nothing is made."""

    @property
    def estimate_only(self) -> bool:
        """Whether only sizes are asked for."""
        return bool(self.targets_db)

    @property
    def decisions(self) -> dict[str, Decision]:
        """Return the decisions for its tensors, by name."""
        return {plan.tensor.name: plan.decision for plan in self.tensors}

    @property
    def signature(self) -> object:
        """Equal for shards that may turn out to be the same: names, dtypes, shapes, recipe and decisions."""
        tensors = tuple(
            (plan.tensor.name, plan.tensor.dtype, plan.tensor.shape, plan.decision) for plan in self.tensors
        )
        return tensors, tuple(self.recipe.items()), self.bases, self.estimate_only

    @property
    def label(self) -> str:
        """For messages: model, number and the first tensor."""
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.model} shard {self.index} ({self.tensors[0].tensor.name}{more})"

    @property
    def patience(self) -> int:
        """Times as long as a shard that it may take before its worker counts as hung."""
        return 1

    @property
    def memory_remedy(self) -> str:
        """What to do where it has no memory."""
        return "lower shard_mib, or run fewer workers on a machine with more memory"

    @property
    def nbytes(self) -> int:
        """Bytes of its source tensors."""
        return sum(plan.tensor.dense_bytes for plan in self.tensors)

    @property
    def effort(self) -> int:
        """How long it will take, in bytes: those it has, and what each tensor costs besides."""
        return self.nbytes + len(self.tensors) * TENSOR_BYTES
