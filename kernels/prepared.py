"""A kernel's launch with all but its tensors settled, which makes a repeated call cheap on the host.

Triton looks the compiled kernel up at every launch, by the type, value and alignment of each argument: 10 to 20
microseconds of host time. A `Prepared` asks once; later calls hand addresses straight to the launcher that Triton
keeps with the compiled kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

_ALIGNMENT = 16
"""Triton compiles for pointers that are, or are not, multiples of this many bytes."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
"""A fused kernel ready to run: (x, theta [N, P], step [], bias [N] or None, y), writing y; escapes are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """All that a launch of a linear layer depends on but addresses: M, N, K, elements between rows of x, and so on."""

    tokens: int
    rows: int
    columns: int
    stride: int
    dtype: torch.dtype
    tf32: bool
    bias: bool
    device: torch.device


class Prepared:
    """A kernel, its grid, numbers and constants; called with its tensors, in the order of its parameters.

    The kernel's parameters are its tensors, then `numbers`, then `constants`. The first call compiles; the tensors of
    later ones have the dtypes (where `tiles` are given, the shapes and strides too) of the first, which is what the
    holder keys it by.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        device: torch.device,
        tiles: "tuple[tuple[list[int], Any], ...]" = (),
    ) -> None:
        """Nothing is compiled yet.

        Args:
            kernel: a `triton.jit` or `gluon.jit` function.
            grid: up to three sizes, all positive.
            numbers: integers handed over at launch.
            constants: `tl.constexpr` parameters by name.
            options: launch options, `num_warps` and such.
            device: of the tensors.
            tiles: (block shape, shared-memory layout) of those first tensors that the kernel takes as descriptors.
        """
        self._kernel = kernel
        self._grid = grid
        self._numbers = numbers
        self._constants = constants
        self._options = options
        self._index = device.index
        self._tiles = tiles
        self._known: _Known | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the tensors' device."""
        index, known = self._index, self._known
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(*tensors)
            return
        hooks = triton.knobs.runtime
        if known is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self._launch_and_keep(tensors)
            return
        pointers: list[Any] = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits % _ALIGNMENT:
            self._launch_and_keep(tensors)
            return
        for place, template in enumerate(known.templates):
            pointers[place] = _at(template, tensors[place])
        known.run(*known.grid, known.stream_of(index), *known.handles, *pointers, *known.after)

    def _launch_and_keep(self, tensors: tuple[Tensor, ...]) -> None:
        """Launch as Triton does; keep what it compiled if the next call may use it as it is."""
        described = tuple(_describe(tensor, *tile) for tensor, tile in zip(tensors, self._tiles, strict=False))
        arguments = (*described, *tensors[len(described) :], *self._numbers)
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if compiled is None or any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors):
            return  # interpreted, or compiled for less than what the others have
        constants = (self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
        self._known = _Known(
            run=compiled.run,
            handles=(compiled.function, compiled.packed_metadata, None, None, None),  # no metadata, no hooks
            grid=(*self._grid, 1, 1)[:3],
            stream_of=triton.runtime.driver.active.get_current_stream,
            templates=described,
            after=(*self._numbers, *constants),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a launch takes beside pointers: the launcher, what it is handed before them and after."""

    run: Callable[..., None]
    handles: tuple[Any, ...]
    grid: tuple[int, ...]
    stream_of: Callable[[int | None], int]
    templates: tuple[Any, ...]
    after: tuple[Any, ...]


def _describe(tensor: Tensor, block: list[int], layout: Any) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    matrix = tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
    return TensorDescriptor.from_tensor(matrix, block, layout)


def _at(template: Any, tensor: Tensor) -> Any:
    """The descriptor of a tensor that differs from the template's in its address only; its checks are not repeated."""
    moved = object.__new__(type(template))
    moved.__dict__.update(template.__dict__, base=tensor)
    return moved


def run_one(launch: Prepared, x: Tensor, theta: Tensor, step: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """The `Run` of kernels that take these five tensors; where there is no bias they are handed the step, unread."""
    launch(x, theta, step, step if bias is None else bias, y)
