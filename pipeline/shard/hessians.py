"""The Hessians for error feedback in a shard's tensors, read from the store to the device."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from birkhoff.codec.output.hessian import Hessian, rows_of
from birkhoff.codec.output.packing import packed_bytes, unpack
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import Decision
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.registry.documents import blob_key, sha256
from birkhoff.pipeline.store.base import Store

HessianOf = Callable[[str], Hessian | None]
"""Returns the Hessian for a tensor's error feedback, on the present device; None without feedback."""


class Hessians:
    """The Hessians of a shard's tensors. Each is read from the store at its first use; its packed bytes stay in
    memory."""

    def __init__(
        self, store: Store, sources: Mapping[str, Tensor], decisions: Mapping[str, Decision], device: torch.device
    ) -> None:
        self._store, self._device = store, device
        self._shapes = {name: matrix_shape(tuple(tensor.shape)) for name, tensor in sources.items()}
        self._digests = {name: decision.hessian for name, decision in decisions.items()}
        self._packed: dict[str, bytes] = {}

    def of(self, name: str) -> Hessian | None:
        """Return the Hessian of a tensor, on the device, or None. Raises IntegrityError."""
        digest, (rows, columns) = self._digests[name], self._shapes[name]
        if digest is None:
            return None
        if digest not in self._packed:
            self._packed[digest] = self._read(name, digest, packed_bytes(columns, rows_of(rows)))
        packed = self._packed[digest]
        alone = len(packed) == packed_bytes(columns, 0)  # no gradient reached the layer's own output
        return unpack(packed, columns, 0 if alone else rows_of(rows), self._device)

    def _read(self, name: str, digest: str, size: int) -> bytes:
        remedy = "run again: the model's statistics are then measured again"
        try:
            body = self._store.get(blob_key(digest), length=size + 1)
        except ObjectNotFoundError:
            raise IntegrityError(
                f"{self._store.url}: blob {digest}, the Hessian of {name!r}, was deleted since the run began; {remedy}"
            ) from None
        if sha256(body) != digest:
            raise IntegrityError(f"{self._store.url}: blob {digest}, the Hessian of {name!r}, is damaged; {remedy}")
        return body
