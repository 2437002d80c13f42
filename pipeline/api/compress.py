"""`birkhoff.compress`: one model in memory, without a manifest; planned, validated and published as any other."""

import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack

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
from birkhoff.pipeline.registry.signing import load_signer
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.report.recorder import Recorder
from birkhoff.pipeline.run.compress import compress as run_all
from birkhoff.pipeline.run.progress import Progress
from birkhoff.pipeline.run.schedule import in_turn
from birkhoff.pipeline.run.worker import InlineExecutor
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.conditions import probed
from birkhoff.pipeline.store.default import borrowed_store


class OverrideTerms(TypedDict, total=False):
    """One of `overrides`: `tensors`, a glob on their names, and either of the others."""

    tensors: str
    target_db: float
    lossless: bool


class ModelTerms(TypedDict, total=False):
    """What a manifest says of a model (`manifests/README.md`). Paths are relative to the working directory."""

    profile: str
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
    """Compress, validate and publish a model that is in memory; one whose content is the latest version is left alone.

    Its tensors go through a file in the temporary folder, in which they take their own size, and shards run one after
    another in this process: `birkhoff compress` with a manifest is for fleets. A transformers model takes its
    configuration along, unless `files` says what to take.

    Args:
        model: a module, or a state dict: tensors of any shapes, dtypes and devices by name. It is not changed.
        name: under this name the version is published: letters, digits, `.`, `_` and `-`.
        store: the store that gets it, or its URL; `BIRKHOFF_STORE`, then `embedded`, where left out.
        sign: file of a private key of `birkhoff key new`, to sign it with.
        progress: show how far it is, in a terminal or a notebook.
        **terms: as a manifest says them of a model: `profile`, a budget, `overrides`, `proof`, ...

    Returns:
        The version, which `birkhoff.load_into(model, version.reference)` loads.

    Warns:
        BirkhoffWarning: tensors were kept lossless though coding was asked for, the version is larger than the model,
            no proof of its masks could be made, or the store has no conditional writes.

    Raises:
        ManifestError: a term or the name does not say what a manifest may say.
        SourceError: the model has no tensors, tensors on the meta device, or compressed layers.
        CodecError: weights that cannot be coded: NaN or Inf.
        ProofError, BudgetError, ValidationError: it would fall below what was asked; nothing was published.
        TrustError: the key cannot be used.
        StoreError: the store failed.
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
            lambda: record.watch(InlineExecutor(opened.address)),
            shown,
            single_publisher=single,
            signer=signer,
            begun=record.follow,
        )
    if run.error is not None:
        raise run.error
    for warning in run.warnings():
        _warn(f"{name}: {warning}")
    assert run.version is not None  # it ended without an error
    return run.version


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its tensors on the CPU; tied ones stay one, a part of a larger storage becomes its own. Raises SourceError."""
    if isinstance(model, nn.Module):
        done = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
        if done:
            raise SourceError(
                f"{len(done)} layers of the model are compressed already ({done[0]}, ...); compress the model that was "
                "loaded from the original weights"
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
