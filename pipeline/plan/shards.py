"""Cut a checkpoint into shards from its header: pure functions, no tensors, no I/O.

A shard is a run of whole tensors of one module block. It is the unit of work, of sharing between models, and of a
worker's memory. A cut depends only on nearby tensors, so two checkpoints with the same encoder get the same shards of
it, whatever decoder follows.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from math import prod

from birkhoff.codec.dtype_names import CODED_NAMES, is_float
from birkhoff.codec.profiles import Header, Override, Profile, scale_gains_db
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.registry.documents import StatisticsRecord
from birkhoff.pipeline.shard.decisions import Shares, decide
from birkhoff.pipeline.shard.task import BaseShard, Reuse, ShardTask, TensorPlan

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The shards of a model, in the order of the checkpoint: every tensor with its decision.

    The decisions follow from `profile`, except those with an `override`.
    """

    profile: Profile
    shards: tuple[tuple[TensorPlan, ...], ...]
    shares: Shares | None = None
    """What targets are derived from under allocation by output and by scale; None before it is known."""
    bases: tuple[BaseShard, ...] = ()
    """Shards of a base version, with their tensors that this model's can be differences to."""

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors in the order of the checkpoint."""
        return tuple(chain.from_iterable(self.shards))

    @property
    def overrides(self) -> dict[str, Override]:
        """The overrides of single tensors, by name."""
        decided = ((plan.tensor.name, plan.decision.override) for plan in self.tensors)
        return {name: override for name, override in decided if override is not None}

    def at(self, target_db: float) -> "ModelPlan":
        """Return the plan with another target for the profile. Tensors with an override keep theirs."""
        return self._under(replace(self.profile, target_db=target_db), self.shares)

    def with_statistics(self, statistics: StatisticsRecord) -> "ModelPlan":
        """Return the plan with targets derived from the sensitivity of the model's outputs to each tensor."""
        with LOADING:
            from birkhoff.codec.output.allocation import Felt, gains_db

        felt = {
            tensor.name: Felt(
                weights=prod(tensor.shape),
                rms=statistics.rms[tensor.name],
                sensitivity=statistics.sensitivities.get(tensor.name, 0.0),
                left=statistics.left.get(tensor.name, 1.0),
            )
            for tensor in self._following
            if statistics.sensitivities.get(tensor.name)
            or not self.profile.is_vector(tensor.shape, tensor.dtype, tensor.name)
        }
        hessians = {name: record.blob for name, record in statistics.hessians.items()}
        shares = Shares(gains_db=gains_db(felt), hessians=hessians)
        return self._under(replace(self.profile, statistics=statistics.key), shares)

    def with_scales(self, scales: Mapping[str, float]) -> "ModelPlan":
        """Return the plan with targets derived from the root mean squares of `scaled`, by name."""
        known = {tensor.name: (tensor.shape, scales[tensor.name]) for tensor in self.scaled}
        gains = scale_gains_db(known, self.profile)
        return self._under(self.profile, Shares(gains_db={each.name: gains[each.name] for each in self._following}))

    @property
    def scaled(self) -> list[StoredTensor]:
        """Tensors that the profile codes. Those with an override count for the mean, so that an override moves the
        target of no other tensor."""
        tensors = [plan.tensor for plan in self.tensors]
        decisions = decide(_headers(tensors), self.profile, {})
        return [tensor for tensor in tensors if decisions[tensor.name].action == "coded"]

    @property
    def _following(self) -> list[StoredTensor]:
        """Coded tensors that follow the profile, without an override."""
        return [plan.tensor for plan in self.tensors if plan.decision.action == "coded" and not plan.decision.override]

    def _under(self, profile: Profile, shares: Shares | None) -> "ModelPlan":
        """Return the same shards, with the decisions of the profile and shares for tensors that follow them."""
        decisions = decide(_headers(self._following), profile, {}, shares)
        shards = (
            tuple(
                TensorPlan(tensor=plan.tensor, decision=decisions.get(plan.tensor.name, plan.decision))
                for plan in shard
            )
            for shard in self.shards
        )
        return ModelPlan(profile=profile, shards=tuple(shards), shares=shares, bases=self.bases)

    def tasks(self, model: str, *, reuse: Reuse = "trust") -> list[ShardTask]:
        """Return the tasks that make its shards."""
        recipe = self.profile.recipe()
        return [
            ShardTask(model=model, index=index, tensors=shard, recipe=recipe, reuse=reuse, bases=self._bases_of(shard))
            for index, shard in enumerate(self.shards)
        ]

    def _bases_of(self, shard: tuple[TensorPlan, ...]) -> tuple[BaseShard, ...]:
        """Return the base's shards that fit tensors of a shard, reduced to these tensors."""
        names = {plan.tensor.name for plan in shard if plan.decision.action == "coded"}
        found = (replace(base, tensors=tuple(name for name in base.tensors if name in names)) for base in self.bases)
        return tuple(base for base in found if base.tensors)

    def estimates(self, model: str, targets_db: Iterable[float], *, reuse: Reuse = "trust") -> list[ShardTask]:
        """Return tasks that estimate the sizes of its shards at each of some targets of its profile, dB."""
        # A lossless tensor has no target, so any number will do.
        trials = zip(
            *([plan.decision.target_db or 0.0 for plan in self.at(db).tensors] for db in targets_db), strict=True
        )
        tasks = self.tasks(model, reuse=reuse)
        return [replace(task, targets_db=tuple(islice(trials, len(task.tensors)))) for task in tasks]


