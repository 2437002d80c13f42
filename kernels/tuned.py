"""Plans measured on particular GPUs, as plain values; made by `python -m tests.benchmarks kernels`."""

from typing import Any

SHIPPED: dict[str, dict[tuple[int, int, int], dict[str, Any]]] = {}
"""GPU name to (rows, columns, tokens) to the fields of a `Plan`."""


def lookup(gpu: str, rows: int, columns: int, tokens: int) -> dict[str, Any] | None:
    """Fields of the plan measured on `gpu` for a weight [rows, columns] and a power of two of tokens, if any."""
    return SHIPPED.get(gpu, {}).get((rows, columns, tokens))
