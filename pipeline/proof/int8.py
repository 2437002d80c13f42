"""Measure a version on int8 tensor cores, and leave in float the layers whose inputs do not suit that.

A layer rounds its inputs to int8 by one scale a token, which a token with outliers makes coarse. What is left of its
outputs is measured on the inputs that the proof's pictures lead to, against the same weights on inputs as they are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from birkhoff.codec.metrics import compare
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.pipeline.artifact.readers import Artifact
from birkhoff.pipeline.load.layer_forms import LayerMaker
from birkhoff.pipeline.load.load import load_artifact
from birkhoff.pipeline.proof.decibel import decibel

LEAST_DB = 36.0
"""SQNR that rounding its inputs must leave of a layer's outputs. It takes 1 dB from weights at 30 dB:
10 * log10(1 + 10^(-36/10) / 10^(-30/10))."""

T = TypeVar("T")


def on_int8(model: nn.Module, artifact: Artifact, run: Callable[[], T]) -> tuple[dict[str, float | None], set[str], T]:
    """Load an artifact into a model on int8, and run it: once, and again if some layers are better left in float.

    Returns:
        The SQNR in dB that rounding leaves of every layer's outputs, by the name of its weight, None for no error; the
        names of those that now compute in float; what the last `run` gave.

    Raises: as `load_into`.
    """
    maker = LayerMaker("uint16", "int8", everywhere=True)
    load_artifact(model, artifact, maker)
    meters = {name: _Meter(layer) for name, layer in maker.made.items() if isinstance(layer, Int8HyperLinear)}
    try:
        found = run()
    finally:
        for meter in meters.values():
            meter.handle.remove()
    left = {name: decibel(meter.energy, meter.error) for name, meter in meters.items() if meter.energy}
    in_float = {name for name, db in left.items() if db is not None and db < LEAST_DB}
    if in_float:
        load_artifact(model, artifact, LayerMaker("uint16", "int8", in_float=in_float, everywhere=True))
        found = run()
    return left, in_float, found


class _Meter:
    """Sums, over the calls of a layer, of its outputs' squares without the bias, and of what rounding changes."""

    def __init__(self, layer: Int8HyperLinear) -> None:
        self.energy = self.error = 0.0
        self.handle: Any = layer.register_forward_hook(self._take)

    def _take(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, Int8HyperLinear)
        with torch.no_grad():
            exact = functional.linear(inputs[0].float(), layer.dense_weight(torch.float32))
            rounded = output.float() if layer.bias is None else output.float() - layer.bias.float()
            found = compare(exact, rounded)
        self.energy += found.energy
        self.error += found.error
