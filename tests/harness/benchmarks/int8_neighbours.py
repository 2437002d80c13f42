"""Linear layers of other packages on int8 and fp8 tensor cores, tokens quantised within the call.

Each rounds an `nn.Linear` in bfloat16 to int8 or e4m3 with a scale for each row of W, and its tokens with a scale each.
gemlite: Triton kernels, tuned at a first call. torchao: `torch._int_mm` or `torch._scaled_mm`, and what Inductor makes
of the rest. Marlin and Machete hold weights in 4 or 8 bits and compute in bfloat16, as HyperLinear does.
"""

import contextlib
import copy
import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.benchmarks.common import installed

Form = Callable[[Tensor], Tensor]
Make = Callable[[nn.Linear], Form]

LIMIT = 0.06
"""Relative error against the bfloat16 layer: fp8 has about 0.04, int8 by row 0.015."""


def present() -> dict[str, Make]:
    """The neighbours whose packages are installed, by name and version."""
    found: dict[str, Make] = {}
    if _imports("gemlite"):
        found[f"gemlite {installed('gemlite')} int8"] = _gemlite
    if _imports("torchao"):
        found[f"torchao {installed('torchao')} fp8"] = _torchao("Float8DynamicActivationFloat8WeightConfig")
        found[f"torchao {installed('torchao')} int8"] = _torchao("Int8DynamicActivationInt8WeightConfig")
    return found


def _imports(package: str) -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module(package)
        return True
    return False


def _gemlite(linear: nn.Linear) -> Form:
    helper: Any = importlib.import_module("gemlite.helper")
    made: Form = helper.A8W8_int8_dynamic(device="cuda:0", dtype=linear.weight.dtype).from_linear(
        linear, del_orig=False
    )
    return made


def _torchao(config: str) -> Make:
    def make(linear: nn.Linear) -> Form:
        quantization: Any = importlib.import_module("torchao.quantization")
        options = {"granularity": quantization.PerRow()} if config.startswith("Float8") else {}
        model = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return partial(_compiled(), model)

    return make


@cache
def _compiled() -> Callable[[nn.Module, Tensor], Tensor]:
    """One function for all layers: Dynamo compiles it once for each shape, not once for each layer."""
    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(lambda layer, x: layer(x), dynamic=False)
    return compiled
