"""Prove a whole model: run the original and the compressed model on the same inputs, one after the other.

The compressed weights are decoded from the shards in the store, as readers get them. The original's outputs of the last
proof are kept, because a search for a target needs them again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from birkhoff.codec.output.pictures import PICTURES_VERSION
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError, ProofError
from birkhoff.pipeline.load.builders import fill, tensors_of
from birkhoff.pipeline.proof import cases, masks, outputs
from birkhoff.pipeline.proof.int8 import on_int8
from birkhoff.pipeline.proof.running import built_model, threads
from birkhoff.pipeline.proof.task import Proof, ProofTask, Subject
from birkhoff.pipeline.registry.documents import Agreement, Int8Record, ProofRecord
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.segment.adapters.base import Segmenter
from birkhoff.pipeline.segment.adapters.families import FAMILIES, segmenter_of
from birkhoff.pipeline.segment.dataset import Case
from birkhoff.pipeline.shard.run import Stages
from birkhoff.pipeline.store.base import Store

SHAPES_SOUND = 0.8
"""IoU of the original's masks with the drawn shapes below which other preprocessings are tried. LiteMedSAM scores
0.98 under its own preprocessing and 0.6 under MobileSAM's."""

SHAPES_BETTER = 0.1
"""Gain in IoU from which another preprocessing is named as the right one."""

SHAPES_LEAST = 0.3
"""IoU below which the original finds nothing, so agreement with it proves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """The original's outputs, and the key of the proof that they belong to."""

    key: object
    synthetic: Sequence[masks.Seen] = ()
    own: Sequence[masks.Seen] = ()
    shapes_iou: float = 0.0
    batches: Sequence[Any] = ()
    outputs: Sequence[Any] = ()


_last: list[_Reference] = []
"""The reference of this process's last proof, if any."""


def prove(task: ProofTask, store: Store, device: torch.device) -> Proof:
    """Compare a model's shards in a store with its checkpoint.

    Raises:
        ProofError: A required proof cannot be made, or the original is run by the wrong adapter.
        BuilderError: The model is not of the family named.
        SourceError, StoreError, IntegrityError, PictureError: An input cannot be read.
    """
    stages = Stages()
    with threads(task.checkpoint.nbytes):
        try:
            model = built_model(task.subject, task.checkpoint)
        except BuilderError as error:
            return _missing(task, error, stages)
        stages.end("build")
        try:
            of = _of_masks if task.subject.inputs is None else _of_outputs
            return of(task, model.to(device), store, stages)
        except ModelMismatchError as error:
            return _missing(task, error, stages)


def _missing(task: ProofTask, error: Exception, stages: Stages) -> Proof:
    """Return the reason why there is no proof. Raises ProofError if a proof is required."""
    if task.subject.required:
        raise ProofError(f"{task.label} is required, and cannot be made: {error}")
    stages.end("prove")
    return Proof(record=None, missing=str(error), stages=stages.seconds)


def _of_masks(task: ProofTask, model: nn.Module, store: Store, stages: Stages) -> Proof:
    try:
        segmenter = segmenter_of(model, task.subject.adapter)
    except BuilderError as error:
        if task.subject.adapter is not None:
            raise
        return _missing(task, error, stages)
    reference = _reference(task, segmenter)
    stages.end("original")
    artifact = _artifact(task, store)
    fill(model, task.label, artifact.tensors())
    synthetic, own = _seen(segmenter, reference)
    record = ProofRecord(
        adapter=segmenter.family,
        pictures_version=PICTURES_VERSION,
        shapes_iou=round(reference.shapes_iou, 3),
        measured=_some(task, masks.agreement(segmenter, reference.synthetic, synthetic), "the synthetic pictures"),
        own=_some(task, masks.agreement(segmenter, reference.own, own), task.subject.pictures) if own else None,
    )
    shown = (reference.own, own) if own else (reference.synthetic, synthetic)
    picture = masks.picture(segmenter, *shown)
    stages.end("prove")
    if task.subject.int8:
        left, in_float, (synthetic, own) = on_int8(model, artifact, lambda: _seen(segmenter, reference))
        measured = masks.agreement(segmenter, reference.synthetic, synthetic)
        of_own = masks.agreement(segmenter, reference.own, own) if own else None
        record = record.model_copy(update={"int8": _int8_record(left, in_float, measured, of_own)})
        stages.end("prove_int8")
    return Proof(record=record, picture=picture, stages=stages.seconds)


def _seen(segmenter: Segmenter, reference: _Reference) -> tuple[list[masks.Seen], list[masks.Seen]]:
    """Return a model's outputs for the synthetic pictures and the user's."""
    return (
        masks.look(segmenter, (one.case for one in reference.synthetic)),
        masks.look(segmenter, (one.case for one in reference.own)),
    )


