"""From an artifact or a checkpoint to a model that runs: which code builds it, and with which settings.

Weights alone do not say what computes on them. In this order:

1. `--builder`: `module:function`, `FILE.py:function`, or a transformers configuration (a .json file, or its folder);
2. the transformers configuration that the artifact carries, or one beside the weights: `config.json`, or the weights'
   own name with `.json`; of a checkpoint, the one beside it comes first;
3. architectures known by their tensors (`architectures`): the published SAM and SAM 2, in the names of their packages
   or of transformers.

Nothing that a store holds names code to run: a builder is code on this machine that the user named.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from birkhoff.pipeline.architectures import Shapes, known, package
from birkhoff.pipeline.artifacts import Artifact, inspect, open_artifact
from birkhoff.pipeline.companions import CONFIG_FILE, config_beside, settings_in, settings_of
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError, SourceError
from birkhoff.pipeline.load import load_into
from birkhoff.pipeline.name_maps import joined, renaming
from birkhoff.pipeline.source import Checkpoint, open_checkpoint, read_tensor
from birkhoff.pipeline.workplace import source_cache

Settings = dict[str, Any]
"""What a transformers configuration says."""

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def compressed_model(
    reference: str, store: str | None = None, *, builder: str | None = None, near: Path | None = None, device: str
) -> nn.Module:
    """A model that computes on an artifact's compressed weights, in evaluation mode.

    Args:
        reference, store: as in `load_into`.
        builder: as the head of this file says.
        near: a checkpoint of the same model, whose configuration is looked for too.
        device: where the weights go.

    Raises:
        BuilderError: nothing here builds it.
        ModelMismatchError: what was built does not have the artifact's tensors.
        ArtifactNotFoundError, IntegrityError, StoreError: as in `load_into`.
    """
    with open_artifact(reference, store) as artifact:
        shapes = {row.name: row.shape for row in inspect(artifact)}
        configs = [_carried(artifact), _beside(Path(reference)), _beside(near) if near else None]
        model = _built(artifact.label, shapes, builder, configs)
    load_into(model, reference, store, device=device)
    return model.to(device).eval()


def original_model(
    source: Path,
    *,
    builder: str | None = None,
    reference: str | None = None,
    store: str | None = None,
    device: str,
) -> nn.Module:
    """A model with the weights of a checkpoint file or a transformers folder, in evaluation mode.

    Args:
        source: the file or folder.
        builder: as the head of this file says.
        reference, store: an artifact of the same model, whose configuration is taken where none is beside the weights.
        device: where the weights go.

    Raises:
        BuilderError: nothing here builds it.
        ModelMismatchError: what was built does not have the checkpoint's tensors.
        SourceError: the checkpoint cannot be read.
        ArtifactNotFoundError, IntegrityError, StoreError: as in `load_into`.
    """
    checkpoint = open_checkpoint(weights_file(source), cache=source_cache())
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    configs = [_beside(source)]
    if builder is None and reference is not None:
        with open_artifact(reference, store) as artifact:
            configs.append(_carried(artifact))
    model = _built(str(source), shapes, builder, configs)
    _fill(model, checkpoint)
    return model.to(device).eval()


def weights_file(source: Path) -> Path:
    """The checkpoint that is meant: the file itself, or the weights in a transformers folder. Raises SourceError."""
    if not source.is_dir():
        return source
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return source / name
    raise SourceError(f"{source}: a folder without {' or '.join(_WEIGHT_FILES)}; name the checkpoint's file")


_Config = tuple[str, Settings]
"""Where a configuration was found, for messages, and what it says."""


def carried_settings(artifact: Artifact) -> Settings | None:
    """The transformers configuration that an artifact carries; None where it has none. Raises IntegrityError."""
    body = artifact.file(CONFIG_FILE)
    return None if body is None else settings_in(body)


def _carried(artifact: Artifact) -> _Config | None:
    settings = carried_settings(artifact)
    return None if settings is None else (f"{CONFIG_FILE} of {artifact.label}", settings)


def _beside(place: Path) -> _Config | None:
    path = config_beside(place)
    settings = None if path is None else settings_of(path)
    return None if settings is None else (str(path), settings)


def _built(label: str, shapes: Shapes, builder: str | None, configs: list[_Config | None]) -> nn.Module:
    if builder is not None:
        return _named(builder)
    found = next(filter(None, configs), None)
    return known(label, shapes) if found is None else from_settings(*found)


def _named(builder: str) -> nn.Module:
    """What `--builder` says. Raises BuilderError."""
    place, _, function = builder.rpartition(":")
    path = Path(builder)
    if path.is_dir() or path.suffix == ".json":
        return from_config(path / CONFIG_FILE if path.is_dir() else path)
    if not place:
        raise BuilderError(
            f"--builder {builder}: expected module:function, FILE.py:function, or a transformers configuration (.json)"
        )
    build: Callable[[], Any] | None = getattr(_module(place), function, None)
    if not callable(build):
        raise BuilderError(f"--builder {builder}: {place} has no function {function!r}")
    try:
        model = build()
    except Exception as error:  # whatever the user's code raises
        raise BuilderError(f"--builder {builder}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BuilderError(f"--builder {builder}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _module(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise BuilderError(f"--builder {place}: no such file")
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:  # a script finds the files beside it
            sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module
    except BuilderError:
        raise
    except Exception as error:
        raise BuilderError(f"--builder {place}: cannot be imported: {type(error).__name__}: {error}") from error


def from_config(path: Path) -> nn.Module:
    """An untrained model from a transformers configuration file. Raises BuilderError."""
    settings = settings_of(path)
    if settings is None:
        raise BuilderError(f"{path}: expected a transformers configuration with a model_type")
    return from_settings(str(path), settings)


def from_settings(label: str, settings: Settings) -> nn.Module:
    """An untrained model from what a transformers configuration says; `label` for messages. Raises BuilderError."""
    transformers = package("transformers", f"{label} describes a model of transformers")
    try:
        own = {key: value for key, value in settings.items() if key != "quantization_config"}  # the artifact has that
        model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**own))
    except Exception as error:  # its classes check their settings each in its own way
        raise BuilderError(f"{label}: transformers cannot build it: {' '.join(str(error).split())[:300]}") from error
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a model; names that the model ties need be there once only."""
    rename = renaming(model.state_dict().keys(), [tensor.name for tensor in checkpoint.tensors])
    tensors: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors:
        if names := rename(tensor.name):
            tensors |= dict.fromkeys(names, read_tensor(tensor))
    tensors = joined(tensors)
    for copy, kept in (getattr(model, "_tied_weights_keys", None) or {}).items():
        for absent, present in ((copy, kept), (kept, copy)):
            if absent not in tensors and present in tensors:
                tensors[absent] = tensors[present]
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelMismatchError(f"{checkpoint.path} does not fit the model: {' '.join(str(error).split())}") from None
