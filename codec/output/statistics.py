"""Measure how a model's outputs depend on each of its weights: sensitivities and Hessians, from random probes.

A probe v has an independent standard normal number for each output. In expectation, the square of the gradient of v.out
is a squared entry of the Jacobian: E[(d(v.out)/dw)^2] is the diagonal of J^T J at w, and one backward pass estimates it
for every weight (M. F. Hutchinson, 1989; C. Bekas, E. Kokiopoulou, Y. Saad, 2007). Each output is divided by its norm,
so a sensitivity is relative: the share of itself by which the outputs move.

The Hessian of a matrix, in the form in which the codec holds it (see `pairs.matrix_shape`), says how errors in two
columns interact. It is the sum of two estimates, each divided by the mean of its diagonal:

    E[x x^T]    of the inputs of linear layers and dense convolutions, as in GPTQ (E. Frantar et al., ICLR 2023)
    E[G^T G]    of the matrix's gradients G under the probes, for any parameter with rows, however it is used

The first is exact for the layer's own output. The second knows which inputs affect the model's outputs.

How errors in two rows interact is E[g g^T] for linear layers and dense convolutions, with g as the gradient of the
layer's output at one position, and E[G G^T] for other parameters. On pictures that set neither, the first saves 0.37
bits per weight of LiteMedSAM, the second 0.30, their sum no more than the first.

Shapes: R = rows, K = columns of a matrix; n = samples (positions of all pictures).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from birkhoff.codec.errors import CodecError
from birkhoff.codec.output.hessian import Hessian, rows_of
from birkhoff.codec.pairs import matrix_shape

STATISTICS_VERSION = 5
"""Raised when the same model, outputs and seed give other statistics."""

HESSIAN_BYTES = 4 << 30
HESSIAN_BYTES_GPU = 16 << 30
"""Bytes of Hessians to gather in one pass on the model's device. More Hessians need more passes.

Those of SAM-H take 10 GB."""

SAMPLES = 2
LEAST_SAMPLES = 1024
"""Positions of a layer that a batch adds to an estimate: so many for each column, and at least so many.

Neighbours in a picture are alike, and another picture says more than the rest of the same one."""

Outputs = Mapping[str, tuple[float, Tensor]]
"""The weight and the value of each output of one batch, by name. Values have any float dtype and a graph."""


def gather(
    model: nn.Module,
    outputs: Callable[[int], Outputs],
    *,
    batches: int,
    probes: int,
    seed: int,
    keep: Callable[[str, Hessian], object],
    wanted: Collection[str] | None = None,
    limit_bytes: int | None = None,
) -> dict[str, float]:
    """Take a model's statistics. Equal arguments on equal devices give equal statistics.

    Memory: the graph of one batch, the gradients, and up to `limit_bytes` of Hessians at a time. If the Hessians need
    more, further passes over all batches gather the rest.

    Args:
        model: In evaluation mode. Parameters keep their `requires_grad` and gradients, except that a gradient that was
            taken becomes None.
        outputs: Runs the model on batch 0..batches-1. Called once per batch and pass.
        batches, probes: Number of forward passes, and of backward passes for each.
        seed: Of the probes, which the CPU draws.
        keep: Receives a parameter's name and its Hessian on the model's device, one at a time. The mean of a factor's
            diagonal is 1, or 2 for columns with both estimates. A matrix that affects no output has no Hessian, one
            with more than `MOST_ROWS` rows no factor for them.
        wanted: Names of the parameters whose Hessians to take; None for all with rows and columns.
        limit_bytes: Bytes of Hessians per pass; None for HESSIAN_BYTES, or HESSIAN_BYTES_GPU on a GPU.

    Returns:
        The mean sensitivity of a weight of each float parameter, by name: the squared share of the outputs per squared
        unit of the weights. It is 0 if the parameter affects no output.

    Raises:
        CodecError: An output, or a gradient, is not finite.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    matrices = {
        name: (rows, columns)
        for name, (rows, columns) in ((name, matrix_shape(tuple(value.shape))) for name, value in parameters.items())
        if rows > 1 and columns > 1 and (wanted is None or name in wanted)
    }
    sensitivity = dict.fromkeys(parameters, 0.0)
    if limit_bytes is None:
        limit_bytes = HESSIAN_BYTES_GPU if any(value.is_cuda for value in parameters.values()) else HESSIAN_BYTES
    with _gradients(parameters.values()), _tensor_cores():
        for number, group in enumerate(_groups(matrices, limit_bytes)):
            sums = _Sums(model, group)
            with sums.watching():
                for gradients in _probe(sums.counted(outputs), parameters, batches, probes, seed):
                    for name, gradient in gradients.items():
                        sums.add_gradient(name, gradient)
                        if number == 0:
                            sensitivity[name] += _mean_square(name, gradient) / (batches * probes)
            for name in group:
                found = sums.hessian(name)
                if found is not None:
                    keep(name, found)
    return sensitivity


