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
