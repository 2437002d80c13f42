"""Measure a version on int8 tensor cores, and keep layers in float if int8 does not suit their inputs.

A layer rounds its inputs to int8 with one scale per token, which is coarse if a token has outliers. We measure what
this leaves of the layer's outputs on the inputs that the proof's pictures produce, relative to unrounded inputs with
the same weights.
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
"""Least SQNR of a layer's outputs after rounding its inputs. It takes 1 dB from weights at 30 dB:
10 * log10(1 + 10^(-36/10) / 10^(-30/10))."""

T = TypeVar("T")


def on_int8(model: nn.Module, artifact: Artifact, run: Callable[[], T]) -> tuple[dict[str, float | None], set[str], T]:
    """Load an artifact into a model on int8, and run it. Run it again if some layers are better in float.

    Returns:
        The SQNR in dB of every layer's outputs after rounding, by the name of its weight, None for no error; the names
        of the layers that now compute in float; the result of the last `run`.

    Raises: As `load_into`.
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
    """Accumulate, over a layer's calls, the squares of its outputs without the bias and of its rounding errors."""

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
