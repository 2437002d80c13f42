"""Statistics of one model: found in the store, or taken by running the model and kept there.

One Hessian is in memory besides those of the pass at hand, whatever the model's size: each is packed where it was
gathered, stored, and given up.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from birkhoff.codec.dtype_names import is_float
from birkhoff.codec.output.allocation import root_mean_square
from birkhoff.codec.output.feedback import left
from birkhoff.codec.output.packing import pack
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
from birkhoff.pipeline.proof.running import built_model, threads
from birkhoff.pipeline.registry.documents import HessianRecord, StatisticsRecord
from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.statistics import statistics as of_segmenter
from birkhoff.pipeline.shard.run import Stages
from birkhoff.pipeline.statistics.stored import find_statistics, keep_hessian, keep_statistics
from birkhoff.pipeline.statistics.task import SEED, Counts, Statistics, StatisticsTask, counts_on, key_of, keys_of
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.statistics")

MOST_PROBES = 8
"""Of each of the user's batches."""

LEAST_WEIGHTS = 1024
"""Matrices with fewer have no Hessian: they are lossless under every profile."""


def take_statistics(task: StatisticsTask, store: Store, device: torch.device) -> Statistics:
    """Find a model's statistics in a store, or take them on a device and store them.

    Raises:
        BuilderError, ModelMismatchError: nothing here runs the model.
        CodecError, TensorError: its weights or outputs are not finite.
        SourceError, StoreError: as reading and storing raise.
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
    """Whether statistics have a checkpoint's tensors, and Hessians of their shapes; says so of those that do not."""
    columns = {tensor.name: matrix_shape(tensor.shape)[1] for tensor in checkpoint.tensors}
    found = {name: hessian.columns for name, hessian in record.hessians.items()}
    if _floats(checkpoint) <= record.rms.keys() and found.items() <= columns.items():
        return True
    log.warning("statistics %s are of other tensors than %s has; they are taken anew", record.key, checkpoint.path)
    return False


def _floats(checkpoint: Checkpoint) -> set[str]:
    """Names of the float tensors that have weights."""
    return {tensor.name for tensor in checkpoint.tensors if is_float(tensor.dtype) and tensor.dense_bytes}


def _taken(task: StatisticsTask, store: Store, device: torch.device, stages: Stages) -> StatisticsRecord:
    checkpoint, counts = task.checkpoint, counts_on(device.type)
    with threads(checkpoint.nbytes):
        model = built_model(task.subject, checkpoint)
        stages.end("build")
        rms = _root_mean_squares(checkpoint)
        fill(model, str(checkpoint.path), tensors_of(checkpoint))
        model.to(device)
        stages.end("read")
        names = _names(model, checkpoint)
        hessians: dict[str, HessianRecord] = {}
        shares: dict[str, float] = {}

        def keep(parameter: str, hessian_KK: Tensor) -> None:
            interrupt.check()
            logs.step("statistics", hessian_KK.nbytes, parameter)
            shares.update(dict.fromkeys(names[parameter], left(hessian_KK)))
            record = keep_hessian(store, pack(hessian_KK), len(hessian_KK))
            hessians.update(dict.fromkeys(names[parameter], record))

        run = _of_inputs if task.subject.inputs is not None else _of_masks
        adapter, pictures, probes, found = run(task, model, counts, keep, _matrices(model, checkpoint, names))
        stages.end("statistics")
    record = StatisticsRecord(
        key=key_of(task.source_sha256, task.subject, counts),
        adapter=adapter,
        pictures=pictures,
        probes=probes,
        device=device.type,
        sensitivities={name: found[parameter] for parameter, stored in names.items() for name in stored},
        left=shares,
        rms=rms,
        hessians=hessians,
    )
    keep_statistics(store, record)
    stages.end("upload")
    return record


Keep = Callable[[str, Tensor], object]


def _of_masks(
    task: StatisticsTask, model: nn.Module, counts: Counts, keep: Keep, wanted: set[str]
) -> tuple[str | None, int, int, dict[str, float]]:
    """(the family's member, pictures, probes of each, sensitivity by parameter) of a model that an adapter runs.

    Raises BuilderError.
    """
    segmenter = segmenter_of(model, task.subject.adapter)
    found = of_segmenter(segmenter, seed=SEED, keep=keep, wanted=wanted, pictures=counts.pictures, probes=counts.probes)
    return segmenter.family, counts.pictures, counts.probes, found


def _of_inputs(
    task: StatisticsTask, model: nn.Module, counts: Counts, keep: Keep, wanted: set[str]
) -> tuple[str | None, int, int, dict[str, float]]:
    """The same of any module on the user's inputs; few batches get more probes each. Raises BuilderError."""
    assert task.subject.inputs is not None
    batches = outputs.batches_of(task.subject.inputs)
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
    return None, len(batches), probes, found


def _root_mean_squares(checkpoint: Checkpoint) -> dict[str, float]:
    """Of the bulk of every float tensor that has weights, by name. Raises TensorError for one that is not finite."""
    found, wanted = {}, _floats(checkpoint)
    for stored in checkpoint.tensors:
        if stored.name in wanted:
            interrupt.check()
            tensor = read_tensor(stored)
            check_storable(stored.name, tensor)
            found[stored.name] = root_mean_square(tensor)
    return found


def _names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names in the checkpoint of each of the model's parameters that it holds, or of rows of it.

    A tensor that is none (a buffer) is felt as the usual one is.
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
    """Parameters whose Hessians are of use: the checkpoint has them in the same shape, and large enough to be coded."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    parameters = dict(model.named_parameters())
    return {
        name
        for name, stored in names.items()
        if parameters[name].dim() > 1
        and parameters[name].numel() >= LEAST_WEIGHTS
        and all(matrix_shape(shapes[other]) == matrix_shape(tuple(parameters[name].shape)) for other in stored)
    }
