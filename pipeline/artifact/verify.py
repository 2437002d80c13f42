"""Verify a stored artifact: every digest, every tensor decoded, optionally against its checkpoint."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.artifact.readers import Artifact
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.errors import IntegrityError, ValidationError
from birkhoff.pipeline.paths import source_cache
from birkhoff.pipeline.shard.decisions import decisions_of
from birkhoff.pipeline.shard.validate import check_step, claimed, promise

_GIVES_REASONS = 2
"""The first `profiles.ENCODER_VERSION` that records why a tensor fell back to lossless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The extent of a verification. `compared` counts tensors measured against a source; `sqnr_db` is their least,
    dB."""

    blobs: int
    bytes: int
    tensors: int
    compared: int
    sqnr_db: float | None


def verify(artifact: Artifact, against: Path | None = None) -> Verification:
    """Check every byte of an artifact.

    Raises:
        IntegrityError: A blob is missing, does not match its digest or cannot be decoded; it is named.
        ValidationError: A tensor is not finite, contradicts recipe and overrides, misses its target (claimed or, with a
            source, measured), or has another step than its nominal one.
        SourceError: The source cannot be read.
    """
    sources: dict[str, StoredTensor] | None = None
    if against is not None:
        sources = {tensor.name: tensor for tensor in open_checkpoint(against, cache=source_cache()).tensors}
    tensors, measured = 0, []
    for coded, decision in _decided(artifact):
        tensors += 1
        target = _target(artifact, coded, decision)
        source = None if sources is None else sources.pop(coded.name, None)
        found = _check(artifact, coded, source, sources is None)
        if decision.nominal and source is not None and not coded.lossless:
            check_step(coded, read_tensor(source), decision)
        if found is not None:
            measured.append(found)
            if target is not None and found < target:
                raise ValidationError(f"tensor {coded.name!r} is at {found:.2f} dB, its target is {target:g} dB")
    if sources:
        raise ValidationError(
            f"{against} holds {len(sources)} tensors that {artifact.label} lacks: {next(iter(sources))}, ..."
        )
    stored = artifact.manifest.stored
    for record in stored[len(artifact.manifest.shards) :]:
        artifact.blob(record)
    return Verification(
        blobs=len(stored),
        bytes=sum(record.bytes for record in stored),
        tensors=tensors,
        compared=tensors if sources is not None else 0,
        sqnr_db=round(min(measured), 2) if measured else None,
    )


def _decided(artifact: Artifact) -> Iterator[tuple[CodedTensor, Decision]]:
    """Yield every stored tensor with the manifest's decision for it, one shard in memory at a time."""
    for shard in artifact.manifest.shards:
        held = artifact.coded_of(shard)
        decisions = decisions_of(artifact.manifest, held)
        yield from ((coded, decisions[coded.name]) for coded in held)


def _target(artifact: Artifact, coded: CodedTensor, decision: Decision) -> float | None:
    """Return the SQNR in dB that a tensor must reach, and claims to; None if there is none."""
    target = promise(coded, decision, reasons=int(artifact.manifest.recipe.get("encoder") or 1) >= _GIVES_REASONS)
    if target is not None and (claim := claimed(coded, "sqnr_db")) < target:
        raise ValidationError(f"tensor {coded.name!r} claims {claim} dB, its target is {target:g} dB")
    return target


def _check(artifact: Artifact, coded: CodedTensor, source: StoredTensor | None, alone: bool) -> float | None:
    """Decode one tensor and compare; return the SQNR in dB of a coded one that has a source."""
    try:
        decoded = decode_tensor(coded)
    except FormatError as error:
        raise IntegrityError(f"{artifact.label}: {error}") from None
    if decoded.is_floating_point() and not bool(decoded.isfinite().all()):
        raise ValidationError(f"{artifact.label}: tensor {coded.name!r} decodes to NaN or Inf")
    if alone:
        return None
    if source is None:
        raise ValidationError(f"{artifact.label} holds tensor {coded.name!r}, the source does not")
    original = read_tensor(source)
    if (original.shape, original.dtype) != (decoded.shape, decoded.dtype):
        raise ValidationError(f"tensor {coded.name!r} is {list(decoded.shape)} {decoded.dtype}, the source differs")
    found = fidelity(original, decoded).sqnr_db
    if coded.lossless:
        if not math.isinf(found):
            raise ValidationError(f"tensor {coded.name!r} was stored lossless but differs from the source")
        return None
    return found
