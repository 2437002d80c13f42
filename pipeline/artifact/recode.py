"""Recode a stored version in the current container format, from its own bytes: no source, no new quantisation.

Each container is rewritten tensor by tensor and read back, and every coordinate and bit must equal the old one's. The
recoded version gets new records, and is published by the ordinary protocol.
"""

import hashlib
import json
from dataclasses import dataclass

import torch

from birkhoff.codec.container import FORMAT_VERSION, CodedTensor, parse, serialise
from birkhoff.codec.errors import FormatError
from birkhoff.codec.tensor import decode_tensor, lattice_of, recode
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.errors import IntegrityError, PreconditionError
from birkhoff.pipeline.registry.documents import ShardRecord, sha256
from birkhoff.pipeline.registry.labels import change_labels, read_labels
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.signing import Signer
from birkhoff.pipeline.registry.versions import Version, latest_version, publish, resolve
from birkhoff.pipeline.shard.run import keep_shard
from birkhoff.pipeline.store.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Recoded:
    """A version before and after; the same one if there was nothing to do."""

    before: Version
    after: Version
    shards: int
    """Number of rewritten containers."""

    def facts(self) -> dict[str, object]:
        """Return the result under the keys of `--json`."""
        return {
            "model": self.after.model,
            "version": self.after.name,
            "from": self.before.name,
            "digest": self.after.digest,
            "format": FORMAT_VERSION,
            "shards": self.shards,
            "stored_bytes": self.after.stored_bytes,
            "saved_bytes": self.before.stored_bytes - self.after.stored_bytes,
        }


def recode_version(
    store: Store,
    reference: str,
    *,
    make_latest: bool = False,
    single_publisher: bool = False,
    signer: Signer | None = None,
) -> Recoded:
    """Publish a version in the current container format, with the labels of its original.

    Args:
        store: The store of the version.
        reference: MODEL[@REF].
        make_latest: Allow a version older than `latest`; `latest` then points at the recoded one.
        single_publisher: As `publish`.
        signer: As `publish`.

    Raises:
        ArtifactNotFoundError: There is no such version.
        PreconditionError: It is not the newest one, and `make_latest` is off.
        IntegrityError: A blob is damaged, or differs after recoding.
        StoreError: The store failed.
    """
    with open_run(store) as run:
        before = resolve(store, reference)
        newest = latest_version(store, before.model)
        if newest is not None and newest.digest != before.digest and not make_latest:
            raise PreconditionError(
                f"{reference} is not the newest version of {before.model}, which is {newest.name}: publishing it again "
                "would make it `latest`; recode that one, or use --make-latest"
            )
        artifact = StoredArtifact(store, before)
        shards = []
        for record in before.manifest.shards:
            shards.append(_recode_shard(store, artifact, record))
            interrupt.check()
            run.check()
        changed = sum(a != b for a, b in zip(shards, before.manifest.shards, strict=True))
        if not changed:
            return Recoded(before=before, after=before, shards=0)
        manifest = before.manifest.model_copy(update={"shards": tuple(shards)})
        after = publish(store, manifest, single_publisher=single_publisher, signer=signer)
        change_labels(store, after.model, after.digest, read_labels(store, before.model, before.digest))
        return Recoded(before=before, after=after, shards=changed)


def _recode_shard(store: Store, artifact: StoredArtifact, record: ShardRecord) -> ShardRecord:
    """Store a shard in the current format and return its record; the same record if it is current."""
    old = artifact.coded_of(record)
    if all(coded.version == FORMAT_VERSION for coded in old):
        return record
    try:
        blob = serialise([recode(coded) for coded in old])
        same = all(map(_is_same, old, parse(blob)))
    except FormatError as error:
        raise IntegrityError(f"{artifact.label}: blob {record.blob} cannot be recoded: {error}") from None
    if not same:
        raise IntegrityError(f"{artifact.label}: blob {record.blob} differs after recoding: report this as a bug")
    # Not a key that an encoder could compute from a source: such a shard has another key.
    key = hashlib.sha256(json.dumps(["recoded", FORMAT_VERSION, record.key]).encode()).hexdigest()
    recoded = record.model_copy(update={"key": key, "blob": sha256(blob), "bytes": len(blob)})
    keep_shard(store, blob, recoded)
    return recoded


def _is_same(old: CodedTensor, new: CodedTensor) -> bool:
    """Return whether two stored tensors have equal entries and contents."""
    fields = ("name", "dtype", "shape", "claims", "lossless")
    if any(getattr(old, field) != getattr(new, field) for field in fields):
        return False
    if old.codec == "lattice":
        return lattice_of(old).equals(lattice_of(new))
    before, after = (decode_tensor(coded).reshape(-1) for coded in (old, new))
    return not len(before) or torch.equal(before.view(torch.uint8), after.view(torch.uint8))
