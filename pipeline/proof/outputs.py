"""Run any module on the user's inputs, and compare the outputs of two models.

    def batches():                     # --inputs FILE.py:batches: yields what the model is called with
        yield torch.rand(4, 3, 64, 64)             # a tensor, a tuple of arguments, or a mapping of keyword arguments

    def metric(original, compressed):  # --metric FILE.py:metric: two lists of outputs, one per batch
        return {"top1": ...}                       # a number, or numbers by name

Each output gets its SQNR in dB, and the mean cosine similarity of its samples with the original's. Only floating-point
tensors are compared.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from birkhoff.codec.metrics import compare as errors
from birkhoff.codec.output.statistics import Outputs
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.load.builders import user_function
from birkhoff.pipeline.proof.decibel import decibel
from birkhoff.pipeline.registry.documents import Agreement


@dataclass(slots=True, kw_only=True)
class OutputScore:
    """Sums of one output over all batches: sum x^2, sum (x - x')^2, and the cosine of each sample."""

    energy: float = 0.0
    error: float = 0.0
    cosines: list[float] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        """Return this output's row in the table of `evaluate`."""
        return {"output": name, "sqnr_db": decibel(self.energy, self.error), "cosine": self.cosine}

    @property
    def cosine(self) -> float:
        """The mean over all samples."""
        return round(sum(self.cosines) / max(1, len(self.cosines)), 4)


def batches_of(inputs: str) -> list[Any]:
    """Return the batches that the user's function yields. Raises BuilderError."""
    make = user_function("--inputs", inputs)
    try:
        found = list(make())
    except Exception as error:  # the user's code may raise anything
        raise BuilderError(f"--inputs {inputs}: {type(error).__name__}: {error}") from error
    if not found:
        raise BuilderError(f"--inputs {inputs}: expected batches, got none")
    return found


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """Return a model's outputs for each batch, on the CPU. Raises BuilderError if the model cannot be called."""
    return [_moved(_called(model, batches, number), torch.device("cpu")) for number in range(len(batches))]


def tapped(model: nn.Module, batches: Sequence[Any]) -> Callable[[int], Outputs]:
    """Return a function from a batch's number to the model's outputs, with their graph, each of weight 1.

    `codec.output.statistics` calls it. It raises BuilderError if the model cannot be called, or if the outputs hold no
    floating-point tensors.
    """

    def outputs(number: int) -> Outputs:
        found = {name: (1.0, tensor) for name, tensor in _tensors(_called(model, batches, number))}
        if not found:
            raise BuilderError("--inputs: the model's outputs hold no real tensors, so no sensitivity can be measured")
        return found

    return outputs


def _called(model: nn.Module, batches: Sequence[Any], number: int) -> Any:
    """Return a model's output for one batch. Raises BuilderError if the call fails."""
    interrupt.check()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given = _moved(batches[number], device)
    try:
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple | list) else model(given)
    except Exception as error:  # the model's code may raise anything
        kind = f"{type(model).__name__} fails on batch {number}"
        raise BuilderError(f"--inputs: {kind}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def scores(original: Sequence[Any], compressed: Sequence[Any]) -> dict[str, OutputScore]:
    """Return the score of every output by name. Raises BuilderError if there is nothing to compare."""
    found: dict[str, OutputScore] = {}
    for first, second in zip(original, compressed, strict=True):
        others = dict(_tensors(second))
        for name, tensor in _tensors(first):
            score, other = found.setdefault(name, OutputScore()), others[name].to(tensor.dtype)
            measured = errors(tensor, other)
            score.energy += measured.energy
            score.error += measured.error
            score.cosines += _cosines(tensor, other)
    if not found:
        raise BuilderError("--inputs: the model's outputs hold no real tensors, so there is nothing to compare")
    return found


def agreement(found: Mapping[str, OutputScore], batches: int, metrics: dict[str, float] | None) -> Agreement:
    """Return the worst SQNR and cosine over all outputs, with the user's metric."""
    lossy = [db for score in found.values() if (db := decibel(score.energy, score.error)) is not None]
    return Agreement(
        inputs=batches,
        output_db=min(lossy, default=None),
        cosine=min(score.cosine for score in found.values()),
        metrics=metrics,
    )


def metrics_of(metric: str | None, original: Sequence[Any], compressed: Sequence[Any]) -> dict[str, float] | None:
    """Return the values of the user's metric by name, or None without a metric. Raises BuilderError."""
    if metric is None:
        return None
    measure: Callable[[Sequence[Any], Sequence[Any]], Any] = user_function("--metric", metric)
    try:
        found = measure(original, compressed)
        named = found if isinstance(found, Mapping) else {metric.rpartition(":")[2]: found}
        values = {str(name): float(value) for name, value in named.items()}
    except Exception as error:  # the user's code may raise anything
        raise BuilderError(f"--metric {metric}: {type(error).__name__}: {error}") from error
    if not all(map(math.isfinite, values.values())):
        raise BuilderError(f"--metric {metric}: expected finite numbers, got {values}")
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in an output, named by the keys and indices that lead to them."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield name or "output", output.float()
        return
    parts = output.items() if isinstance(output, Mapping) else enumerate(output) if _is_list(output) else ()
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _moved(value: Any, device: torch.device) -> Any:
    """Return `value` with its tensors on `device`. Other objects are left alone."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    return tuple(_moved(part, device) for part in value) if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _cosines(first: Tensor, second: Tensor) -> list[float]:
    """Return the cosine of each sample of a batch, along the first dimension."""
    a, b = (
        tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1) for tensor in (first, second)
    )
    found: list[float] = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1).tolist()
    return [value if math.isfinite(value) else 0.0 for value in found]
