"""From an artifact to weights that run: dense tensors, or a model whose linear layers compute on the trajectory."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.tensor import decode_tensor, is_matrix
from birkhoff.pipeline.artifacts import inspect_shard, open_artifact
from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.load_shards import decode_shards
from birkhoff.pipeline.memory import LayerMaker, Memory
from birkhoff.pipeline.name_maps import joined, owner, renaming
from birkhoff.pipeline.trust import Trust

_SHOWN = 5

Device = str | torch.device
Keys = Sequence[str | os.PathLike[str]]


def load_state_dict(
    ref_or_dir: str | os.PathLike[str],
    store: str | None = None,
    device: Device = "cpu",
    *,
    offline: bool = False,
    require_signature: Keys | None = None,
) -> dict[str, Tensor]:
    """All tensors of an artifact, dense, in their original names, order, shapes and dtypes.

    Args:
        ref_or_dir: a folder that `birkhoff pull` wrote, or `MODEL[@VERSION|ALIAS|DIGEST]` in a store.
        store: URL of the store; `BIRKHOFF_STORE`, then `embedded`, where left out. Read through the local cache.
        device: where the tensors go, and where they are decoded.
        offline: take a reference from the cache alone.
        require_signature: files of public keys, one of which must have signed the version.

    Raises:
        ArtifactNotFoundError: no such folder, model or version.
        TrustError: the signature is missing or does not hold, or the alias was put back to an older state.
        IntegrityError: stored bytes that do not match their digest.
        StoreError: the store cannot be reached or read.
    """
    trust = Trust.of(require_signature)
    with open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:
        found = dict(decode_shards(artifact, lambda coded: (coded.name, decode_tensor(coded, device))))
        return dict(item for shard in artifact.manifest.shards for item in found[shard])


def load_into(
    model: nn.Module,
    ref_or_dir: str | os.PathLike[str],
    store: str | None = None,
    *,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    memory: Memory = "uint16",
    offline: bool = False,
    require_signature: Keys | None = None,
) -> list[str]:
    """Load an artifact into a model, in place: coded `nn.Linear` become HyperLinear, the rest is loaded dense.

    Tensors are decoded beside the model, on its device, as their shards arrive; the model is changed at the end, all at
    once, or not at all. Modules on the meta device are filled in. Host memory beside the model: the compressed model.

    Args:
        model: any module whose state-dict names are those of the artifact; or transformers' `SamModel` or
            `Sam2Model` for an artifact of a published SAM or SAM 2 checkpoint (see `name_maps`).
        ref_or_dir, store, offline, require_signature: as in `load_state_dict`.
        device: where the model goes; each parameter's own device (CPU for meta) where left out.
        dtype: float type of the loaded weights, and of what HyperLinear computes in; the model's own where left out.
        strict: refuse missing and unexpected tensors; a wrong shape is always refused.
        memory: form of the linear layers' weights, 8 bits a weight and exactly what is stored; `packed12` and
            `packed10` take about 6.06 and 5.06 and are coded once more: of what is stored MiniLM keeps 31.4 and 25.3 dB
            (30 dB become 27.6 and 24.1, 36 dB 30.1 and 25.0), the heavy-tailed demo model 28.5 and 22.6. A layer that
            would keep less than 24 or 18 dB, or save nothing, keeps the first form; a BirkhoffWarning names it.

    Returns:
        Names of the modules that became HyperLinear.

    Raises:
        ModelMismatchError: tensors missing, unexpected or of another shape; each is named.
        ArtifactNotFoundError, IntegrityError, TrustError, StoreError: as in `load_state_dict`.
    """
    trust = Trust.of(require_signature)
    with open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:
        maker = LayerMaker(memory)
        names = (row.name for shard in artifact.manifest.shards for row in inspect_shard(artifact, shard))
        loading = _Loading(model, names, device, dtype, maker)
        for _ in decode_shards(artifact, loading.stage):
            pass
        loading.check(artifact.label, strict=strict)
        swapped = loading.commit()
    maker.report()
    return swapped


class _Loading:
    """What is known about the model and what has been decoded for it; `stage` is for threads."""

    def __init__(
        self,
        model: nn.Module,
        stored_names: Iterable[str],
        device: Device | None,
        dtype: torch.dtype | None,
        make: LayerMaker,
    ) -> None:
        self._model, self._dtype, self._make = model, dtype, make
        self._device = None if device is None else _indexed(torch.device(device))
        self._wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._rename = renaming(self._wanted, stored_names)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, nn.Module] = {}
        self._dense: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def stage(self, coded: CodedTensor) -> None:
        """Decode a tensor for its place, if the model has one of its shape."""
        names = self._rename(coded.name)
        if not names:
            return
        name = names[0]
        if name not in self._wanted and owner(name) in self._wanted:
            self._rows[name] = self._placed(coded, self._wanted[owner(name)])
            return
        self._shapes |= dict.fromkeys(names, coded.shape)
        present = self._wanted.get(name)
        if present is None or tuple(present.shape) != coded.shape:
            return
        module, _, leaf = name.rpartition(".")
        if type(self._model.get_submodule(module)) is nn.Linear and leaf == "weight" and is_matrix(coded):
            place, kind = self._place(present), self._dtype or present.dtype
            self._layers[module] = self._make(coded, bias=None, device=place, dtype=kind)
            return
        self._dense |= dict.fromkeys(names, self._placed(coded, present))

    def _place(self, present: Tensor) -> torch.device:
        return self._device or (torch.device("cpu") if present.is_meta else present.device)

    def _placed(self, coded: CodedTensor, present: Tensor) -> Tensor:
        """A tensor decoded where `present` is to be, in its type."""
        tensor = decode_tensor(coded, self._place(present))
        kind = tensor.dtype if present.is_meta else present.dtype
        return tensor.to(self._dtype if self._dtype is not None and tensor.is_floating_point() else kind)

    def check(self, label: str, *, strict: bool) -> None:
        """Once all are staged; raises ModelMismatchError, naming what does not fit."""
        rows = joined(self._rows)
        self._shapes |= {name: tuple(tensor.shape) for name, tensor in rows.items()}
        self._dense |= rows
        wrong = [
            f"{name} is {list(shape)}, the model wants {list(self._wanted[name].shape)}"
            for name, shape in self._shapes.items()
            if name in self._wanted and shape != tuple(self._wanted[name].shape)
        ]
        held = {id(self._wanted[name]) for name in self._shapes if name in self._wanted}
        # A tied parameter is stored once, under one of its names.
        missing = [name for name, present in self._wanted.items() if id(present) not in held] if strict else []
        unexpected = [name for name in self._shapes if name not in self._wanted] if strict else []
        complaints = [
            f"{len(found)} {kind}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
            for kind, found in (("of another shape", sorted(wrong)), ("missing", missing), ("unexpected", unexpected))
            if found
        ]
        if complaints:
            raise ModelMismatchError(f"{label} does not fit the model: {'; '.join(complaints)}")

    def commit(self) -> list[str]:
        """Put everything into its place; returns the names of the layers that are HyperLinear now."""
        swapped = [name for name in (key.rpartition(".")[0] for key in self._wanted) if name in self._layers]
        swapped = list(dict.fromkeys(swapped))
        for name in swapped:
            self._swap(name, self._layers[name])
        fresh: dict[int, Tensor] = {}
        tied = {id(self._wanted[name]): tensor for name, tensor in self._dense.items() if name in self._wanted}
        for name, present in self._wanted.items():
            if id(present) in tied:
                self._fill(name, tied[id(present)], fresh)
        if self._device is not None:
            _move_rest(self._model, self._device)
        return swapped

    def _swap(self, name: str, layer: nn.Module) -> None:
        """Put a layer in the place of a linear one; its bias is kept, and loaded when its turn comes."""
        linear = self._model.get_submodule(name)
        if isinstance(linear.bias, nn.Parameter):
            old, kind = linear.bias, self._dtype or linear.bias.dtype
            place = next(layer.buffers()).device
            # Not zeros_like: of a tensor on the meta device it imports a computer algebra system.
            fresh = torch.zeros(old.shape, dtype=kind, device=place) if old.is_meta else old.detach().to(place, kind)
            layer.bias = nn.Parameter(fresh, requires_grad=old.requires_grad)
        layer.train(linear.training)
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, layer)

    def _fill(self, name: str, tensor: Tensor, fresh: dict[int, Tensor]) -> None:
        """Put a dense tensor into its place; `fresh` holds new parameters, so that tied ones stay tied."""
        parent, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(parent)
        present = getattr(module, leaf)
        if not present.is_meta and (present.device, present.dtype) == (tensor.device, tensor.dtype):
            with torch.no_grad():
                present.copy_(tensor)
        elif isinstance(present, nn.Parameter):
            made = fresh.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=present.requires_grad))
            setattr(module, leaf, made)
        else:
            module.register_buffer(leaf, tensor, persistent=True)


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what no artifact holds, such as buffers that are not saved."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.device != device:
                setattr(module, name, buffer.to(device))
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and parameter.device != device:
                moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                setattr(module, name, moved)


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the tensors there say it: `cuda:0`."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
