"""A kernel launch with everything fixed except its tensors, which makes repeated calls cheap on the host.

Triton looks the compiled kernel up at every launch, by the type, value and alignment of each argument: 10 to 20
microseconds of host time. A `Prepared` does it once. Later calls pass addresses straight to the launcher that Triton
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
"""Addresses for which a launch caches encoded descriptors."""

_ALIGNMENT = 16
"""Triton compiles different kernels for pointers that are multiples of this many bytes and for others."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
"""A fused kernel ready to run: writes y from (x, theta [N, P], step [], bias [N] or None, y), without escapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Everything that a launch of a linear layer depends on except addresses: M, N, K, the stride of x's rows, and so
    on.

    `bias` is the dtype of the bias, or None.
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
    """A kernel with its grid, numbers and constants, called with its tensors in the order of its parameters.

    The kernel's parameters are its tensors, then `numbers`, then `constants`. The first call compiles. Tensors of later
    calls must have the same dtypes, and with `tiles` the same shapes and strides; the holder's key ensures this.
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
        """Store the launch. Nothing is compiled yet.

        Args:
            kernel: A `triton.jit` or `gluon.jit` function.
            grid: Up to three positive sizes.
            numbers: Passed at launch.
            constants: `tl.constexpr` parameters by name.
            options: Launch options, such as `num_warps`.
            device: The device of the tensors.
            tiles: (block shape, shared-memory layout) of the leading tensors, which the kernel takes as descriptors.
            shared: Whether multiprocessors give the kernel the maximum of shared memory (`carveout`).
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
        """Return the pointers, with the leading ones replaced by the expanded descriptors of their tensors."""
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
        """Launch as Triton does, and keep the compiled kernel if later calls can use it directly."""
        described = [_describe(tensor, *tile) for tensor, tile in zip(tensors, self._tiles, strict=False)]
        arguments = (*described, *tensors[len(described) :], *self._numbers)
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if compiled is not None and self._shared:
            prefer_shared(compiled.function)
        if compiled is None or any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors):
            return  # interpreted, or compiled for unaligned pointers
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
    """The launcher, and the arguments of a launch before and after its pointers."""

    run: Callable[..., None]
    handles: tuple[Any, ...]
    grid: tuple[int, ...]
    stream_of: Callable[[int | None], int]
    maps: tuple[tuple[dict[int, list[Any]], "_Expand"], ...]  # per descriptor: address to expansion
    after: tuple[Any, ...]


_Expand = Callable[[Any], list[Any]]
"""Expands a descriptor to the arguments of the inner launcher."""


def _launcher_of(compiled: Any) -> tuple[Callable[..., None], list[_Expand]]:
    """Return Triton's launcher of a kernel with descriptors, without the wrapper that encodes these at every launch.

    Encoding takes half of such a launch's host time and depends only on the address. The wrapper is a closure over the
    inner launcher and the function that expands descriptors.
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
    """Run a kernel with these five tensors, as a `Run`. Without a bias it gets the step and does not read it."""
    launch(x, theta, step, step if bias is None else bias, y)