def layer_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors [B, n, K] that a linear layer or dense convolution multiplies by its matrix.

    `x` is the layer's input: [..., K] for a linear layer, whose B is 1, [B, C, H, W] for a convolution, whose patches
    are unfolded. The columns are those of the codec.
    """
    if isinstance(module, nn.Conv2d):
        if (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0)):
            return _positions(x, maps=True)
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=_PADDING[module.padding_mode])
            padding: tuple[int, ...] = (0, 0)
        else:
            padding = module.padding
        x = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        return x.transpose(1, 2)
    return _positions(x, maps=False)


def _positions(x: Tensor, *, maps: bool) -> Tensor:
    """Return maps [B, C, H, W] as [B, H W, C], or vectors [..., C] as [1, n, C], if possible as a view."""
    return x.flatten(2).transpose(1, 2) if maps else x.reshape(1, -1, x.shape[-1])


def _sampled(x_BnK: Tensor) -> Tensor:
    """Return vectors [m, K] of some positions, one from each of as many equal stretches.

    Where in its stretch goes by the golden ratio: an even step would see one column of a picture only, or one corner of
    every window of attention.
    """
    batch, positions, columns = x_BnK.shape
    kept = -(-max(SAMPLES * columns, LEAST_SAMPLES) // max(batch, 1))
    if kept < positions:
        stretch = torch.arange(kept, device=x_BnK.device, dtype=torch.float64)
        places = (stretch + (stretch * _GOLDEN) % 1) * (positions / kept)
        x_BnK = x_BnK.index_select(1, places.long().clamp_(max=positions - 1))
    return x_BnK.reshape(-1, columns)


_GOLDEN = (math.sqrt(5) - 1) / 2


_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""torch's names for the padding modes of `nn.Conv2d`."""


