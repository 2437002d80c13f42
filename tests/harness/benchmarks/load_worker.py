"""`python -m tests.harness.benchmarks.load_worker JSON`: one load in its own process; prints JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.harness.benchmarks.family import layout

MODEL = "sam-h"
LAYOUT = "sam_vit_h"


def skeleton(name: str = LAYOUT) -> nn.Module:
    """A module tree with the tensors of a layout on the meta device, `nn.Linear` where the published model has it."""
    root = nn.Module()
    with torch.device("meta"):
        for spec in layout(name):
            *path, leaf = spec.name.split(".")
            owner = root
            for index, part in enumerate(path):
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                if index == len(path) - 1 and spec.kind == "linear" and leaf == "weight":
                    owner._modules[part] = nn.Linear(spec.shape[1], spec.shape[0], bias=False)
                owner = owner.get_submodule(part)
            if spec.kind == "linear" and leaf == "weight":
                continue
            if spec.kind in ("buffer", "counter"):
                owner.register_buffer(leaf, torch.empty(spec.shape))
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.empty(spec.shape)))
    return root


def ours(order: dict[str, Any], device: torch.device, model: nn.Module) -> nn.Module:
    """load_into of the reference, into the cache that the environment names."""
    import birkhoff

    birkhoff.load_into(model, order["reference"], order["store"], device=device)
    return model


def baseline(order: dict[str, Any], device: torch.device, _: nn.Module) -> dict[str, torch.Tensor]:
    """The dense checkpoint through the safetensors library."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(order["file"], device=str(device))
    return tensors


def _peak() -> int:
    """Greatest resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Start everything that a process starts once and build the empty model, then time the load alone."""
    order = json.loads(sys.argv[1])
    device = torch.device(order["device"])
    if order["what"] == "ours":
        import birkhoff.pipeline.load.load  # noqa: F401
    torch.zeros(1, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.time()
    if order.get("kernels") and device.type == "cuda":
        from birkhoff.kernels.entropy.op import warm_up

        warm_up(device)
    kernels = time.time() - began
    model = skeleton()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now; ru_maxrss would be the parent's
    before = _peak()
    ready = time.time()
    held = (ours if order["what"] == "ours" else baseline)(order, device, model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    loaded = time.time()
    tensors = held.values() if isinstance(held, dict) else [*held.parameters(), *held.buffers()]
    figures = {
        "load_s": loaded - ready,
        "start_s": ready - order["spawned"],
        "kernels_s": kernels,
        "host_bytes": _peak() - before,
        "model_bytes": sum(tensor.nbytes for tensor in tensors),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
