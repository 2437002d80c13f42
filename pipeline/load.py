"""From an artifact to weights that run: dense tensors, or a model whose linear layers compute on the trajectory."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.tensor import decode_tensor, is_matrix, lattice_of
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifacts import Artifact, inspect, open_artifact
from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.memory import LayerMaker, Memory
from birkhoff.pipeline.trust import Trust

_SHOWN = 5


def load_state_dict(
    ref_or_dir: str | os.PathLike[str],
    store: str | None = None,
    device: str | torch.device = "cpu",
    *,
    require_signature: Sequence[str | os.PathLike[str]] | None = None,
) -> dict[str, Tensor]:
    """All tensors of an artifact, dense, in their original names, order, shapes and dtypes.

    Args:
        ref_or_dir: a folder that `birkhoff pull` wrote, or `MODEL[@VERSION|ALIAS|DIGEST]` in a store.
        store: URL of the store; `BIRKHOFF_STORE`, then `embedded`, where left out.
        device: where the tensors go.
        require_signature: files of public keys, one of which must have signed the version.

    Raises:
        ArtifactNotFoundError: no such folder, model or version.
        TrustError: the signature is missing or does not hold, or the alias was put back to an older state.
        IntegrityError: stored bytes that do not match their digest.
        StoreError: the store cannot be reached or read.
    """
    with open_artifact(ref_or_dir, store, cached=True, trust=Trust.of(require_signature)) as artifact:
        return {name: tensor.to(device) for name, tensor in artifact.tensors()}


def load_into(
    model: nn.Module,
    ref_or_dir: str | os.PathLike[str],
    store: str | None = None,
    *,
    device: str | torch.device | None = None,
    strict: bool = True,
    memory: Memory = "uint16",
    require_signature: Sequence[str | os.PathLike[str]] | None = None,
) -> list[str]:
    """Load an artifact into a model, in place: coded `nn.Linear` become HyperLinear, the rest is loaded dense.

    Names and shapes are checked before anything is changed. Modules on the meta device are filled in.

    Args:
        model: any module whose state-dict names are those of the artifact.
        ref_or_dir, store: as in `load_state_dict`.
        device: where the weights go; each parameter's own device (CPU for meta) where left out.
        strict: refuse missing and unexpected tensors; a wrong shape is always refused.
        memory: the form of those layers' weights. `uint16`: 8 bits a weight, exactly what is stored. `packed12` and
            `packed10`: 6.06 and 5.06 bits in a PackedHyperLinear, coded once more, which costs fidelity: against the
            stored weights MiniLM keeps 31.5 and 25.5 dB (so that 30 dB become 27.7 and 24.2, 36 dB become 30.2 and
            25.1), the heavy-tailed demo model 28.5 and 22.6 dB. A layer that would keep less than 24 or 18 dB stays a
            HyperLinear, with a BirkhoffWarning that names it.
        require_signature: as in `load_state_dict`.

    Returns:
        Names of the modules that became HyperLinear.

    Raises:
        ModelMismatchError: tensors missing, unexpected or of another shape; each is named.
        CodecError: `memory` is no form.
        ArtifactNotFoundError, IntegrityError, TrustError, StoreError: as in `load_state_dict`.
    """
    layer_of = LayerMaker(memory)
    with open_artifact(ref_or_dir, store, cached=True, trust=Trust.of(require_signature)) as artifact:
        wanted = model.state_dict(keep_vars=True)
        _check_fit(artifact, wanted, strict=strict)
        swapped: list[str] = []
        for coded in artifact.coded():
            if coded.name not in wanted:
                continue
            owner, _, leaf = coded.name.rpartition(".")
            module = model.get_submodule(owner)
            if type(module) is nn.Linear and leaf == "weight" and is_matrix(coded):
                _swap(model, owner, module, coded, device)
                swapped.append(owner)
            else:
                _fill(module, leaf, decode_tensor(coded), device)
    return swapped


def _check_fit(artifact: Artifact, wanted: dict[str, Tensor], *, strict: bool) -> None:
    shapes = {row.name: row.shape for row in inspect(artifact)}
    wrong = [
        f"{name} is {list(shapes[name])}, the model wants {list(wanted[name].shape)}"
        for name in shapes.keys() & wanted.keys()
        if shapes[name] != tuple(wanted[name].shape)
    ]
    missing = [name for name in wanted if name not in shapes] if strict else []
    unexpected = [name for name in shapes if name not in wanted] if strict else []
    complaints = [
        f"{len(found)} {kind}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for kind, found in (("of another shape", sorted(wrong)), ("missing", missing), ("unexpected", unexpected))
        if found
    ]
    if complaints:
        raise ModelMismatchError(f"{artifact.label} does not fit the model: {'; '.join(complaints)}")


def _swap(
    model: nn.Module, name: str, linear: nn.Linear, coded: CodedTensor, device: str | torch.device | None
) -> None:
    """Put a HyperLinear in the place of a linear layer; its bias is kept, and loaded when its turn comes."""
    place = _target(linear.weight, device)
    bias: Tensor | None = linear.bias
    if bias is not None and bias.is_meta:
        bias = torch.zeros_like(bias, device=place)
    hyper = HyperLinear.from_lattice(lattice_of(coded), bias=bias, device=place, dtype=linear.weight.dtype)
    hyper.train(linear.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, hyper)


def _fill(module: nn.Module, leaf: str, tensor: Tensor, device: str | torch.device | None) -> None:
    present = getattr(module, leaf)
    place = _target(present, device)
    if not present.is_meta and present.device == place:
        with torch.no_grad():
            present.copy_(tensor)
        return
    tensor = tensor.to(place) if present.is_meta else tensor.to(place, present.dtype)
    if isinstance(present, nn.Parameter):
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=present.requires_grad))
    else:
        module.register_buffer(leaf, tensor, persistent=True)


def _target(present: Tensor, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if present.is_meta else present.device
