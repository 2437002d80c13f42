"""Base of the layers that compute on compressed weights: bias, escapes, dtypes, checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from birkhoff.kernels.runtime.errors import KernelError

Kept = tuple[tuple[int, ...], tuple[Tensor, ...], tuple[object, ...]]

_ADDRESS = Tensor.data_ptr


class CompressedLinear(nn.Module):
    """y = x W^T + b with a constant weight in buffers. Subclasses add the buffers of their code.

    Buffers (N = out features, K = in features, E = escaped weights):
        step_bits: int32 [], the bits of the float32 `step`, in the unit of the weights.
        escape_index: int64 [E], positions row*K + column of the weights stored outside the code, increasing.
        escape_bits: int32 [E], the bits of the float32 `escape_value`, those weights.

    All buffers have integer types. NCCL and gloo can move these, so DistributedDataParallel can broadcast them, and
    neither `.to(dtype)` nor FSDP's mixed precision casts them. `step` and `escape_value` give the float values; state
    dicts that hold these also load. The result has the dtype of the input, or autocast's. Gradients reach the input and
    the bias.
    """

    _CODE: ClassVar[tuple[tuple[str, torch.dtype | None], ...]]
    """Buffers in the order of the op's arguments, each with the dtype of its values if that differs from the
    buffer's."""

    _SIZED: ClassVar[tuple[str, ...]] = ("escape_index", "escape_bits")
    """Buffers that take their shape from a loaded state dict."""

    step_bits: Tensor
    escape_index: Tensor
    escape_bits: Tensor
    _like: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features: int = in_features
        self.out_features: int = out_features
        self._kept: Kept | None = None

    def _register_rest(
        self, step: float, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register step, escapes and bias, uninitialized, to load a state dict into."""
        self.register_buffer("step_bits", torch.full((), step, dtype=torch.float32, device=device).view(torch.int32))
        self.register_buffer("escape_index", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("escape_bits", torch.empty(0, dtype=torch.int32, device=device))
        # Follows `.to(dtype)`, so that a layer without bias has a dtype too.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        zeros = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def _bare(cls, in_features: int, out_features: int) -> Self:
        """Make a layer without buffers and parameters, because making those on the meta device takes longer than a
        load."""
        layer = cls.__new__(cls)
        CompressedLinear.__init__(layer, in_features, out_features)
        return layer

    def _take_rest(
        self,
        step: float,
        escapes: tuple[Tensor, Tensor],
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Fill what `_register_rest` registers on the meta device: step, (index, value) of the escapes, a copy of the
        bias. A bare layer has nothing registered, so it needs `dtype`."""
        dtype = self._like.dtype if dtype is None else dtype
        found = torch.full((), step, dtype=torch.float32, device=device)  # a copy from the host would wait
        index, value = (part.to(device) for part in escapes)
        self.register_buffer("step_bits", as_bits("step", found))
        self.register_buffer("escape_index", index)
        self.register_buffer("escape_bits", as_bits("escape_value", value))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        copied = None if bias is None else nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        self.register_parameter("bias", copied)
        return self

    @property
    def step(self) -> Tensor:
        """float32 [], in the unit of the weights; a view of `step_bits`."""
        return self.step_bits.view(torch.float32)

    @step.setter
    def step(self, value: Tensor) -> None:
        self.step_bits = as_bits("step", value)

    @property
    def escape_value(self) -> Tensor:
        """float32 [E], the weights at `escape_index`; a view of `escape_bits`."""
        return self.escape_bits.view(torch.float32)

    @escape_value.setter
    def escape_value(self, value: Tensor) -> None:
        self.escape_bits = as_bits("escape_value", value)

    @property
    def weight(self) -> Tensor:
        """The weight in the layer's dtype. Every access decodes it again, see `dense_weight`."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight [N, K] in `dtype` (default: the layer's), escapes included."""
        raise NotImplementedError

    def code(self) -> tuple[Tensor, ...]:
        """Return the op's constant tensors in its order: views of the buffers with the dtypes of their values."""
        held: dict[str, Any] = self._buffers
        return tuple(held[name] if kind is None else held[name].view(kind) for name, kind in self._CODE)

    def _keep_code(self) -> "Kept":
        """Return (addresses of the buffers, `code`, form of the code), cached until a buffer moves.

        Making the views again would cost the host microseconds per call.
        """
        pointers = tuple(map(_ADDRESS, self._buffers.values()))  # type: ignore[arg-type]
        kept = self._kept
        if kept is None or kept[0] != pointers:
            with _disable_current_modes(), _untraced():  # modes and tracers see only the op
                code = self.code()
                kept = pointers, code, self._code_form(code)
            self.__dict__["_kept"] = kept  # skips the module's `__setattr__`
        return kept

    def _code_form(self, code: tuple[Tensor, ...]) -> tuple[object, ...]:  # noqa: ARG002
        """Return properties of the code that the op would otherwise compute on every call."""
        return ()

    def _watched_code(self) -> tuple[Tensor, ...]:
        """Return `code` for the op: made again if the buffers have no addresses or a compiler must see the views."""
        plain = not (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or any(type(part) is not Tensor for part in self._buffers.values())
        )
        return self._keep_code()[1] if plain else self.code()

    def _own_bias(self) -> Tensor | None:
        try:
            return self._parameters["bias"]  # three times as fast as the attribute
        except KeyError:
            return self.bias  # FSDP replaces the parameter by a plain attribute

    def _checked(self, x: Tensor) -> Tensor:
        """Return the input, in autocast's dtype if that is on.

        Raises:
            KernelError: The last dimension is not K, or the layer is being exported to ONNX.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            name = type(self).__name__
            raise KernelError(f"{name} of {self.in_features} features got an input of shape {list(x.shape)}")
        kind = "cuda" if x.is_cuda else x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return x

    def _refuse_onnx(self) -> None:
        exporting = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        if exporting and torch.onnx.is_in_onnx_export():
            raise KernelError(
                f"ONNX has no operator for {type(self).__name__}: export the plain model instead, after "
                "model.load_state_dict(birkhoff.load_state_dict(REFERENCE))"
            )

    def extra_repr(self) -> str:
        """Return the shape as `nn.Linear` prints it, and the number of escapes if there are any."""
        escapes = f", escapes={self.escape_index.numel()}" if self.escape_index.numel() else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}{self._form()}{escapes}"

    def _form(self) -> str:
        """Return the subclass's part of `extra_repr`."""
        return ""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._kept = None  # the old buffers' views are stale
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _to_bits(state_dict, prefix)
        for name in self._SIZED:
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            # A state dict may change a matrix's columns, not its rows.
            if stored is not None and stored.shape != own.shape and stored.shape[:-1] == own.shape[:-1]:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_kept", None)
        _to_bits(self._buffers, "")


BITS: dict[str, tuple[str, torch.dtype, torch.dtype]] = {
    "theta": ("theta_bytes", torch.uint16, torch.uint8),
    "step": ("step_bits", torch.float32, torch.int32),
    "escape_value": ("escape_bits", torch.float32, torch.int32),
}
"""Buffers of earlier releases by name: the present buffer, the dtype of its values, and its own dtype."""


def as_bits(name: str, value: Tensor) -> Tensor:
    """Return the buffer for values of `theta`, `step` or `escape_value`: a view if the dtype fits."""
    _, kind, held = BITS[name]
    # Old state dicts may hold theta as int16 with the same bits.
    return (value.view(kind) if name == "theta" else value.to(kind)).view(held)


def _to_bits(state: dict[str, Any], prefix: str) -> None:
    """Replace the buffers of earlier releases in a state dict by the present ones, in place."""
    for name, (now, _, _) in BITS.items():
        if prefix + name in state:
            state[prefix + now] = as_bits(name, state.pop(prefix + name))


@contextmanager
def _untraced() -> Iterator[None]:
    """Inside the block, `torch.jit.trace` records results as constants."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def layer_dtype(rows: int, bias: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a layer for a matrix of `rows`: as requested, else the bias's, else float32.

    Raises:
        KernelError: The bias does not have one value per row.
    """
    if bias is not None and bias.shape != (rows,):
        raise KernelError(f"a weight of {rows} rows takes a bias [{rows}], got {list(bias.shape)}")
    return dtype or (torch.float32 if bias is None else bias.dtype)
