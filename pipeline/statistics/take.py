"""Statistics of one model: find them in the store, or take them by running the model and store them.

Whatever the model's size, memory holds only one Hessian besides those of the present pass: each is packed on the
device where it was gathered, stored, and dropped.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from birkhoff.codec.dtype_names import is_float
from birkhoff.codec.output.allocation import root_mean_square
from birkhoff.codec.output.encode import left
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.statistics import gather
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.tensor import check_storable
from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import read_tensor
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError
from birkhoff.pipeline.load.builders import fill, tensors_of
from birkhoff.pipeline.load.name_maps import owner, renaming
from birkhoff.pipeline.proof import outputs
from birkhoff.pipeline.proof.running import built_model, heap_kept, threads
from birkhoff.pipeline.registry.documents import HessianRecord, StatisticsRecord
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.statistics import statistics as of_segmenter
from birkhoff.pipeline.shard.run import Stages
from birkhoff.pipeline.statistics.stored import find_statistics, keep_hessian, keep_statistics
from birkhoff.pipeline.statistics.task import SEED, Counts, Statistics, StatisticsTask, counts_on, key_of, keys_of
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.statistics")

MOST_PROBES = 8
"""Most probes of each of the user's batches."""

LEAST_WEIGHTS = 1024
"""Smaller matrices have no Hessian, because they are lossless under every profile."""


def take_statistics(task: StatisticsTask, store: Store, device: torch.device) -> Statistics:
    """Find a model's statistics in a store, or take them on a device and store them.

    Raises:
        BuilderError, ModelMismatchError: No code here can run the model.
        CodecError, TensorError: Its weights or outputs are not finite.
        SourceError, StoreError: As reading and storing raise.
    """
    stages = Stages()
    if task.reuse != "never":
        for key in keys_of(task.source_sha256, task.subject):
            record = find_statistics(store, key)
            if record is not None and _are_of(record, task.checkpoint):
                stages.end("find")
                return Statistics(record=record, reused=True, stages=stages.seconds)
        stages.end("find")
    try:
        record = _taken(task, store, device, stages)
    except (BuilderError, ModelMismatchError) as error:
        raise BuilderError(
            f"{task.label} cannot be taken: {error}; or name another `allocation`, which needs no code"
        ) from error
    return Statistics(record=record, reused=False, stages=stages.seconds)


def _are_of(record: StatisticsRecord, checkpoint: Checkpoint) -> bool:
    """Return whether statistics fit a checkpoint: the same tensors, and Hessians of their shapes. If not, log that."""
    columns = {tensor.name: matrix_shape(tensor.shape)[1] for tensor in checkpoint.tensors}
    found = {name: hessian.columns for name, hessian in record.hessians.items()}
    if _floats(checkpoint) <= record.rms.keys() and found.items() <= columns.items():
        return True
    log.warning("statistics %s are of other tensors than %s has; they are taken anew", record.key, checkpoint.path)
    return False


def _floats(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the float tensors that have weights."""
    return {tensor.name for tensor in checkpoint.tensors if is_float(tensor.dtype) and tensor.dense_bytes}


def _taken(task: StatisticsTask, store: Store, device: torch.device, stages: Stages) -> StatisticsRecord:
    checkpoint = task.checkpoint
    with threads(checkpoint.nbytes), heap_kept():
        model = built_model(task.subject, checkpoint)
        stages.end("build")
        rms = _root_mean_squares(checkpoint)
        fill(model, str(checkpoint.path), tensors_of(checkpoint))
        model.to(device)
        stages.end("read")
        names = _names(model, checkpoint)
        hessians: dict[str, HessianRecord] = {}
        shares: dict[str, float] = {}

        def keep(parameter: str, hessian: Hessian) -> None:
            interrupt.check()
            logs.step("statistics", hessian.columns.nbytes, parameter)
            shares.update(dict.fromkeys(names[parameter], left(hessian)))
            record = keep_hessian(store, hessian)
            hessians.update(dict.fromkeys(names[parameter], record))

        run = _of_inputs if task.subject.inputs is not None else _of_masks
        adapter, counts, taken, found = run(task, model, device, keep, _matrices(model, checkpoint, names))
        stages.end("statistics")
    record = StatisticsRecord(
        key=key_of(task.source_sha256, task.subject, counts),
        adapter=adapter,
        pictures=taken.pictures,
        probes=taken.probes,
        device=device.type,
        sensitivities={name: found[parameter] for parameter, stored in names.items() for name in stored},
        left=shares,
        rms=rms,
        hessians=hessians,
    )
    keep_statistics(store, record)
    stages.end("upload")
    return record


Keep = Callable[[str, Hessian], object]


def _of_masks(
    task: StatisticsTask, model: nn.Module, device: torch.device, keep: Keep, wanted: set[str]
) -> tuple[str | None, Counts, Counts, dict[str, float]]:
    """Take the statistics of a model that an adapter runs.

    Returns:
        The family's member, what the device can afford, the pictures and probes that were taken, and the sensitivity by
        parameter.

    Raises:
        BuilderError: No adapter runs it.
    """
    segmenter = segmenter_of(model, task.subject.adapter)
    counts = counts_on(device.type, segmenter.side)
    found = of_segmenter(segmenter, seed=SEED, keep=keep, wanted=wanted, pictures=counts.pictures, probes=counts.probes)
    return segmenter.family, counts, counts, found


def _of_inputs(
    task: StatisticsTask, model: nn.Module, device: torch.device, keep: Keep, wanted: set[str]
) -> tuple[str | None, Counts, Counts, dict[str, float]]:
    """Do the same for any module on the user's inputs. With few batches, each gets more probes. Raises BuilderError."""
    assert task.subject.inputs is not None
    batches, counts = outputs.batches_of(task.subject.inputs), counts_on(device.type)
    probes = max(counts.probes, min(MOST_PROBES, counts.pictures // len(batches)))
    found = gather(
        model,
        outputs.tapped(model, batches),
        batches=len(batches),
        probes=probes,
        seed=SEED,
        keep=keep,
        wanted=wanted,
    )
    return None, counts, replace(counts, pictures=len(batches), probes=probes), found


def _root_mean_squares(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the root mean square of the bulk of every float tensor with weights, by name.

    Raises:
        TensorError: A tensor is not finite.
    """
    found, wanted = {}, _floats(checkpoint)
    for stored in checkpoint.tensors:
        if stored.name in wanted:
            interrupt.check()
            tensor = read_tensor(stored)
            check_storable(stored.name, tensor)
            found[stored.name] = root_mean_square(tensor)
    return found


def _names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return, for each of the model's parameters in the checkpoint, the names there of it or of its rows.

    A tensor that is no parameter (a buffer) gets the usual sensitivity.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    rename = renaming(model.state_dict().keys(), [tensor.name for tensor in checkpoint.tensors])
    found: defaultdict[str, list[str]] = defaultdict(list)
    for tensor in checkpoint.tensors:
        own = next((everywhere[name] for name in map(owner, rename(tensor.name)) if name in everywhere), None)
        if own is not None and own.is_floating_point():
            found[first[id(own)]].append(tensor.name)
    return dict(found)


def _matrices(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, list[str]]) -> set[str]:
    """Return the parameters with useful Hessians: of the same shape in the checkpoint, and large enough to code."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    parameters = dict(model.named_parameters())
    return {
        name
        for name, stored in names.items()
        if parameters[name].dim() > 1
        and parameters[name].numel() >= LEAST_WEIGHTS
        and all(matrix_shape(shapes[other]) == matrix_shape(tuple(parameters[name].shape)) for other in stored)
    }
