"""From an artifact to weights that run: dense tensors, or a model whose linear layers compute on the trajectory."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.tensor import decode_tensor, is_matrix
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline.artifact.readers import inspect_shard, open_artifact
from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.load.changes import Changes
from birkhoff.pipeline.load.decode import decode_shards
from birkhoff.pipeline.load.layer_forms import Compute, LayerMaker, Memory
from birkhoff.pipeline.load.name_maps import joined, owner, renaming
from birkhoff.pipeline.load.refresh import refresh
from birkhoff.pipeline.load.targets import Target, Targets
from birkhoff.pipeline.registry.trust import Trust
from birkhoff.pipeline.store.base import Store

_SHOWN = 5

Device = str | torch.device
Keys = Sequence[str | os.PathLike[str]]


def load_state_dict(
    ref_or_dir: str | os.PathLike[str],
    store: str | Store | None = None,
    device: Device = "cpu",
    *,
    offline: bool = False,
    require_signature: Keys | None = None,
    signed_for: str | None = None,
) -> dict[str, Tensor]:
    """All tensors of an artifact, dense, in their original names, order, shapes and dtypes.

    Args:
        ref_or_dir: a folder that `birkhoff pull` wrote, or `MODEL[@VERSION|ALIAS|DIGEST]` in a store.
        store: the store, or its URL; `BIRKHOFF_STORE`, then `embedded`, where left out. Read through the local cache.
        device: where the tensors go, and where they are decoded.
        offline: take a reference from the cache alone.
        require_signature: files of public keys, one of which must have signed the version for the store that is read.
        signed_for: the store that it must be signed for instead: of a mirror, the one it mirrors.

    Raises:
        ArtifactNotFoundError: no such folder, model or version.
        TrustError: the signature is missing or does not hold, or the alias was put back to an older state.
        IntegrityError: stored bytes that do not match their digest.
        StoreError: the store cannot be reached or read.
    """
    trust = Trust.of(require_signature, audience=signed_for)
    with open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:
        decoded = decode_shards(artifact, lambda coded: (coded.name, decode_tensor(coded, device)))
        found = {shard.blob: tensors for shard, tensors in decoded}
        return dict(item for shard in artifact.manifest.shards for item in found[shard.blob])


def load_into(
    model: nn.Module,
    ref_or_dir: str | os.PathLike[str],
    store: str | Store | None = None,
    *,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    memory: Memory = "uint16",
    compute: Compute = "float",
    offline: bool = False,
    require_signature: Keys | None = None,
    signed_for: str | None = None,
) -> list[str]:
    """Load an artifact into a model, in place: coded `nn.Linear` become HyperLinear, the rest is loaded dense.

    Tensors are decoded beside the model, on its device, as their shards arrive; the model is changed at the end, all at
    once, or not at all. Modules on the meta device are filled in. Host memory beside the model: the compressed model.

    A model can be loaded again, while it serves: layers that are compressed already get their new code in place, each
    at once. A call that runs meanwhile may meet layers of both versions; hold calls back if it must not. A model that
    torch.compile, DataParallel or DistributedDataParallel wraps may be given too, the last once its layers are
    compressed; one that FSDP shards is refused.

    Every module keeps its mode. One with a `train` or `eval` of its own, such as TinyViT's attention, which caches
    biases there, is put into its mode again, and the hooks that `load_state_dict` calls at its end are called.

    Args:
        model: any module whose state-dict names are those of the artifact; or transformers' `SamModel` or
            `Sam2Model` for an artifact of a published SAM or SAM 2 checkpoint (see `name_maps`). The prefixes
            `module.`, `_orig_mod.` and `model.` of stored names are left out, unless the model has names that begin so.
        ref_or_dir, store, offline, require_signature, signed_for: as in `load_state_dict`.
        device: where the model goes; each parameter's own device (CPU for meta) where left out.
        dtype: float type of the loaded weights, and of what HyperLinear computes in; the model's own where left out.
        strict: refuse missing and unexpected tensors; a wrong shape is always refused, and so is an artifact of which
            nothing fits.
        memory: form of the linear layers' weights, 8 bits a weight and exactly what is stored; `packed12` and
            `packed10` take about 6.06 and 5.06 and are coded once more: of what is stored MiniLM keeps 31.4 and 25.3 dB
            (30 dB become 27.6 and 24.1, 36 dB 30.1 and 25.0), the heavy-tailed demo model 28.5 and 22.6. A layer that
            would keep less than 24 or 18 dB, or save nothing, keeps the first form; a BirkhoffWarning names it.
        compute: `int8` multiplies on int8 tensor cores (on CPUs by their instructions for bytes), the same weights in
            as much memory: the inputs of linear layers are rounded to int8, one scale a token. Outliers beyond a
            byte take further columns; a layer that they would make wider by 256 and by a quarter computes in float,
            and a BirkhoffWarning names it.

    Returns:
        Names of the modules that are HyperLinear, or its packed form, with weights of the artifact.

    Raises:
        ModelMismatchError: tensors missing, unexpected or of another shape; each is named.
        ArtifactNotFoundError, IntegrityError, TrustError, StoreError: as in `load_state_dict`.
    """
    trust = Trust.of(require_signature, audience=signed_for)
    with open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:
        maker = LayerMaker(memory, compute)
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
        self._targets = Targets.of(model)
        self._wanted = self._targets.by_name
        self._rename = renaming(self._wanted, stored_names)
        self._stored: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, CompressedLinear] = {}
        self._dense: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def stage(self, coded: CodedTensor) -> None:
        """Decode a tensor for its place, if the model has one of its shape.

        Raises:
            ModelMismatchError: another stored tensor has the same place.
        """
        names = self._rename(coded.name)
        for name in names:
            if (other := self._stored.setdefault(name, coded.name)) != coded.name:
                raise ModelMismatchError(f"{other} and {coded.name} are both {name} of the model: store one of them")
        if not names:
            return
        name = names[0]
        if name not in self._wanted and owner(name) in self._wanted:
            self._rows[name] = self._placed(coded, self._wanted[owner(name)])
            return
        self._shapes |= dict.fromkeys(names, coded.shape)
        target = self._wanted.get(name)
        if target is None or target.shape != coded.shape:
            return
        layer = target.layer
        if layer is not None and is_matrix(coded) and (target.present is None or layer in self._targets.edges):
            place, kind = self._place(target), self._dtype or target.dtype
            self._layers[name] = self._make(coded, bias=None, device=place, dtype=kind)
            return
        self._dense |= dict.fromkeys(names, self._placed(coded, target))

    def _place(self, target: Target) -> torch.device:
        return self._device or (torch.device("cpu") if target.device.type == "meta" else target.device)

    def _placed(self, coded: CodedTensor, target: Target) -> Tensor:
        """A tensor decoded where the target is to be, in its type."""
        tensor = decode_tensor(coded, self._place(target))
        kind = tensor.dtype if target.device.type == "meta" else target.dtype
        return tensor.to(self._dtype if self._dtype is not None and tensor.is_floating_point() else kind)

    def check(self, label: str, *, strict: bool) -> None:
        """Once all are staged; raises ModelMismatchError, naming what does not fit."""
        rows = joined(self._rows)
        self._shapes |= {name: tuple(tensor.shape) for name, tensor in rows.items()}
        self._dense |= rows
        wrong = sorted(
            f"{name} is {list(shape)}, the model wants {list(self._wanted[name].shape)}"
            for name, shape in self._shapes.items()
            if name in self._wanted and shape != self._wanted[name].shape
        )
        held = {id(self._wanted[name]) for name in self._shapes if name in self._wanted}
        # A tied parameter is stored once, under one of its names.
        missing = [name for name, target in self._wanted.items() if id(target) not in held]
        unexpected = [name for name in self._shapes if name not in self._wanted]
        complaints = [
            f"{len(found)} {kind}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
            for kind, found in (("of another shape", wrong), ("missing", missing), ("unexpected", unexpected))
            if found and (strict or not held or found is wrong)
        ]
        if complaints:
            raise ModelMismatchError(
                f"{label} does not fit the model: {'; '.join(complaints)}{_remedy(missing, unexpected)}"
            )
        if self._targets.distributed and self._replaces():
            raise ModelMismatchError(
                "the model is in DistributedDataParallel, which holds on to the weights that would go: load into the "
                "plain model, then wrap it"
            )

    def _replaces(self) -> bool:
        """Whether a module with parameters of its own goes, or comes."""
        dense = [self._wanted[name] for name in self._dense if name in self._wanted]
        return any(self._wanted[name].present is not None for name in self._layers) or any(
            target.present is None for target in dense
        )

    def commit(self) -> list[str]:
        """Put everything into its place; returns the names of the layers that are compressed now.

        Whatever can fail, for want of memory or otherwise, is made before anything is changed.

        Raises:
            ModelMismatchError: the model is a single compressed layer, and the artifact's has another form.
        """
        layers = {id(target := self._wanted[name]): (target, layer) for name, layer in self._layers.items()}
        dense = {
            id(self._wanted[name]): (self._wanted[name], tensor)
            for name, tensor in self._dense.items()
            if name in self._wanted
        }
        changes = Changes(self._targets.edges)
        for target, layer in layers.values():
            changes.put_layer(target, layer)
        for target, tensor in dense.values():
            changes.put_dense(target, tensor)
        if self._device is not None:
            changes.move_rest(self._model, self._device)
        changes.make()
        refresh(self._model)
        names = {id(target): name for name, target in reversed(self._wanted.items())}  # the first name of each
        return [
            name.rpartition(".")[0]
            for name, target in self._wanted.items()
            if names[id(target)] == name and id(target) in layers
        ]


def _remedy(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What to do about names that differ by what stands before them, if that is all."""
    for beyond, inner, advice in (
        (missing, unexpected, "its names are those of {0}: load into model.{0}"),
        (unexpected, missing, 'the model is what it calls {0}: load into torch.nn.ModuleDict({{"{0}": model}})'),
    ):
        first = next((name for name in beyond if inner and name.endswith(f".{inner[0]}")), None)
        if first is not None and set(beyond) >= {(prefix := first.removesuffix(inner[0])) + name for name in inner}:
            return f"; {advice.format(prefix[:-1])}"
    return ""


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the tensors there say it: `cuda:0`."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
