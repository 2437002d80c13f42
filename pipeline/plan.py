"""From a checkpoint's header to shards: pure functions, no tensors, no I/O.

A shard is a run of whole tensors of one module block: the unit of work, of sharing between models, and of what a
worker holds in memory. Cuts depend only on the tensors near them, so that two checkpoints that share an encoder
share its shards, whatever decoder follows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

from birkhoff.codec.dtype_names import is_float
from birkhoff.codec.dtypes import CODED_DTYPES, dtype_name
from birkhoff.codec.profiles import Override, Profile
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.source_types import DTYPES, Checkpoint, StoredTensor

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What will happen to one tensor, and why."""

    tensor: StoredTensor
    action: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """All tensors of a model in the order of the checkpoint, and the shards that hold them."""

    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[StoredTensor, ...], ...]
    overrides: Mapping[str, Override] = field(default_factory=dict)
    """What single tensors get over the profile, by name."""


def plan_model(
    name: str,
    checkpoint: Checkpoint,
    profile: Profile,
    *,
    shard_bytes: int,
    overrides: Mapping[str, Override] | None = None,
) -> ModelPlan:
    """Decide actions and shards of one model from its header; `overrides` by tensor name, as `overrides.resolve`.

    Raises:
        SourceError: the checkpoint holds no tensor of a type that is coded.
    """
    own = overrides or {}
    plans = tuple(_plan_tensor(tensor, profile, own.get(tensor.name)) for tensor in checkpoint.tensors)
    if not any(is_float(plan.tensor.dtype) for plan in plans):
        held = ", ".join(sorted({plan.tensor.dtype for plan in plans}))
        raise SourceError(
            f"{checkpoint.path}: the {len(plans)} tensors of model {name!r} are {held}; coded are "
            f"{', '.join(sorted(map(dtype_name, CODED_DTYPES)))}: point `source` at the weights in one of these types"
        )
    return ModelPlan(tensors=plans, shards=tuple(cut_shards(checkpoint.tensors, shard_bytes)), overrides=own)


def _plan_tensor(tensor: StoredTensor, profile: Profile, override: Override | None) -> TensorPlan:
    action, reason = profile.of_tensor(tensor.shape, override).action(tensor.shape, tensor.dtype)
    if action == "coded" and override is not None:
        reason = f"{override:g} dB by override"
    return TensorPlan(tensor=tensor, action=action, reason=reason)


def cut_shards(tensors: Iterable[StoredTensor], shard_bytes: int) -> list[tuple[StoredTensor, ...]]:
    """Runs of at most `shard_bytes` source bytes (more only for a single larger tensor), never across top modules.

    Small neighbouring blocks of one top module share a shard; a block that would overflow it starts the next.
    """
    shards: list[tuple[StoredTensor, ...]] = []
    for _, members in groupby(tensors, key=lambda tensor: tensor.name.split(".", 1)[0]):
        pending: list[StoredTensor] = []
        size = 0
        for _, group in groupby(members, key=lambda tensor: block_of(tensor.name)):
            for piece in _pieces(list(group), shard_bytes):
                more = sum(map(dense_bytes, piece))
                if pending and size + more > shard_bytes:
                    shards.append(tuple(pending))
                    pending, size = [], 0
                pending += piece
                size += more
        if pending:
            shards.append(tuple(pending))
    return shards


def block_of(name: str) -> str:
    """Module block of a tensor name: up to its first number (`encoder.blocks.3`), else its module path."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def dense_bytes(tensor: StoredTensor) -> int:
    """Bytes of the tensor's elements, whatever stride the file keeps them in."""
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _pieces(group: list[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    """A block cut between tensors where it is larger than a shard."""
    pieces: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in group:
        if pieces[-1] and size + dense_bytes(tensor) > shard_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(tensor)
        size += dense_bytes(tensor)
    return pieces
