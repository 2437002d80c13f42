"""The published packages, imported where torchvision cannot be.

They import torchvision for their image transforms and their box operations, which building, loading and running a model
do not use; the index's torchvision needs a torch built for CUDA. So where it cannot be imported, empty modules stand in
for it while the packages are imported, and go again: other packages look for torchvision too.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import nn

_NAMES = {
    "torchvision": (),
    "torchvision.transforms": ("Normalize", "Resize", "ToTensor"),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
}


def upstream(name: str) -> ModuleType:
    """A module of a published package; skips the test where the package is not installed."""
    with _torchvision():
        return pytest.importorskip(name)


def drawn(model: nn.Module) -> nn.Module:
    """Random weights everywhere: what a module sets to zero or one would hide a tensor in a wrong place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                draw = torch.randn(tensor.shape, generator=generator)
                scale = 0.05 if tensor.dim() > 1 else 0.02
                tensor.copy_(draw * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


@contextmanager
def _torchvision() -> Iterator[None]:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        pass
    else:
        yield
        return
    for name, members in _NAMES.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(dict.fromkeys(members, object))
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    try:
        yield
    finally:
        for name in _NAMES:
            sys.modules.pop(name, None)
