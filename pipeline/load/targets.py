"""The targets of a load by name: parameters, buffers, and the weights of compressed layers.

Names are those of the plain model, without the parts that torch.compile, DataParallel, DistributedDataParallel and
activation checkpointing insert.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline.errors import ModelMismatchError

_CHECKPOINTED = "_checkpoint_wrapped_module"
"""The only wrapper's name that state dicts already leave out."""

_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
_WRAPPERS = {
    _COMPILED: "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): _CHECKPOINTED,
}
"""The attribute of the wrapped module, by module and name of the wrapper's class. Few of these are imported."""


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` made a module."""
    return _kind(module) == _COMPILED


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


@dataclass(slots=True, kw_only=True)
class Target:
    """A tensor of a model, and all its places there. Tied tensors have several.

    `present` is None for the weight of a compressed layer.
    """

    present: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def layer(self) -> nn.Module | None:
        """The linear layer, compressed or not, if this is its weight and nothing else."""
        modules = {module for module, _ in self.places}
        if len(modules) > 1 or {leaf for _, leaf in self.places} != {"weight"}:
            return None
        (module,) = modules
        return module if type(module) is nn.Linear or isinstance(module, CompressedLinear) else None


Edges = dict[nn.Module, list[tuple[nn.Module, str]]]
"""For every module, the modules that hold it, each with its name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """A model as a load sees it: targets by name, one target under all its names, and which module holds which."""

    by_name: dict[str, Target]
    edges: Edges
    distributed: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Targets":
        """Find the targets of a model.

        Raises:
            ModelMismatchError: Its parameters are sharded.
        """
        saved, edges = model.state_dict(keep_vars=True).keys(), Edges({})
        by_name: dict[str, Target] = {}
        known: dict[int, Target] = {}
        distributed = False
        for raw, bare, module in _walk(model, "", "", edges):
            if type(module).__name__ == "FullyShardedDataParallel" or _is_sharded(module):
                raise ModelMismatchError(
                    f"{bare[:-1] or 'the model'} is sharded by FSDP: load into the plain model, then wrap it"
                )
            distributed |= type(module) is nn.parallel.DistributedDataParallel
            for leaf, target in _own(module, raw, saved):
                key = id(module if target.present is None else target.present)
                held = known.setdefault(key, target)
                if (module, leaf) not in held.places:
                    held.places.append((module, leaf))
                by_name[bare + leaf] = held
        return cls(by_name=by_name, edges=edges, distributed=distributed)


def _walk(module: nn.Module, raw: str, bare: str, edges: Edges) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (prefix in the state dict, prefix in the plain model, module) for a module and all below it."""
    yield raw, bare, module
    wrapped = _WRAPPERS.get(_kind(module))
    for name, child in module._modules.items():
        if child is not None:
            held = edges.setdefault(child, [])
            if (module, name) not in held:
                held.append((module, name))
            inside = bare if name == wrapped else f"{bare}{name}."
            yield from _walk(child, raw if name == _CHECKPOINTED else f"{raw}{name}.", inside, edges)


def _own(module: nn.Module, raw: str, saved: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Yield by name the targets of a module itself that are in its state dict."""
    held: list[tuple[str, Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
    if isinstance(module, CompressedLinear):
        matrix, dtype = (module.out_features, module.in_features), module._like.dtype
        yield "weight", Target(present=None, shape=matrix, dtype=dtype, device=module.step_bits.device)
        held = [("bias", module.bias)]
    for leaf, present in held:
        if present is not None and raw + leaf in saved:
            shape = tuple(present.shape)
            yield leaf, Target(present=present, shape=shape, dtype=present.dtype, device=present.device)


def _is_sharded(module: nn.Module) -> bool:
    return any(type(held).__name__ == "DTensor" for held in module._parameters.values())
