"""Re-checking a stored artifact: every digest, every tensor decoded, on demand against its checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import Profile
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.artifacts import Artifact
from birkhoff.pipeline.errors import IntegrityError, ValidationError
from birkhoff.pipeline.source import open_checkpoint, read_tensor
from birkhoff.pipeline.source_types import StoredTensor
from birkhoff.pipeline.validate import claimed, promise
from birkhoff.pipeline.workplace import source_cache

_GIVES_REASONS = 2
"""`profiles.ENCODER_VERSION` from which a tensor that fell back to lossless says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` looked at. `compared` counts tensors measured against a source; `sqnr_db` is their least, in dB."""

    blobs: int
    bytes: int
    tensors: int
    compared: int
    sqnr_db: float | None


def verify(artifact: Artifact, against: Path | None = None) -> Verification:
    """Check an artifact down to every byte.

    Raises:
        IntegrityError: a blob is missing, does not match its digest or cannot be decoded; it is named.
        ValidationError: a tensor is not finite, was not treated as recipe and overrides say, or misses its target,
            by what it claims or, with a source, by what is measured.
        SourceError: the source cannot be read.
    """
    sources: dict[str, StoredTensor] | None = None
    if against is not None:
        sources = {tensor.name: tensor for tensor in open_checkpoint(against, cache=source_cache()).tensors}
    tensors, measured = 0, []
    for coded in artifact.coded():
        tensors += 1
        target = _target(artifact, coded)
        found = _check(artifact, coded, None if sources is None else sources.pop(coded.name, None), sources is None)
        if found is not None:
            measured.append(found)
            if target is not None and found < target:
                raise ValidationError(f"tensor {coded.name!r} is at {found:.2f} dB, its target is {target:g} dB")
    if sources:
        raise ValidationError(
            f"{against} holds {len(sources)} tensors that {artifact.label} lacks: {next(iter(sources))}, ..."
        )
    for record in artifact.manifest.files or ():
        artifact.blob(record)
    stored = artifact.manifest.stored
    return Verification(
        blobs=len(stored),
        bytes=sum(record.bytes for record in stored),
        tensors=tensors,
        compared=tensors if sources is not None else 0,
        sqnr_db=round(min(measured), 2) if measured else None,
    )


def _target(artifact: Artifact, coded: CodedTensor) -> float | None:
    """The SQNR that a tensor must reach, dB, and by its own claim does; None where there is none to reach."""
    manifest = artifact.manifest
    profile = Profile.of_recipe(manifest.profile, manifest.recipe)
    own = profile.of_tensor(coded.shape, (manifest.overrides or {}).get(coded.name))
    target = promise(coded, own, reasons=int(manifest.recipe.get("encoder") or 1) >= _GIVES_REASONS)
    if target is not None and claimed(coded, "sqnr_db") < target:
        raise ValidationError(f"tensor {coded.name!r} claims {coded.params['sqnr_db']} dB, its target is {target:g} dB")
    return target


def _check(artifact: Artifact, coded: CodedTensor, source: StoredTensor | None, alone: bool) -> float | None:
    """Decode one tensor and compare; the SQNR in dB of a coded one that has a source."""
    try:
        decoded = decode_tensor(coded)
    except FormatError as error:
        raise IntegrityError(f"{artifact.label}: {error}") from None
    if decoded.is_floating_point() and not bool(decoded.float().isfinite().all()):
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
