"""Read a shard's source tensors, one shard after the other into the same memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from birkhoff.pipeline import logs
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import read_tensor

MAX_KEPT_BYTES = 64 << 20
"""Most memory that is kept from shard to shard. Shards are smaller unless a tensor, or a manifest's `shard_mib`, is
large."""

_ALIGNMENT = 64
"""Tensors begin at a multiple of so many bytes, as in memory of their own."""


class SourceBuffer:
    """The memory of one worker for its sources.

    The kernel need not map and clear it for every shard. In an allocator's heap, each shard's memory comes to lie
    between small objects that stay; the next does not fit there, so a worker would grow with the number of shards.
    """

    def __init__(self) -> None:
        self._kept: Tensor = torch.empty(0, dtype=torch.uint8)

    def read(self, tensors: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """Return tensors by name, on the CPU. They may lie in memory that the next call overwrites.

        Raises SourceError.
        """
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        parts = self._allocate(sum(sizes)).split(sizes)
        return {tensor.name: _read(tensor, part) for tensor, part in zip(tensors, parts, strict=True)}

    def _allocate(self, size: int) -> Tensor:
        if size > MAX_KEPT_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        if size > self._kept.numel():
            self._kept = torch.empty(size, dtype=torch.uint8)
        return self._kept[:size]


def _read(tensor: StoredTensor, memory: Tensor) -> Tensor:
    logs.step("read", tensor.dense_bytes, tensor.name)
    return read_tensor(tensor, memory)
