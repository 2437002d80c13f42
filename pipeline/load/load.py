"""Load artifacts: as dense tensors, or into a model whose linear layers compute on the compressed weights."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from birkhoff.codec.container import CodedTensor, Head
from birkhoff.codec.errors import CodecError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.tensor import is_matrix
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.entropy.op import begin
from birkhoff.kernels.entropy.staging import Upload
from birkhoff.kernels.runtime.device import indexed
from birkhoff.pipeline.artifact.readers import Artifact, heads, open_artifact
from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.load.changes import Changes
from birkhoff.pipeline.load.collector import without_collections
from birkhoff.pipeline.load.decode import decode_shards
from birkhoff.pipeline.load.layer_forms import Compute, LayerMaker, Memory, check_forms
from birkhoff.pipeline.load.name_maps import joined, owner, renaming
from birkhoff.pipeline.load.refresh import refresh
from birkhoff.pipeline.load.targets import Target, Targets
from birkhoff.pipeline.registry.trust import Trust
from birkhoff.pipeline.store.base import Store

_SHOWN = 5

_MOST_ENTRIES = 20_000
"""Entries of headers that are kept for the decoding, half a kilobyte each. If there are more, all are parsed again."""

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
    """Return all tensors of an artifact, dense, with their original names, order, shapes and dtypes.

    Args:
        ref_or_dir: A pulled folder, or `MODEL[@VERSION|ALIAS|DIGEST]` in a store.
        store: The store or its URL, read through the local cache. Default: `BIRKHOFF_STORE`, then `embedded`.
        device: The device on which tensors are decoded and returned.
        offline: Use the cache only.
        require_signature: Files of public keys; one of them must have signed the version for this store.
        signed_for: The store that signatures must name instead, if this one is its mirror.

    Raises:
        ArtifactNotFoundError: There is no such folder, model or version.
        TrustError: A signature is missing or wrong, or the alias went back to an older state.
        IntegrityError: Stored bytes do not match their digest.
        StoreError: The store cannot be reached or read.
    """
    trust = Trust.of(require_signature, audience=signed_for)
    with without_collections(), open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:

        def take(
            shards: Sequence[list[CodedTensor]], upload: Upload | None
        ) -> Callable[[], list[list[tuple[str, Tensor]]]]:
            result = begin([coded for shard in shards for coded in shard], frozenset(), device, upload)

            def ended() -> list[list[tuple[str, Tensor]]]:
                tensors = iter(cast(list[Tensor], result()))
                return [[(coded.name, next(tensors)) for coded in shard] for shard in shards]

            return ended

        found = {shard.blob: tensors for shard, tensors in decode_shards(artifact, take, torch.device(device))}
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
    """Load an artifact into a model in place: coded `nn.Linear` become HyperLinear, everything else is loaded dense.

    A matrix that `allocation: output` gave 44 dB or more is in fixed point, which HyperLinear cannot hold, so it is
    loaded dense.

    Tensors are decoded next to the model, on its device, as shards arrive. At the end the model changes as a whole or
    not at all. Modules on the meta device are filled in. Besides the model, host memory holds only the compressed
    model.

    A model can be loaded again while it serves: each layer that is already compressed gets its new code in place. A
    call that runs meanwhile may see layers of both versions; block calls if it must not. Models wrapped by
    torch.compile, DataParallel or DistributedDataParallel are accepted, the last one only after its layers are
    compressed. Models sharded by FSDP are refused.

    Every module keeps its mode. Modules with their own `train` or `eval`, such as TinyViT's attention, which caches
    biases there, are put into their mode again. The hooks that end `load_state_dict` are called.

    Args:
        model: A module whose state-dict names are those of the artifact, or transformers' `SamModel` or `Sam2Model` for
            an artifact of a published SAM or SAM 2 checkpoint (see `name_maps`). The prefixes `module.`, `_orig_mod.`
            and `model.` of stored names are dropped unless the model has names with them.
        ref_or_dir, store, offline, require_signature, signed_for: As in `load_state_dict`.
        device: The device to move the model to. Default: each parameter's own, the CPU for meta.
        dtype: Float dtype of the loaded weights and of HyperLinear's computation. Default: the model's.
        strict: Refuse missing and unexpected tensors. Wrong shapes, and an artifact without any fitting tensor, are
            always refused.
        memory: Form of the linear layers' weights. `uint16` takes 8 bits per weight and is exactly what is stored.
            `packed12` and `packed10` take about 6.06 and 5.06 bits and are coded once more: relative to what is stored,
            MiniLM keeps 31.4 and 25.3 dB (30 dB become 27.6 and 24.1, 36 dB 30.1 and 25.0), the heavy-tailed demo model
            28.5 and 22.6. A layer that would keep less than 24 or 18 dB, or save nothing, stays `uint16`, and a
            BirkhoffWarning names it.
        compute: `int8` multiplies on int8 tensor cores, or on CPUs by their instructions for bytes. Weights are the
            same and take as much memory. The inputs of linear layers are rounded to int8 by one scale per token.
            Outliers beyond a byte take further columns. A layer that they would make wider by 256 columns and by a
            quarter computes in float, and a BirkhoffWarning names it. On a GPU, layers of fewer than 768 rows also
            compute in float, because int8 would not make them faster. `proven` uses int8 only in the layers whose
            outputs keep their accuracy, as measured by the version's proof. The manifest lists them if the version was
            made with `compute: int8`.

    Returns:
        The names of the modules that are now HyperLinear, or a packed or int8 form of it, with the artifact's weights.

    Raises:
        ModelMismatchError: Tensors are missing, unexpected or of another shape; each is named.
        CodecError: A form is not valid, or the version was not proven on int8.
        ArtifactNotFoundError, IntegrityError, TrustError, StoreError: As in `load_state_dict`.
    """
    check_forms(memory, compute)
    trust = Trust.of(require_signature, audience=signed_for)
    with without_collections(), open_artifact(ref_or_dir, store, cached=True, offline=offline, trust=trust) as artifact:
        maker = _maker(artifact, memory, compute)
        swapped = load_artifact(model, artifact, maker, device=device, dtype=dtype, strict=strict)
    maker.report()
    return swapped


def load_artifact(
    model: nn.Module,
    artifact: Artifact,
    maker: LayerMaker,
    *,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> list[str]:
    """Run `load_into` for an artifact that is open, with layers made by `maker`. Raises as `load_into`."""
    names: list[str] = []
    found: list[Head] = []
    for head in heads(artifact):
        names += (entry.name for entry in head.entries)
        found.append(head)
        if len(names) > _MOST_ENTRIES:
            found.clear()
    loading = _Loading(model, names, device, dtype, maker)
    for _ in decode_shards(artifact, loading.stage, loading.device, found):
        pass
    loading.check(artifact.label, strict=strict)
    return loading.commit()


def _maker(artifact: Artifact, memory: Memory, compute: Compute) -> LayerMaker:
    """Return the maker of an artifact's layers. Raises CodecError if it was not proven for the requested form."""
    if compute != "proven":
        return LayerMaker(memory, compute)
    proof = artifact.manifest.proof
    if proof is None or proof.int8 is None:
        raise CodecError(
            f"{artifact.label} was not measured on int8: publish it with `compute: int8` in its manifest, or say "
            "compute='int8', which rounds the inputs of every layer"
        )
    return LayerMaker(memory, "int8", in_float=proof.int8.in_float)


