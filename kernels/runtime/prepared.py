"""A kernel's launch with all but its tensors settled, which makes a repeated call cheap on the host.

Triton looks the compiled kernel up at every launch, by the type, value and alignment of each argument: 10 to 20
microseconds of host time. A `Prepared` asks once; later calls hand addresses straight to the launcher that Triton
keeps with the compiled kernel.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from birkhoff.kernels.runtime.carveout import prefer_shared

_MOST_MAPS = 4096
"""Addresses of which a launch keeps the encoded descriptors."""

_ALIGNMENT = 16
"""Triton compiles for pointers that are, or are not, multiples of this many bytes."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
"""A fused kernel ready to run: (x, theta [N, P], step [], bias [N] or None, y), writing y; escapes are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """All that a launch of a linear layer depends on but addresses: M, N, K, elements between rows of x, and so on.

    `bias` is the dtype of one, None without.
    """

    tokens: int
    rows: int
    columns: int
    stride: int
    dtype: torch.dtype
    tf32: bool
    bias: torch.dtype | None
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
        numbers: tuple[int | float, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        device: torch.device,
        tiles: "tuple[tuple[list[int], Any], ...]" = (),
        shared: bool = False,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            kernel: a `triton.jit` or `gluon.jit` function.
            grid: up to three sizes, all positive.
            numbers: handed over at launch.
            constants: `tl.constexpr` parameters by name.
            options: launch options, `num_warps` and such.
            device: of the tensors.
            tiles: (block shape, shared-memory layout) of those first tensors that the kernel takes as descriptors.
            shared: whether multiprocessors are to have as much shared memory as they can while it runs (`carveout`).
        """
        self._kernel = kernel
        self._grid = grid
        self._numbers = numbers
        self._constants = constants
        self._options = options
        self._index = device.index
        self._tiles = tiles
        self._shared = shared
        self._known: _Known | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the tensors' device."""
        index, known = self._index, self._known
        if index is not None and index != torch._C._cuda_getDevice():
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
        if known.maps:
            pointers = self._mapped(known, pointers, tensors)
        known.run(*known.grid, known.stream_of(index), *known.handles, *pointers, *known.after)

    def _mapped(self, known: "_Known", pointers: list[Any], tensors: tuple[Tensor, ...]) -> list[Any]:
        """The pointers, the first of them as what descriptors of tensors there come down to."""
        mapped: list[Any] = []
        for place, (maps, expand) in enumerate(known.maps):
            found = maps.get(pointers[place])
            if found is None:
                if len(maps) >= _MOST_MAPS:
                    maps.clear()
                found = maps[pointers[place]] = expand(_describe(tensors[place], *self._tiles[place]))
            mapped += found
        return mapped + pointers[len(known.maps) :]

    def _launch_and_keep(self, tensors: tuple[Tensor, ...]) -> None:
        """Launch as Triton does; keep what it compiled if the next call may use it as it is."""
        described = [_describe(tensor, *tile) for tensor, tile in zip(tensors, self._tiles, strict=False)]
        arguments = (*described, *tensors[len(described) :], *self._numbers)
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if compiled is not None and self._shared:
            prefer_shared(compiled.function)
        if compiled is None or any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors):
            return  # interpreted, or compiled for less than what the others have
        constants = (self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
        run, expanders = _launcher_of(compiled) if described else (compiled.run, [])
        self._known = _Known(
            run=run,
            handles=(compiled.function, compiled.packed_metadata, None, None, None),  # no metadata, no hooks
            grid=(*self._grid, 1, 1)[:3],
            stream_of=triton.runtime.driver.active.get_current_stream,
            maps=tuple(({}, expand) for expand in expanders),
            after=(*self._numbers, *constants),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a launch takes beside pointers: the launcher, what it is handed before them and after."""

    run: Callable[..., None]
    handles: tuple[Any, ...]
    grid: tuple[int, ...]
    stream_of: Callable[[int | None], int]
    maps: tuple[tuple[dict[int, list[Any]], "_Expand"], ...]  # of each descriptor: address to what it expands to
    after: tuple[Any, ...]


_Expand = Callable[[Any], list[Any]]
"""A descriptor to the arguments that the launcher proper takes for it."""


def _launcher_of(compiled: Any) -> tuple[Callable[..., None], list[_Expand]]:
    """Triton's launcher of a kernel that takes descriptors, without its wrapper that encodes them at every launch.

    Encoding is half of such a launch's host time, and depends on nothing but the address. The wrapper is a closure
    over the launcher proper; beside it stands the function that it expands descriptors with.
    """
    from triton.backends.nvidia import driver

    plain = copy.copy(compiled.run)
    plain.launch = inspect.getclosurevars(compiled.run.launch).nonlocals["launcher"]
    return plain, [partial(driver.make_tensordesc_arg, metadata=each) for each in compiled.metadata.tensordesc_meta]


def _describe(tensor: Tensor, block: list[int], layout: Any) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    matrix = tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
    return TensorDescriptor.from_tensor(matrix, block, layout)


def run_one(launch: Prepared, x: Tensor, theta: Tensor, step: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """The `Run` of kernels that take these five tensors; where there is no bias they are handed the step, unread."""
    launch(x, theta, step, step if bias is None else bias, y)