def plan_model(
    name: str,
    checkpoint: Checkpoint,
    profile: Profile,
    *,
    shard_bytes: int,
    overrides: Mapping[str, Override] | None = None,
) -> ModelPlan:
    """Decide about each tensor of a model and cut shards, from its header; `overrides` by tensor name.

    Raises:
        SourceError: No tensor of the checkpoint has a type that can be coded.
    """
    tensors = checkpoint.tensors
    if not any(is_float(tensor.dtype) for tensor in tensors):
        held = ", ".join(sorted({tensor.dtype for tensor in tensors}))
        raise SourceError(
            f"{checkpoint.path}: the {len(tensors)} tensors of model {name!r} are {held}; coded are "
            f"{', '.join(sorted(CODED_NAMES))}: point `source` at the weights in one of these types"
        )
    profile = profile.of_model(_headers(tensors))
    decisions = decide(_headers(tensors), profile, overrides or {})
    shards = (
        tuple(TensorPlan(tensor=tensor, decision=decisions[tensor.name]) for tensor in shard)
        for shard in cut_shards(tensors, shard_bytes)
    )
    return ModelPlan(profile=profile, shards=tuple(shards))


def _headers(tensors: Iterable[StoredTensor]) -> Iterator[Header]:
    return (Header(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors)


def cut_shards(tensors: Iterable[StoredTensor], shard_bytes: int) -> list[tuple[StoredTensor, ...]]:
    """Cut tensors into runs of at most `shard_bytes` source bytes, never across top modules. A larger tensor stays
    whole.

    Small neighbouring blocks of one top module share a shard. A block that would overflow it starts the next.
    """
    shards: list[tuple[StoredTensor, ...]] = []
    for _, members in groupby(tensors, key=lambda tensor: tensor.name.split(".", 1)[0]):
        pending: list[StoredTensor] = []
        size = 0
        for _, group in groupby(members, key=lambda tensor: block_of(tensor.name)):
            for piece in _pieces(list(group), shard_bytes):
                more = sum(tensor.dense_bytes for tensor in piece)
                if pending and size + more > shard_bytes:
                    shards.append(tuple(pending))
                    pending, size = [], 0
                pending += piece
                size += more
        if pending:
            shards.append(tuple(pending))
    return shards


def block_of(name: str) -> str:
    """Return the module block of a tensor name: up to its first number (`encoder.blocks.3`), else its module path."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def _pieces(group: list[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    """Cut a block that is larger than a shard between its tensors."""
    pieces: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in group:
        if pieces[-1] and size + tensor.dense_bytes > shard_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(tensor)
        size += tensor.dense_bytes
    return pieces
