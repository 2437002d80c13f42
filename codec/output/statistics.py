"""What the outputs of a model feel of each of its weights: sensitivities and Hessians, from random probes.

With a probe v of independent standard normal numbers for each output, the gradient of v.out has in expectation the
squares of the Jacobian: E[(d(v.out)/dw)^2] is the diagonal of J^T J at w, and one backward pass gives it for every
weight (M. F. Hutchinson, 1989; C. Bekas, E. Kokiopoulou, Y. Saad, 2007). Each output counts over its own norm, so that
a sensitivity says by which share of itself the outputs move.

The Hessian of a matrix in the form in which the codec holds it (see `pairs.matrix_shape`) is, as far as an error in a
column and one in another column meet, a sum of two estimates, each over the mean of its diagonal:

    E[x x^T]    of the inputs of linear layers and dense convolutions: what GPTQ takes (E. Frantar et al., ICLR 2023)
    E[G^T G]    of the matrix' gradients G under the probes: for any parameter with rows, however it is used

The first is exact for the layer's own output, the second knows which of the inputs the model's outputs feel.

Shapes: R = rows, K = columns of a matrix; n = samples (positions of all pictures).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from birkhoff.codec.errors import CodecError
from birkhoff.codec.pairs import matrix_shape

STATISTICS_VERSION = 3
"""Raised when the same model, outputs and seed give other statistics."""

HESSIAN_BYTES = 4 << 30
HESSIAN_BYTES_GPU = 16 << 30
"""Bytes of Hessians that are gathered in one pass, on the model's device; more take further passes.

SAM-H's take 8 GB."""

Outputs = Mapping[str, tuple[float, Tensor]]
"""Weight and value of each output of one batch, by name; values of any float dtype, with a graph."""


def gather(
    model: nn.Module,
    outputs: Callable[[int], Outputs],
    *,
    batches: int,
    probes: int,
    seed: int,
    keep: Callable[[str, Tensor], object],
    wanted: Collection[str] | None = None,
    limit_bytes: int | None = None,
) -> dict[str, float]:
    """Take a model's statistics; equal arguments on equal devices give equal ones.

    Memory: the graph of one batch, the gradients, and up to `limit_bytes` of Hessians at a time. Whatever more Hessians
    take comes in further passes over all batches.

    Args:
        model: in evaluation mode; its parameters' `requires_grad` and gradients are left as they were, but None where
            a gradient was taken.
        outputs: runs the model on batch 0..batches-1. Called once for each batch and pass.
        batches, probes: forward passes, and backward passes for each.
        seed: of the probes, which the CPU draws.
        keep: is given the name of a parameter and its Hessian, float32 [K, K] on the model's device, one at a time.
            Its diagonal has a mean of 1 or 2, one for each estimate there is. A matrix that no output feels has none.
        wanted: names of parameters whose Hessians are asked for; all those with rows and columns where None.
        limit_bytes: bytes of Hessians gathered in one pass; HESSIAN_BYTES, on a GPU HESSIAN_BYTES_GPU, where None.

    Returns:
        Mean sensitivity of a weight of each float parameter, by name: squared share of the outputs by the square of
        the weights' unit. 0 where no output feels it.

    Raises:
        CodecError: an output, or a gradient, is not finite.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    matrices = {
        name: columns
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
    """The vectors [n, K] that a linear layer or dense convolution multiplies its matrix with, in the codec's columns.

    `x` is the layer's input: [..., K] of a linear layer, [B, C, H, W] of a convolution, whose patches are unfolded.
    """
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=_PADDING[module.padding_mode])
            padding: tuple[int, ...] = (0, 0)
        else:
            padding = module.padding
        x = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""torch's names for what `nn.Conv2d` calls its padding modes."""


class _Sums:
    """Running sums of both estimates for some matrices."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._names = set(names)
        self._counts = False
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
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
        """Add the inputs of layers while they run."""
        with ExitStack() as stack:
            for name, module in self._layers.items():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            yield

    def counted(self, outputs: Callable[[int], Outputs]) -> Callable[[int], Outputs]:
        """`outputs`, whose inputs of layers count; those of layers that run again in backward passes do not."""

        def run(batch: int) -> Outputs:
            self._counts = True
            try:
                return outputs(batch)
            finally:
                self._counts = False

        return run

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], _out: object) -> None:
            if not self._counts:
                return
            x = layer_inputs(module, inputs[0].detach()).float()
            self._inputs[name] = _added(self._inputs.get(name), x)

        return add

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add a gradient in its parameter's shape."""
        if name in self._names:
            matrix = gradient.reshape(matrix_shape(tuple(gradient.shape))).float()
            self._gradients[name] = _added(self._gradients.get(name), matrix)

    def hessian(self, name: str) -> Tensor | None:
        """The sum of the estimates there are, each over the mean of its diagonal; they are given up with it."""
        inputs, gradients = self._inputs.pop(name, None), self._gradients.pop(name, None)
        if gradients is None:
            return None
        total = None
        for part in (gradients, inputs):
            mean = 0.0 if part is None else float(part.diagonal().double().mean())
            if not math.isfinite(mean):
                raise CodecError(f"parameter {name!r}: the inputs of its layer are not finite on synthetic pictures")
            if total is None and not mean > 0:
                return None  # no output feels it
            if part is not None and mean > 0:
                total = part / mean if total is None else total.add_(part, alpha=1 / mean)
        return total


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 in TF32: ten bits of every factor are enough for a mean over samples."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def _added(total: Tensor | None, x_nK: Tensor) -> Tensor:
    """A running sum of x^T x."""
    return x_nK.T @ x_nK if total is None else total.addmm_(x_nK.T, x_nK)


def _probe(
    outputs: Callable[[int], Outputs], parameters: Mapping[str, nn.Parameter], batches: int, probes: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Gradients by parameter name of each probe of each batch."""
    generator = torch.Generator().manual_seed(seed)
    for batch in range(batches):
        found = outputs(batch)
        scales = {name: _scale(name, weight, value) for name, (weight, value) in found.items()}
        for probe in range(probes):
            parts = [
                (value * torch.randn(value.shape, generator=generator).to(value.device, value.dtype)).sum() * scale
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
    """An output's weight over its norm; 0 for an output of zeros."""
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
    """All parameters take gradients meanwhile, and have none afterwards."""
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


def _groups(columns: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Names cut into runs whose Hessians take at most `limit_bytes` together, or have one name; at least one run."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in ((name, 2 * 4 * count**2) for name, count in columns.items()):
        if groups[-1] and held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups
