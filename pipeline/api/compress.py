"""`birkhoff.compress`: compress a model in memory, planned, validated and published like any model of a manifest."""

import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from rich.console import Console
from torch import Tensor, nn

from birkhoff.codec.errors import BirkhoffWarning
from birkhoff.codec.profiles import Allocation
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.pipeline import logs
from birkhoff.pipeline.api.notebook import NotebookProgress
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.families import CONFIG_FILE
from birkhoff.pipeline.notebook import in_notebook
from birkhoff.pipeline.plan.manifest import manifest_of
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.registry.signing import load_signer
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.report.recorder import Recorder
from birkhoff.pipeline.run.compress import compress as run_all
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.schedule import in_turn
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.conditions import probed
from birkhoff.pipeline.store.default import borrowed_store


class OverrideTerms(TypedDict, total=False):
    """An entry of `overrides`: `tensors`, a glob on their names, and one of the other keys."""

    tensors: str
    target_db: float
    lossless: bool


class ModelTerms(TypedDict, total=False):
    """The keys of a model in a manifest (`manifests/README.md`). Paths are relative to the working directory."""

    profile: str
    base: str
    target_ratio: float
    max_bytes: int | str
    target_agreement: float
    target_output_db: float
    allocation: Allocation
    floor_db: float
    overrides: Sequence[OverrideTerms]
    proof: bool
    floor_agreement: float
    floor_output_db: float
    pictures: str
    compute: Literal["int8"]
    adapter: str
    builder: str
    upstream: str
    inputs: str
    metric: str
    files: Sequence[str]
    labels: Mapping[str, str]


def compress(
    model: nn.Module | Mapping[str, Tensor],
    name: str,
    *,
    store: str | Store | None = None,
    sign: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **terms: Unpack[ModelTerms],
) -> Version:
    """Compress, validate and publish a model that is in memory, unless the latest version has the same content.

    The tensors are written to a temporary file of their own size, and shards run in threads of this process; use
    `birkhoff compress` with a manifest for fleets. The configuration of a transformers model is published with it,
    unless `files` names other files.

    Args:
        model: A module, or a state dict of tensors of any shape, dtype and device. It is not changed.
        name: Name of the model in the store: letters, digits, `.`, `_` and `-`.
        store: The store or its URL. Default: `BIRKHOFF_STORE`, then `embedded`.
        sign: File of the private key to sign with (`birkhoff key new`).
        progress: Show progress, in a terminal or a notebook.
        **terms: Keys of a model in a manifest: `profile`, a budget, `overrides`, `proof`, ...

    Returns:
        The version; `birkhoff.load_into(model, version.reference)` loads it.

    Warns:
        BirkhoffWarning: Tensors were kept lossless although coding was requested, the version is larger than the model,
            its masks could not be proven, its base is a newer version by now, or the store has no conditional writes.

    Raises:
        ManifestError: A term or the name is not valid in a manifest.
        SourceError: The model has no tensors, has tensors on the meta device, or is compressed already.
        CodecError: Weights contain NaN or Inf.
        ProofError, BudgetError, ValidationError: The result would miss a target; nothing was published.
        TrustError: The key cannot be used.
        StoreError: The store failed.
    """
    tensors = _tensors(model)
    signer = None if sign is None else load_signer(Path(sign))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="birkhoff-")))
        source, said = folder / f"{name}.pth", {**terms, "labels": dict(terms.get("labels", {}))}
        config: Any = getattr(model, "config", None)
        if "files" not in said and hasattr(config, "to_json_file"):
            config.to_json_file(folder / CONFIG_FILE)
            said["files"] = [str(folder / CONFIG_FILE)]
        manifest = manifest_of({"models": [{**said, "name": name, "source": str(source)}]})
        torch.save(tensors, source)
        opened = stack.enter_context(borrowed_store(store, create=True))
        single = probed(opened, _warn)
        record = Recorder(manifest, opened, executor="inline", reuse="trust")
        stack.enter_context(in_turn(opened, [name], wait=True, tell=_warn))
        stack.enter_context(record)
        stack.enter_context(logs.trace(record.run))
        shown = stack.enter_context(_progress(show=progress))
        (run,) = run_all(
            manifest,
            opened,
            lambda demand: record.watch(InlineExecutor(opened.address, gpu=demand.gpu)),
            shown,
            single_publisher=single,
            signer=signer,
            begun=record.follow,
        )
    if run.error is not None:
        raise run.error
    for warning in run.warnings():
        _warn(f"{name}: {warning}")
    assert run.version is not None  # because the run ended without an error
    if run.newer_base is not None and run.version.manifest.base is not None:
        held, newer = run.version.manifest.base.label, run.newer_base.label
        _warn(f"{name}: its base is {newer} by now; it stays a difference to {held} until you say base={newer!r}")
    return run.version


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU. Tied tensors stay one; views of larger storages are copied. Raises SourceError."""
    if isinstance(model, nn.Module):
        done = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
        if done:
            raise SourceError(
                f"{len(done)} layers of the model are compressed already ({done[0]}, ...); compress a model with the "
                "original weights"
            )
    found: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    kept = {name: tensor.detach() for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not kept:
        raise SourceError("the model has no tensors; expected a module or a state dict, a mapping of names to tensors")
    for name, tensor in kept.items():
        if tensor.device.type == "meta":
            raise SourceError(f"{name!r} is on the meta device, which holds no values; load the weights first")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise SourceError(f"{name!r} is sparse or quantized ({tensor.layout}, {tensor.dtype}); make it dense first")
    moved: dict[tuple[object, ...], Tensor] = {}
    tensors = {}
    for name, tensor in kept.items():
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() == 0 or place not in moved:
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            moved[place] = tensor.cpu() if whole else tensor.cpu().clone(memory_format=torch.contiguous_format)
        tensors[name] = moved[place]
    return tensors


def _progress(*, show: bool) -> Progress:
    if show and in_notebook():
        return NotebookProgress(models=1)
    return Progress(Console(stderr=True), models=1, quiet=not (show and sys.stderr.isatty()))


def _warn(message: str) -> None:
    warnings.warn(message, BirkhoffWarning, stacklevel=3)
