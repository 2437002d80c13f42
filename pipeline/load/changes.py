"""Changes that a load makes to a model: prepared first, then made all at once."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.load.targets import Edges, Target, is_compiled

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""Attributes that a new module takes over from the one that it replaces."""


class Changes:
    """Collects changes of a model. Preparing a change takes all the memory it needs; `make` takes none."""

    def __init__(self, edges: Edges, dense: Iterable[Target] = ()) -> None:
        """`dense` are the targets for which `put_dense` will be called."""
        self._edges = edges
        self._awaited = {id(target.present) for target in dense}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._steps: list[Callable[[], object]] = []
        self._instead: dict[nn.Module, nn.Module] = {}
        self._settled: set[nn.Module] = set()
        self._filled: set[int] = set()

    def put_layer(self, target: Target, layer: CompressedLinear) -> None:
        """Put a compressed layer with another code into the present layer if that has the same form, else in its place.

        Raises:
            ModelMismatchError: The model is a single compressed layer of another form.
        """
        old = target.layer
        assert old is not None
        if not (isinstance(old.bias, Tensor) and old.bias.is_meta and id(old.bias) in self._awaited):
            layer.bias = _bias_for(old, layer.step_bits.device, layer._like.dtype)
        if type(old) is type(layer) and _form(old) == _form(layer):
            # In one step, so that a call in another thread has all of one code or all of the other.
            self._steps.append(lambda: old.__dict__.update(_buffers=layer._buffers))
            self._steps.append(lambda: old._parameters.update(bias=layer.bias))
            self._settled.add(old)
        else:
            self._replace(old, layer)

    def put_dense(self, target: Target, tensor: Tensor) -> None:
        """Put in a dense tensor, in place if the present one has its type and device. Compressed layers become linear.

        Raises: As `put_layer`.
        """
        present = target.present
        if present is None:
            self._put_linear(target, tensor)
            return
        self._filled.add(id(present))
        if (present.device, present.dtype) == (tensor.device, tensor.dtype) and _is_writable(present):
            self._copies.append((present, tensor))
            return
        parameter = isinstance(present, nn.Parameter)
        made = nn.Parameter(tensor, requires_grad=present.requires_grad) if parameter else tensor
        for module, leaf in target.places:
            self._set(self._instead.get(module, module), leaf, made)

    def move_rest(self, model: nn.Module, device: torch.device) -> None:
        """Move to a device what no artifact holds, such as buffers that are not saved. Tied parameters stay tied."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            if module in self._instead or module in self._settled:
                continue
            for leaf, held in [*module._parameters.items(), *module._buffers.items()]:
                if held is None or held.is_meta or held.device == device or id(held) in self._filled:
                    continue
                if id(held) not in moved:
                    there = held.detach().to(device)
                    parameter = isinstance(held, nn.Parameter)
                    moved[id(held)] = nn.Parameter(there, requires_grad=held.requires_grad) if parameter else there
                self._set(module, leaf, moved[id(held)])

    def make(self) -> None:
        """Change the model."""
        with torch.no_grad():
            for present, tensor in self._copies:
                present.copy_(tensor)
        for step in self._steps:
            step()

    def _put_linear(self, target: Target, tensor: Tensor) -> None:
        old = target.layer
        assert isinstance(old, CompressedLinear)
        linear = nn.Linear(old.in_features, old.out_features, bias=False, device="meta", dtype=tensor.dtype)
        trained = old.bias is None or old.bias.requires_grad
        linear.weight = nn.Parameter(tensor, requires_grad=trained)
        linear.bias = _bias_for(old, tensor.device, tensor.dtype)  # type: ignore[assignment]  # None as in torch
        self._replace(old, linear)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        if old not in self._edges:
            raise ModelMismatchError(
                f"the model itself is a {type(old).__name__}, which cannot become a {type(new).__name__} in place: "
                "put it into a module"
            )
        new.training = old.training
        new.__dict__.update({name: old.__dict__[name] for name in _HOOKS})
        self._instead[old] = new
        for parent, name in self._edges[old]:
            self._steps.append(partial(setattr, parent, name, new))
            if is_compiled(parent):  # torch.compile holds the old module
                self._steps.append(cast(Callable[[], object], parent._initialize))

    def _set(self, module: nn.Module, leaf: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self._steps.append(lambda: setattr(module, leaf, tensor))
        else:
            self._steps.append(lambda: module._buffers.update({leaf: tensor}))


def _bias_for(old: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Parameter | None:
    """Return the bias of a linear layer on a device, in a dtype: the same object if it already fits."""
    bias = old.bias
    if not isinstance(bias, nn.Parameter) or (bias.device, bias.dtype) == (device, dtype):
        return bias if isinstance(bias, nn.Parameter) else None
    # Not zeros_like, which imports a computer algebra system for tensors on the meta device.
    there = torch.zeros(bias.shape, dtype=dtype, device=device) if bias.is_meta else bias.detach().to(device, dtype)
    return nn.Parameter(there, requires_grad=bias.requires_grad)


def _form(layer: nn.Module) -> object:
    return getattr(layer, "bits", None)


def _is_writable(present: Tensor) -> bool:
    """Return whether values can be copied into a tensor."""
    return not (present.is_meta or present.is_inference() or torch._debug_has_internal_overlap(present) == 1)
