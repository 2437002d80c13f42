"""One shard from start to finish, in one process: read, key, encode, validate, upload, record.

Workers run this for each task. It does not depend on Ray.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

import birkhoff.kernels.entropy.op
import birkhoff.kernels.feedback.op
import birkhoff.kernels.trellis.op  # noqa: F401  these register what a GPU does itself
from birkhoff.codec.budget import Floats
from birkhoff.codec.container import FORMAT_VERSION, serialise
from birkhoff.codec.difference.encode import Base
from birkhoff.codec.difference.encode import encode as by_difference
from birkhoff.codec.difference.sizes import sizes
from birkhoff.codec.errors import FormatError
from birkhoff.codec.output import encode as by_output
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.profiles import Decision, Recipe
from birkhoff.codec.tensor import Encoded, check_storable, encode_tensors
from birkhoff.pipeline import logs
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError, ValidationError
from birkhoff.pipeline.registry.documents import (
    BaseBlob,
    ShardRecord,
    blob_key,
    fetch_document,
    keep_object,
    sha256,
    shard_key,
)
from birkhoff.pipeline.registry.versions import missing_blobs
from birkhoff.pipeline.shard.bases import Bases
from birkhoff.pipeline.shard.hessians import HessianOf, Hessians
from birkhoff.pipeline.shard.sources import SourceBuffer
from birkhoff.pipeline.shard.task import ShardResult, ShardSizes, ShardTask
from birkhoff.pipeline.shard.validate import ShardChecks, validate_shard
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.shard")


class Stages:
    """Measures seconds by stage. Each stage begins when the one before ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        """End the current stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def run_shard(task: ShardTask, store: Store, device: torch.device, memory: SourceBuffer) -> ShardResult | ShardSizes:
    """Do what a task asks for, with the worker's memory for sources. Raises as `compress_shard`."""
    if task.estimate_only:
        return estimate_shard(task, store, memory)
    return compress_shard(task, store, device, memory)


def estimate_shard(task: ShardTask, store: Store, memory: SourceBuffer) -> ShardSizes:
    """Predict what a shard will take at every target, a tensor at a time, the containers of its bases beside it.

    Raises SourceError, CodecError, StoreError.
    """
    stages, bases = Stages(), Bases(store, task.bases)
    total: Floats = np.zeros(len(task.targets_db[0]))
    for plan, targets in zip(task.tensors, task.targets_db, strict=True):
        (source,) = memory.read([plan.tensor]).values()
        stages.end("read")
        logs.step("estimate", source.nbytes, plan.tensor.name)
        base = bases.of(plan.tensor.name)
        total += sizes(plan.tensor.name, source, plan.decision, targets, None if base is None else base.tensor)
        stages.end("estimate")
    return ShardSizes(bytes=tuple(total.tolist()), stages=stages.seconds)


def compress_shard(task: ShardTask, store: Store, device: torch.device, memory: SourceBuffer) -> ShardResult:
    """Encode, validate and upload one shard, unless the store has it. Its tensors are read into `memory`.

    Raises:
        SourceError, CodecError, ValidationError, StoreError: The message names the tensor or object.
    """
    stages = Stages()
    sources, decisions = memory.read([plan.tensor for plan in task.tensors]), task.decisions
    hessians, bases = Hessians(store, sources, decisions, device), Bases(store, task.bases)
    stages.end("read")
    key = input_key(sources, task.recipe, decisions)
    if task.bases:
        if key in {base.key for base in task.bases}:
            bases = Bases(store, ())  # the base has this very shard: share it
        else:
            key = input_key(sources, task.recipe, decisions, bases)
    stages.end("key")
    same = next((record for record in task.known if record.key == key), None)
    if same is not None and task.reuse == "trust" and not missing_blobs(store, [same, *(same.bases or ())]):
        return ShardResult(record=same, reused=True, stages=stages.seconds)
    record = None if task.reuse == "never" else find_record(store, key)
    stages.end("find")
    if record is not None and task.reuse == "prove":
        record = _proven(record, store, sources, task, device, hessians, bases)
        stages.end("validate")
    if record is not None and task.reuse == "revalidate":
        body = store.get(blob_key(record.blob))
        validate_shard(body, sources, decisions, device, hessians.of, bases.tensors_of)
        stages.end("validate")
    if record is not None:
        return ShardResult(record=record, reused=True, stages=stages.seconds)
    blob = encode_shard(sources, decisions, device, hessians.of, bases.of)
    stages.end("encode")
    checks = validate_shard(blob, sources, decisions, device, hessians.of, bases.tensors_of)
    stages.end("validate")
    record = make_record(key, sources, blob, checks, bases)
    logs.step("upload", len(blob))
    keep_shard(store, blob, record)
    stages.end("upload")
    return ShardResult(record=record, reused=False, stages=stages.seconds)


def _proven(
    record: ShardRecord,
    store: Store,
    sources: Mapping[str, Tensor],
    task: ShardTask,
    device: torch.device,
    hessians: Hessians,
    bases: Bases,
) -> ShardRecord | None:
    """Return a fresh record of a stored shard, computed from its bytes and its source; None if it fails validation.

    Anyone who can write to the store can write records and blobs, but cannot sign. So the stored record is not trusted.
    """
    try:
        blob = store.get(blob_key(record.blob))
        if sha256(blob) != record.blob:
            raise IntegrityError(f"blob {record.blob} is damaged")
        checks = validate_shard(blob, sources, task.decisions, device, hessians.of, bases.tensors_of)
        proven = make_record(record.key, sources, blob, checks, bases)
    except (ObjectNotFoundError, IntegrityError, ValidationError, FormatError) as error:
        log.warning(
            "%s: the stored shard %s does not match its source (%s); it is encoded again", task.label, record.key, error
        )
        return None
    if proven != record:
        keep_shard(store, blob, proven)
    return proven


