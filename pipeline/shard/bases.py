"""The stored tensors that a shard's tensors may be coded as differences to."""

from collections.abc import Mapping, Sequence

from birkhoff.codec.container import CodedTensor, parse
from birkhoff.codec.difference.encode import Base
from birkhoff.codec.errors import FormatError
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.registry.documents import blob_key, sha256
from birkhoff.pipeline.shard.task import BaseShard
from birkhoff.pipeline.store.base import Store


class Bases:
    """The bases of one shard's tensors. Each container is read once, at its first use."""

    def __init__(self, store: Store, shards: Sequence[BaseShard]) -> None:
        self._store = store
        self._shards = {shard.blob: shard for shard in shards}
        self._of = {name: shard.blob for shard in shards for name in shard.tensors}
        self._held: dict[str, dict[str, CodedTensor]] = {}

    def digest_of(self, name: str) -> str | None:
        """Return the SHA-256 of the container that holds a tensor's base, or None."""
        return self._of.get(name)

    def size_of(self, digest: str) -> int:
        """Return the size of a container in bytes."""
        return self._shards[digest].bytes

    def of(self, name: str) -> Base | None:
        """Return the base of a tensor, or None. Raises IntegrityError, naming the container."""
        digest = self._of.get(name)
        if digest is None:
            return None
        held = self.tensors_of(digest).get(name)
        return None if held is None else Base(container=digest, tensor=held)

    def tensors_of(self, digest: str) -> Mapping[str, CodedTensor]:
        """Return the tensors of a container by name. Raises IntegrityError, naming the container."""
        if digest not in self._held:
            self._held[digest] = self._read(digest)
        return self._held[digest]

    def _read(self, digest: str) -> dict[str, CodedTensor]:
        shard = self._shards.get(digest)
        if shard is None:
            raise IntegrityError(f"{self._store.url}: blob {digest} is not a base of this shard: report this as a bug")
        remedy = "verify the base, and compress it again if it is damaged"
        try:
            body = self._store.get(blob_key(digest), length=shard.bytes + 1)
        except ObjectNotFoundError:
            raise IntegrityError(f"{self._store.url}: blob {digest} of the base is missing; {remedy}") from None
        if sha256(body) != digest:
            raise IntegrityError(f"{self._store.url}: blob {digest} of the base is damaged; {remedy}")
        try:
            return {coded.name: coded for coded in parse(body)}
        except FormatError as error:
            raise IntegrityError(f"{self._store.url}: blob {digest} of the base: {error}; {remedy}") from None