def _int8_record(
    left: Mapping[str, float | None], in_float: set[str], measured: Agreement, own: Agreement | None
) -> Int8Record:
    kept = [db for name, db in left.items() if name not in in_float and db is not None]
    return Int8Record(
        layers=len(left) - len(in_float),
        least_db=min(kept, default=None),
        in_float={name: db for name, db in left.items() if name in in_float and db is not None},
        measured=measured,
        own=own,
    )


def _of_outputs(task: ProofTask, model: nn.Module, store: Store, stages: Stages) -> Proof:
    """Prove a model without an adapter, on the user's inputs."""
    subject = task.subject
    assert subject.inputs is not None
    key = _key(task, model)
    if not (_last and _last[0].key == key):
        _last.clear()
        fill(model, str(task.checkpoint.path), tensors_of(task.checkpoint))
        batches = outputs.batches_of(subject.inputs)
        _last.append(_Reference(key=key, batches=batches, outputs=outputs.outputs_of(model, batches)))
    reference = _last[0]
    stages.end("original")
    artifact = _artifact(task, store)
    fill(model, task.label, artifact.tensors())
    record = ProofRecord(measured=_outputs_agree(subject, reference, outputs.outputs_of(model, reference.batches)))
    stages.end("prove")
    if subject.int8:
        left, in_float, found = on_int8(model, artifact, lambda: outputs.outputs_of(model, reference.batches))
        measured = _outputs_agree(subject, reference, found)
        record = record.model_copy(update={"int8": _int8_record(left, in_float, measured, None)})
        stages.end("prove_int8")
    return Proof(record=record, stages=stages.seconds)


def _outputs_agree(subject: Subject, reference: _Reference, found: Sequence[Any]) -> Agreement:
    metrics = outputs.metrics_of(subject.metric, reference.outputs, found)
    return outputs.agreement(outputs.scores(reference.outputs, found), len(reference.batches), metrics)


def _some(task: ProofTask, found: Agreement, where: str | None) -> Agreement:
    """Return `found`. Raises ProofError if the original found nothing on any picture."""
    if not found.prompts:
        raise ProofError(f"{task.label}: the original finds nothing on {where}: agreement with it proves nothing")
    return found


def _reference(task: ProofTask, segmenter: Segmenter) -> _Reference:
    """Return the original's outputs: those of the last proof if the key matches, else computed from its weights."""
    subject, key = task.subject, _key(task, segmenter.model)
    if _last and _last[0].key == key:
        return _last[0]
    _last.clear()
    fill(segmenter.model, str(task.checkpoint.path), tensors_of(task.checkpoint))
    synthetic = masks.look(segmenter, cases.synthetic(segmenter.side))
    sound = masks.shapes_iou(segmenter, synthetic)
    if sound < SHAPES_SOUND:
        _check_family(task, segmenter, [one.case for one in synthetic if one.case.truth is not None], sound)
    own = masks.look(segmenter, cases.own(Path(subject.pictures))) if subject.pictures else []
    _last.append(_Reference(key=key, synthetic=synthetic, own=own, shapes_iou=sound))
    return _last[0]


def _check_family(task: ProofTask, segmenter: Segmenter, shapes: Sequence[Case], sound: float) -> None:
    """Refuse an original that misses drawn shapes under this family's preprocessing.

    Raises:
        ProofError: Another family's preprocessing finds the shapes, or none does.
    """
    given, found = segmenter.preprocessing, {segmenter.family: sound}
    tried = [given]
    try:
        for family in segmenter.families:
            if FAMILIES[family] not in tried:
                segmenter.preprocessing = FAMILIES[family]
                tried.append(FAMILIES[family])
                found[family] = masks.shapes_iou(segmenter, masks.look(segmenter, shapes))
    finally:
        segmenter.preprocessing = given
    best = max(found.values())
    if best >= sound + SHAPES_BETTER:
        # Padding and stretching give similar masks. Another scaling of the values gives very different ones.
        close = " or ".join(name for name, value in found.items() if value > best - SHAPES_BETTER / 2)
        raise ProofError(
            f"{task.label}: run as {segmenter.family!r}, the original itself finds drawn shapes at a mean IoU of "
            f"{sound:.2f}, as {close} at {best:.2f}: name what it is by `adapter` in the manifest"
        )
    if sound < SHAPES_LEAST:
        raise ProofError(
            f"{task.label}: run as {segmenter.family!r}, the original itself finds drawn shapes at a mean IoU of "
            f"{sound:.2f}, at least {SHAPES_LEAST:g} is expected of trained weights: agreement with it proves nothing; "
            "name the right `adapter`, or leave the proof out by `proof: false`"
        )


def _key(task: ProofTask, model: nn.Module) -> object:
    """Return a key that is equal for proofs whose originals have the same outputs."""
    device = next((parameter.device for parameter in model.parameters()), None)
    return task.manifest.source.sha256, replace(task.subject, required=False, int8=False), str(device)


def _artifact(task: ProofTask, store: Store) -> StoredArtifact:
    """Return the future version, whose shards lie in the store."""
    manifest = task.manifest
    return StoredArtifact(store, Version(model=task.model, name=None, digest=manifest.digest, manifest=manifest))