def encode_shard(
    sources: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    device: torch.device,
    hessian_of: HessianOf = lambda _: None,
    base_of: Callable[[str], Base | None] = lambda _: None,
) -> bytes:
    """Return the container of a shard's tensors. Raises as `compress_shard`."""
    bases = {
        name: base for name in sources if decisions[name].action == "coded" and (base := base_of(name)) is not None
    }
    coded = {
        name: by_difference(name, tensor.to(device), decisions[name], bases[name], hessian_of(name)).tensor
        for name, tensor in _announced({name: sources[name] for name in bases})
    }
    coded |= {
        name: _encode_by_output(name, tensor.to(device), decisions[name], hessian_of(name)).tensor
        for name, tensor in _announced(
            {name: tensor for name, tensor in sources.items() if decisions[name].nominal and name not in coded}
        )
    }
    # The CPU packs lossless tensors, so copying them to a GPU and back would be a waste.
    items = (
        (name, tensor if decisions[name].action == "lossless" else tensor.to(device), decisions[name])
        for name, tensor in _announced({name: tensor for name, tensor in sources.items() if name not in coded})
    )
    coded |= {encoded.tensor.name: encoded.tensor for encoded in encode_tensors(items)}
    return serialise([coded[name] for name in sources])


def _announced(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        logs.step("encode", tensor.nbytes, name)
        yield name, tensor


def _encode_by_output(name: str, tensor: Tensor, decision: Decision, hessian: Hessian | None) -> Encoded:
    assert decision.target_db is not None  # a nominal target is one
    check_storable(name, tensor)
    return by_output.encode(name, tensor, decision.target_db, hessian, path=decision.path)


def make_record(
    key: str, sources: Mapping[str, Tensor], blob: bytes, checks: ShardChecks, bases: Bases | None = None
) -> ShardRecord:
    """Return the record of a validated shard. Its tensors may be coded as differences to `bases`."""
    needed = () if bases is None else tuple(BaseBlob(blob=d, bytes=bases.size_of(d)) for d in checks.bases)
    return ShardRecord(
        key=key,
        blob=sha256(blob),
        bytes=len(blob),
        source_bytes=sum(tensor.nbytes for tensor in sources.values()),
        tensors=len(sources),
        sqnr_db=checks.sqnr_db,
        probe_db=checks.probe_db,
        probe_error=checks.probe_error,
        fallbacks=checks.fallbacks or None,
        bases=needed or None,
    )


def keep_shard(store: Store, blob: bytes, record: ShardRecord) -> None:
    """Upload a shard, blob first."""
    keep_object(store, blob_key(record.blob), blob)
    keep_object(store, shard_key(record.key), record.to_bytes())


def find_record(store: Store, key: str) -> ShardRecord | None:
    """Return the record of a shard key if its blob is in the store and matches its digest, else None.

    So are the containers of its bases. All are touched: a grace period begins anew for what is reused.
    """
    try:
        record = fetch_document(store, ShardRecord, shard_key(key))
        needed: list[ShardRecord | BaseBlob] = [record, *(record.bases or ())]
        damaged = next((one.blob for one in needed if not _is_there(store, one)), None)
        if record.key == key and damaged is None:
            for one in needed:
                store.touch(blob_key(one.blob))
            store.touch(shard_key(key))
            return record
        log.warning("blob %s is damaged in %s; it is made anew", damaged or record.blob, store.url)
    except ObjectNotFoundError:
        pass
    except IntegrityError as error:
        log.warning("%s; it is encoded again", error)
    return None


def _is_there(store: Store, record: ShardRecord | BaseBlob) -> bool:
    """Whether a blob has the bytes that its digest stands for. Raises ObjectNotFoundError."""
    return sha256(store.get(blob_key(record.blob), length=record.bytes + 1)) == record.blob


def input_key(
    sources: Mapping[str, Tensor], recipe: Recipe, decisions: Mapping[str, Decision], bases: Bases | None = None
) -> str:
    """Return the key of a shard: the BLAKE3 digest of everything that determines its bytes, and of nothing else.

    All weights of a fleet are hashed for it, and SHA-256 would take two to three times as long.

    Decisions enter only as far as the recipe and the tensors' headers leave them open: `override`, or the target and
    the Hessian where other tensors of the model decide about them, and the container that holds a base.
    """
    digest = blake3(json.dumps([FORMAT_VERSION, recipe], sort_keys=True).encode())
    for name, tensor in sources.items():
        decision = decisions[name]
        own: list[object] = [] if decision.override is None else [decision.override]
        scaled = recipe.get("allocation") == "scale" and decision.action == "coded" and decision.override is None
        if decision.nominal or scaled:
            own += [decision.target_db, decision.hessian]
        if bases is not None and decision.action == "coded" and (base := bases.digest_of(name)) is not None:
            own.append({"base": base})
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), *own]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
