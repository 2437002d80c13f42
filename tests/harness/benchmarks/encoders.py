"""Image encoders of the SAM family at full size, and how they are timed against each other."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ENCODERS: dict[str, dict[str, Any]] = {
    "SAM-B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_dim": 3072,
              "global_attn_indexes": [2, 5, 8, 11]},
    "SAM-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_dim": 4096,
              "global_attn_indexes": [5, 11, 17, 23]},
    "SAM-H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120,
              "global_attn_indexes": [7, 15, 23, 31]},
}  # fmt: skip


def build(settings: Mapping[str, Any], device: str) -> nn.Module:
    """transformers' SamVisionModel, for evaluation; without weights on `meta`, else with matrices from N(0, 0.02)."""
    from transformers import SamVisionConfig, SamVisionModel

    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = SamVisionModel(SamVisionConfig(**settings)).eval()
    if device != "meta":
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return model


def keep_positions(model: nn.Module) -> None:
    """Compute relative positions once: made from indices on the host, they stall every layer and forbid graphs."""
    for module in model.modules():
        if hasattr(module, "get_rel_pos"):
            module.get_rel_pos = _remembering(module.get_rel_pos)


def _remembering(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known: dict[tuple[int, int, int], Tensor] = {}

    def remembered(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
        key = q_size, k_size, rel_pos.data_ptr()
        if key not in known:
            known[key] = function(q_size, k_size, rel_pos)
        return known[key]

    return remembered


def wall(runs: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of a call that ends when the device has, taking turns."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            begin = time.perf_counter()
            run()
            settle()
            seconds[label].append(time.perf_counter() - begin)
    return {label: sorted(values)[len(values) // 2] for label, values in seconds.items()}


def settle() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