class _Loading:
    """The model's targets and the tensors decoded for them; `stage` is thread-safe."""

    def __init__(
        self,
        model: nn.Module,
        stored_names: Iterable[str],
        device: Device | None,
        dtype: torch.dtype | None,
        make: LayerMaker,
    ) -> None:
        self._model, self._dtype, self._make = model, dtype, make
        self._device = None if device is None else indexed(torch.device(device))
        self._targets = Targets.of(model)
        self._wanted = self._targets.by_name
        self._rename = renaming(self._wanted, stored_names)
        self._stored: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, CompressedLinear] = {}
        self._dense: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where most tensors are decoded."""
        places = Counter(map(self._place, self._wanted.values()))
        return self._device or max(places, key=places.__getitem__, default=torch.device("cpu"))

    def stage(self, shards: Sequence[Sequence[CodedTensor]], upload: Upload | None) -> Callable[[], Sequence[None]]:
        """Begin to decode those tensors of shards that fit a place in the model, for that place. The result ends it.

        Raises:
            ModelMismatchError: Another stored tensor has the same place.
        """
        every = [coded for shard in shards for coded in shard]
        wanted = [(coded, target) for coded in every if (target := self._target(coded)) is not None]
        layers = {coded.name for coded, target in wanted if self._is_layer(coded, target)}
        begun = []
        for device in {self._place(target) for _, target in wanted}:
            here = [(coded, target) for coded, target in wanted if self._place(target) == device]
            there = upload if upload is not None and upload.device == device else None
            begun.append((here, begin([one for one, _ in here], layers, device, there)))

        def ended() -> Sequence[None]:
            for here, result in begun:
                for (coded, target), found in zip(here, result(), strict=True):
                    self._take(coded, target, found)
            return [None for _ in shards]

        return ended

    def _take(self, coded: CodedTensor, target: Target, found: LatticeTensor | Tensor) -> None:
        names = self._rename(coded.name)
        if isinstance(found, Tensor):
            self._keep(names, target, found)
        else:
            self._layers[names[0]] = self._make(coded.name, found, dtype=self._dtype or target.dtype)

    def _target(self, coded: CodedTensor) -> Target | None:
        """Return the place for a stored tensor, or the place of the tensor that it is a part of."""
        names = self._rename(coded.name)
        for name in names:
            if (other := self._stored.setdefault(name, coded.name)) != coded.name:
                raise ModelMismatchError(f"{other} and {coded.name} are both {name} of the model: store one of them")
        if not names:
            return None
        name = names[0]
        if name not in self._wanted and owner(name) in self._wanted:
            return self._wanted[owner(name)]
        self._shapes |= dict.fromkeys(names, coded.shape)
        target = self._wanted.get(name)
        return target if target is not None and target.shape == coded.shape else None

    def _is_layer(self, coded: CodedTensor, target: Target) -> bool:
        """Return whether a tensor becomes the weight of a compressed layer."""
        layer = target.layer
        own = self._rename(coded.name)[0] in self._wanted
        return (
            own and layer is not None and is_matrix(coded) and (target.present is None or layer in self._targets.edges)
        )

    def _keep(self, names: Sequence[str], target: Target, tensor: Tensor) -> None:
        """Keep a decoded tensor for its places, with their type."""
        kind = tensor.dtype if target.device.type == "meta" else target.dtype
        tensor = tensor.to(self._dtype if self._dtype is not None and tensor.is_floating_point() else kind)
        if names[0] in self._wanted:
            self._dense |= dict.fromkeys(names, tensor)
        else:
            self._rows[names[0]] = tensor

    def _place(self, target: Target) -> torch.device:
        return self._device or (torch.device("cpu") if target.device.type == "meta" else target.device)

    def check(self, label: str, *, strict: bool) -> None:
        """Check that everything staged fits the model. Raises ModelMismatchError, which names what does not fit."""
        rows = joined(self._rows)
        self._shapes |= {name: tuple(tensor.shape) for name, tensor in rows.items()}
        self._dense |= rows
        wrong = sorted(
            f"{name} is {list(shape)}, the model has {list(self._wanted[name].shape)}"
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
                "the model is in DistributedDataParallel, which keeps the weights that a load replaces: load into the "
                "plain model, then wrap it"
            )

    def _replaces(self) -> bool:
        """Return whether a module with parameters would be replaced or added."""
        dense = [self._wanted[name] for name in self._dense if name in self._wanted]
        return any(self._wanted[name].present is not None for name in self._layers) or any(
            target.present is None for target in dense
        )

    def commit(self) -> list[str]:
        """Put everything into its place. Return the names of the layers that are compressed now.

        Every step that can fail, such as an allocation, comes before the first change.

        Raises:
            ModelMismatchError: The model is a single compressed layer, and the artifact's layer has another form.
        """
        layers = {id(target := self._wanted[name]): (target, layer) for name, layer in self._layers.items()}
        dense = {
            id(self._wanted[name]): (self._wanted[name], tensor)
            for name, tensor in self._dense.items()
            if name in self._wanted
        }
        changes = Changes(self._targets.edges, (target for target, _ in dense.values()))
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
    """Return the remedy if names differ only by a prefix, else an empty string."""
    for beyond, inner, advice in (
        (missing, unexpected, "its names are those of {0}: load into model.{0}"),
        (unexpected, missing, 'the model is what it calls {0}: load into torch.nn.ModuleDict({{"{0}": model}})'),
    ):
        first = next((name for name in beyond if inner and name.endswith(f".{inner[0]}")), None)
        if first is not None and set(beyond) >= {(prefix := first.removesuffix(inner[0])) + name for name in inner}:
            return f"; {advice.format(prefix[:-1])}"
    return ""