class _Sums:
    """Running sums of both estimates for some matrices."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._names = set(names)
        self._counts = False
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        by_id = {id(value): name for name, value in model.named_parameters() if name in self._names}
        self._layers = {
            by_id[id(module.weight)]: module
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and getattr(module, "groups", 1) == 1
            and id(module.weight) in by_id
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add the inputs of layers while those run."""
        with ExitStack() as stack:
            for name, module in self._layers.items():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            yield

    def counted(self, outputs: Callable[[int], Outputs]) -> Callable[[int], Outputs]:
        """Return `outputs` so that inputs of layers count. Layers that run again in backward passes do not count."""

        def run(batch: int) -> Outputs:
            self._counts = True
            try:
                return outputs(batch)
            finally:
                self._counts = False

        return run

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if not self._counts:
                return
            x = _sampled(layer_inputs(module, inputs[0].detach()))
            self._inputs[name] = _added(self._inputs.get(name), x.float())
            maps = isinstance(module, nn.Conv2d)
            if out.requires_grad and rows_of(out.shape[1 if maps else -1]):
                out.register_hook(partial(self._add_outputs, name, maps))

        return add

    def _add_outputs(self, name: str, maps: bool, gradient: Tensor) -> None:
        vectors = _sampled(_positions(gradient.detach(), maps=maps))
        self._rows[name] = _added(self._rows.get(name), vectors.float())

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add a gradient in the shape of its parameter."""
        if name in self._names:
            matrix = gradient.reshape(matrix_shape(tuple(gradient.shape))).float()
            self._gradients[name] = _added(self._gradients.get(name), matrix)
            if name not in self._inputs and rows_of(len(matrix)):
                self._rows[name] = _added(self._rows.get(name), matrix.T)

    def hessian(self, name: str) -> Hessian | None:
        """Return both factors, each the sum of its estimates divided by the mean of their diagonals, and drop them."""
        inputs, gradients, rows = (sums.pop(name, None) for sums in (self._inputs, self._gradients, self._rows))
        columns = None if gradients is None else _total(name, gradients, inputs)
        return None if columns is None else Hessian(columns=columns, rows=_total(name, rows))


def _total(name: str, *estimates: Tensor | None) -> Tensor | None:
    """Return the sum of estimates, each divided by the mean of its diagonal; None if the first is zero or missing."""
    total = None
    for part in estimates:
        mean = 0.0 if part is None else float(part.diagonal().double().mean())
        if not math.isfinite(mean):
            raise CodecError(f"parameter {name!r}: the values at its layer are not finite on synthetic pictures")
        if total is None and not mean > 0:
            return None
        if part is not None and mean > 0:
            total = part / mean if total is None else total.add_(part, alpha=1 / mean)
    return total


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 in TF32. Ten bits of every factor are enough for a mean over samples."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def _added(total: Tensor | None, x_nK: Tensor) -> Tensor:
    """Return a running sum of x^T x with these vectors added."""
    return x_nK.T @ x_nK if total is None else total.addmm_(x_nK.T, x_nK)


def _probe(
    outputs: Callable[[int], Outputs], parameters: Mapping[str, nn.Parameter], batches: int, probes: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients by parameter name, for each probe of each batch."""
    generator = torch.Generator().manual_seed(seed)
    for batch in range(batches):
        found = outputs(batch)
        scales = {name: _scale(name, weight, value) for name, (weight, value) in found.items()}
        for probe in range(probes):
            parts = [
                (
                    value
                    * torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device, value.dtype)
                ).sum()
                * scale
                for (_, value), scale in zip(found.values(), scales.values(), strict=True)
                if scale
            ]
            if not parts:
                continue
            torch.stack([part.float() for part in parts]).sum().backward(retain_graph=probe + 1 < probes)
            yield {name: value.grad for name, value in parameters.items() if value.grad is not None}
            for value in parameters.values():
                value.grad = None


def _scale(name: str, weight: float, value: Tensor) -> float:
    """Return an output's weight divided by its norm; 0 for an output of zeros."""
    norm = float(value.detach().float().norm())
    if not math.isfinite(norm):
        raise CodecError(f"output {name!r} holds NaN or Inf on synthetic pictures: repair or retrain the model first")
    return weight / norm if norm > 0 else 0.0


def _mean_square(name: str, gradient: Tensor) -> float:
    found = float(gradient.float().square().mean())
    if not math.isfinite(found):
        raise CodecError(f"parameter {name!r}: its gradient on synthetic pictures is not finite")
    return found


@contextmanager
def _gradients(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let all parameters take gradients in this context, and drop the gradients afterwards."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
            parameter.grad = None


def _groups(shapes: Mapping[str, tuple[int, int]], limit_bytes: int) -> list[list[str]]:
    """Divide names into runs whose Hessians take at most `limit_bytes` together, or that have one name. Return at least
    one run."""
    groups: list[list[str]] = [[]]
    held = 0
    sizes = {name: 4 * (2 * columns**2 + rows_of(rows) ** 2) for name, (rows, columns) in shapes.items()}
    for name, size in sizes.items():
        if groups[-1] and held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups
